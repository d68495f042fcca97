"""A model in shards over the processes of a run (torch's fully_shard, FSDP2), and checkpoints of them.

Every process holds its part of each weight, gradient, optimiser state and average. The units that are gathered for a
computation are the transformer blocks (`_no_split_modules`), the modules that stay in float32 (`_keep_in_fp32_modules`:
the depth head), and the rest. Every process writes its part of a checkpoint as safetensors; any number reads it.

The verbs from `backward` on are for a whole model too. finetune/deepspeed_zero.py has the same ones for DeepSpeed.
"""

from functools import cache
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def is_fsdp_asked() -> bool:
    """Whether the launch says FSDP, as accelerate's configs do, and there are processes to share with."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP") and torch.distributed.is_initialized()


def is_deepspeed_asked() -> bool:
    """Whether the launch says DeepSpeed, as accelerate's configs do."""
    return PartialState().distributed_type == DistributedType.DEEPSPEED


def is_sharding_asked() -> bool:
    return is_fsdp_asked() or is_deepspeed_asked()


@cache
def process_mesh(device_type: str) -> DeviceMesh:
    return init_device_mesh(device_type, (torch.distributed.get_world_size(),))


def roots(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The models in `model`, which is one or has them as children."""
    return [root for root in (model, *model.children()) if getattr(root, "_no_split_modules", None)]


def compute_in(root: torch.nn.Module, device_type: str, dtype: torch.dtype) -> None:
    """Has a model compute under autocast, where `dtype` is not float32."""
    root.forward = torch.autocast(device_type, dtype, enabled=dtype != torch.float32)(root.forward)


def shard(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """
    Shards each of the models in `model`, in place: its parameters are new.

    Args:
        device: of the computation; parameters move there.
        dtype: of the computation and of the gathered weights. Shards and gradients keep float32.
    """
    for root in roots(model):
        shard_root(root, process_mesh(device.type), dtype)


def shard_root(root: torch.nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shards one model; it computes under autocast from here on."""
    # Inputs stay in float32: noise levels and noisy latents need it, and autocast casts for the products.
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    kept = root._keep_in_fp32_modules or []
    units = [(module, exact) for name, module in root.named_modules() if name in kept]
    units += [(module, policy) for module in root.modules() if type(module).__name__ in root._no_split_modules]
    compute_in(root, mesh.device_type, dtype)
    for module, unit_policy in (*units, (root, policy)):
        # A unit that stayed whole after a validation would miss the change of weights that follows.
        fully_shard(module, mesh=mesh, mp_policy=unit_policy, reshard_after_forward=True)


def exchange_gradients(model: torch.nn.Module, is_last: bool) -> None:
    """Whether the next backward pass ends an accumulation, and so exchanges gradients."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(is_last, recurse=False)


def backward(model: torch.nn.Module, loss: torch.Tensor) -> None:
    loss.backward()


def step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor], max_grad_norm: float
) -> torch.Tensor:
    """Clips, updates the weights, and returns the norm before clipping."""
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm


def publish(model: torch.nn.Module) -> None:
    """Nothing is to be done after a change of `own_part`s: the model computes with them."""


def shape_of(parameter: torch.Tensor) -> torch.Size:
    return parameter.shape


def own_part(parameter: torch.Tensor) -> torch.Tensor:
    """The part of a parameter that this process holds, all of it where nothing is sharded; in the same memory."""
    return parameter.detach().to_local().requires_grad_() if isinstance(parameter, DTensor) else parameter


def as_whole(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A tensor that is sharded as `parameter` is, of the parts that the processes hold."""
    if not isinstance(parameter, DTensor):
        return part
    layout = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
    return DTensor.from_local(part, parameter.device_mesh, parameter.placements, **layout)


def part_of(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that `read_tensors` read for `parameter`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes `path`.safetensors, or where tensors are sharded a folder `path`, in which every process must join."""
    if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(path), save_distributed=True))
    else:
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        save_file(copies, path.with_suffix(".safetensors"))


def read_tensors(path: Path, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Reads what any number of processes wrote.

    Args:
        path: as in `write_tensors`.
        parameters: those of this run. What belongs to one (`NAME` or `NAME|...`) and has its shape comes sharded as it
            is; all else comes whole, on the CPU.
    """
    if not path.is_dir():
        tensors = load_file(path.with_suffix(".safetensors"))
        return {name: lay_out(tensor, parameters.get(name.split("|")[0])) for name, tensor in tensors.items()}
    reader, tensors = HuggingFaceStorageReader(str(path)), {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        parameter, dtype = parameters.get(name.split("|")[0]), stored.properties.dtype
        if isinstance(parameter, DTensor) and parameter.shape == stored.size:
            tensors[name] = torch.zeros_like(parameter.detach(), dtype=dtype)
        else:
            tensors[name] = torch.zeros(stored.size, dtype=dtype)
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def lay_out(tensor: torch.Tensor, parameter: torch.Tensor | None) -> torch.Tensor:
    """A whole tensor sharded as `parameter` is, if it is and has the same shape."""
    if not isinstance(parameter, DTensor) or parameter.shape != tensor.shape:
        return tensor
    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named_parameters: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The optimiser's state by `NAME|KEY`. Plain counts become integers without a dimension."""
    return {
        f"{name}|{key}": torch.as_tensor(value)
        for name, parameter in named_parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, named_parameters: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]
) -> None:
    """Gives the optimiser the state that `optimizer_tensors` gave and `read_tensors` read."""
    for full_name, value in tensors.items():
        name, key = full_name.rsplit("|", 1)
        parameter = named_parameters[name]
        is_count = value.ndim == 0 and not value.is_floating_point()
        optimizer.state[parameter][key] = value.item() if is_count else value.to(parameter.device)
