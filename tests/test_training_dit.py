"""The from-scratch family through both training scripts, on a tiny instance and a few procedural scenes."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import TINY_T5, make_t5_tokenizer
from training_runs import TRAINED_ALONG, pretrain_settings, run, settings, weights
from transformers import UMT5Config, UMT5EncoderModel

from finetune import post_train, pretrain
from finetune.config import load_config
from finetune.pretrain import PretrainConfig
from finetune.training.models import empty_transformer
from finetune.training.tokenizers import train_unigram
from mf_diffusers import ModalityForcingDiTTransformer2DModel, ModalityForcingPipeline
from mf_diffusers.modality_forcing.backbones import BACKBONES
from mf_diffusers.modality_forcing.text_features import encode_t5


pytest_plugins = ["training_runs"]
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "finetune" / "configs"
RUNGS = ["dit_500k", "dit_2m", "dit_8m", "dit_30m", "dit_100m", "dit_370m", "dit_800m", "dit_3_3b"]


def posttrain_settings(base, output, **trainer) -> list[str]:
    chosen = [a for a in settings(base, f"{output}-cache", output, **trainer) if "text_encoder" not in a]
    return [*chosen, "architecture=dit", "mode=all", "max_sequence_length=12"]


@pytest.fixture(scope="module")
def base(vae, tmp_path_factory):
    """A text-to-image base, as pretrain.py leaves it after a few steps."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(pretrain, pretrain_settings(vae, folder / "run", TRAINED_ALONG), folder, monkeypatch)
    return folder / "run" / "pipeline"


def test_resumed_pretraining_equals_uninterrupted(vae, tmp_path, monkeypatch):
    for output, steps in (("whole", 6), ("parts", 4), ("parts", 6)):
        run(pretrain, pretrain_settings(vae, tmp_path / output, TRAINED_ALONG, steps=steps), tmp_path, monkeypatch)
    for part, file in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        whole, parts = (
            load_file(tmp_path / output / "pipeline" / part / f"{file}.safetensors") for output in ("whole", "parts")
        )
        assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_pretrained_and_post_trained(base, tmp_path, monkeypatch):
    pipe = ModalityForcingPipeline.from_pretrained(base)
    assert not pipe.has_depth and isinstance(pipe.transformer, ModalityForcingDiTTransformer2DModel)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red ball", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)

    for output, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        run(post_train, posttrain_settings(base, tmp_path / output, steps=steps), tmp_path, monkeypatch)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    before = pipe.transformer.state_dict()
    same = [name for name, tensor in before.items() if torch.equal(whole[name], tensor)]
    assert not same  # nothing is frozen
    assert whole["depth_head.proj_out.weight"].any()
    trained = ModalityForcingPipeline.from_pretrained(tmp_path / "whole" / "pipeline")
    trained.set_progress_bar_config(disable=True)
    depth = trained(image=np.random.default_rng(0).random((32, 32, 3)), num_inference_steps=2, output_type="np").depth
    assert depth.shape == (1, 32, 32) and np.isfinite(depth).all()


@pytest.mark.parametrize("script", ["pretrain", "post_train"])
def test_a_result_is_written_whole_or_not_at_all(vae, base, tmp_path, monkeypatch, script):
    """The studies take a folder that is there for a finished run."""
    output = tmp_path / "run"
    arguments = {
        "pretrain": pretrain_settings(vae, output, TRAINED_ALONG, steps=2),
        "post_train": posttrain_settings(base, output, steps=2),
    }[script]
    module = {"pretrain": pretrain, "post_train": post_train}[script]
    save = ModalityForcingPipeline.save_pretrained

    def fail(pipe, folder):
        save(pipe, folder)
        (folder / "model_index.json").unlink()
        raise OSError("the disk is full")

    def stopped():
        with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is full"):
            patch.setattr(ModalityForcingPipeline, "save_pretrained", fail)
            run(module, arguments, tmp_path, monkeypatch)

    stopped()
    assert not (output / "pipeline").exists()
    run(module, arguments, tmp_path, monkeypatch)
    before = weights(output)
    arguments.append("trainer.steps=4")
    stopped()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(output).items())
    ModalityForcingPipeline.from_pretrained(output / "pipeline")
    run(module, arguments, tmp_path, monkeypatch)
    assert not torch.equal(weights(output)["proj_out.weight"], before["proj_out.weight"])
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", ["live", "cached"])
def test_a_frozen_text_encoder(vae, tmp_path, monkeypatch, kind):
    tokenizer = make_t5_tokenizer()
    frozen = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **TINY_T5))
    frozen.save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    text = [f"pretrained_text_encoder={tmp_path / 'text'}"]
    if kind == "live":
        text.append("cache.folder=null")
    for output, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        arguments = pretrain_settings(vae, tmp_path / output, text, steps=steps, mixed_precision="bf16")
        run(pretrain, arguments, tmp_path, monkeypatch)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    pipe = ModalityForcingPipeline.from_pretrained(tmp_path / "whole" / "pipeline")
    for name, tensor in frozen.to(torch.bfloat16).float().state_dict().items():
        assert torch.equal(pipe.text_encoder.state_dict()[name].float(), tensor), name
    assert pipe.tokenizer("a ball").input_ids == tokenizer("a ball").input_ids


def test_validation_of_the_base(vae, tmp_path, monkeypatch, capsys):
    """Without dropout, also where training has it."""
    config, modes = tmp_path / "empty.yaml", []
    config.write_text("{}")
    text = [*TRAINED_ALONG, "text_encoder.dropout_rate=0.5"]
    arguments = pretrain_settings(vae, tmp_path / "run", text, steps=2, validate_every=1)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--config", str(config), *arguments])

    def watch(text_encoder, tokenizer, prompts, layers, length, device):
        modes.append(text_encoder.training)
        assert text_encoder.config.dropout_rate == 0.5
        return encode_t5(text_encoder, tokenizer, prompts, layers, length, device)

    monkeypatch.setitem(BACKBONES, "dit", replace(BACKBONES["dit"], encode_text=watch))
    pretrain.main()
    assert (tmp_path / "run" / "samples-00000001.png").is_file()
    assert "losses at t" in capsys.readouterr().out
    in_training = 2 * 2  # steps of two micro batches
    assert sum(modes) == in_training < len(modes) and modes[:2] == [True, True] and not modes[-1]


def test_a_tokenizer_of_captions():
    shapes = ("ball", "cube", "cone")
    captions = [f"a {colour} {shape}, on the floor" for colour in ("red", "blue") for shape in shapes]
    tokenizer = train_unigram(captions, 150)
    assert len(tokenizer) == 4 + 94 + len(["a", "red", "blue", *shapes, "on", "the", "floor"])
    assert tokenizer.convert_ids_to_tokens(range(4)) == ["<pad>", "</s>", "<unk>", "▁"]
    assert tokenizer.tokenize("a red cube, odd") == ["▁a", "▁red", "▁cube", ",", "▁", "o", "d", "d"]
    tokens = tokenizer("a red cube, odd").input_ids
    assert tokens[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in tokens
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "a red cube, odd"
    assert len(train_unigram(captions, 100)) == 100


def test_a_base_keeps_its_text_length(base, tmp_path, monkeypatch, capsys):
    """Before it is there, a dry run knows it from the settings of its pre-training."""
    arguments = [*posttrain_settings(base, tmp_path / "run", steps=0), "max_sequence_length=2000"]
    run(post_train, arguments, tmp_path, monkeypatch)
    assert ModalityForcingPipeline.from_pretrained(tmp_path / "run" / "pipeline").config.max_sequence_length == 12

    def needs(*more) -> str:
        capsys.readouterr()
        run(post_train, ["--dry-run", *arguments, *more], tmp_path, monkeypatch)
        return next(line for line in capsys.readouterr().out.splitlines() if "in all" in line)

    before_it_is_there = needs("base=nowhere/at/all", f"base_settings={base.parent / 'config.yaml'}")
    assert needs() == before_it_is_there == needs("max_sequence_length=12")
    monkeypatch.setattr(post_train, "with_text_of_base", lambda config: config)
    assert needs() != before_it_is_there


def test_all_weights_train_on_from_float32(base, tmp_path, monkeypatch):
    arguments = posttrain_settings(base, tmp_path / "run", steps=0, mixed_precision="bf16")
    run(post_train, [*arguments, "base_dtype=bf16"], tmp_path, monkeypatch)
    before = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    after = weights(tmp_path / "run")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mode=full"], "architecture=dit trains with mode=all"),
        (["mode=lora"], "architecture=dit trains with mode=all"),
        (["architecture=flux2"], "is of architecture dit"),
        (["architecture=flux3"], "none of flux2, z_image, dit"),
        (["depth_processor.fra=30"], "depth_processor.fra is no setting"),
        (["depth_processor.patch_size=8"], "depth_processor.patch_size is no setting"),
        (["base_config.num_layer=3"], "base_config.num_layer is no setting"),
        (["validation_data.heigth=32"], "kind 'scenes'.* 'heigth'"),
    ],
)
def test_wrong_settings_of_post_training(base, tmp_path, monkeypatch, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run(post_train, [*posttrain_settings(base, tmp_path / "run"), *arguments], tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["architecture=unet"], "none of flux2, z_image, dit"),
        (["pretrained_text_encoder=google/umt5-xxl"], "give one"),
        (["cache.text=true"], "cache.text must be true where the text encoder is frozen"),
        (["vae=nowhere/at/all"], "no VAE at nowhere/at/all"),
        (["text_encoder.d_modell=3"], "text_encoder.d_modell is no setting"),
        (["text_encoder.hiden_size=3"], "text_encoder.hiden_size is no setting"),
        (["text_encoder.vocab_size=3"], "text_encoder.vocab_size is no setting"),
        (["transformer.num_layer=3"], "transformer.num_layer is no setting"),
        (["data.heigth=32"], "kind 'scenes'.* 'heigth'"),
    ],
)
def test_wrong_settings_of_pretraining(vae, tmp_path, monkeypatch, arguments, message):
    with pytest.raises(SystemExit, match=message):
        chosen = pretrain_settings(vae, tmp_path / "run", TRAINED_ALONG)
        run(pretrain, [*chosen, *arguments], tmp_path, monkeypatch)


@pytest.mark.parametrize("rung", RUNGS)
def test_shipped_settings(rung, monkeypatch, capsys):
    """Every rung has complete settings for both scripts, which a dry run reports without weights."""
    monkeypatch.chdir(ROOT)
    path, name = str(CONFIGS / f"{rung}.yaml"), rung.removeprefix("dit_").replace("_", ".").upper()
    config = load_config(PretrainConfig, ["--config", path])
    is_small = config.pretrained_text_encoder is None
    assert config.vae == (PretrainConfig.vae if is_small else "black-forest-labs/FLUX.2-klein-base-4B")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--dry-run", "--config", path])
    pretrain.main()
    printed = capsys.readouterr().out
    assert "in all" in printed and config.trainer.output == f"outputs/{rung}/base"

    post = str(CONFIGS / ("dit_post_train.yaml" if is_small else "dit_post_train_256.yaml"))
    overrides = [f"base=outputs/{rung}/base/pipeline", f"base_settings={path}"]
    monkeypatch.setattr(sys, "argv", ["post_train.py", "--dry-run", "--config", post, *overrides])
    post_train.main()
    in_all = next(line.split()[0] for line in capsys.readouterr().out.splitlines() if "in all" in line)
    assert is_small or f"{in_all} GiB ({name})" in Path(post).read_text()
    after = load_config(post_train.PostTrainConfig, ["--config", post, *overrides])
    assert after.max_sequence_length == config.max_sequence_length
    assert after.cache.pixels == config.cache.pixels == after.sample_size**2
    model = empty_transformer(after)
    depth_free = sum(p.numel() for name, p in model.named_parameters() if "depth" not in name)
    size = float(name[:-1]) * {"K": 1e3, "M": 1e6, "B": 1e9}[name[-1]]
    assert depth_free == pytest.approx(size, rel=0.15 if is_small else 0.03)
