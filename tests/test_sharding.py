"""Sharded runs (FSDP2) on CPU processes: they follow one process, go on in any number, and come together again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make_pipeline
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_dry_run import fresh_accelerate  # noqa: F401
from test_training import ROOT, command, run
from test_training_dit import TRAINED_ALONG, pretrain_settings, vae  # noqa: F401

from finetune import pretrain
from finetune.sharding import read_tensors
from mf_diffusers import ModalityForcingPipeline


ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "OMP_NUM_THREADS": "1"}
UNVALIDATED = """
import sys
sys.path.insert(0, {root!r})
from finetune import pretrain
pretrain.validate = lambda *_: None
pretrain.main()
"""


def start(arguments: list[str], folder: Path, processes: int, validates: bool = False) -> subprocess.Popen:
    """Pre-training in sharded processes; the pictures of validations cost more than these runs do."""
    script = folder / "unvalidated.py"
    script.write_text(UNVALIDATED.format(root=str(ROOT)))
    script = ROOT / "finetune" / "pretrain.py" if validates else script
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    return subprocess.Popen(
        command(script, arguments, folder, *launcher), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )


def launch(*args, **kwargs) -> None:
    process = start(*args, **kwargs)
    _, errors = process.communicate(timeout=580)
    assert process.returncode == 0, errors[-3000:]


def consolidate(checkpoint: Path, folder: Path) -> subprocess.CompletedProcess:
    arguments = [sys.executable, str(ROOT / "finetune" / "consolidate.py"), str(checkpoint), str(folder)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300)


def loss_curve(run_folder: Path) -> dict[int, float]:
    curve = {}
    for path in sorted(run_folder.glob("logs/**/events*"), key=lambda path: path.stat().st_mtime):
        curve |= {event.step: event.value for event in EventAccumulator(str(path)).Reload().Scalars("loss")}
    return curve


def tensors_of(pipeline: Path) -> dict[str, torch.Tensor]:
    files = sorted(pipeline.rglob("*.safetensors"))
    return {f"{path.relative_to(pipeline)}:{name}": t for path in files for name, t in load_file(path).items()}


def assert_follows(run_folder: Path, other: Path) -> None:
    """The curves of the losses within 1e-4, and the trained pipelines."""
    ours, theirs = loss_curve(run_folder), loss_curve(other)
    assert ours.keys() == theirs.keys() == set(range(1, 7))
    curve = max(abs(ours[step] - theirs[step]) for step in ours)
    ours, theirs = tensors_of(run_folder / "pipeline"), tensors_of(other / "pipeline")
    assert ours.keys() == theirs.keys()
    distance = max((tensor - theirs[name]).abs().max().item() for name, tensor in ours.items())
    print(f"{run_folder.name} against {other.name}: losses within {curve:.1e}, weights within {distance:.1e}")
    assert curve < 1e-4 and distance < 1e-4


def arguments_of(vae: Path, output: Path, **trainer) -> list[str]:
    chosen = {"batch_size": 8, "micro_batch_size": 1, "checkpoint_every": 3, "validate_every": 4} | trainer
    chosen |= {"learning_rate": 1e-4, "warmup_steps": 0}
    return [*pretrain_settings(vae, output, TRAINED_ALONG, **chosen), f"cache.folder={output.parent / 'cache'}"]


@pytest.fixture(scope="module")
def runs(vae, tmp_path_factory):
    """The same run in one process, which is not sharded, and in two and four, which are."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(pretrain, arguments_of(vae, folder / "one"), folder, monkeypatch)
    launch(arguments_of(vae, folder / "two"), folder, 2, validates=True)
    launch(arguments_of(vae, folder / "four"), folder, 4)
    return folder


@pytest.mark.parametrize("processes", ["two", "four"])
def test_sharded_processes_follow_one(runs, processes):
    assert_follows(runs / processes, runs / "one")
    state = json.loads((runs / processes / "checkpoints" / "step-00000003" / "state.json").read_text())
    assert state["processes"] == {"two": 2, "four": 4}[processes]


def take_up(source: Path, output: Path) -> None:
    """A run that was stopped after the checkpoint of step 3, moved to another folder."""
    name = "step-00000003"
    shutil.copytree(source / "checkpoints" / name, output / "checkpoints" / name)
    shutil.copytree(source / "logs", output / "logs")


def test_a_sharded_run_goes_on_in_one_process(vae, runs, tmp_path, monkeypatch):
    take_up(runs / "four", tmp_path / "one")
    run(pretrain, arguments_of(vae, tmp_path / "one"), tmp_path, monkeypatch)
    assert_follows(tmp_path / "one", runs / "one")


@pytest.mark.parametrize("source", ["one", "two"])
def test_runs_of_one_and_two_go_on_in_four(vae, runs, tmp_path, source):
    take_up(runs / source, tmp_path / "four")
    launch(arguments_of(vae, tmp_path / "four"), tmp_path, 4)
    assert_follows(tmp_path / "four", runs / "one")


@pytest.mark.parametrize("processes", ["one", "two", "four"])
def test_consolidated_bit_by_bit(runs, tmp_path, processes):
    checkpoint = runs / processes / "checkpoints" / "step-00000006"
    done = consolidate(checkpoint, tmp_path / "pipeline")
    assert done.returncode == 0, done.stderr[-3000:]
    found, written = tensors_of(tmp_path / "pipeline"), tensors_of(runs / processes / "pipeline")
    assert found.keys() == written.keys() and all(torch.equal(t, written[name]) for name, t in found.items())
    pipe, averages = (
        ModalityForcingPipeline.from_pretrained(tmp_path / "pipeline"),
        read_tensors(checkpoint / "ema", {}),
    )
    assert len(averages) > 20
    for name, average in averages.items():
        part, name = name.split(".", 1)
        assert torch.equal(pipe.components[part].state_dict()[name], average)
    assert "exists already" in consolidate(checkpoint, tmp_path / "pipeline").stderr
    assert "is no checkpoint of a run" in consolidate(tmp_path / "nowhere", tmp_path / "other").stderr


def test_a_killed_worker_ends_the_job_and_the_run_goes_on(vae, runs, tmp_path, monkeypatch):
    output = tmp_path / "killed"
    process = start(arguments_of(vae, output, steps=6, checkpoint_every=1, keep_checkpoints=9), tmp_path, 2)
    while process.poll() is None and not list(output.glob("checkpoints/step-*[1-9]")):
        time.sleep(0.05)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0 and "Signal 9 (SIGKILL) received" in errors
    assert not (output / "pipeline").exists()
    run(pretrain, arguments_of(vae, output), tmp_path, monkeypatch)
    assert_follows(output, runs / "one")
