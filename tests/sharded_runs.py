"""Runs on several CPU processes, and how far apart two runs end: a plugin with a run to compare with.

All processes but those that are killed are forked from a server that has imported the scripts: importing them in each
would take longer than the runs.
"""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import TRAINED_ALONG, pretrain_settings

from finetune import consolidate, post_train, pretrain
from finetune.training.sharding import read_tensors
from mf_diffusers import ModalityForcingPipeline


pytest_plugins = ["training_runs"]


ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "OMP_NUM_THREADS": "1"}
SCRIPTS = {"pretrain": pretrain, "post_train": post_train}


def launch(processes: int, function: Callable, *args) -> None:
    """Calls `function(*args)` in processes that find one another as those of a launcher do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # some versions of Python give the server no other
        multiprocessing.forkserver.ensure_running()
    spawned = torch.multiprocessing.start_processes(
        in_process, (processes, port, function, args), processes, join=False, start_method="forkserver"
    )
    while not spawned.join(timeout=300):
        pass


def in_process(rank: int, processes: int, port: int, function: Callable, args: tuple) -> None:
    os.environ |= ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {name: str(processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    torch.set_num_threads(1)
    function(*args)


def train(script: str, arguments: list[str], folder: Path, validates: bool = False) -> None:
    """Training; the pictures of validations cost more than these runs do."""
    (folder / "empty.yaml").write_text("{}")
    module = SCRIPTS[script]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, "--config", str(folder / "empty.yaml"), *arguments])
        if validates:
            patch.setattr(module, "picture_grid", lambda *_: Image.new("RGB", (8, 8)))
        else:
            patch.setattr(module, "validate", lambda *_: None)
        module.main()


def curve_of(run_folder: Path, scalar: str = "loss") -> dict[int, float]:
    curve = {}
    for path in sorted(run_folder.glob("logs/**/events*"), key=lambda path: path.stat().st_mtime):
        curve |= {event.step: event.value for event in EventAccumulator(str(path)).Reload().Scalars(scalar)}
    return curve


def tensors_of(pipeline: Path) -> dict[str, torch.Tensor]:
    files = sorted(pipeline.rglob("*.safetensors"))
    return {f"{path.relative_to(pipeline)}:{name}": t for path in files for name, t in load_file(path).items()}


def relative_distance(run_folder: Path, other: Path, kind: str) -> float:
    """How far two runs ended apart, in "weights" or averages ("ema"), in parts of how far the other moved since its
    checkpoint before the last."""
    start, end = sorted((other / "checkpoints").iterdir())[-2:]
    folders = (run_folder / "checkpoints" / end.name, end, start)
    ours, theirs, before = (read_tensors(folder / kind, {}) for folder in folders)
    assert ours.keys() == theirs.keys() == before.keys()
    distance, movement = (torch.cat([(theirs[n] - t[n]).flatten() for n in theirs]).norm() for t in (ours, before))
    return (distance / movement).item()


def assert_follows(run_folder: Path, other: Path) -> None:
    """The curves of the losses within 1e-4; the weights and their averages within a thousandth of how far they moved
    since the checkpoint of step 3, so that what a resumed run loses there shows."""
    ours, theirs = curve_of(run_folder), curve_of(other)
    assert ours.keys() == theirs.keys() == set(range(1, 7))
    curve = max(abs(ours[step] - theirs[step]) for step in ours)
    weights, averages = (relative_distance(run_folder, other, kind) for kind in ("weights", "ema"))
    print(f"{run_folder.name} against {other.name}: losses {curve:.1e}, weights {weights:.1e}, averages {averages:.1e}")
    assert curve < 1e-4 and weights < 1e-3 and averages < 1e-3


def arguments_of(vae: Path, output: Path, **trainer) -> list[str]:
    chosen = {"batch_size": 8, "micro_batch_size": 1, "checkpoint_every": 3, "validate_every": 4, "warmup_steps": 0}
    chosen |= {"learning_rate": 2e-4} | trainer
    return [*pretrain_settings(vae, output, TRAINED_ALONG, **chosen), f"cache.folder={output.parent / 'cache'}"]


@pytest.fixture(scope="module")
def start(vae, tmp_path_factory):
    """
    A checkpoint from before the first step. A new base is idle: what starts at zero leaves the rest gradients that are
    rounding, which Adam takes for steps of the whole learning rate. So here nothing is zero.
    """
    folder = tmp_path_factory.mktemp("start")
    train("pretrain", arguments_of(vae, folder / "run", steps=1, learning_rate=0), folder)
    checkpoint = folder / "run" / "checkpoints" / "step-00000001"
    weights, optimizer = (load_file(checkpoint / f"{kind}.safetensors") for kind in ("weights", "optimizer"))
    generator = torch.Generator().manual_seed(0)
    for name, tensor in weights.items():
        if not tensor.any():
            weights[name] = 0.2 * torch.randn(tensor.shape, generator=generator)
    for kind in ("weights", "ema"):
        save_file(weights, checkpoint / f"{kind}.safetensors")
    save_file({name: torch.zeros_like(t) for name, t in optimizer.items()}, checkpoint / "optimizer.safetensors")
    (checkpoint / "state.json").write_text(json.dumps({"step": 0, "optimizer": "adamw", "ema_steps": 0}))
    return checkpoint


def begin(start: Path, output: Path) -> None:
    shutil.copytree(start, output / "checkpoints" / "step-00000000")


@pytest.fixture(scope="module")
def one(vae, start, tmp_path_factory):
    """A run in one process, which is not sharded."""
    folder = tmp_path_factory.mktemp("runs")
    begin(start, folder / "one")
    train("pretrain", arguments_of(vae, folder / "one"), folder)
    return folder / "one"


def take_up(source: Path, output: Path) -> None:
    """A run that was stopped after the checkpoint of step 3, moved to another folder."""
    name = "step-00000003"
    shutil.copytree(source / "checkpoints" / name, output / "checkpoints" / name)
    shutil.copytree(source / "logs", output / "logs")


def consolidated(checkpoint: Path, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["consolidate.py", str(checkpoint), str(folder)])
        consolidate.main()


def assert_consolidates(run_folder: Path, folder: Path) -> None:
    """The last checkpoint makes the pipeline that the run wrote, which holds its averages."""
    checkpoint = run_folder / "checkpoints" / "step-00000006"
    consolidated(checkpoint, folder)
    found, written = tensors_of(folder), tensors_of(run_folder / "pipeline")
    assert found.keys() == written.keys() and all(torch.equal(t, written[name]) for name, t in found.items())
    pipe, averages = ModalityForcingPipeline.from_pretrained(folder), read_tensors(checkpoint / "ema", {})
    assert len(averages) > 20
    for name, average in averages.items():
        part, name = name.split(".", 1)
        assert torch.equal(pipe.components[part].state_dict()[name], average)
