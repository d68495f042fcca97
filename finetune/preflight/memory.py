"""What a training step needs on the device of one process, whether it fits there, and the nearest settings that do.

The model is on the meta device, so neither its weights nor memory for them are needed. What lives through a step is
counted. Left out are: the VAE (it stays on the device); the text encoder where there is a cache (it is there while
samples are encoded and in validation); what validation needs; the CUDA context, workspaces of kernels and
fragmentation. So a run stops where the estimate alone is more than there is, and settings are called fitting where a
fifth more than the estimate is there.

Activations are what autograd keeps of a block of width D and MLP ratio m for each token: its input, the normalised
and the modulated input (3 D), queries and keys before their norm (2 D), the four tensors of attention (4 D), what the
gates multiply, the second norm or the fused projection (3 D), and five times m D in the gated MLP: (12 + 5 m) D values.
With gradient checkpointing it is D values for each block, and one block in full. The formula counts every product's
input, though frozen weights do not need theirs, every value in the compute dtype, though norms keep float32, and
grouped keys and values as wide as the queries that share them. Where a family keeps norms and rotations in float32
anyhow (`TransformerShape.float32_values`), what that takes beyond the compute dtype is counted besides.

Processes that share a model in shards (training/sharding.py) divide weights, gradients, optimiser and averages. Whole
are the weights that are in use, the teacher, and while micro batches accumulate the gradients, which are exchanged at
the end. DeepSpeed (training/deepspeed_zero.py) exchanges them after every micro batch, gathers weights in float32, and
has them twice. Left out are its buffers: by its defaults, 5e8 gradients (2 GB) and up to 1e9 gathered weights (4 GB).
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import combinations, product
from typing import Any, NamedTuple

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from finetune.training.sharding import is_deepspeed_asked, is_sharding_asked, roots
from finetune.training.trainer import TrainerConfig
from mf_diffusers.modality_forcing.backbones import BACKBONES
from mf_diffusers.precision import DTYPES


OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2}
MARGIN = 1.2  # for what the estimate leaves out
SHARDED_LAUNCH = "accelerate launch --config_file finetune/accelerate/fsdp2.yaml --num_processes"
Stack = tuple[int, int, int, float]  # blocks of one kind: their number, tokens, width and MLP ratio
Changes = dict[str, Any]  # settings by their dotted names; SHARDED_LAUNCH: in how many processes


class Launch(NamedTuple):
    """How many processes train, and whether they share one model in shards, and do so by DeepSpeed."""

    processes: int = 1
    is_sharded: bool = False
    by_deepspeed: bool = False

    @classmethod
    def current(cls) -> "Launch":
        return cls(PartialState().num_processes, is_sharding_asked(), is_deepspeed_asked())


ALONE = Launch()


def size_in_bytes(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def activation_bytes(stacks: list[Stack], config: TrainerConfig, float32_values: float = 0) -> int:
    """What autograd keeps of a micro batch; see above."""
    itemsize = DTYPES[config.mixed_precision].itemsize
    in_float32 = float32_values * (4 - itemsize) / itemsize
    inputs = [blocks * tokens * width for blocks, tokens, width, _ in stacks]
    per_block = [(12 + 5 * ratio + in_float32) * tokens * width for _, tokens, width, ratio in stacks]
    if config.gradient_checkpointing:
        values = sum(inputs) + max(per_block)
    else:
        values = sum(blocks * whole for (blocks, *_), whole in zip(stacks, per_block))
    return int(values) * config.micro_batch_size * itemsize


def gathered_values(model: torch.nn.Module) -> int:
    """Weights that a sharded step holds whole: of the block at work and the next one, and of what is in no block."""
    blocks = [
        sum(p.numel() for p in module.parameters())
        for root in roots(model)
        for module in root.modules()
        if type(module).__name__ in root._no_split_modules
    ]
    return sum(p.numel() for p in model.parameters()) - sum(blocks) + 2 * max(blocks)


def memory(
    model: torch.nn.Module,
    config: TrainerConfig,
    stacks: list[Stack],
    teacher_bytes: int = 0,
    text_encoder_bytes: int = 0,
    launch: Launch = ALONE,
    float32_values: float = 0,
) -> dict[str, int]:
    """Bytes on the device in a training step, by what they are for."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    in_float32 = sum(p.numel() for p in frozen if p.dtype == torch.float32) + trained
    parts = launch.processes if launch.is_sharded else 1
    accumulates = launch.processes * config.micro_batch_size < config.batch_size and not launch.by_deepspeed
    dtypes = " and ".join(sorted({str(p.dtype)[6:] for p in frozen})) or "none"
    checkpointing = "with" if config.gradient_checkpointing else "without"
    needs = {
        f"frozen weights, {dtypes}": size_in_bytes(frozen) // parts,
        "trainable weights, float32": (8 if launch.by_deepspeed else 4) * trained // parts,
        "their gradients, float32": 4 * trained // (1 if accumulates else parts),
        f"optimizer, {config.optimizer}": OPTIMIZER_BYTES[config.optimizer] * trained // parts,
        "averaged weights (EMA), float32": 4 * trained // parts if config.ema_decay else 0,
        "bf16 copies of the float32 weights": 2 * in_float32 if config.mixed_precision == "bf16" else 0,
        "teacher (self-distillation)": teacher_bytes,
        f"activations, {checkpointing} gradient checkpointing": activation_bytes(stacks, config, float32_values),
    }
    if text_encoder_bytes:
        needs["frozen text encoder, there without a cache"] = text_encoder_bytes
    if launch.is_sharded:
        needs["bf16 copies of the float32 weights"] = 0  # the shards are gathered in the dtype of the computation
        dtype = torch.float32 if launch.by_deepspeed else DTYPES[config.mixed_precision]
        needs["gathered weights of two blocks, with gradients"] = 2 * gathered_values(model) * dtype.itemsize
    elif launch.processes > 1:
        needs["copy of the gradients that processes exchange"] = 4 * trained
    return needs


def post_training_memory(config, model, text_encoder: int, launch: Launch = ALONE) -> dict[str, int]:
    """`memory` of a `PostTrainConfig` and its grafted transformer, of which is chosen what trains.

    Args:
        text_encoder: parameters of a frozen one that stays on the device.
    """
    shape = model.shape
    images = config.cache.pixels // model.config.depth_channels
    tokens = config.max_sequence_length + 2 * images
    stacks = [
        (shape.trunk_blocks, tokens, shape.width, shape.mlp_ratio),
        (model.config.num_depth_decoder_layers, images, shape.width, shape.mlp_ratio),
    ]
    of_base = (p for name, p in model.named_parameters() if "lora_" not in name and not model.is_depth_parameter(name))
    base = sum(p.numel() for p in of_base)
    teacher = base * DTYPES[config.base_dtype].itemsize if config.distils and config.mode != "lora" else 0
    text_encoder_bytes = text_encoder * DTYPES[config.base_dtype].itemsize
    return memory(model, config.trainer, stacks, teacher, text_encoder_bytes, launch, shape.float32_values)


def pretraining_memory(config, model, token_size: int, text_encoder: int, launch: Launch = ALONE) -> dict[str, int]:
    """`memory` of a `PretrainConfig` and its `TextToImage` model; `text_encoder` as `post_training_memory` takes it."""
    transformer, length = model.transformer, config.max_sequence_length
    tokens = length + config.cache.pixels // token_size**2
    shape = BACKBONES[config.architecture].transformer_class.shape_of(transformer.config)
    stacks = [(shape.trunk_blocks, tokens, shape.width, shape.mlp_ratio)]
    if model.tokenizer is not None:
        text = model.text_encoder.config
        mlp_width = getattr(text, BACKBONES[config.architecture].text_mlp_width)
        stacks.append((text.num_hidden_layers, length, text.hidden_size, mlp_width / text.hidden_size))
    text_encoder_bytes = text_encoder * DTYPES[config.trainer.mixed_precision].itemsize
    return memory(model, config.trainer, stacks, 0, text_encoder_bytes, launch, shape.float32_values)


def available_bytes(config: TrainerConfig) -> int:
    """What a process may use: as the settings say, or the memory of its device, the smallest of all processes'.

    On a CPU it is what is free now, divided by the processes there.
    """
    if config.memory_gib is not None:
        return int(config.memory_gib * 2**30)
    device = PartialState().device
    if device.type == "cuda":
        own = torch.cuda.mem_get_info(device)[1]
    else:
        own = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(gather_object([own]))


def memory_verdict(
    config, memory_of: Callable[[Any, Launch], dict[str, int]], levers: dict[str, list] | None = None
) -> tuple[bool, str]:
    """
    Whether a run fits into the memory that there is. All processes of the run must ask at once.

    Args:
        config: settings of a script, with a `TrainerConfig` as `trainer`.
        memory_of: the `memory` of such settings in a launch.
        levers: what else than the settings of the trainer may be changed to need less: values by setting, the nearest
            first.

    Returns:
        False where it does not, and the verdict as text, with the nearest settings that fit where it is close or worse.
    """
    launch, available = Launch.current(), available_bytes(config.trainer)
    needs = sum(memory_of(config, launch).values())
    facts = f"a training step needs {gib(needs)}, and a process may use {gib(available)}"
    if MARGIN * needs <= available:
        return True, f"memory: fits: {facts}"
    levers = trainer_levers(config.trainer, launch) | (levers or {})
    fits = needs <= available
    verdict = "close: the estimate leaves out as much as a fifth" if fits else "does not fit"
    return fits, f"memory: {verdict}: {facts}.\n{suggestions(config, memory_of, levers, launch, available)}" + (
        "" if fits else "\ntrainer.memory_gib=1e6 goes on all the same."
    )


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def trainer_levers(config: TrainerConfig, launch: Launch) -> dict[str, list]:
    """Settings of the trainer that may need less memory, the nearest values first."""
    smaller = range(config.micro_batch_size - 1, 0, -1)
    levers = {
        "trainer.micro_batch_size": [size for size in smaller if config.batch_size % size == 0],
        "trainer.gradient_checkpointing": [True] * (not config.gradient_checkpointing),
    }
    levers["trainer.ema_decay"] = [0.0] * bool(config.ema_decay)
    if config.memory_gib is not None or torch.cuda.is_available():  # the memory named may be another machine's
        levers["trainer.optimizer"] = ["adamw8bit"] * (config.optimizer == "adamw")
        counts = [launch.processes * 2**k for k in range(7)]
        levers[SHARDED_LAUNCH] = [n for n in counts if n > (launch.processes if launch.is_sharded else 1)]
    return levers


def suggestions(config, memory_of, levers: dict[str, list], launch: Launch, available: int) -> str:
    """The settings that fit with the fewest changes, each with its estimate; or that none do."""
    least = float("inf")
    for number in range(1, len(levers) + 1):
        fitting = []
        for names in combinations(levers, number):
            for changes, needs in estimates(config, memory_of, {name: levers[name] for name in names}, launch):
                least = min(least, needs)
                if MARGIN * needs <= available:
                    fitting.append((changes, needs))
                    break
        if fitting:
            return "\n".join(
                ["These settings fit, with a fifth to spare:"]
                + [f"  {gib(needs):>11}  {as_text(changes)}" for changes, needs in fitting]
            )
    tried = ", ".join(name for name, values in levers.items() if values)
    return f"None of these fit, alone or together, with a fifth to spare: {tried}; the least is {gib(least)}."


def estimates(config, memory_of, levers: dict[str, list], launch: Launch) -> Iterator[tuple[Changes, int]]:
    """Every choice of values that goes together, and what it needs."""
    for values in product(*levers.values()):
        changes = dict(zip(levers, values))
        changed = launch
        if SHARDED_LAUNCH in changes:
            changed = Launch(changes[SHARDED_LAUNCH], is_sharded=True)
        settings = with_changes(config, changes)
        trainer = settings.trainer
        is_shared_equally = trainer.batch_size % (trainer.micro_batch_size * changed.processes) == 0
        if is_shared_equally and not (changed.is_sharded and trainer.optimizer != "adamw"):
            yield changes, sum(memory_of(settings, changed).values())


def with_changes(config, changes: Changes):
    """The settings with some changed."""
    trainer = {name.split(".")[1]: value for name, value in changes.items() if name.startswith("trainer.")}
    own = {name: value for name, value in changes.items() if name in vars(config)}
    return replace(config, trainer=replace(config.trainer, **trainer), **own)


def as_text(changes: Changes) -> str:
    """Changes of settings as one would write them on the command line."""
    launch = [f"{SHARDED_LAUNCH} {changes[SHARDED_LAUNCH]} ..."] if SHARDED_LAUNCH in changes else []
    settings = {name: value for name, value in changes.items() if name != SHARDED_LAUNCH}
    return " ".join(launch + [f"{name}={'true' if value is True else value}" for name, value in settings.items()])
