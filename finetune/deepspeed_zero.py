"""A model in shards over the processes of a run by DeepSpeed (ZeRO-3): the verbs of finetune/sharding.py.

To DeepSpeed the model is one in float32: it gathers weights so, and the products are in the dtype of the computation by
autocast. It cuts every tensor, as a vector, into equal parts, the last one padded, and keeps two copies of those of the
weights: one that the optimiser changes, and one that is gathered. Checkpoints hold what those of FSDP2 do, tensors cut
along their first dimension.

Gradients are reduced after every micro batch. A parameter without a gradient counts as one with a gradient of zero, so
weight decay changes also what the model does not use.
"""

import warnings
from pathlib import Path

import deepspeed
import torch
from accelerate import Accelerator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, zeros
from torch.nn.functional import pad
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from finetune import sharding


MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def shard(
    model: torch.nn.Module,
    optimizer: torch.optim.AdamW,
    accelerator: Accelerator,
    dtype: torch.dtype,
    micro_batch_size: int,
    max_grad_norm: float,
) -> tuple[deepspeed.DeepSpeedEngine, DeepSpeedZeroOptimizer_Stage3]:
    """
    Shards a model in place, whose parameters stay the same objects, and an optimiser of its parameters.

    Args:
        dtype: of the computation.

    Returns:
        DeepSpeed's engine, to compute with, and its optimiser.

    Raises:
        SystemExit: the launch asks for another stage of ZeRO, or for offloading.
    """
    settings = accelerator.deepspeed_plugin.deepspeed_config
    check(settings["zero_optimization"])
    # No parameter stays whole between steps, where a change of its parts would not reach it.
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    settings |= {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,  # `exchange_gradients` says where a step ends
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }
    for root in sharding.roots(model):
        sharding.compute_in(root, accelerator.device.type, dtype)
    # Of functions that newer versions of torch rename, and DeepSpeed calls for every module.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    engine, _ = accelerator.prepare(model, optimizer)
    unset_hf_deepspeed_config()  # transformers would shard what is loaded from here on
    return engine, engine.optimizer


def check(settings: dict) -> None:
    """Stops at settings of ZeRO that the run cannot follow."""
    if settings["stage"] != 3:
        raise SystemExit(
            f"error: DeepSpeed's zero_stage is {settings['stage']} and must be 3: launch with "
            "finetune/accelerate/deepspeed_zero3.yaml"
        )
    for name in ("offload_optimizer", "offload_param"):
        device = settings.get(name, {}).get("device", "none")
        if device != "none":
            raise SystemExit(f"error: DeepSpeed's {name}_device is {device} and must be none")


def exchange_gradients(engine: deepspeed.DeepSpeedEngine, is_last: bool) -> None:
    """Whether the next backward pass ends an accumulation."""
    engine.set_gradient_accumulation_boundary(is_last)


def backward(engine: deepspeed.DeepSpeedEngine, loss: torch.Tensor) -> None:
    engine.backward(loss)


def step(engine: deepspeed.DeepSpeedEngine, *_) -> torch.Tensor:
    """Clips, updates the weights unless a gradient is not finite, and returns the norm before clipping."""
    engine.step()
    return torch.as_tensor(engine.get_global_grad_norm(), device=engine.device)


@torch.no_grad()
def publish(engine: deepspeed.DeepSpeedEngine) -> None:
    """Has the model compute with what is in the `own_part`s, where something else than a step changed them."""
    engine.empty_partition_cache()  # some may be gathered still, after a computation without gradients
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            parameter.ds_tensor.copy_(own_part(parameter))


def shape_of(parameter: torch.nn.Parameter) -> torch.Size:
    return parameter.ds_shape


def own_part(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The part of a parameter that this process trains, a vector; in the same memory. See `publish`."""
    return safe_get_local_fp32_param(parameter).detach().requires_grad_()


def as_whole(part: torch.Tensor, parameter: torch.nn.Parameter) -> DTensor:
    """A tensor of the shape of `parameter`, of the parts that the processes hold."""
    mesh = sharding.process_mesh(part.device.type)
    padded = DTensor.from_local(part, mesh, [Shard(0)], run_check=False).full_tensor()
    whole = padded[: parameter.ds_numel].view(parameter.ds_shape)
    return distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None).clone()  # which lets go of the whole


def part_of(tensor: DTensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this process holds of a tensor that `read_tensors` read."""
    processes, whole = torch.distributed.get_world_size(), tensor.full_tensor().flatten()
    padded = pad(whole, (0, -len(whole) % processes))
    return padded.view(processes, -1)[torch.distributed.get_rank()]


def read_tensors(path: Path, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """As `sharding.read_tensors`."""
    mesh = sharding.process_mesh(next(iter(parameters.values())).device.type)
    layouts = {
        name: zeros(parameter.ds_shape, device_mesh=mesh, placements=[Shard(0)])
        for name, parameter in parameters.items()
    }
    return sharding.read_tensors(path, layouts)


def optimizer_tensors(
    optimizer: DeepSpeedZeroOptimizer_Stage3, named_parameters: dict[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """As `sharding.optimizer_tensors`."""
    steps = next(iter(optimizer.state.values()))["step"]
    tensors = {f"{name}|step": steps.clone() for name in named_parameters}
    for name, parameter in named_parameters.items():
        for moment in MOMENTS:
            part = safe_get_local_optimizer_state(parameter, moment)
            tensors[f"{name}|{moment}"] = as_whole(part, parameter)
    return tensors


def load_optimizer_tensors(
    optimizer: DeepSpeedZeroOptimizer_Stage3,
    named_parameters: dict[str, torch.nn.Parameter],
    tensors: dict[str, torch.Tensor],
) -> None:
    """As `sharding.load_optimizer_tensors`. Moments of parameters that had none in the checkpoint are zero."""
    steps = next(tensor for name, tensor in tensors.items() if name.endswith("|step"))
    for group in optimizer.fp32_partitioned_groups_flat:
        state = {moment: torch.zeros_like(group) for moment in MOMENTS}
        optimizer.state[group] = state | {"step": steps.to(group.device)}
    for name, parameter in named_parameters.items():
        for moment in MOMENTS:
            if f"{name}|{moment}" in tensors:
                part = part_of(tensors[f"{name}|{moment}"], parameter)
                safe_set_local_optimizer_state(parameter, part, moment)
