"""Runs of the training scripts on tiny models and a few samples: a plugin with their bases, caches and frames."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from PIL import Image
from safetensors.torch import load_file
from tiny import TINY_DIT, TINY_T5, make_pipeline

from mf_diffusers import DepthProcessor
from mf_diffusers.modality_forcing.objective import ObjectiveConfig, draw_noise, modality_forcing_loss


SCENES = "{kind: scenes, split: train, height: 32, width: 32, supersample: 1}"
ROOT = Path(__file__).parents[1]
TRAINED_ALONG = [*(f"text_encoder.{name}={value}" for name, value in TINY_T5.items()), "cache.text=false"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny text-to-image pipeline with random weights."""
    folder = tmp_path_factory.mktemp("base")
    pipe = make_pipeline()
    config = {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_") and "depth" not in k}
    transformer = Flux2Transformer2DModel(**config)
    Flux2KleinPipeline(pipe.scheduler, pipe.vae, pipe.text_encoder, pipe.tokenizer, transformer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def make_frames(folder: Path, count: int = 12) -> str:
    """Pictures of three sizes in turn, every third without depth; returned is the source."""
    folder.mkdir()
    rng, lines = np.random.default_rng(0), []
    for number in range(count):
        size = [(32, 32), (24, 40), (40, 24)][number % 3]
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        lines.append({"file_name": f"{number}.png", "text": f"picture {number}" + " left" * (number % 2)})
        if number % 4:
            np.save(folder / f"{number}.npy", rng.uniform(0.5, 2, size).astype(np.float32))
            lines[-1]["depth_file_name"] = f"{number}.npy"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return f"{{kind: folder, path: {folder}}}"


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return make_frames(tmp_path_factory.mktemp("frames") / "frames")


def settings(base, cache, output, data=SCENES, **trainer) -> list[str]:
    trainer = {
        "output": output,
        "steps": 6,
        "batch_size": 4,
        "micro_batch_size": 2,
        "mixed_precision": "fp32",
        "ema_decay": 0.9,
        "checkpoint_every": 2,
        "keep_checkpoints": 3,
        "validate_every": 100,
        "log_every": 1,
        "learning_rate": 0.001,
    } | trainer
    return [
        f"base={base}",
        "num_depth_decoder_layers=1",
        "text_encoder_out_layers=[1,2,3]",
        "max_sequence_length=64",
        "sample_size=32",
        f"data={data}",
        f"validation_data={SCENES}",
        "validation_samples=8",
        f"cache={{folder: {cache}, samples: 8, pixels: 1024, depth_density: 0.5}}",
        *(f"trainer.{name}={value}" for name, value in trainer.items()),
    ]


def run(script, arguments, tmp_path, monkeypatch):
    config = tmp_path / "empty.yaml"
    config.write_text("{}")
    monkeypatch.setattr(sys, "argv", [script.__name__, "--config", str(config), *arguments])
    monkeypatch.setattr(script, "validate", lambda *args, **kwargs: None)  # has its own test; here it costs seconds
    script.main()


def assert_it_learns(model: torch.nn.Module, text_channels: int, learning_rate: float) -> None:
    """A few steps on one batch bring both losses of a transformer, with tokens of 4 x 4 pixels, below a half."""
    processor, generator = DepthProcessor(patch_size=4), torch.Generator().manual_seed(0)
    batch = {
        "latents": torch.randn(1, 6, 16, generator=generator).expand(8, -1, -1),
        "depth": (torch.rand(1, 1, 8, 12, generator=generator) * 1.9).expand(8, -1, -1, -1),
        "valid": torch.ones(8, 1, 8, 12, dtype=torch.bool),
        "prompt_embeds": torch.randn(8, 5, text_channels, generator=generator),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    history = []
    for step in range(60):
        draws = [torch.Generator().manual_seed(8 * step + i) for i in range(8)]
        draw = draw_noise(ObjectiveConfig(), (6, 16), (1, 8, 12), [True] * 8, draws)
        losses = modality_forcing_loss(model, **batch, draw=draw, config=ObjectiveConfig(), depth_processor=processor)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append((losses.rgb.mean().item(), losses.depth.mean().item()))
    first, last = np.mean(history[:5], axis=0), np.mean(history[-5:], axis=0)
    assert (last < 0.5 * first).all(), (first, last)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


def command(script, arguments, tmp_path, *launcher) -> list[str]:
    config = tmp_path / "empty.yaml"
    config.write_text("{}")
    return [sys.executable, *launcher, str(ROOT / "finetune" / script), "--config", str(config), *arguments]


@pytest.fixture
def fresh_accelerate():
    """Runs of one process share accelerate's state, which keeps the precision of the first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    make_pipeline().vae.save_pretrained(folder)
    return folder


def pretrain_settings(vae, output, text: list[str], **trainer) -> list[str]:
    return [
        "architecture=dit",
        f"vae={vae}",
        *(f"transformer.{name}={list(v) if isinstance(v, tuple) else v}" for name, v in TINY_DIT.items()),
        "vocabulary_size=200",
        "max_sequence_length=12",
        f"data={SCENES}",
        "validation_samples=4",
        f"cache={{folder: {output}-cache, samples: 8, pixels: 1024}}",
        *text,
        *(a for a in settings("", "", output, **trainer) if a.startswith("trainer.")),
    ]
