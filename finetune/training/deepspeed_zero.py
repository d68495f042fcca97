"""A model in shards over the processes of a run by DeepSpeed (ZeRO-3).

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

from finetune.training import sharding


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


class ZeroShards(sharding.Shards):
    """A model sharded by DeepSpeed. `model` is its engine. A part is a vector."""

    def exchange_gradients(self, is_last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(is_last)

    def backward(self, loss: torch.Tensor) -> None:
        self.model.backward(loss)

    def step(self, max_grad_norm: float) -> torch.Tensor:
        """Weights stay where a gradient is not finite. The engine knows `max_grad_norm` from the start."""
        self.model.step()
        return torch.as_tensor(self.model.get_global_grad_norm(), device=self.model.device)

    @torch.no_grad()
    def publish(self) -> None:
        self.model.empty_partition_cache()  # some may be gathered still, after a computation without gradients
        for parameter in self.named_parameters.values():
            parameter.ds_tensor.copy_(self.own_part(parameter))

    def shape_of(self, parameter: torch.nn.Parameter) -> torch.Size:
        return parameter.ds_shape

    def own_part(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        return safe_get_local_fp32_param(parameter).detach().requires_grad_()

    def as_whole(self, part: torch.Tensor, parameter: torch.nn.Parameter) -> DTensor:
        mesh = sharding.process_mesh(part.device.type)
        padded = DTensor.from_local(part, mesh, [Shard(0)], run_check=False).full_tensor()
        whole = padded[: parameter.ds_numel].view(parameter.ds_shape)
        return distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None).clone()  # which lets go of the whole

    def part_of(self, tensor: DTensor) -> torch.Tensor:
        processes, whole = torch.distributed.get_world_size(), tensor.full_tensor().flatten()
        padded = pad(whole, (0, -len(whole) % processes))
        return padded.view(processes, -1)[torch.distributed.get_rank()]

    def read(self, path: Path) -> dict[str, torch.Tensor]:
        mesh = sharding.process_mesh(next(iter(self.named_parameters.values())).device.type)
        layouts = {
            name: zeros(parameter.ds_shape, device_mesh=mesh, placements=[Shard(0)])
            for name, parameter in self.named_parameters.items()
        }
        return sharding.read_tensors(path, layouts)

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        steps = next(iter(self.optimizer.state.values()))["step"]
        tensors = {f"{name}|step": steps.clone() for name in self.named_parameters}
        for name, parameter in self.named_parameters.items():
            for moment in MOMENTS:
                part = safe_get_local_optimizer_state(parameter, moment)
                tensors[f"{name}|{moment}"] = self.as_whole(part, parameter)
        return tensors

    def load_optimizer_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Moments of parameters that had none in the checkpoint are zero."""
        steps = next(tensor for name, tensor in tensors.items() if name.endswith("|step"))
        for group in self.optimizer.fp32_partitioned_groups_flat:
            state = {moment: torch.zeros_like(group) for moment in MOMENTS}
            self.optimizer.state[group] = state | {"step": steps.to(group.device)}
        for name, parameter in self.named_parameters.items():
            for moment in MOMENTS:
                if f"{name}|{moment}" in tensors:
                    part = self.part_of(tensors[f"{name}|{moment}"])
                    safe_set_local_optimizer_state(parameter, part, moment)
