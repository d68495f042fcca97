"""Throughput and memory of training, on synthetic samples with random weights: neither weights nor data are needed.

    python finetune/benchmark.py [--pretrain] --config finetune/configs/NAME.yaml [key=value ...]
    accelerate launch finetune/benchmark.py ...

takes a settings file of finetune/post_train.py, or with `--pretrain` of finetune/pretrain.py, and trains as that script
does: the same model at its real size, loss, optimiser, averages, precision, compilation, attention and sharding. It
prints a row of a Markdown table and appends all numbers to a file of JSON lines. Nothing is saved.

- Model FLOPs are what the products of a forward and a backward pass take, by torch's FlopCounterMode: those of the
  teacher count, those that gradient checkpointing repeats do not, and frozen weights have no gradients to count.
  Utilisation (MFU) is their share of what the device can do: by its data sheet, or where that is not known, and on a
  CPU, as fast as it multiplies large matrices in the dtype of the computation.
- Samples come through the loader of the cache, from files that were just written, so that the disk is not measured. The
  encoding of samples that a run without a cache does between its steps is left out.
- Data wait is the share of the time that the loop waits for the loader. A GPU may be busy with earlier work meanwhile.
- Peak memory is what torch allocated on the GPU, the largest of the processes; on a CPU the process's resident memory.
"""

import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


sys.path.append(str(Path(__file__).parents[1]))  # the launcher puts this folder on the path, not the repository

from finetune import post_train, pretrain
from finetune.config import load_config, take_flag
from finetune.data.cache import SHARD, EncodedSamples, shard_path
from finetune.data.encoding import EncodedBatch
from finetune.post_train import PostTrainConfig, choose_trainable, make_teacher
from finetune.preflight.start_check import check_start
from finetune.pretrain import PretrainConfig, TextToImage
from finetune.training.models import empty_transformer, read_base, read_token_size
from finetune.training.tokenizers import TOKENIZERS
from finetune.training.trainer import Trainer, join_processes
from mf_diffusers import DepthProcessor
from mf_diffusers.errors import errors_as_lines
from mf_diffusers.modality_forcing.backbones import BACKBONES
from mf_diffusers.precision import DTYPES


# Dense bfloat16 products with float32 accumulation, FLOP/s, by what is in torch's name of the device: NVIDIA's data
# sheets and architecture white papers, halved where they speak of sparsity. The first that fits counts.
DATA_SHEETS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "RTX 5090": 209e12,
}
COLUMNS = {
    "settings": "{settings}",
    "parameters (trained)": "{parameters:.4g} M ({trained:.4g} M)",
    "batch (micro)": "{batch_size} ({micro_batch_size})",
    "tokens a sample": "{tokens}",
    "precision": "{precision}",
    "samples/s": "{samples_per_second:.3g}",
    "tokens/s": "{tokens_per_second:,.0f}",
    "model FLOPs a sample": "{flops_per_sample:.3g}",
    "MFU": "{mfu:.1%} of {peak_flops:.3g} FLOP/s ({peak_source})",
    "peak memory": "{peak_memory:.2f} GiB",
    "data wait": "{data_wait:.1%}",
    "device": "{processes} x {device}, torch {torch}",
}


@dataclass
class Measurement:
    """
    Args:
        warmup_steps: steps that are not counted; the first compiles.
        steps: optimiser steps that are counted.
        samples: different synthetic samples, at most 256; a batch may have one of them several times.
        output: file of JSON lines, to which the result is appended.
    """

    warmup_steps: int = 3
    steps: int = 10
    samples: int = 32
    output: str = "outputs/benchmark.jsonl"

    def __post_init__(self):
        if self.warmup_steps < 1 or self.steps < 1:
            raise SystemExit("error: benchmark.warmup_steps and benchmark.steps must be at least 1")
        if not 1 <= self.samples <= SHARD:
            raise SystemExit(f"error: benchmark.samples must be from 1 to {SHARD}, not {self.samples}")


@dataclass
class PostTrainBenchmark(PostTrainConfig):
    """The settings of finetune/post_train.py, and what is measured."""

    benchmark: Measurement = field(default_factory=Measurement)


@dataclass
class PretrainBenchmark(PretrainConfig):
    """The settings of finetune/pretrain.py, and what is measured."""

    benchmark: Measurement = field(default_factory=Measurement)


class Workload(NamedTuple):
    """
    Args:
        model: what trains, as the script gives it to its `Trainer`.
        losses_of: (trainer, batch, generators) -> loss of a micro batch, and its parts; of the trainer, `prepared` and
            `device` count.
        token_size: pixels along a token's side.
        text_dtype: of the text features in the cache; None where the text encoder trains along.
    """

    model: torch.nn.Module
    losses_of: Callable[[Any, EncodedBatch, list[torch.Generator]], tuple[torch.Tensor, dict[str, torch.Tensor]]]
    token_size: int
    text_dtype: torch.dtype | None

    @property
    def transformer_config(self) -> dict[str, Any]:
        return getattr(self.model, "transformer", self.model).config


def fill_randomly(model: torch.nn.Module, device: torch.device, drawn_on: torch.device | None = None):
    """A model from the meta device on `device`, with small random matrices and vectors of ones, in their dtypes; drawn
    on another device where that is faster."""
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                shape = {"size": parameter.shape, "dtype": parameter.dtype, "device": drawn_on or device}
                parameter.copy_(0.02 * torch.randn(**shape))
            else:
                parameter.fill_(1)
    return model


def post_training(config: PostTrainConfig, device: torch.device, fill: Callable = fill_randomly) -> Workload:
    """What finetune/post_train.py trains."""
    base_config, token_size = read_base(config)
    model = empty_transformer(config)
    choose_trainable(model, config)
    base = None  # the teacher; with a LoRA it is in the model
    if config.distils and config.mode != "lora":
        family = BACKBONES[config.architecture]
        base_class = family.transformer_class if "depth_channels" in base_config else family.base_class
        with torch.device("meta"):
            base = base_class(**base_config).to(DTYPES[config.base_dtype])
        fill(base, device)
    fill(model, device)
    teacher = make_teacher(config, model, base, device)
    depth_processor = DepthProcessor(patch_size=token_size, **config.depth_processor)
    dtype, text_shape = DTYPES[config.base_dtype], (config.max_sequence_length, model.shape.text_channels)
    empty_embeds = torch.zeros(1, *text_shape, dtype=dtype, device=device)

    def losses_of(trainer, batch, generators):
        return post_train.micro_batch_losses(config, trainer, batch, generators, empty_embeds, depth_processor, teacher)

    return Workload(model, losses_of, token_size, dtype)


def pre_training(config: PretrainConfig, device: torch.device) -> Workload:
    """What finetune/pretrain.py trains."""
    tokenizer = dtype = empty_embeds = None
    if config.pretrained_text_encoder is None:
        words = [f"w{number}" for number in range(config.vocabulary_size)]
        tokenizer = TOKENIZERS[BACKBONES[config.architecture].text_encoder_class](words, config.vocabulary_size)
    with device:
        model = TextToImage(config, tokenizer)
    token_size = read_token_size(config.vae, config.transformer)
    if tokenizer is None:
        dtype = DTYPES[config.trainer.mixed_precision]
        shape = BACKBONES[config.architecture].transformer_class.shape_of(model.transformer.config)
        empty_embeds = torch.zeros(1, config.max_sequence_length, shape.text_channels, dtype=dtype, device=device)

    def losses_of(trainer, batch, generators):
        return pretrain.micro_batch_losses(config, trainer, batch, generators, empty_embeds, token_size)

    return Workload(model, losses_of, token_size, dtype)


def write_samples(config, work: Workload, folder: Path) -> EncodedSamples:
    """A cache of random samples, square and with depth on every pixel, of the sizes that `config` says."""
    side = max(1, round(config.cache.pixels**0.5 / work.token_size))
    generator, count, tensors = torch.Generator().manual_seed(0), config.benchmark.samples, {}
    shape = (1, side * work.token_size, side * work.token_size)
    sizes = BACKBONES[config.architecture].transformer_class.shape_of(work.transformer_config)
    text_shape = (config.max_sequence_length, sizes.text_channels)
    for place in range(count):
        tensors[f"latents.{place}"] = torch.randn(side**2, sizes.token_channels, generator=generator)
        tensors[f"depth.{place}"] = 1.9 * torch.rand(shape, generator=generator)
        tensors[f"valid.{place}"] = torch.ones(shape, dtype=torch.bool)
        if work.text_dtype is not None:
            tensors[f"prompt_embeds.{place}"] = torch.randn(text_shape, generator=generator).to(work.text_dtype)
    save_file(tensors, shard_path(folder, 0), {"captions": json.dumps(["w1 w2"] * count)})
    return EncodedSamples(folder, count)


def count_flops(config: PostTrainConfig | PretrainConfig, batch: EncodedBatch) -> float:
    """Model FLOPs of a sample of `batch`, in training. The weights are tensors without memory, all float32, because
    FLOPs do not depend on dtypes."""
    device, mode = torch.device("cpu"), FakeTensorMode(allow_non_fake_inputs=True)

    def pretend_to_fill(model, device):
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                with mode:
                    fake = torch.empty(parameter.shape, device=device)
                setattr(module, name, torch.nn.Parameter(fake, parameter.requires_grad))
        model.to = lambda _: model  # torch cannot move such a module; it is where it should be

    if isinstance(config, PretrainConfig):
        with mode:
            work = pre_training(config, device)
    else:
        work = post_training(replace(config, base_dtype="fp32"), device, fill=pretend_to_fill)
    generators = [torch.Generator() for _ in batch.positions]
    # Fused kernels of attention repeat its forward pass in the backward pass: plain products do not.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work.losses_of(SimpleNamespace(prepared=work.model, device=device), batch, generators)[0].backward()
    return counter.get_total_flops() / len(batch.positions)


class Waiting:
    """An iterator that adds up the seconds spent in waiting for its next item."""

    def __init__(self, stream: Iterator):
        self.stream, self.seconds = stream, 0.0

    def __iter__(self):
        return self

    def __next__(self):
        start = time.perf_counter()
        item = next(self.stream)
        self.seconds += time.perf_counter() - start
        return item


def synchronize(device: torch.device) -> None:
    """Waits until an asynchronous device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def train(trainer: Trainer, work: Workload, stream: Iterator[EncodedBatch], steps: int) -> float:
    """Optimiser steps as the scripts take them; returns their seconds."""
    synchronize(trainer.device)
    start = time.perf_counter()
    for _ in range(steps):
        trainer.train_step(stream, partial(work.losses_of, trainer))
    synchronize(trainer.device)
    return time.perf_counter() - start


def peak_memory(device: torch.device) -> float:
    """GiB; see above. `reset_peak_memory` begins the measurement, on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that the device can do, and by what they are known: "data sheet" or "measured"."""
    for name, value in DATA_SHEETS.items():
        if name in device_name(device):
            return value, "data sheet"
    size, seconds = 2048 if device.type == "cpu" else 8192, []
    a, b = torch.randn(2, size, size, dtype=dtype, device=device)
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds), "measured"


def measure(config: PostTrainBenchmark | PretrainBenchmark) -> dict[str, Any]:
    """Trains for a while; returns what came out, the same in every process."""
    measurement = config.benchmark
    torch.manual_seed(config.trainer.seed)
    device = join_processes().device
    peak, peak_source = peak_flops(device, DTYPES[config.trainer.mixed_precision])
    work = (pre_training if isinstance(config, PretrainConfig) else post_training)(config, device)
    transformer = getattr(work.model, "transformer", work.model)
    if config.trainer.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    parameters = [(p.numel(), p.requires_grad) for p in work.model.parameters()]  # before they are sharded
    with tempfile.TemporaryDirectory() as folder:
        # A step beyond the last one that is taken, and no checkpoint: nothing of it is worth keeping.
        steps = measurement.warmup_steps + measurement.steps + 1
        unsaved = {"output": folder, "steps": steps, "checkpoint_every": steps + 1}
        settings = replace(config.trainer, **unsaved)
        check_start(settings)
        trainer = Trainer(settings, work.model)
        samples = write_samples(config, work, Path(folder))
        reset_peak_memory(device)
        stream = Waiting(samples.stream(trainer))
        train(trainer, work, stream, measurement.warmup_steps)
        stream.seconds = 0.0
        seconds = train(trainer, work, stream, measurement.steps)
        sample = samples[[0], [0]]
        flops = count_flops(config, sample)
        found = gather_object([(seconds, stream.seconds / seconds, peak_memory(device), peak)])
        trainer.progress_bar.close()
        trainer.accelerator.end_training()
    all_seconds, waits, memories, peaks = zip(*found)
    per_second = measurement.steps * config.trainer.batch_size / max(all_seconds)
    has_depth = work.transformer_config.get("depth_channels") is not None
    tokens = config.max_sequence_length + sample.latents.shape[1] * (2 if has_depth else 1)
    return {
        "parameters": sum(count for count, _ in parameters) / 1e6,
        "trained": sum(count for count, is_trained in parameters if is_trained) / 1e6,
        "batch_size": config.trainer.batch_size,
        "micro_batch_size": config.trainer.micro_batch_size,
        "tokens": tokens,
        "precision": config.trainer.mixed_precision,
        "gradient_checkpointing": config.trainer.gradient_checkpointing,
        "compile": config.trainer.compile,
        "attention": config.trainer.attention,
        "optimizer": config.trainer.optimizer,
        "steps": measurement.steps,
        "samples_per_second": per_second,
        "tokens_per_second": per_second * tokens,
        "flops_per_sample": flops,
        "mfu": flops * per_second / sum(peaks),
        "peak_flops": peak,
        "peak_source": peak_source,
        "peak_memory": max(memories),
        "data_wait": max(waits),
        "processes": trainer.accelerator.num_processes,
        "device": device_name(device),
    }


def describe_settings(arguments: list[str]) -> str:
    """A command line in short: the settings file's name, and the overrides that are not about the measurement."""
    names = [Path(a).stem if a.endswith(".yaml") and "=" not in a else a for a in arguments]
    return " ".join(name for name in names if name != "--config" and not name.startswith("benchmark."))


def report(results: list[dict[str, Any]], columns: dict[str, str], output: str) -> None:
    """Appends results to a file of JSON lines, and prints them as a Markdown table.

    Args:
        columns: the table's header, and how a result is written under it.
    """
    settings = {"command": " ".join(sys.argv), "settings": describe_settings(sys.argv[1:]), "torch": torch.__version__}
    results = [settings | result for result in results]
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with open(output, "a") as file:
        file.writelines(json.dumps(result) + "\n" for result in results)
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for result in results:
        print(f"| {' | '.join(template.format(**result) for template in columns.values())} |")


def main() -> None:
    is_pretraining = take_flag("--pretrain")
    script = pretrain if is_pretraining else post_train
    config = load_config(PretrainBenchmark if is_pretraining else PostTrainBenchmark)
    script.check(config)
    result = measure(config)
    if join_processes().is_main_process:
        report([result], COLUMNS, config.benchmark.output)


if __name__ == "__main__":
    with errors_as_lines():
        main()
