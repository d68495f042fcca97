"""Validation: losses by noise level and depth errors do not depend on batches, and reach the logs."""

import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import SCENES, settings

from finetune import post_train, pretrain
from finetune.data.cache import CacheConfig
from finetune.data.encoding import Encoder
from finetune.data.sources import FolderConfig, ReadReport, ScenesConfig, Source, build_source
from finetune.training import validation
from finetune.training.validation import LEVELS, image_to_depth_metrics, level_losses, read_batches
from mf_diffusers.modality_forcing.objective import ObjectiveConfig, draw_noise, modality_forcing_loss


pytest_plugins = ["training_runs"]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    grid = validation.picture_grid
    monkeypatch.setattr(validation, "picture_grid", lambda pipe, source, size: grid(pipe, source, size, steps=1))


def test_batches_have_one_size_and_every_sample(frames):
    source = build_source(FolderConfig(path=frames.split()[-1].rstrip("}"), shuffle=False))
    batches = list(read_batches(source, 12, 3, ReadReport()))
    assert sorted(index for indices, _ in batches for index in indices) == list(range(12))
    for indices, samples in batches:
        assert len({sample["image"].shape for sample in samples}) == 1 and len(indices) <= 3
        assert [sample["caption"].split()[1] for sample in samples] == [str(index) for index in indices]


def test_metrics_do_not_depend_on_batches(pipe):
    source = build_source(ScenesConfig(height=32, width=32, supersample=1))
    pairs = [image_to_depth_metrics(pipe, source, 4, batch_size, steps=1) for batch_size in (4, 3)]
    assert pairs[0]["abs_rel"] == pytest.approx(pairs[1]["abs_rel"], rel=1e-4)
    assert pairs[0]["images"] == 4


def test_losses_at_a_level_are_those_of_the_objective(pipe):
    source = build_source(ScenesConfig(height=32, width=32, supersample=1))
    encoder = Encoder(pipe.vae, pipe.depth_processor, lambda prompts: pipe.encode_prompt(prompts)[0])
    seen = []

    def losses_at(batch, generators, level):
        seen.append((batch, level, generators[0].initial_seed()))
        shapes = batch.latents.shape[1:], batch.depth.shape[1:]
        draw = draw_noise(ObjectiveConfig(), *shapes, [True] * len(generators), generators)
        draw.timestep = draw.depth_timestep = torch.full((len(generators),), level)
        losses = modality_forcing_loss(pipe.transformer, *batch[:4], draw, ObjectiveConfig(), pipe.depth_processor)
        return {"rgb": losses.rgb, "depth": losses.depth}

    (indices, samples), *_ = read_batches(source, 3, 3, ReadReport())
    found = level_losses(losses_at, encoder, CacheConfig(pixels=1024), indices, samples)
    assert found.keys() == {(name, level) for name in ("rgb", "depth") for level in LEVELS}
    assert [level for _, level, _ in seen] == list(LEVELS) and {seed for *_, seed in seen} == {0}
    assert all(len(values) == 3 and min(values) > 0 for values in found.values())
    alone = level_losses(losses_at, encoder, CacheConfig(pixels=1024), indices[1:2], samples[1:2])
    for key, values in found.items():
        assert alone[key][0] == pytest.approx(values[1], rel=1e-3)
    smaller = level_losses(losses_at, encoder, CacheConfig(pixels=256), indices, samples)
    assert smaller["rgb", 0.5] != found["rgb", 0.5] and seen[-1][0].depth.shape[-2:] == (16, 16)


class HalfSky(Source):
    """Scenes, of which every other one has infinite depth alone."""

    def __init__(self):
        self.scenes = build_source(ScenesConfig(height=32, width=32, supersample=1))

    def __getitem__(self, index):
        sample = self.scenes[index]
        return sample | {"depth": torch.full_like(sample["depth"], torch.inf)} if index % 2 else sample


def test_samples_that_are_all_sky_have_no_metrics(pipe):
    assert image_to_depth_metrics(pipe, HalfSky(), 4, steps=1)["images"] == 2
    assert validation.picture_grid(pipe, HalfSky(), (32, 32)).width > 0


def scalars(folder) -> dict[str, list[float]]:
    found = {}
    for events in folder.rglob("events*"):
        log = EventAccumulator(str(events)).Reload()
        found |= {tag: [event.value for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
    return found


def train(script, arguments, tmp_path, monkeypatch):
    config = tmp_path / "empty.yaml"
    config.write_text("{}")
    monkeypatch.setattr(sys, "argv", [script.__name__, "--config", str(config), *arguments])
    script.main()


@pytest.mark.parametrize("way", ["cache", "live"])
def test_post_training_logs_losses_metrics_and_pictures(base, cache, frames, tmp_path, monkeypatch, capsys, way):
    arguments = settings(base, cache, tmp_path / "run", frames, steps=2, validate_every=1)
    arguments[arguments.index(f"validation_data={SCENES}")] = f"validation_data={frames}"
    train(post_train, [*arguments, *(["cache.folder=null"] if way == "live" else [])], tmp_path, monkeypatch)
    found = scalars(tmp_path / "run")
    for name in ("abs_rel", "delta1", *(f"{m}_loss_at_{level}" for m in ("rgb", "depth") for level in LEVELS)):
        assert len(found[f"validation/{name}"]) == 2, name
    assert {"rgb", "depth", "distillation", "grad_norm"} <= found.keys()
    assert len(list((tmp_path / "run").glob("validation-*.png"))) == 2
    printed = capsys.readouterr()
    assert "losses at t = 0.1 0.3 0.5 0.7 0.9, rgb " in printed.out + printed.err


def test_pretraining_logs_losses_and_pictures(base, tmp_path, monkeypatch):
    arguments = [
        f"vae={base / 'vae'}",
        "transformer={in_channels: 16, num_layers: 1, num_single_layers: 1, attention_head_dim: 16}",
        "transformer={num_attention_heads: 2, joint_attention_dim: 48, axes_dims_rope: [4, 4, 4, 4]}",
        "transformer.guidance_embeds=false",
        "text_encoder={hidden_size: 16, intermediate_size: 32, num_hidden_layers: 3, num_attention_heads: 2}",
        "text_encoder={num_key_value_heads: 1, head_dim: 8}",
        f"data={SCENES}",
        f"validation_data={SCENES.replace('train', 'validation')}",
        "validation_samples=8",
        f"cache={{folder: {tmp_path / 'cache'}, samples: 8, pixels: 1024, text: false}}",
        *(a for a in settings(base, "", tmp_path / "run", steps=1) if a.startswith("trainer.")),
    ]
    train(pretrain, arguments, tmp_path, monkeypatch)
    found = scalars(tmp_path / "run")
    assert all(len(found[f"validation/rgb_loss_at_{level}"]) == 1 for level in LEVELS)
    assert list((tmp_path / "run").glob("samples-*.png"))
