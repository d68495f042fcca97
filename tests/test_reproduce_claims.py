"""The measurements behind the claims, on tiny models."""

from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest

from finetune import reproduce_claims
from finetune.data.sources import build_source
from finetune.measures.studies import Measurements, over_seeds, table_cell
from finetune.reproduce_claims import (
    ClaimsConfig,
    constant_depth,
    draw_figure,
    drift,
    write_tables,
)


CONFIG = ClaimsConfig(
    scenes=4,
    prompts=3,
    image_steps=2,
    sampling_steps=[1, 2],
    ensembles=[1, 2],
    joint_log2_alpha=[-5, 5],
    strengths=[-5, -14],
)


@pytest.fixture(scope="module")
def source():
    return build_source({"kind": "scenes", "split": "validation", "height": 32, "width": 32, "supersample": 1})


def test_a_measurement_is_made_once(tmp_path):
    calls = []

    def measure():
        calls.append(None)
        return {"abs_rel": 0.5}

    for _ in range(2):
        assert Measurements(tmp_path / "claims.json")("a", measure) == {"abs_rel": 0.5}
    assert len(calls) == 1


def test_constant_depth_is_the_weighted_median_of_each_scene(source):
    errors = []
    for index in range(4):
        truth = source[index]["depth"].numpy()
        truth = truth[np.isfinite(truth) & (truth > 0)].astype(np.float64)
        # sum |c - gt| / gt over the constants c that occur
        errors.append(min((np.abs(constant - truth) / truth).mean() for constant in truth))
    measured = constant_depth(source, 4)["abs_rel"]
    assert measured == pytest.approx(np.mean(errors), rel=0.01)  # aligned on a subsample, so a little above


def test_drift_is_the_relative_change_of_the_velocity(pipe, source):
    def as_base(scale):
        """What the pipeline itself says with its depth, `scale` times."""

        def transformer(**inputs):
            return (scale * pipe.transformer(**inputs)[0],)

        return SimpleNamespace(transformer=transformer)

    # without depth tokens the velocity is another one, so the drift is above 0 and grows as the base is scaled away
    near, far = (drift(pipe, as_base(scale), source, count=2)["drift"] for scale in (1.0, 3.0))
    assert near > 0
    ratio = drift(deepcopy(pipe), as_base(1e6), source, count=2)["drift"]
    assert ratio == pytest.approx(1, abs=1e-4)  # ||v - b||^2 / ||b||^2 for a base that outweighs the model
    assert far != near


def test_spread_over_seeds():
    numbers = {"a, seed 0": {"abs_rel": 0.1}, "a, seed 1": {"abs_rel": 0.2}, "b": {"abs_rel": 0.3, "delta1": 0.5}}
    assert table_cell(over_seeds(numbers, "a", "abs_rel", [0, 1])) == "15.00 ± 5.00"
    assert table_cell(over_seeds(numbers, "b", "abs_rel", [0, 1])) == "30.00"
    assert table_cell(over_seeds(numbers, "b", "drift", [0, 1])) == ""


def test_tables_and_figure_hold_every_run(tmp_path):
    numbers = {name: {"abs_rel": 0.25, "delta1": 0.5} for name in ("constant depth", "untrained", "embedded model")}
    for run in reproduce_claims.RUNS:
        numbers |= {f"{run}, seed {seed}": {"abs_rel": 0.1, "delta1": 0.9, "drift": 0.02} for seed in (0, 1)}
    names = ["steps 1", "steps 2", "ensemble 1", "ensemble 2", "joint -5", "joint 5", "depth not given"]
    names += ["depth followed -5", "depth followed -14", "depth followed rigidly"]
    numbers |= {name: {"abs_rel": 0.2, "delta1": 0.8} for name in names}
    tables = write_tables(numbers, CONFIG)
    rows = [line.split(" |")[0].removeprefix("| ") for line in tables.splitlines() if line.startswith("| ")]
    assert set(rows) >= {*reproduce_claims.RUNS, *names, "constant depth", "untrained", "embedded model"}
    draw_figure(numbers, CONFIG).savefig(tmp_path / "claims.png")
    assert (tmp_path / "claims.png").stat().st_size > 10_000


def test_without_a_model_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["reproduce_claims.py", "--quick", f"model={tmp_path / 'none'}"])
    with pytest.raises(SystemExit, match="no pipeline at model="):
        reproduce_claims.main()
