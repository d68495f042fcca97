"""The training scripts end to end, on tiny models and a few procedural scenes."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline
from safetensors.torch import load_file
from tiny import randomize
from training_runs import SCENES, command, make_frames, run, settings, weights
from transformers import Adafactor

from finetune import consolidate, post_train, pretrain
from finetune.post_train import PostTrainConfig, choose_trainable, make_teacher
from finetune.training import trainer
from finetune.training.trainer import Trainer, TrainerConfig
from mf_diffusers import ModalityForcingFlux2Transformer2DModel, ModalityForcingPipeline
from mf_diffusers.modality_forcing.adapter import load_adapter
from mf_diffusers.modality_forcing.objective import ObjectiveConfig, draw_noise, modality_forcing_loss


pytest_plugins = ["training_runs"]


@pytest.fixture(params=["scenes", "cached frames", "live frames"])
def data(request, frames) -> tuple[str, list[str]]:
    """A source, and further settings: one size from a cache, several from a cache, several without a cache."""
    live = ["cache.folder=null", "flip=true", "trainer.num_workers=1"]
    return {"scenes": (SCENES, []), "cached frames": (frames, []), "live frames": (frames, live)}[request.param]


def test_resumed_equals_uninterrupted_and_frozen_weights_stay(base, cache, data, tmp_path, monkeypatch):
    source, more = data
    run(post_train, [*settings(base, cache, tmp_path / "whole", source), *more], tmp_path, monkeypatch)
    for steps in (4, 6):
        arguments = [*settings(base, cache, tmp_path / "parts", source, steps=steps), *more]
        run(post_train, arguments, tmp_path, monkeypatch)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    before = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, tensor in before.items():
        frozen = name.startswith("transformer_blocks.")
        assert torch.equal(whole[name], tensor) == frozen, name
    checkpoints = sorted(path.name for path in (tmp_path / "whole" / "checkpoints").iterdir())
    assert checkpoints == ["step-00000002", "step-00000004", "step-00000006"]
    assert isinstance(ModalityForcingPipeline.from_pretrained(tmp_path / "whole" / "pipeline"), ModalityForcingPipeline)


def test_killed_and_resumed_equals_uninterrupted(base, cache, tmp_path, monkeypatch):
    def arguments(output):
        return settings(base, cache, tmp_path / output, steps=40, checkpoint_every=3, validate_every=1000)

    process = subprocess.Popen(command("post_train.py", arguments("killed"), tmp_path), stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "killed").glob("checkpoints/step-*[1-9]")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for name in ("killed", "whole"):
        run(post_train, arguments(name), tmp_path, monkeypatch)
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(tensor, killed[name]) for name, tensor in whole.items())


TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.mark.parametrize("data", ["cached frames", "live frames"], indirect=True)
def test_two_processes_follow_one(base, cache, data, tmp_path, monkeypatch):
    """On samples of several sizes, of which the processes have micro batches of unequal number."""
    source, more = data

    def arguments(output):
        return [*settings(base, cache, tmp_path / output, source, steps=5, batch_size=8, max_grad_norm=1e9), *more]

    run(post_train, arguments("one"), tmp_path, monkeypatch)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    two = command("post_train.py", arguments("two"), tmp_path, *TWO_PROCESSES)
    subprocess.run(two, check=True, env=environment, timeout=300)
    state = json.loads((tmp_path / "two" / "checkpoints" / "step-00000005" / "state.json").read_text())
    assert (state["processes"], state["optimizer"]) == (2, "adamw")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max((tensor - two[name]).abs().max() for name, tensor in one.items()) < 1e-5


def test_a_base_with_depth_goes_on(base, cache, tmp_path, monkeypatch):
    first = ["depth_processor={infinite_depth: true, far: 30}", *settings(base, cache, tmp_path / "first", steps=2)]
    run(post_train, first, tmp_path, monkeypatch)
    again = settings(tmp_path / "first" / "pipeline", cache, tmp_path / "again", steps=0)
    again += ["sample_size=48", "num_depth_decoder_layers=3", "objective.distillation_high=0.5"]
    run(post_train, again, tmp_path, monkeypatch)
    before, after = weights(tmp_path / "first"), weights(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    pipe = ModalityForcingPipeline.from_pretrained(tmp_path / "again" / "pipeline")
    assert pipe.depth_processor.config.infinite_depth
    assert pipe.config.default_sample_size == 48
    again = settings(tmp_path / "first" / "pipeline", cache, tmp_path / "more", steps=2)
    run(post_train, [*again, "objective.distillation_high=0.5"], tmp_path, monkeypatch)
    more = weights(tmp_path / "more")
    assert not torch.equal(more["depth_embedder.weight"], before["depth_embedder.weight"])


def test_the_learning_rate_warms_up_and_cools_down():
    config = TrainerConfig(learning_rate=1.0, steps=10, warmup_steps=2, cooldown_steps=4)
    rates = [Trainer.learning_rate.fget(SimpleNamespace(config=config, step=step)) for step in range(10)]
    assert rates == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    constant = replace(config, warmup_steps=0, cooldown_steps=0)
    assert {Trainer.learning_rate.fget(SimpleNamespace(config=constant, step=step)) for step in range(10)} == {1}


def test_lora(base, cache, tmp_path, monkeypatch):
    more = ["mode=lora", "lora_rank=2", "objective.distillation_high=0.5"]
    run(post_train, [*more, *settings(base, cache, tmp_path / "lora")], tmp_path, monkeypatch)
    trained = ModalityForcingPipeline.from_pretrained(tmp_path / "lora" / "pipeline").transformer
    klein = Flux2KleinPipeline.from_pretrained(base)
    fresh = ModalityForcingPipeline.from_base(klein, num_depth_decoder_layers=1).transformer
    load_adapter(fresh, tmp_path / "lora" / "pipeline.adapter.safetensors", merge=True)
    ours, merged = trained.state_dict(), fresh.state_dict()
    assert all(torch.allclose(tensor, merged[name], atol=1e-6) for name, tensor in ours.items())
    before = klein.transformer.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, ours[name])}
    assert changed and all(".attn." in name for name in changed)

    adapter = tmp_path / "lora" / "pipeline.adapter.safetensors"
    written, early = adapter.read_bytes(), tmp_path / "lora" / "early"
    checkpoint = tmp_path / "lora" / "checkpoints" / "step-00000002"
    monkeypatch.setattr(sys, "argv", ["consolidate.py", str(checkpoint), str(early)])
    consolidate.main()
    assert adapter.read_bytes() == written  # the run's, which consolidating one of its checkpoints leaves alone
    assert early.with_name("early.adapter.safetensors").read_bytes() != written


def test_a_loss_that_is_not_finite_stops(base, cache, tmp_path, monkeypatch):
    run(post_train, settings(base, cache, tmp_path / "run", steps=2), tmp_path, monkeypatch)
    with pytest.raises(FloatingPointError, match=r"not finite within the 1 steps before step \d.*step-00000002"):
        run(post_train, settings(base, cache, tmp_path / "run", steps=8, learning_rate="1e30"), tmp_path, monkeypatch)


def test_a_full_disk_leaves_the_checkpoints_before(base, cache, tmp_path, monkeypatch):
    run(post_train, settings(base, cache, tmp_path / "run", steps=2), tmp_path, monkeypatch)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    (checkpoint.parent / ".step-00000003").mkdir()  # left by a run that was killed
    (checkpoint.parent / ".DS_Store").touch()  # left by macOS
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["weights.safetensors"]) + 1000, hard))  # stops in the second
    try:
        with pytest.raises(OSError, match=r"step 4 cannot be written into .*Last good checkpoint: .*step-00000002"):
            run(post_train, settings(base, cache, tmp_path / "run"), tmp_path, monkeypatch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name for path in checkpoint.parent.iterdir()} == {"step-00000002", ".DS_Store"}
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    for name in ("run", "whole"):
        run(post_train, settings(base, cache, tmp_path / name), tmp_path, monkeypatch)
    assert all(torch.equal(tensor, weights(tmp_path / "run")[n]) for n, tensor in weights(tmp_path / "whole").items())


@pytest.mark.parametrize("folder", ["cache", "null"])
def test_what_cannot_be_read_is_listed_at_the_end(base, tmp_path, monkeypatch, capsys, folder):
    frames = make_frames(tmp_path / "frames", 120)
    (tmp_path / "frames" / "7.png").write_bytes(b"no picture")
    arguments = settings(base, tmp_path / folder, tmp_path / "run", frames, steps=31)
    arguments = [*arguments, "cache.samples=122", *(["cache.folder=null"] if folder == "null" else [])]
    run(post_train, arguments, tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    assert printed.count(" samples could not be read") == (2 if folder == "cache" else 1)  # after encoding, at the end
    assert "7.png" in printed[printed.rindex(" samples could not be read") :]


def test_the_teacher_of_a_lora_is_the_base_it_adapts(base):
    config = PostTrainConfig(mode="lora", lora_rank=2, objective=ObjectiveConfig(distillation_high=1.0))
    klein = Flux2KleinPipeline.from_pretrained(base)
    pipe = ModalityForcingPipeline.from_base(klein, num_depth_decoder_layers=1)
    choose_trainable(pipe.transformer, config)
    randomize(pipe.transformer)
    shared = make_teacher(config, pipe.transformer, klein.transformer, torch.device("cpu"))
    depth, generators = torch.rand(2, 1, 16, 16) + 0.1, [torch.Generator().manual_seed(i) for i in range(2)]
    draw = draw_noise(config.objective, (16, 16), depth.shape[1:], [True, True], generators)
    draw.timestep, draw.depth_timestep = torch.rand(2), torch.rand(2)
    inputs = torch.randn(2, 16, 16), depth, depth > 0, torch.randn(2, 8, 48), draw, config.objective
    found = []
    for teacher in (shared, klein.transformer.requires_grad_(False)):
        losses = modality_forcing_loss(pipe.transformer, *inputs, pipe.depth_processor, teacher)
        losses.total.backward()
        gradients = {n: p.grad.clone() for n, p in pipe.transformer.named_parameters() if p.requires_grad}
        pipe.transformer.zero_grad()
        found.append((losses.distillation, gradients))
    (ours, our_gradients), (theirs, their_gradients) = found
    assert (theirs > 0).all() and torch.equal(ours, theirs)
    assert our_gradients.keys() == their_gradients.keys() and any("lora_" in name for name in our_gradients)
    assert all(torch.equal(our_gradients[name], gradient) for name, gradient in their_gradients.items())


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw8bit"])
def test_an_optimizer_that_counts_in_integers_resumes(base, cache, tmp_path, monkeypatch, optimizer):
    """Adafactor stands for others where bitsandbytes is not installed."""
    more = {}
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
        more["optimizer"] = optimizer
    else:
        options = {"lr": 1e-3, "relative_step": False, "scale_parameter": False}
        monkeypatch.setattr(trainer, "make_optimizer", lambda _, parameters: Adafactor(parameters, **options))
    for output, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        arguments = settings(base, cache, tmp_path / output, steps=steps, **more)
        run(post_train, arguments, tmp_path, monkeypatch)
    assert all(torch.equal(tensor, weights(tmp_path / "parts")[n]) for n, tensor in weights(tmp_path / "whole").items())
    state = load_file(tmp_path / "whole" / "checkpoints" / "step-00000004" / "optimizer.safetensors")
    assert {tensor.item() for name, tensor in state.items() if name.endswith("|step")} == {4}


def test_compiled_blocks_train_alike_and_resume(base, cache, tmp_path, monkeypatch):
    """The graphs are run as they were captured: generating code for them takes a minute and more."""
    compile_module, compiled = torch.nn.Module.compile, set()

    def capture(module):
        compiled.add(type(module).__name__)
        compile_module(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", capture)
    for output, steps, compiles in (("eager", 2, False), ("compiled", 1, True), ("compiled", 2, False)):
        arguments = settings(base, cache, tmp_path / output, steps=steps, compile=compiles)
        run(post_train, arguments, tmp_path, monkeypatch)
    assert compiled == set(ModalityForcingFlux2Transformer2DModel._repeated_blocks)
    eager, whole = weights(tmp_path / "eager"), weights(tmp_path / "compiled")
    assert max((tensor - whole[name]).abs().max() for name, tensor in eager.items()) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer.stpes=3"], "trainer.stpes"),
        (["trainer.steps=many"], "trainer.steps"),
        (["mode=half"], "none of full, all, lora"),
        (["steps"], "no key=value"),
        (["trainer.batch_size=0"], "batch_size must be 1 or more, not 0"),
        (["trainer.log_every=0"], "log_every must be 1 or more, not 0"),
        (["trainer.optimizer=sgd"], "none of adamw, adamw8bit"),
        (["trainer.mixed_precision=fp16"], "none of auto, fp32, bf16"),
        (["flip=true"], "flip=true needs cache.folder=null"),
        (["cache.text=false"], "cache.text must be true where the text encoder is frozen"),
    ],
)
def test_wrong_settings(base, cache, tmp_path, monkeypatch, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run(post_train, [*settings(base, cache, tmp_path / "run"), *arguments], tmp_path, monkeypatch)


@pytest.mark.parametrize("script", [post_train, pretrain])
@pytest.mark.parametrize(
    ("state", "arguments", "message"),
    [
        ({}, ["trainer.batch_size=5"], "must be a multiple of micro_batch_size 2 times 1 processes"),
        ({}, ["trainer.resume=false"], "run/checkpoints has checkpoints already.*choose another trainer.output"),
        ({"optimizer": "adamw8bit"}, [], "step-00000002 goes on with trainer.optimizer=adamw8bit, not adamw"),
        ({"optimizer": "adamw"}, [], "step-00000002 has no averaged weights and goes on with trainer.ema_decay=0 only"),
    ],
)
def test_what_cannot_go_on_does_not_start(tmp_path, monkeypatch, script, state, arguments, message):
    """Nor is anything opened: there is no base and no VAE."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps(state))
    chosen = [a for a in settings("", "", tmp_path / "run") if a.startswith("trainer.")]
    with pytest.raises(SystemExit, match=message):
        run(script, [*chosen, *arguments], tmp_path, monkeypatch)


def test_a_checkpoint_of_another_model(base, cache, tmp_path, monkeypatch):
    run(post_train, settings(base, cache, tmp_path / "run", steps=2), tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"another model.*choose another trainer\.output"):
        arguments = [*settings(base, cache, tmp_path / "run"), "num_depth_decoder_layers=2"]
        run(post_train, arguments, tmp_path, monkeypatch)


@pytest.mark.parametrize("folder", ["cache", "null"])
def test_pretraining(base, tmp_path, monkeypatch, folder):
    vae = AutoencoderKLFlux2.from_pretrained(base / "vae")
    vae.save_pretrained(tmp_path / "vae")
    transformer = {
        k: v for k, v in json.loads((base / "transformer" / "config.json").read_text()).items() if k[0] != "_"
    }
    text_encoder = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}

    def train(output, steps):
        arguments = [
            f"vae={tmp_path / 'vae'}",
            *(f"transformer.{name}={'null' if value is None else value}" for name, value in transformer.items()),
            *(f"text_encoder.{name}={value}" for name, value in text_encoder.items()),
            "text_encoder.num_key_value_heads=1",
            "text_encoder.head_dim=8",
            f"data={SCENES}",
            f"cache={{folder: {folder if folder == 'null' else tmp_path / folder}, samples: 8, pixels: 1024}}",
            "cache.text=false",
            *(a for a in settings(base, "", tmp_path / output, steps=steps) if a.startswith("trainer.")),
        ]
        run(pretrain, arguments, tmp_path, monkeypatch)

    for output, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        train(output, steps)
    assert all(torch.equal(tensor, weights(tmp_path / "parts")[n]) for n, tensor in weights(tmp_path / "whole").items())
    pipe = Flux2KleinPipeline.from_pretrained(tmp_path / "whole" / "pipeline")
    assert pipe.transformer.config.in_channels == 16 and len(pipe.tokenizer) > 256
