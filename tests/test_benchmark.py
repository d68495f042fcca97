"""The benchmarks of training and of sampling, on tiny models: their numbers, and FLOPs against a formula."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tiny import TINY_DIT, TINY_T5, TINY_TRANSFORMER, make_pipeline

from finetune import benchmark, benchmark_inference
from finetune.benchmark import PostTrainBenchmark, count_flops
from finetune.benchmark_inference import InferenceBenchmark, Sampling, measure_task, place, random_pipeline
from finetune.config import load_config
from finetune.data.encoding import EncodedBatch


pytest_plugins = ["training_runs"]
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


BASE = {name: value for name, value in TINY_TRANSFORMER.items() if "depth" not in name}
TRAINER = {
    "batch_size": 4,
    "micro_batch_size": 2,
    "mixed_precision": "fp32",
    "ema_decay": 0.9,
    "checkpoint_every": 1,
}
LENGTH = 12


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A tiny pipeline, of which the benchmarks take the sizes."""
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline().save_pretrained(folder)
    return folder


def write(folder: Path, **settings) -> str:
    path = folder / "tiny.yaml"
    OmegaConf.save(OmegaConf.create(settings), path)
    return str(path)


def post_training(folder: Path, pipeline, **settings) -> str:
    cache = {"pixels": 1024}
    chosen = {"base": str(pipeline), "max_sequence_length": LENGTH, "sample_size": 32, "cache": cache}
    return write(folder, **chosen | {"trainer": TRAINER} | settings)


def pretraining(folder: Path, pipeline) -> str:
    return write(
        folder,
        architecture="dit",
        vae=str(pipeline),
        transformer=TINY_DIT,
        text_encoder=TINY_T5,
        vocabulary_size=200,
        max_sequence_length=LENGTH,
        cache={"pixels": 1024, "text": False},
        trainer=TRAINER,
    )


def run(script, arguments: list[str], output: Path, monkeypatch, capsys) -> list[dict]:
    """The results that a command appended to its file, after looking at the table that it printed."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *arguments, f"benchmark.output={output}"])
    script.main()
    results = [json.loads(line) for line in output.read_text().splitlines()]
    table = capsys.readouterr().out.splitlines()
    assert table[0] == f"| {' | '.join(script.COLUMNS)} |" and set(table[1]) == set("|-")
    columns = len(script.COLUMNS) + 1
    assert table[0].count("|") == table[1].count("|") == columns and all(row.count("|") == columns for row in table[2:])
    assert all(r["torch"] == torch.__version__ and "cpu" in r["device"] for r in results)
    return results


@pytest.mark.parametrize("kind", ["lora", "teacher", "pretraining"])
def test_training(pipeline, tmp_path, monkeypatch, capsys, kind):
    if kind == "pretraining":
        arguments = ["--pretrain", "--config", pretraining(tmp_path, pipeline)]
    else:
        objective = {"distillation_high": 0.5}
        mode = "lora" if kind == "lora" else "full"
        arguments = ["--config", post_training(tmp_path, pipeline, mode=mode, lora_rank=2, objective=objective)]
    steps = ["benchmark.warmup_steps=1", "benchmark.steps=2", "benchmark.samples=3"]
    monkeypatch.chdir(tmp_path)
    (result,) = run(benchmark, [*arguments, *steps], tmp_path / "results" / "all.jsonl", monkeypatch, capsys)
    positive = ["parameters", "trained", "samples_per_second", "flops_per_sample", "mfu", "peak_flops", "peak_memory"]
    assert all(math.isfinite(result[name]) and result[name] > 0 for name in positive)
    assert 0 <= result["data_wait"] < 1 and result["peak_source"] == "measured"
    assert result["tokens"] == LENGTH + 64 * (1 if kind == "pretraining" else 2)
    assert result["tokens_per_second"] == pytest.approx(result["samples_per_second"] * result["tokens"])
    assert result["trained"] == result["parameters"] if kind == "pretraining" else result["trained"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results", "tiny.yaml"]  # nothing else was written


def one_sample(tokens: int, patch_size: int, config) -> EncodedBatch:
    side = round(tokens**0.5) * patch_size
    shape = (1, 1, side, side)
    text = torch.randn(1, config.max_sequence_length, config.base_config["joint_attention_dim"])
    channels = config.base_config["in_channels"]
    latents = torch.randn(1, tokens, channels)
    return EncodedBatch(latents, torch.rand(shape), torch.ones(shape, dtype=torch.bool), text, ["a"], [0])


def counted(path: str, *overrides: str) -> float:
    config = load_config(PostTrainBenchmark, ["--config", path, *overrides])
    return count_flops(config, one_sample(64, 16, config))


def test_model_flops(tmp_path):
    """Against a formula: 2 a weight and token forward, twice that backward, and attention's two products."""
    width, heads = 128, 4
    sizes = {"attention_head_dim": 32, "num_attention_heads": heads, "axes_dims_rope": [8, 8, 8, 8]}
    base = BASE | sizes | {"num_layers": 2, "num_single_layers": 4, "in_channels": 128, "joint_attention_dim": 64}
    path = write(
        tmp_path, mode="all", base_config=base, max_sequence_length=40, num_depth_decoder_layers=1, trainer=TRAINER
    )
    text, image, depth = 40, 64, 64
    tokens = text + image + depth
    block = (4 + 3 * 3) * width**2  # queries, keys, values and output; three matrices of a gated MLP of ratio 3
    products = 6 * block * tokens + 1 * block * depth  # six blocks of the trunk, one of the decoder
    attention = 2 * width * (6 * tokens**2 + depth**2)
    ends = width * (text * 64 + 2 * image * 128 + 2 * depth * 256)
    modulations = width**2 * (2 * 3 * 6 + 2 * 3 + 2 * 3 + 3)  # of a sample, of the order of a token's block
    forward = 2 * (products + attention + ends + modulations)
    whole = counted(path)
    assert whole == pytest.approx(3 * forward, rel=0.04)
    assert counted(path, "trainer.gradient_checkpointing=true") == whole
    assert counted(path, "base_dtype=bf16") == whole

    # A teacher adds a forward pass without depth; frozen weights take the products of their gradients away.
    teacher = counted(path, "objective.distillation_high=0.5") - whole
    trunk = 2 * (6 * (block * (text + image) + 2 * width * (text + image) ** 2) + width * (text * 64 + 2 * image * 128))
    assert teacher == pytest.approx(trunk, rel=0.04)
    frozen = whole - counted(path, "mode=full")
    assert frozen == pytest.approx(2 * 2 * block * (text + image), rel=0.04)


def test_inference(pipeline, tmp_path, monkeypatch, capsys):
    path = post_training(tmp_path, pipeline)
    chosen = ["benchmark.weights=fp32", "benchmark.image_to_depth_steps=[1,2]", "benchmark.joint_steps=[2]"]
    arguments = ["--config", path, *chosen, "benchmark.repeats=2"]
    results = run(benchmark_inference, arguments, tmp_path / "all.jsonl", monkeypatch, capsys)
    found = [(r["task"], r["steps"], r["calls"]) for r in results]
    assert found == [("image to depth", 1, 1), ("image to depth", 2, 2), ("joint", 2, 4)]
    for result in results:
        assert result["bare_seconds"] > 0 and 0 < result["loop_seconds"] < result["seconds"]
        assert result["overhead"] == result["loop_seconds"] / result["bare_seconds"] - 1
        assert math.isfinite(result["overhead"]) and result["peak_memory"] > 0


@pytest.mark.parametrize(
    ("weights", "offload"), [("bf16", "model"), ("bf16", "group"), ("fp8", "group"), ("nf4", "none"), ("nf4", "model")]
)
def test_weights_and_offloads(pipeline, tmp_path, weights, offload):
    if weights == "nf4":
        pytest.importorskip("bitsandbytes")
    config = load_config(InferenceBenchmark, ["--config", post_training(tmp_path, pipeline)])
    config.benchmark = Sampling(weights=weights, offload=offload)
    device = torch.device("cpu")
    pipe = random_pipeline(config, device)
    in_bfloat16 = sum(p.nbytes for p in pipe.transformer.parameters())
    place(pipe, config.benchmark, device)
    stored = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "nf4": torch.uint8}[weights]
    assert pipe.transformer.transformer_blocks[0].attn.to_q.weight.dtype == stored
    assert pipe.transformer.depth_head.proj_out.weight.dtype == torch.float32
    if weights != "bf16":
        assert sum(p.nbytes for p in pipe.transformer.parameters()) < 0.7 * in_bfloat16
    inputs = {"image": torch.rand(3, 32, 32), "prompt_embeds": torch.randn(1, LENGTH, 48), "num_inference_steps": 1}
    assert measure_task(pipe, inputs, repeats=1)["calls"] == 1


@pytest.mark.parametrize(
    ("script", "overrides", "message"),
    [
        (benchmark, ["benchmark.stepz=2"], "benchmark.stepz"),
        (benchmark, ["benchmark.steps=0"], "must be at least 1"),
        (benchmark, ["benchmark.samples=1000"], "from 1 to 256"),
        (benchmark, ["mode=half"], "none of full, all, lora"),
        (benchmark, ["--pretrain"], "base"),
        (benchmark_inference, ["benchmark.weights=fp4"], "none of auto, fp32, bf16, fp8, nf4"),
        (benchmark_inference, ["benchmark.offload=disk"], "none of none, model, group"),
        (benchmark_inference, ["benchmark.weights=nf4", "benchmark.offload=group"], "does not move"),
    ],
)
def test_wrong_settings(pipeline, tmp_path, monkeypatch, script, overrides, message):
    monkeypatch.setattr(sys, "argv", ["x", "--config", post_training(tmp_path, pipeline), *overrides])
    with pytest.raises(SystemExit, match=message):
        script.main()
