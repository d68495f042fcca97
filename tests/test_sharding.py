"""Sharded runs (FSDP2) on CPU processes: they follow one process, go on in any number, and come together again."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from sharded_runs import (
    ENVIRONMENT,
    arguments_of,
    assert_consolidates,
    assert_follows,
    begin,
    consolidated,
    launch,
    relative_distance,
    take_up,
    train,
)
from training_runs import command, run, settings

from finetune import post_train, pretrain


pytest_plugins = ["sharded_runs"]
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def runs(vae, start, one):
    """The folder of that run and of the same in two and four processes, which are sharded."""
    for processes, name, validates in ((2, "two", True), (4, "four", False)):
        begin(start, one.parent / name)
        launch(processes, train, "pretrain", arguments_of(vae, one.parent / name), one.parent, validates)
    return one.parent


@pytest.mark.parametrize("processes", ["two", "four"])
def test_sharded_processes_follow_one(runs, processes):
    assert_follows(runs / processes, runs / "one")
    state = json.loads((runs / processes / "checkpoints" / "step-00000003" / "state.json").read_text())
    assert state["processes"] == {"two": 2, "four": 4}[processes]


def test_a_sharded_run_goes_on_in_one_process(vae, runs, tmp_path, monkeypatch):
    take_up(runs / "four", tmp_path / "one")
    run(pretrain, arguments_of(vae, tmp_path / "one"), tmp_path, monkeypatch)
    assert_follows(tmp_path / "one", runs / "one")


def test_a_run_of_two_goes_on_in_four(vae, runs, tmp_path):
    take_up(runs / "two", tmp_path / "four")
    launch(4, train, "pretrain", arguments_of(vae, tmp_path / "four"), tmp_path)
    assert_follows(tmp_path / "four", runs / "one")


@pytest.mark.parametrize("processes", ["one", "two", "four"])
def test_consolidated_bit_by_bit(runs, tmp_path, processes):
    assert_consolidates(runs / processes, tmp_path / "pipeline")
    with pytest.raises(SystemExit, match="exists already"):
        consolidated(runs / processes / "checkpoints" / "step-00000006", tmp_path / "pipeline")
    with pytest.raises(SystemExit, match="is no checkpoint of a run"):
        consolidated(tmp_path / "nowhere", tmp_path / "other")


def test_a_killed_worker_ends_the_job_and_the_run_goes_on(vae, start, one, tmp_path, monkeypatch):
    output = tmp_path / "killed"
    begin(start, output)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    arguments = arguments_of(vae, output, steps=6, checkpoint_every=1, keep_checkpoints=9, validate_every=100)
    process = subprocess.Popen(
        command("pretrain.py", arguments, tmp_path, *launcher),
        env=os.environ | ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not list(output.glob("checkpoints/step-*[1-9]")):
        time.sleep(0.05)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0 and "Signal 9 (SIGKILL) received" in errors
    assert not (output / "pipeline").exists()
    run(pretrain, arguments_of(vae, output), tmp_path, monkeypatch)
    assert_follows(output, one)


def test_post_training_of_flux2_with_frozen_weights_and_samples_of_several_sizes(
    base,
    cache,
    frames,
    tmp_path,
    monkeypatch,
):
    """Processes whose samples fall into micro batches of unequal number would wait for one another for ever."""

    def arguments(output):
        chosen = {"steps": 4, "batch_size": 8, "max_grad_norm": 1e9, "warmup_steps": 0}
        return settings(base, cache, tmp_path / output, frames, **chosen)

    run(post_train, arguments("one"), tmp_path, monkeypatch)
    launch(2, train, "post_train", arguments("two"), tmp_path)
    assert relative_distance(tmp_path / "two", tmp_path / "one", "weights") < 1e-3
