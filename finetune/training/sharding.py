"""A model in shards over the processes of a run (torch's fully_shard, FSDP2), and checkpoints of them.

Every process holds its part of each weight, gradient, optimiser state and average. The units that are gathered for a
computation are the transformer blocks (`_no_split_modules`), the modules that stay in float32 (`_keep_in_fp32_modules`:
the depth head), and the rest. Every process writes its part of a checkpoint as safetensors; any number reads it.

`Shards` is what a training loop asks of a model that is shared so, or is whole: `TensorShards` for FSDP2 and for a
whole model, `ZeroShards` of finetune/training/deepspeed_zero.py for DeepSpeed.
"""

from abc import ABC, abstractmethod
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


class Shards(ABC):
    """
    A model in training and its optimiser, of which each process holds a part, or all.

    Args:
        model: what computes.
        optimizer: of the trainable parameters; None where nothing is trained, only filled.
        named_parameters: the trainable parameters by name.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        named_parameters: dict[str, torch.nn.Parameter],
    ):
        self.model, self.optimizer, self.named_parameters = model, optimizer, named_parameters

    @abstractmethod
    def exchange_gradients(self, is_last: bool) -> None:
        """Says whether the next backward pass ends an accumulation, and so exchanges gradients."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """The backward pass of a micro batch."""

    @abstractmethod
    def step(self, max_grad_norm: float) -> torch.Tensor:
        """Clips, updates the weights, and returns the norm before clipping."""

    @abstractmethod
    def publish(self) -> None:
        """Has the model compute with what is in the `own_parts`, where something else than a step changed them."""

    @abstractmethod
    def shape_of(self, parameter: torch.nn.Parameter) -> torch.Size:
        """The shape of a whole parameter."""

    @abstractmethod
    def own_part(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The part of a parameter that this process trains; in the same memory."""

    @abstractmethod
    def as_whole(self, part: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        """A tensor that is shared as `parameter` is, of the parts that the processes hold."""

    @abstractmethod
    def part_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """What this process holds of a tensor that `read` returned."""

    @abstractmethod
    def read(self, path: Path) -> dict[str, torch.Tensor]:
        """What `write_tensors` wrote, shared as the parameters are."""

    @abstractmethod
    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """The optimiser's state by `NAME|KEY`."""

    @abstractmethod
    def load_optimizer_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Gives the optimiser the state that `optimizer_tensors` gave and `read` read."""

    @property
    def own_parts(self) -> list[torch.Tensor]:
        """What this process holds of the trainable parameters."""
        return [self.own_part(parameter) for parameter in self.named_parameters.values()]

    def write(self, path: Path, parts: list[torch.Tensor]) -> None:
        """Writes what the processes hold of tensors that are as the trainable parameters."""
        named = zip(self.named_parameters.items(), parts)
        write_tensors(path, {name: self.as_whole(part.detach(), parameter) for (name, parameter), part in named})

    def fill(self, path: Path, parts: list[torch.Tensor]) -> None:
        """Fills `parts` with what `write` wrote.

        Raises:
            ValueError: it is of another model; the message names a parameter.
        """
        tensors = self.read(path)
        for (name, parameter), part in zip(self.named_parameters.items(), parts):
            shape = self.shape_of(parameter)
            if name not in tensors or tensors[name].shape != shape:
                raise ValueError(
                    f"{path.parent} is a checkpoint of another model: its {name} is "
                    f"{tuple(tensors[name].shape) if name in tensors else 'missing'}, here {tuple(shape)}"
                )
            part.detach().copy_(self.part_of(tensors[name]))


class TensorShards(Shards):
    """A model sharded by FSDP2, whose parameters are `DTensor`s, or a whole one."""

    def exchange_gradients(self, is_last: bool) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(is_last, recurse=False)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, max_grad_norm: float) -> torch.Tensor:
        grad_norm = torch.nn.utils.clip_grad_norm_(list(self.named_parameters.values()), max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm

    def publish(self) -> None:
        """Nothing is to be done: the model computes with the parts themselves."""

    def shape_of(self, parameter: torch.nn.Parameter) -> torch.Size:
        return parameter.shape

    def own_part(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        return parameter.detach().to_local().requires_grad_() if isinstance(parameter, DTensor) else parameter

    def as_whole(self, part: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        if not isinstance(parameter, DTensor):
            return part
        layout = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
        return DTensor.from_local(part, parameter.device_mesh, parameter.placements, **layout)

    def part_of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def read(self, path: Path) -> dict[str, torch.Tensor]:
        return read_tensors(path, self.named_parameters)

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """Plain counts become integers without a dimension."""
        return {
            f"{name}|{key}": torch.as_tensor(value)
            for name, parameter in self.named_parameters.items()
            for key, value in self.optimizer.state[parameter].items()
        }

    def load_optimizer_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        for full_name, value in tensors.items():
            name, key = full_name.rsplit("|", 1)
            parameter = self.named_parameters[name]
            is_count = value.ndim == 0 and not value.is_floating_point()
            self.optimizer.state[parameter][key] = value.item() if is_count else value.to(parameter.device)


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
