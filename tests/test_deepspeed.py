"""Runs under DeepSpeed (ZeRO-3) on two CPU processes: they follow one without it, and go on with and without it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from sharded_runs import (
    arguments_of,
    assert_consolidates,
    assert_follows,
    begin,
    curve_of,
    launch,
    relative_distance,
    take_up,
    train,
)
from tiny import TINY_TRANSFORMER
from training_runs import run, settings

from finetune import post_train, pretrain
from finetune.preflight.start_check import check_start
from finetune.training.trainer import Trainer, TrainerConfig
from mf_diffusers import ModalityForcingFlux2Transformer2DModel


pytest_plugins = ["sharded_runs"]
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


deepspeed = pytest.importorskip("deepspeed")
CONFIG = Path(__file__).parents[1] / "finetune" / "accelerate" / "deepspeed_zero3.yaml"


def environment() -> dict[str, str]:
    """What accelerate's launcher tells processes by the shipped settings, but for the device."""
    arguments = ["--config_file", str(CONFIG), "--main_process_port", "0", "train.py"]
    launched = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelerate.commands.launch.deepspeed_launcher", launched.append)
        launch_command(launch_command_parser().parse_args(arguments))
    variables = prepare_deepspeed_cmd_env(launched[0])[1]
    asked = {name: value for name, value in variables.items() if name.startswith("ACCELERATE_")}
    return asked | {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_CPU": "false"}


def launch_deepspeed(processes: int, function: Callable, *args, **variables: str) -> None:
    launch(processes, in_deepspeed, environment() | variables, function, *args)


def in_deepspeed(variables: dict[str, str], function: Callable, *args) -> None:
    os.environ |= variables
    os.environ.pop("ACCELERATE_USE_FSDP")
    deepspeed.ops.__compatible_ops__.clear()  # what it compiles takes a minute, and serves inference
    PartialState(backend="gloo")  # accelerate knows DeepSpeed on GPUs only, and leaves processes on a CPU alone
    function(*args)


@pytest.fixture(scope="module")
def runs(vae, start, one):
    """The folder of a run in one process, and of the same in two under DeepSpeed."""
    begin(start, one.parent / "two")
    launch_deepspeed(2, train, "pretrain", arguments_of(vae, one.parent / "two"), one.parent, True)
    return one.parent


def test_two_processes_follow_one(runs):
    assert_follows(runs / "two", runs / "one")
    norms, other = (curve_of(runs / name, "grad_norm") for name in ("two", "one"))
    assert norms == pytest.approx(other, rel=1e-5) and max(norms.values()) > 1  # where clipping begins
    state = json.loads((runs / "two" / "checkpoints" / "step-00000003" / "state.json").read_text())
    assert state["processes"] == 2


def test_validation_sees_the_averages(vae, start, runs, tmp_path):
    begin(start, tmp_path / "one")
    train("pretrain", arguments_of(vae, tmp_path / "one"), tmp_path, validates=True)
    ours, theirs = (curve_of(folder, "validation/rgb_loss_at_0.5") for folder in (runs / "two", tmp_path / "one"))
    assert ours.keys() == {4, 6} and ours == pytest.approx(theirs, rel=1e-5)


def test_a_run_of_two_goes_on_in_one_process_without_deepspeed(vae, runs, tmp_path, monkeypatch):
    take_up(runs / "two", tmp_path / "one")
    run(pretrain, arguments_of(vae, tmp_path / "one"), tmp_path, monkeypatch)
    assert_follows(tmp_path / "one", runs / "one")


@pytest.mark.parametrize("stopped", ["one", "two"])
def test_a_run_goes_on_in_two_with_deepspeed(vae, runs, tmp_path, stopped):
    take_up(runs / stopped, tmp_path / "two")
    launch_deepspeed(2, train, "pretrain", arguments_of(vae, tmp_path / "two"), tmp_path)
    assert_follows(tmp_path / "two", runs / "one")


def test_consolidated_bit_by_bit(runs, tmp_path):
    assert_consolidates(runs / "two", tmp_path / "pipeline")


def make_trainer(folder: Path, **settings) -> Trainer:
    torch.manual_seed(0)
    config = TrainerConfig(output=str(folder), batch_size=2, micro_batch_size=1, **settings)
    check_start(config)
    return Trainer(config, ModalityForcingFlux2Transformer2DModel(**TINY_TRANSFORMER))


def check_parts(folder: Path) -> None:
    trainer = make_trainer(folder)
    parameters = trainer.shards.named_parameters.values()
    assert not any(parameter.numel() for parameter in parameters)
    padding = len(parameters)
    halves = sum(parameter.ds_numel for parameter in parameters) // 2
    for parts in (trainer.shards.own_parts, trainer.ema.shadow_params):
        assert halves <= sum(part.numel() for part in parts) <= halves + padding


def test_a_process_holds_its_part_alone(tmp_path):
    launch_deepspeed(2, check_parts, tmp_path)


POST_TRAININGS = {
    "frozen weights and samples of several sizes": [],
    "a teacher": [
        *("mode=lora", "lora_rank=2", "objective.distillation_high=2.0", "base_dtype=bf16"),
        *("trainer.mixed_precision=bf16", "trainer.gradient_checkpointing=true"),
    ],
}


@pytest.mark.parametrize("kind", POST_TRAININGS)
def test_post_training_of_flux2(base, cache, frames, fresh_accelerate, tmp_path, monkeypatch, kind):
    def arguments(output):
        chosen = {"steps": 4, "batch_size": 8, "max_grad_norm": 1e9, "warmup_steps": 0}
        return [*settings(base, cache, tmp_path / output, frames, **chosen), *POST_TRAININGS[kind]]

    run(post_train, arguments("one"), tmp_path, monkeypatch)
    launch_deepspeed(2, train, "post_train", arguments("two"), tmp_path)
    distance = relative_distance(tmp_path / "two", tmp_path / "one", "weights")
    print(f"{kind}: weights within {distance:.1e}")
    assert distance < (0.1 if "trainer.mixed_precision=bf16" in POST_TRAININGS[kind] else 1e-3)


def check_refused(folder: Path, message: str, settings: dict) -> None:
    with pytest.raises(SystemExit, match=message):
        make_trainer(folder, **settings)


@pytest.mark.parametrize(
    ("variables", "settings", "message"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, {}, "zero_stage is 2 and must be 3"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, {}, "offload_optimizer_device is cpu"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, {}, "offload_param_device is cpu"),
        ({}, {"optimizer": "adamw8bit"}, "needs optimizer=adamw, not adamw8bit"),
    ],
)
def test_wrong_settings(tmp_path, variables, settings, message):
    launch_deepspeed(1, check_refused, tmp_path, message, settings, **variables)
