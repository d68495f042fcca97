"""What the training loops share: optimiser, averaged weights, checkpoints that resume, logs that notice trouble."""

import json
import math
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException
from tqdm import tqdm

from finetune.data.encoding import EncodedBatch
from finetune.data.sources import ReadReport
from finetune.training import sharding
from mf_diffusers.files import place_folder
from mf_diffusers.precision import DTYPES, choose_dtype, computes_in_bfloat16


COUNTS = ("batch_size", "micro_batch_size", "checkpoint_every", "keep_checkpoints", "validate_every", "log_every")
BEGIN_ANEW = "to begin anew, choose another trainer.output, or move or delete the checkpoints"


@dataclass
class TrainerConfig:
    """
    Args:
        output: folder of checkpoints, logs and the result.
        seed: of the data order and of every noise.
        steps: optimiser steps; 0 writes the result untrained.
        batch_size: samples of an optimiser step, over all processes and accumulated micro batches.
        micro_batch_size: samples of one forward pass of one process.
        learning_rate: reached after `warmup_steps`, then constant, but for the last `cooldown_steps`: there it falls to
            nothing, on a straight line.
        optimizer: "adamw", or "adamw8bit" (bitsandbytes, GPU).
        mixed_precision: what is computed in, "fp32" or "bf16"; "auto": bf16 where the device has instructions for it,
            else fp32. Weights in training are float32 either way.
        compile: compile the transformer's blocks (torch.compile); needs a C++ compiler.
        attention: a backend of diffusers' `set_attention_backend`, "_native_math" for example, which is the fastest for
            short sequences on a CPU; None: diffusers' choice.
        ema_decay: of the averaged weights, which are what is saved; 0 switches averaging off.
        checkpoint_every, keep_checkpoints: steps between checkpoints, and how many stay.
        validate_every: steps between validations.
        log_every: steps between log lines, and between checks that the loss is finite.
        num_workers: processes that read samples ahead, for each training process; 0 reads between the steps.
        resume: go on from the newest checkpoint in `output`; false: a new run, which does not start where there are
            checkpoints.
        memory_gib: what one process may use, in GiB; None: what its device has. A run that needs more by the estimate
            of finetune/preflight/memory.py does not start; 1e6 lets every run start.
    """

    output: str = "outputs/training"
    seed: int = 0
    steps: int = 1000
    batch_size: int = 32
    micro_batch_size: int = 32
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    cooldown_steps: int = 0
    weight_decay: float = 0.01
    adam_beta2: float = 0.99
    max_grad_norm: float = 1.0
    optimizer: str = "adamw"
    mixed_precision: str = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    attention: str | None = None
    ema_decay: float = 0.9999
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    validate_every: int = 500
    log_every: int = 20
    num_workers: int = 0
    resume: bool = True
    memory_gib: float | None = None

    def __post_init__(self):
        if self.optimizer not in ("adamw", "adamw8bit"):
            raise SystemExit(f"error: optimizer {self.optimizer!r} is none of adamw, adamw8bit")
        if self.mixed_precision == "auto":
            self.mixed_precision = "bf16" if computes_in_bfloat16(training_device()) else "fp32"
        if self.mixed_precision not in DTYPES:
            raise SystemExit(f"error: mixed_precision {self.mixed_precision!r} is none of auto, fp32, bf16")
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise SystemExit(f"error: {name} must be 1 or more, not {getattr(self, name)}")


def training_device() -> torch.device:
    """What a launch trains on, known before its processes join."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()


def join_processes() -> PartialState:
    """Makes the processes of a launch one group; called before all else that asks for them, because a `PartialState()`
    without this flag does not heed ACCELERATE_USE_CPU, and would leave every process on a CPU alone."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def checkpoints(output: str | Path) -> list[Path]:
    """Complete checkpoints in the folder of a run, oldest first."""
    return sorted((Path(output) / "checkpoints").glob("step-*[0-9]"))


def sample_generators(seed: int, step: int, positions: Iterable[int]) -> list[torch.Generator]:
    """A generator for each position in the batch of a step: the same whatever process or micro batch it falls to."""
    generators = []
    for position in positions:
        entropy = np.random.SeedSequence([seed, step, position]).generate_state(1, np.uint64)[0]
        generators.append(torch.Generator().manual_seed(int(entropy >> np.uint64(1))))
    return generators


class Trainer:
    """
    The state of a training run: trainable parameters, optimiser, averaged weights, step. Everything random is a
    function of seed and step, so a checkpoint needs no random state and a resumed run ends as one left alone.
    """

    def __init__(self, config: TrainerConfig, model: torch.nn.Module):
        self.config = config
        self.accelerator = Accelerator(
            mixed_precision="no" if config.mixed_precision == "fp32" else "bf16",
            log_with="tensorboard",
            project_dir=config.output,
        )
        self.device = self.accelerator.device
        if self.accelerator.is_main_process:
            choose_dtype(self.device, DTYPES[config.mixed_precision])  # warns where it is emulated
            print(f"computes in {config.mixed_precision} on {self.device.type}", file=sys.stderr)
        self.is_sharded = sharding.is_sharding_asked()
        if config.attention:
            for module in model.modules():
                if hasattr(module, "set_attention_backend"):
                    module.set_attention_backend(config.attention)
        if config.compile:
            for module in model.modules():
                if hasattr(module, "compile_repeated_blocks"):
                    module.compile_repeated_blocks()
        self.prepare(model)
        self.ema = EMAModel(self.shards.own_parts, decay=config.ema_decay, foreach=True) if config.ema_decay else None
        self.step = 0
        self.folder = Path(config.output)
        if checkpoints(self.folder):
            self.load(checkpoints(self.folder)[-1])
        self.accelerator.init_trackers("logs")
        self.progress_bar = tqdm(
            total=config.steps * config.batch_size,
            initial=self.step * config.batch_size,
            disable=not self.accelerator.is_main_process,
            unit=" samples",
        )
        self.running: dict[str, torch.Tensor] = {}
        self.running_steps = 0

    def prepare(self, model: torch.nn.Module) -> None:
        """Makes of the model what computes, the optimiser, and `shards`, which knows who holds what of them."""
        config = self.config
        dtype = DTYPES[config.mixed_precision]
        if sharding.is_fsdp_asked():
            sharding.shard(model, self.device, dtype)
        self.prepared = model if self.is_sharded else self.accelerator.prepare(model)
        named_parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(config, list(named_parameters.values()))
        shards = sharding.TensorShards
        if sharding.is_deepspeed_asked():
            from finetune.training import deepspeed_zero  # optional

            shards = deepspeed_zero.ZeroShards
            self.prepared, self.optimizer = deepspeed_zero.shard(
                model, self.optimizer, self.accelerator, dtype, config.micro_batch_size, config.max_grad_norm
            )
        self.shards = shards(self.prepared, self.optimizer, named_parameters)

    @property
    def validates(self) -> bool:
        """Whether this process computes in validations. The shards of a model are needed all."""
        return self.accelerator.is_main_process or self.is_sharded

    def micro_batches(self, stream: Iterator[EncodedBatch]) -> Iterator[tuple]:
        """
        This process's share of the next step's batch: for each micro batch the samples, a generator for each, and its
        weight, the part of the share that it is. What generators draw depends on seed, step and position in the batch
        alone. Processes exchange gradients at the last micro batch.
        """
        share, done = self.config.batch_size // self.accelerator.num_processes, 0
        while done < share:
            batch = next(stream)
            done += len(batch.positions)
            generators = sample_generators(self.config.seed, self.step, batch.positions)
            if self.is_sharded:
                self.shards.exchange_gradients(is_last=done == share)
            skips = done < share and not self.is_sharded
            with self.accelerator.no_sync(self.prepared) if skips else nullcontext():
                yield batch, generators, len(batch.positions) / share

    def train_step(
        self,
        stream: Iterator[EncodedBatch],
        losses_of: Callable[[EncodedBatch, list[torch.Generator]], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    ) -> None:
        """An optimiser step.

        Args:
            losses_of: samples of a micro batch and a generator for each -> the loss, and scalars to log.
        """
        sums = defaultdict(float)
        for batch, generators, weight in self.micro_batches(stream):
            loss, logged = losses_of(batch, generators)
            self.shards.backward(loss * weight)
            for name, value in logged.items():
                sums[name] += value.detach() * weight
        self.update(sums)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next optimiser step."""
        config = self.config
        warm = (self.step + 1) / max(1, config.warmup_steps)
        cool = (config.steps - self.step) / max(1, config.cooldown_steps)
        return config.learning_rate * min(1.0, warm, cool)

    @property
    def is_time_to_validate(self) -> bool:
        return self.step % self.config.validate_every == 0 or self.step == self.config.steps

    def update(self, losses: dict[str, torch.Tensor]) -> None:
        """After the backward passes of a step: clip, step, average, log, checkpoint.

        Args:
            losses: scalars to log, without gradient.

        Raises:
            FloatingPointError: a loss or gradient is not finite; the newest checkpoint is the last good state.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        grad_norm = self.shards.step(self.config.max_grad_norm)
        if self.ema:
            self.ema.step(self.shards.own_parts)
        self.step += 1

        for name, value in {**losses, "grad_norm": grad_norm}.items():
            self.running[name] = self.running.get(name, 0) + value.detach()
        self.running_steps += 1
        done = self.step == self.config.steps
        checkpoint = done or self.step % self.config.checkpoint_every == 0
        if checkpoint or self.step % self.config.log_every == 0:
            self.log()
        if checkpoint:
            self.save()
        self.progress_bar.update(self.config.batch_size)

    def log(self) -> None:
        steps = self.running_steps
        means = {name: self.accelerator.reduce(value, "mean").item() / steps for name, value in self.running.items()}
        self.running, self.running_steps = {}, 0
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"{', '.join(bad)} not finite within the {steps} steps before step {self.step}. Lower learning_rate "
                f"({self.config.learning_rate:g}) or max_grad_norm ({self.config.max_grad_norm:g}), or look at the "
                f"data of these steps. Last good checkpoint: {self.last_checkpoint}"
            )
        self.accelerator.log(means, step=self.step)
        self.progress_bar.set_postfix({"step": self.step} | {name: f"{value:.4g}" for name, value in means.items()})

    @property
    def last_checkpoint(self) -> Path | str:
        found = checkpoints(self.folder)
        return found[-1] if found else "none yet"

    def save(self) -> None:
        """Writes a checkpoint, whole or not at all, and drops the oldest beyond `keep_checkpoints`.

        Raises OSError if it cannot be written, to a full disk for example; those before stay as they are.
        """
        parent, is_main = self.folder / "checkpoints", self.accelerator.is_main_process
        folder = parent / f".step-{self.step:08}"
        if is_main:
            for leftover in parent.glob(".step-*"):  # of a run that was killed while it wrote
                shutil.rmtree(leftover)
        try:
            if is_main:
                folder.mkdir(parents=True)
            if self.is_sharded:
                self.accelerator.wait_for_everyone()
            if is_main or self.is_sharded:
                self.write_state(folder)
            if is_main:
                place_folder(folder, parent / f"step-{self.step:08}")
        except (OSError, SafetensorError, CheckpointException) as error:
            raise OSError(
                f"the checkpoint of step {self.step} cannot be written into {parent}: {error}. Make room, and give "
                f"the same command again. Last good checkpoint: {self.last_checkpoint}"
            ) from error
        finally:
            if is_main:
                shutil.rmtree(folder, ignore_errors=True)
        if is_main:
            for old in checkpoints(self.folder)[: -self.config.keep_checkpoints]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def write_state(self, folder: Path) -> None:
        """The files of a checkpoint; of a sharded one, each process writes its part."""
        self.shards.write(folder / "weights", self.shards.own_parts)
        sharding.write_tensors(folder / "optimizer", self.shards.optimizer_tensors())
        state = {"step": self.step, "samples": self.step * self.config.batch_size}
        state |= {"processes": self.accelerator.num_processes, "optimizer": self.config.optimizer}
        if self.ema:
            self.shards.write(folder / "ema", self.ema.shadow_params)
            state["ema_steps"] = self.ema.optimization_step
        if self.accelerator.is_main_process:
            (folder / "state.json").write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        """Takes up the state of a checkpoint, of any number of processes.

        Raises:
            ValueError: it belongs to another architecture; the message names a parameter.
        """
        state = json.loads((folder / "state.json").read_text())
        fill(self.shards, folder / "weights", self.shards.own_parts)
        self.shards.publish()
        self.shards.load_optimizer_tensors(self.shards.read(folder / "optimizer"))
        if self.ema:
            fill(self.shards, folder / "ema", self.ema.shadow_params)
            self.ema.optimization_step = state["ema_steps"]
        self.step = state["step"]

    @contextmanager
    def averaged_weights(self):
        """Context in which the model holds the averaged weights, and nothing is compiled for the sake of validation."""
        with torch.compiler.set_stance("eager_on_recompile"):
            if self.ema is None:
                yield
                return
            parameters = self.shards.own_parts
            self.ema.store(parameters)
            self.ema.copy_to(parameters)
            self.shards.publish()
            try:
                yield
            finally:
                self.ema.restore(parameters)
                self.shards.publish()

    def finish(self, report: ReadReport) -> None:
        """Closes the logs, and lists the samples that could not be read."""
        self.progress_bar.close()
        if report.failures and self.accelerator.is_main_process:
            print(report)
        self.accelerator.end_training()


def fill(shards: sharding.Shards, path: Path, parts: list[torch.Tensor]) -> None:
    """`Shards.fill`, whose error says what to do."""
    try:
        shards.fill(path, parts)
    except ValueError as error:
        raise ValueError(f"{error}; {BEGIN_ANEW}") from error


def load_result(model: torch.nn.Module, checkpoint: Path) -> None:
    """Fills the trainable parameters of a whole model with the averages of a checkpoint, or where it has none with the
    weights. Raises ValueError as `Shards.fill` does."""
    kind = "ema" if "ema_steps" in json.loads((checkpoint / "state.json").read_text()) else "weights"
    named_parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fill(sharding.TensorShards(model, None, named_parameters), checkpoint / kind, list(named_parameters.values()))


def make_optimizer(config: TrainerConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    settings = {
        "lr": config.learning_rate,
        "betas": (0.9, config.adam_beta2),
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    from bitsandbytes.optim import AdamW8bit  # optional, and only on GPUs

    return AdamW8bit(parameters, **settings)
