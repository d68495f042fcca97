"""The training of the autoencoder, a few steps long: it learns, resumes to the same weights and whitens the tokens."""

import pytest
import torch
from diffusers import AutoencoderKLFlux2
from PIL import Image

from finetune import train_autoencoder
from finetune.config import load_config
from finetune.train_autoencoder import Config, edge_loss, learning_rate, load_pool, train
from mf_diffusers.modality_forcing.latent_tokens import image_to_tokens


def tiny(output, **settings) -> Config:
    defaults = {
        "precision": "fp32",
        "image_size": 16,
        "train_scenes": 24,
        "validation_scenes": 4,
        "block_out_channels": [8, 8, 8],
        "latent_channels": 4,
        "norm_num_groups": 2,
        "steps": 8,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "validate_every": 4,
        "checkpoint_every": 3,
    }
    return Config(output=str(output), **defaults | settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a whole run, and the loss of its steps."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(tiny(folder, steps=40, batch_size=8))


def test_loss_falls(trained):
    folder, losses = trained
    assert len(losses) == 40
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0]
    assert Image.open(folder / "validation.png").size == (4 * 2 * 16, 16)


def test_statistics_whiten_the_tokens(trained):
    folder, _ = trained
    vae = AutoencoderKLFlux2.from_pretrained(folder / "vae")
    pool = load_pool(tiny(folder), "train", 24)
    tokens = image_to_tokens(vae, pool / 255).flatten(0, 1)
    assert tokens.shape == (24 * 4, 16)
    torch.testing.assert_close(tokens.mean(0), torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(tokens.std(0, unbiased=False), torch.ones(16), atol=1e-2, rtol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_run_has_the_weights_of_an_uninterrupted_one(tmp_path, monkeypatch, precision):
    whole = train(tiny(tmp_path / "whole", precision=precision))

    save = train_autoencoder.save_checkpoint

    def save_and_stop(path, step, *args):
        save(path, step, *args)
        if step == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_autoencoder, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(tmp_path / "parts", precision=precision))
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="resume=true"):
        train(tiny(tmp_path / "parts", precision=precision))
    assert train(tiny(tmp_path / "parts", precision=precision, resume=True)) == whole[6:]

    a, b = (AutoencoderKLFlux2.from_pretrained(tmp_path / name / "vae").state_dict() for name in ("whole", "parts"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_pool_is_rendered_once(tmp_path, monkeypatch):
    first = load_pool(tiny(tmp_path), "train", 6)
    assert first.shape == (6, 3, 16, 16)
    assert first.dtype == torch.uint8
    monkeypatch.setattr(train_autoencoder, "render_scenes", None)
    assert torch.equal(load_pool(tiny(tmp_path), "train", 6), first)


def test_edges_ignore_brightness():
    image = torch.rand(2, 3, 16, 16)
    assert edge_loss(image + 0.3, image) < 1e-6
    assert edge_loss(image.roll(1, -1), image) > 0.1


def test_learning_rate_rises_and_falls():
    config = tiny(".", steps=20, warmup_steps=5)
    rates = [learning_rate(step, config) for step in range(20)]
    assert max(rates) == rates[4] == config.learning_rate
    assert sorted(rates[:5]) == rates[:5]
    assert sorted(rates[4:], reverse=True) == rates[4:]
    assert rates[-1] == 0


def test_settings(tmp_path):
    path = "finetune/configs/embedded_autoencoder.yaml"
    assert load_config(Config, ["--config", path, "steps=7"]).steps == 7
    with pytest.raises(SystemExit, match="layer_per_block"):
        load_config(Config, ["--config", path, "layer_per_block=1"])
    with pytest.raises(SystemExit, match="precision is auto, bf16 or fp32"):
        train(tiny(tmp_path, precision="fp8"))
    with pytest.raises(SystemExit, match="three levels"):
        train(tiny(tmp_path, block_out_channels=[8, 8]))
    with pytest.raises(SystemExit, match="validation_scenes"):
        train(tiny(tmp_path, validation_scenes=3))
