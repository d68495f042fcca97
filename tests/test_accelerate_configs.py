"""The launch settings under finetune/accelerate: accelerate reads them, and they say what they are for."""

import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env


FOLDER = Path(__file__).parents[1] / "finetune" / "accelerate"
KINDS = {"one_gpu": "NO", "fsdp2": "FSDP", "fsdp2_nodes": "FSDP", "deepspeed_zero3": "DEEPSPEED"}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_accelerate_reads(name, kind):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == kind and config.mixed_precision == "bf16"


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_nodes"])
def test_a_launch_asks_for_shards(name, monkeypatch):
    """What the processes see in their environment is what finetune/training/sharding.py goes by."""
    monkeypatch.setattr("accelerate.commands.launch.is_cuda_available", lambda: True, raising=False)
    parsed = launch_command_parser().parse_args(["--config_file", str(FOLDER / f"{name}.yaml"), "train.py"])
    parsed, _, _ = _validate_launch_command(parsed)
    environment = prepare_multi_gpu_env(parsed)
    assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"


def test_the_examples_launch_one_command():
    slurm, sky = (FOLDER / "slurm.sh").read_text(), yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    subprocess.run(["bash", "-n", str(FOLDER / "slurm.sh")], check=True)
    subprocess.run(["bash", "-n"], input=sky["run"], text=True, check=True)
    options = ["--config_file finetune/accelerate/fsdp2_nodes.yaml", "--num_machines", "--machine_rank"]
    for option in [*options, "--num_processes", "--main_process_ip", "--main_process_port 29500"]:
        assert option in slurm and option in sky["run"]
    assert sky["envs"]["TRAINING"] in slurm
