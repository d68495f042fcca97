"""Time and memory of sampling, with random weights: neither weights nor data are needed.

    python finetune/benchmark_inference.py --config finetune/configs/NAME.yaml [key=value ...]

takes a settings file of finetune/post_train.py and measures the pipeline that it would make: `base_config` or `base`
give the sizes. With `base` a `ModalityForcingPipeline`, such as mf_diffusers/embedded/model, it is of that one's sizes.
It prints a Markdown table of image -> depth and of joint generation, and appends all numbers to a file of JSON lines.

- Text features are given: the text encoder is no part of the numbers. Where nothing is offloaded it stays on the device
  and its size is to be added; where it is offloaded, it has left the device before the transformer begins.
- "Loop over bare" compares the sampling loop with the same calls of the transformer alone, on the same inputs: what
  guidance, schedulers and conversions cost besides. The fastest of several runs of each, in turn.
- Guidance is the pipeline's default: joint generation calls the transformer twice a step, image -> depth once.
- Peak memory is what torch allocated on the GPU, weights and all; on a CPU the process's resident memory.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler


sys.path.append(str(Path(__file__).parents[1]))  # as the other scripts, which the launcher starts

from finetune.benchmark import device_name, fill_randomly, peak_memory, report, reset_peak_memory, synchronize
from finetune.config import load_config
from finetune.post_train import PostTrainConfig, check
from finetune.training.models import FLUX2_TOKEN_SIZE, empty_transformer, read_base
from finetune.training.trainer import training_device
from mf_diffusers import DepthProcessor, ModalityForcingPipeline
from mf_diffusers.errors import errors_as_lines
from mf_diffusers.modality_forcing.conversion import PUBLISHED_SHIFT_MU
from mf_diffusers.precision import computes_in_bfloat16


WEIGHTS = ("fp32", "bf16", "fp8", "nf4")
OFFLOADS = ("none", "model", "group")
COLUMNS = {
    "settings": "{settings}",
    "parameters": "{parameters:.4g} M",
    "task": "{task}",
    "size": "{side}x{side}",
    "steps (calls)": "{steps} ({calls})",
    "weights": "{weights}",
    "offload": "{offload}",
    "seconds": "{seconds:.3g}",
    "loop over bare": "{overhead:+.1%}",
    "peak memory": "{peak_memory:.2f} GiB",
    "device": "{device}, torch {torch}",
}


@dataclass
class Sampling:
    """
    Args:
        weights: of the transformer: "fp32"; "bf16"; "auto": bf16 where the device has instructions for it, else fp32;
            "fp8", stored in 8 bits by diffusers' layerwise casting and computed in bfloat16; or "nf4", stored in 4 bits
            by bitsandbytes.
        offload: "none"; "model", a model at a time on the device; or "group", a layer at a time.
        side: of the square image, in pixels; null: `sample_size`.
        image_to_depth_steps, joint_steps: Euler steps of the two tasks; several numbers are measured one after another.
        repeats: runs of each, after one that is not counted.
        output: file of JSON lines, to which the results are appended.
    """

    weights: str = "auto"
    offload: str = "none"
    side: int | None = None
    image_to_depth_steps: list[int] = field(default_factory=lambda: [1, 4])
    joint_steps: list[int] = field(default_factory=lambda: [25])
    repeats: int = 3
    output: str = "outputs/benchmark.jsonl"

    def __post_init__(self):
        if self.weights == "auto":
            self.weights = "bf16" if computes_in_bfloat16(training_device()) else "fp32"
        if self.weights not in WEIGHTS:
            raise SystemExit(f"error: benchmark.weights {self.weights!r} is none of auto, {', '.join(WEIGHTS)}")
        if self.offload not in OFFLOADS:
            raise SystemExit(f"error: benchmark.offload {self.offload!r} is none of {', '.join(OFFLOADS)}")
        if (self.weights, self.offload) == ("nf4", "group"):
            raise SystemExit(
                "error: 4-bit weights have a state that group offload does not move: offload=model or none"
            )
        if self.repeats < 1:
            raise SystemExit("error: benchmark.repeats must be at least 1")


@dataclass
class InferenceBenchmark(PostTrainConfig):
    """The settings of finetune/post_train.py, and what is measured."""

    benchmark: Sampling = field(default_factory=Sampling)


class TimedPipeline(ModalityForcingPipeline):
    """The pipeline, which notes the seconds of its sampling loop."""

    loop_seconds = 0.0

    def denoise(self, *args, **kwargs) -> None:
        seconds, result = timed(self._execution_device, super().denoise, *args, **kwargs)
        self.loop_seconds = seconds
        return result


def timed(device: torch.device, function: Callable, *args, **kwargs) -> tuple[float, Any]:
    """Seconds of a call, to its end on the device, and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = function(*args, **kwargs)
    synchronize(device)
    return time.perf_counter() - start, result


def random_pipeline(config: InferenceBenchmark, device: torch.device) -> TimedPipeline:
    """The pipeline on the CPU, in bfloat16 or float32; what is random is drawn on `device`, which may be faster."""
    dtype = torch.float32 if config.benchmark.weights == "fp32" else torch.bfloat16
    _, token_size = read_base(config)
    transformer = empty_transformer(replace(config, base_dtype="fp32")).to(dtype)  # the depth head stays as it is
    if (Path(config.base) / "vae").is_dir():
        vae_config = AutoencoderKLFlux2.load_config(config.base, subfolder="vae")
    elif token_size == FLUX2_TOKEN_SIZE:
        vae_config = {}  # the class's defaults are FLUX.2's
    else:
        raise SystemExit(f"error: no VAE at {config.base}, and tokens of {token_size} pixels are not FLUX.2's")
    shift = math.exp(PUBLISHED_SHIFT_MU)
    pipe = TimedPipeline(
        transformer=fill_randomly(transformer, torch.device("cpu"), drawn_on=device).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        depth_scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=AutoencoderKLFlux2.from_config(vae_config).eval().to(dtype),
        text_encoder=None,
        tokenizer=None,
        depth_processor=DepthProcessor(patch_size=token_size, **config.depth_processor),
        max_sequence_length=config.max_sequence_length,
        default_sample_size=config.benchmark.side or config.sample_size,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def quantize_nf4(transformer: torch.nn.Module, device: torch.device) -> None:
    """Linear layers in 4 bits, but those that stay in float32; `device` does it, and the transformer ends there."""
    from bitsandbytes.nn import Linear4bit, Params4bit  # optional

    kept = tuple(transformer._keep_in_fp32_modules)
    for name, module in list(transformer.named_modules()):
        for child, linear in list(module.named_children()):
            if isinstance(linear, torch.nn.Linear) and not name.startswith(kept):
                quantized = Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                    device="meta",
                )
                quantized.weight = Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4")
                quantized.bias = linear.bias
                setattr(module, child, quantized.to(device))
    transformer.to(device)


def place(pipe: TimedPipeline, config: Sampling, device: torch.device) -> None:
    """Weights into their form, and the pipeline where it computes."""
    if config.weights == "fp8":
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    elif config.weights == "nf4":
        quantize_nf4(pipe.transformer, device)
    if config.offload == "none":
        pipe.to(device)
    elif config.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(
            onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda", non_blocking=True
        )


def record_calls(pipe: TimedPipeline, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments with which a run of the pipeline calls its transformer."""
    calls = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True, prepend=True
    )
    pipe(**inputs)
    handle.remove()
    return calls


@torch.no_grad()
def measure_task(pipe: TimedPipeline, inputs: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Runs the pipeline and, in turn with it, the bare calls of its transformer.

    Returns:
        `calls` of the transformer; `seconds` of the fastest whole run, `loop_seconds` of the fastest sampling loop and
        `bare_seconds` of its calls alone; `overhead` of the loop over these; `peak_memory` in GiB.
    """
    device = pipe._execution_device
    calls = record_calls(pipe, inputs)

    def call_transformer():
        for arguments in calls:
            pipe.transformer(**arguments)

    reset_peak_memory(device)
    whole, loops, bare = [], [], []
    for _ in range(repeats):
        whole.append(timed(device, pipe, **inputs)[0])
        loops.append(pipe.loop_seconds)
        bare.append(timed(device, call_transformer)[0])
        pipe.maybe_free_model_hooks()  # as a run does: an offloaded transformer comes anew to the next
    return {
        "calls": len(calls),
        "seconds": min(whole),
        "loop_seconds": min(loops),
        "bare_seconds": min(bare),
        "overhead": min(loops) / min(bare) - 1,
        "peak_memory": peak_memory(device),
    }


def measure(config: InferenceBenchmark) -> list[dict[str, Any]]:
    """Results of both tasks, for each number of steps."""
    sampling, device = config.benchmark, PartialState().device
    torch.manual_seed(config.trainer.seed)
    pipe = random_pipeline(config, device)
    parameters = sum(p.numel() for p in pipe.transformer.parameters()) / 1e6
    place(pipe, sampling, device)
    side = pipe.config.default_sample_size
    text = torch.randn(2, 1, config.max_sequence_length, pipe.transformer.shape.text_channels)
    tasks = {
        "image to depth": ({"image": torch.rand(3, side, side), "prompt_embeds": text[0]}, "image_to_depth_steps"),
        "joint": ({"prompt_embeds": text[0], "negative_prompt_embeds": text[1]}, "joint_steps"),
    }
    results = []
    for task, (inputs, name) in tasks.items():
        for steps in getattr(sampling, name):
            settings = {"output_type": "np", "height": side, "width": side, "num_inference_steps": steps}
            results.append(
                {"parameters": parameters, "task": task, "side": side, "steps": steps, "repeats": sampling.repeats}
                | {"weights": sampling.weights, "offload": sampling.offload, "device": device_name(device)}
                | measure_task(pipe, inputs | settings, sampling.repeats)
            )
    return results


def main() -> None:
    config = load_config(InferenceBenchmark)
    check(config)
    report(measure(config), COLUMNS, config.benchmark.output)


if __name__ == "__main__":
    with errors_as_lines():
        main()
