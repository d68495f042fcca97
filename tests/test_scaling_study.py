"""The study of size and pre-training: its arithmetic, and the whole of it on a tiny rung."""

import importlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny import TINY_DIT, TINY_T5, make_pipeline

from finetune import scaling_study
from finetune.scaling_study import METRICS, ScalingConfig, draw_figure, fit, measure, write_tables


CONFIG = ScalingConfig(rungs=["small", "large"], budgets=[0, 100, 1000])


def planted(noise: float, seed: int = 0) -> dict[str, dict[str, float]]:
    """AbsRel = P^-0.2 S^-0.1 with noise in its logarithm."""
    generator = np.random.default_rng(seed)
    numbers = {}
    for rung, parameters in (("small", 1e6), ("large", 2e7)):
        for budget in CONFIG.budgets:
            for seed in CONFIG.seeds:
                errors = parameters**-0.2 * max(budget, 1) ** -0.1 * 10 ** (noise * generator.normal(size=len(METRICS)))
                row = dict(zip(METRICS, errors))
                numbers[f"{rung}, {budget}, seed {seed}"] = row | {"parameters": parameters, "samples": budget}
    return numbers


@pytest.mark.parametrize(("axis", "slope"), [("parameters", -0.2), ("samples", -0.1)])
def test_fit_finds_the_slope_and_its_interval_holds_it_as_often_as_said(axis, slope):
    assert fit(planted(0), "abs_rel")[axis] == pytest.approx((slope, 0), abs=1e-9)
    fits = [fit(planted(0.01, seed), "abs_rel")[axis] for seed in range(400)]
    assert 0.92 < np.mean([abs(found - slope) < width for found, width in fits]) < 0.98


def test_tables_and_figure(tmp_path):
    tables = write_tables(planted(0.01), CONFIG)
    assert sum(line.startswith(("| small |", "| large |")) for line in tables.splitlines()) == 6
    assert tables.count("slope -0.") == 4
    draw_figure(planted(0.01), CONFIG).savefig(tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


@pytest.fixture
def tiny_study(tmp_path, monkeypatch) -> ScalingConfig:
    """A study of one tiny rung, whose scripts run in this process and without validation."""
    make_pipeline().vae.save_pretrained(tmp_path / "vae")
    scenes = {"kind": "scenes", "height": 32, "width": 32, "supersample": 1}
    cache = {"folder": str(tmp_path / "cache"), "samples": 8, "pixels": 1024}
    common = {"architecture": "dit", "data": scenes, "max_sequence_length": 12, "cache": cache}
    rung = {
        "transformer": {name: list(v) if isinstance(v, tuple) else v for name, v in TINY_DIT.items()},
        "text_encoder": dict(TINY_T5),
        "vocabulary_size": 200,
        "cache": cache | {"text": False},
    }
    post_training = {"mode": "all", "num_depth_decoder_layers": 1, "sample_size": 32, "validation_data": scenes}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(common | rung))
    (tmp_path / "dit_post_train.yaml").write_text(yaml.safe_dump(common | post_training))

    def run_here(name, *arguments):
        script = importlib.import_module(f"finetune.{Path(name).stem}")
        if hasattr(script, "validate"):
            monkeypatch.setattr(script, "validate", lambda *args, **kwargs: None)
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        script.main()

    monkeypatch.setattr(scaling_study, "CONFIGS", tmp_path)
    monkeypatch.setattr(scaling_study, "run_script", run_here)
    yield ScalingConfig(
        rungs=["tiny"],
        budgets=[0, 4, 8],
        seeds=[0],
        batch_size=4,
        post_training_samples=4,
        vae=str(tmp_path / "vae"),
        output=str(tmp_path / "study"),
        training=["trainer.compile=false", "trainer.mixed_precision=fp32", "trainer.ema_decay=0.5"],
        validation_data=scenes | {"split": "validation"},
        scenes=2,
    )
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_whole_study(tiny_study):
    numbers = measure(tiny_study)
    assert list(numbers) == ["tiny, 0, seed 0", "tiny, 4, seed 0", "tiny, 8, seed 0"]
    for row, budget in zip(numbers.values(), tiny_study.budgets):
        assert row["samples"] == budget and 0 < row["abs_rel"] < 10

    run = Path(tiny_study.output) / "tiny" / "seed-0"
    bases = [weights(run / f"base-{budget}") for budget in tiny_study.budgets]
    assert not any(torch.equal(a["proj_out.weight"], b["proj_out.weight"]) for a, b in pairwise(bases))
    # a budget is what a run of its length gives, though larger ones went on from it
    alone = replace(tiny_study, output=tiny_study.output + "-alone", budgets=[4])
    (Path(alone.output)).mkdir()
    (Path(tiny_study.output) / "text_encoder").rename(Path(alone.output) / "text_encoder")
    once = weights(scaling_study.base(alone, "tiny", 4, 0))
    assert all(torch.equal(tensor, bases[1][name]) for name, tensor in once.items())


def weights(pipeline: Path) -> dict[str, torch.Tensor]:
    return load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
