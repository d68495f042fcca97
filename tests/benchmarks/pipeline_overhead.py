"""What the pipeline's sampling loop costs over the bare transformer calls.

    python tests/benchmarks/pipeline_overhead.py [--device cuda] [--rounds 15]

Rounds of the sampling loop and of the same number of bare calls alternate, so that whatever else the machine does hits
both alike. Prints the median time of each and the median of the ratio of paired rounds. Goal: at most 1.03.
"""

import argparse
import statistics
import time

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from mf_diffusers import DepthProcessor, ModalityForcingFlux2Transformer2DModel, ModalityForcingPipeline
from mf_diffusers.modality_forcing.latent_tokens import position_ids


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", default="cpu")
parser.add_argument("--rounds", type=int, default=15)
parser.add_argument("--steps", type=int, default=4)
arguments = parser.parse_args()

torch.manual_seed(0)
with torch.device(arguments.device):
    transformer = ModalityForcingFlux2Transformer2DModel(
        num_layers=4,
        num_single_layers=4,
        num_depth_decoder_layers=2,
        attention_head_dim=64,
        num_attention_heads=12,
        joint_attention_dim=768,
        axes_dims_rope=(16, 16, 16, 16),
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 64, 128),
        "encoder_hidden_states": torch.randn(1, 32, 768),
        "timestep": torch.ones(1),
        "img_ids": position_ids(rows=8, columns=8),
        "txt_ids": position_ids(length=32),
        "depth_hidden_states": torch.randn(1, 64, 256),
        "depth_timestep": torch.ones(1),
        "depth_ids": position_ids(time=1, rows=8, columns=8),
        "return_dict": False,
    }
pipe = ModalityForcingPipeline(
    transformer=transformer,
    scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    depth_scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    vae=None,
    text_encoder=None,
    tokenizer=None,
    depth_processor=DepthProcessor(),
)


def bare_calls():
    for _ in range(arguments.steps):
        transformer(**inputs)


def sampling_loop():
    sigmas = torch.linspace(1, 1 / arguments.steps, arguments.steps)
    with pipe.progress_bar(total=arguments.steps) as progress_bar:
        pipe.denoise(
            inputs["hidden_states"],
            inputs["depth_hidden_states"],
            pipe.prepare_scheduler(pipe.scheduler, sigmas, arguments.device),
            pipe.prepare_scheduler(pipe.depth_scheduler, sigmas, arguments.device),
            inputs["encoder_hidden_states"],
            inputs["img_ids"],
            inputs["depth_ids"],
            progress_bar=progress_bar,
        )


def seconds(function) -> float:
    if arguments.device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if arguments.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


pipe.set_progress_bar_config(disable=True)
pairs = []
with torch.no_grad():
    for i in range(arguments.rounds + 2):
        # Which of the two goes first changes from round to round; the first two rounds warm up.
        order = (bare_calls, sampling_loop) if i % 2 else (sampling_loop, bare_calls)
        times = {function: seconds(function) / arguments.steps for function in order}
        pairs.append((times[bare_calls], times[sampling_loop]))
bare, loop = zip(*pairs[2:])
print(f"parameters        {sum(p.numel() for p in transformer.parameters()) / 1e6:.0f} M on {arguments.device}")
print(f"bare transformer  {1e3 * statistics.median(bare):.1f} ms a step")
print(f"sampling loop     {1e3 * statistics.median(loop):.1f} ms a step")
print(f"ratio             {statistics.median(b / a for a, b in pairs[2:]):.4f}")
