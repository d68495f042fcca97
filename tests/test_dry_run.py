"""Dry runs against what is really allocated, the klein settings, and frozen weights in bfloat16."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import TINY_TRANSFORMER, make_pipeline
from tiny_z_image import TINY_Z_IMAGE
from training_runs import SCENES, run, settings, weights

from finetune import post_train, pretrain
from finetune.config import load_config
from finetune.data.cache import CacheConfig
from finetune.post_train import PostTrainConfig, choose_trainable
from finetune.preflight import dry_run, memory
from finetune.training import models
from finetune.training.trainer import Trainer, TrainerConfig
from mf_diffusers import ModalityForcingPipeline, ModalityForcingZImageTransformer2DModel
from mf_diffusers.modality_forcing.objective import ObjectiveConfig, draw_noise, modality_forcing_loss
from mf_diffusers.precision import DTYPES


pytest_plugins = ["training_runs"]
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


CONFIGS = Path(__file__).parents[1] / "finetune" / "configs"


def loss_of(pipe, transformer, batch_size=2, text_length=64):
    depth = torch.rand(batch_size, 1, 64, 64) + 0.1
    generators = [torch.Generator().manual_seed(i) for i in range(batch_size)]
    config, latents = ObjectiveConfig(), torch.randn(batch_size, 256, 16)
    draw = draw_noise(config, latents.shape[1:], depth.shape[1:], [True] * batch_size, generators)
    text = torch.randn(batch_size, text_length, 48)
    return modality_forcing_loss(transformer, latents, depth, depth > 0, text, draw, config, pipe.depth_processor).total


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("base_dtype", ["fp32", "bf16"])
def test_weights_gradients_optimizer_and_averages_are_counted_exactly(tmp_path, mode, base_dtype):
    pipe = make_pipeline()
    model = pipe.transformer.to(DTYPES[base_dtype])
    choose_trainable(model, PostTrainConfig(mode=mode, lora_rank=2))
    config = TrainerConfig(output=tmp_path, batch_size=2, micro_batch_size=2, mixed_precision="bf16")
    trainer = Trainer(config, model)
    loss_of(pipe, trainer.prepared).backward()
    trainer.optimizer.step()

    needs = memory.memory(model, trainer.config, stacks=[(4, 64 + 2 * 256, 32, 3.0)])
    frozen, trained, gradients, optimizer, averaged, copies, teacher, _ = needs.values()
    size = memory.size_in_bytes
    parameters = list(model.parameters())
    assert frozen == size(p for p in parameters if not p.requires_grad)
    assert trained == size(p for p in parameters if p.requires_grad)
    assert gradients == size(p.grad for p in parameters if p.grad is not None)
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    assert optimizer == size(value for value in states if value.ndim > 0)  # but for a step count per tensor
    assert averaged == size(trainer.ema.shadow_params)
    assert copies == sum(2 * p.numel() for p in parameters if p.dtype == torch.float32) and teacher == 0


def make_transformer(architecture: str) -> torch.nn.Module:
    """Wide enough for what is of a block to outweigh what is not."""
    if architecture == "flux2":
        return make_pipeline(num_layers=2, num_single_layers=4, num_attention_heads=8).transformer
    sizes = {"dim": 128, "n_heads": 4, "axes_dims": [8, 12, 12], "n_layers": 6, "n_refiner_layers": 1}
    return ModalityForcingZImageTransformer2DModel(
        **TINY_Z_IMAGE | sizes | {"cap_feat_dim": 48}, depth_channels=16, num_depth_decoder_layers=1
    )


@pytest.mark.parametrize("architecture", ["flux2", "z_image"])
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_about_what_autograd_keeps(architecture, mode, precision, checkpointing):
    pipe = make_pipeline()
    model = make_transformer(architecture).train()
    shape = model.shape
    choose_trainable(model, PostTrainConfig(architecture=architecture, mode=mode, lora_rank=2))
    if checkpointing:
        model.enable_gradient_checkpointing()
    live = Live({p.untyped_storage().data_ptr() for p in model.parameters()})
    with (
        torch.autograd.graph.saved_tensors_hooks(live.pack, lambda kept: kept),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        loss_of(pipe, model)
    config = TrainerConfig(micro_batch_size=2, mixed_precision=precision, gradient_checkpointing=checkpointing)
    stacks = [(shape.trunk_blocks, 64 + 2 * 256, shape.width, shape.mlp_ratio), (1, 256, shape.width, shape.mlp_ratio)]
    kept = live.bytes
    if checkpointing:  # on the way back one block is computed anew, and then keeps all
        kept += memory.activation_bytes([(0, *stacks[0][1:])], config, shape.float32_values)
    assert 0.7 < kept / memory.activation_bytes(stacks, config, shape.float32_values) < 1.3


class Live:
    """Bytes that autograd keeps, each storage once, without the weights and what is smaller than a sequence."""

    def __init__(self, weights: set[int]):
        self.known, self.kept, self.bytes = weights, [], 0

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known and tensor.ndim > 2:
            self.known.add(storage.data_ptr())
            self.kept.append(tensor)  # so that its address is not given to another
            self.bytes += storage.nbytes()
        return tensor


@pytest.mark.parametrize(
    ("name", "base_billions", "billions"),
    [
        *((f"klein_4b_{mode}", 3.9, 5.1) for mode in ("lora", "full")),
        *((f"klein_9b_{mode}", 9.1, 12.0) for mode in ("lora", "full")),
        *((f"z_image_{mode}", 6.15, 7.25) for mode in ("lora", "full")),
        ("z_image_lora_24gb", 6.15, 6.7),
    ],
)
def test_settings_of_pretrained_bases(name, base_billions, billions, monkeypatch, capsys):
    path = CONFIGS / f"{name}.yaml"
    monkeypatch.setattr(sys, "argv", ["post_train.py", "--dry-run", "--config", str(path)])
    post_train.main()
    printed = capsys.readouterr().out
    in_all = next(line.split()[0] for line in printed.splitlines() if "in all" in line)
    assert f"By --dry-run {in_all} GiB" in path.read_text()
    assert "CANNOT BE READ" in printed  # the data is for the user to give

    model = models.empty_transformer(load_config(PostTrainConfig, ["--config", str(path)]))
    counts = {n: p.numel() for n, p in model.named_parameters()}
    assert all(p.is_meta for p in model.parameters())
    assert sum(counts.values()) / 1e9 == pytest.approx(billions, abs=0.1)
    assert sum(c for n, c in counts.items() if "depth" not in n) / 1e9 == pytest.approx(base_billions, abs=0.1)


def test_a_dry_run_reads_the_data_and_writes_nothing(base, tmp_path, monkeypatch, capsys):
    frames = tmp_path / "frames"
    frames.mkdir()
    for name, size in (("a", (48, 32)), ("b", (32, 32))):
        Image.new("RGB", size).save(frames / f"{name}.png")
    lines = [{"file_name": "a.png", "text": "a wall"}, {"file_name": "b.png"}]
    (frames / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    folder = f"{{kind: folder, path: {frames}, shuffle: false}}"
    arguments = [
        a.replace(f"data={SCENES}", f"data={folder}") for a in settings(base, tmp_path / "cache", tmp_path / "run")
    ]
    run(post_train, ["--dry-run", *arguments], tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    assert "\ndata: folder, 2 samples, 0 of them with depth" in printed
    assert "frames:00000: 32x48, depth on 0% of the pixels, 'a wall'" in printed
    assert "28x40 (4), 32x32 (4)" in printed
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
    run(post_train, ["--dry-run", *arguments, "cache.folder=null"], tmp_path, monkeypatch)
    assert "\ncache: none" in capsys.readouterr().out
    run(post_train, [*arguments, "trainer.batch_size=8", "trainer.steps=1"], tmp_path, monkeypatch)


def test_the_cache_is_as_large_as_announced(base, tmp_path, monkeypatch):
    run(post_train, settings(base, tmp_path / "cache", tmp_path / "run", steps=1), tmp_path, monkeypatch)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.safetensors"))
    config = CacheConfig(samples=8, pixels=1024)
    announced = dry_run.cache_bytes(config, token_size=4, token_channels=16, text_bytes=4 * 64 * 48)
    assert announced < on_disk < 1.1 * announced


def test_a_dry_run_of_pretraining(base, tmp_path, monkeypatch, capsys):
    transformer = {k: v for k, v in TINY_TRANSFORMER.items() if "depth" not in k}
    arguments = [
        f"vae={base / 'vae'}",
        *(f"transformer.{k}={list(v) if isinstance(v, tuple) else v}" for k, v in transformer.items()),
        "text_encoder={hidden_size: 16, intermediate_size: 32, num_hidden_layers: 3, num_attention_heads: 2}",
        f"data={SCENES}",
        f"cache={{folder: {tmp_path / 'cache'}, samples: 8, pixels: 1024, text: false}}",
    ]
    run(pretrain, ["--dry-run", *arguments], tmp_path, monkeypatch)
    assert "frozen 0\n" in capsys.readouterr().out and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_frozen_weights_in_bfloat16(base, cache, tmp_path, monkeypatch, mode):
    dtypes = {}

    def watch(*args):
        trainer = args[1]
        dtypes.update(
            (p.dtype, p.requires_grad) for p in trainer.accelerator.unwrap_model(trainer.prepared).parameters()
        )
        return losses(*args)

    losses = post_train.micro_batch_losses
    monkeypatch.setattr(post_train, "micro_batch_losses", watch)
    chosen = [f"mode={mode}", "lora_rank=2", "base_dtype=bf16", "objective.distillation_high=0.5"]

    def train(output, steps):
        arguments = settings(base, cache, tmp_path / output, steps=steps, mixed_precision="bf16")
        run(post_train, [*arguments, *chosen], tmp_path, monkeypatch)

    train("whole", 6)
    assert dtypes == {torch.bfloat16: False, torch.float32: True}
    train("parts", 4)
    train("parts", 6)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    before = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    name = "transformer_blocks.0.ff.linear_in.weight"
    assert whole[name].dtype == torch.bfloat16 and torch.equal(whole[name], before[name].bfloat16())
    assert whole["depth_embedder.weight"].dtype == torch.float32

    pipe = ModalityForcingPipeline.from_pretrained(tmp_path / "whole" / "pipeline", dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a cat", num_inference_steps=1, output_type="np").depth.shape == (1, 32, 32)


def test_validation_with_frozen_weights_in_bfloat16(base, cache, tmp_path, monkeypatch):
    from finetune.training.validation import image_to_depth_metrics

    config = tmp_path / "empty.yaml"
    config.write_text("{}")
    arguments = settings(base, cache, tmp_path / "run", steps=1, validate_every=1, mixed_precision="bf16")
    arguments = ["--config", str(config), "mode=lora", "base_dtype=bf16", *arguments]
    monkeypatch.setattr(sys, "argv", ["post_train.py", *arguments])
    found = []
    monkeypatch.setattr(
        post_train, "validate", lambda pipe, source, *_: found.append(image_to_depth_metrics(pipe, source, 2, steps=1))
    )
    post_train.main()
    assert found[0]["abs_rel"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base_dtype=fp16"], "neither fp32 nor bf16"),
        (["base_dtype=bf16"], "needs trainer.mixed_precision=bf16"),
        (["--dry-run", "trainer.optimizer=sgd"], "none of adamw, adamw8bit"),
        (["--dry-run", "base=nowhere/at/all"], "no base at nowhere/at/all"),
    ],
)
def test_wrong_settings(base, cache, tmp_path, monkeypatch, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run(post_train, [*settings(base, cache, tmp_path / "run"), *arguments], tmp_path, monkeypatch)
