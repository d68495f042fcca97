import math

import numpy as np
import pytest

from mf_diffusers.evaluation.metrics import (
    MIN_DEPTH,
    boundary_f1,
    depth_metrics,
    mean_metrics,
    point_cloud_distance,
)
from mf_diffusers.geometry import intrinsics_from_fov


def row(*values):
    return np.array([values], dtype=np.float32)


def metrics_by_loops(prediction, truth, mask):
    pairs = [(float(d), float(g)) for d, g, m in zip(prediction.ravel(), truth.ravel(), mask.ravel()) if m and g > 0]
    n = len(pairs)
    logs = [math.log(d) - math.log(g) for d, g in pairs]
    mean_log = sum(logs) / n
    return {
        "abs_rel": sum(abs(d - g) / g for d, g in pairs) / n,
        "sq_rel": sum((d - g) ** 2 / g for d, g in pairs) / n,
        "rmse": math.sqrt(sum((d - g) ** 2 for d, g in pairs) / n),
        "rmse_log": math.sqrt(sum(e * e for e in logs) / n),
        "silog": 100 * math.sqrt(sum(e * e for e in logs) / n - mean_log**2),
        "log10": sum(abs(math.log10(d) - math.log10(g)) for d, g in pairs) / n,
        "delta1": sum(max(d / g, g / d) < 1.25 for d, g in pairs) / n,
        "delta2": sum(max(d / g, g / d) < 1.25**2 for d, g in pairs) / n,
        "delta3": sum(max(d / g, g / d) < 1.25**3 for d, g in pairs) / n,
        "pixels": n,
        "left_out": truth.size - n,
        "nonfinite": 0,
        "nonpositive": 0,
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("negative", ["error", "clip"])
def test_depth_metrics_equal_the_formulas(seed, negative):
    rng = np.random.default_rng(seed)
    truth = rng.lognormal(size=(13, 17)).astype(np.float32)
    truth[rng.random(truth.shape) < 0.2] = 0
    prediction = np.maximum(truth, 0.1) * rng.lognormal(sigma=0.4, size=truth.shape)
    mask = rng.random(truth.shape) < 0.8
    assert depth_metrics(prediction, truth, mask, negative) == pytest.approx(metrics_by_loops(prediction, truth, mask))


def test_depth_metrics_by_hand():
    metrics = depth_metrics(row(1, 3, 2, 9), row(1, 2, 4, 0))
    assert metrics["abs_rel"] == pytest.approx((0 + 1 / 2 + 1 / 2) / 3)
    assert metrics["sq_rel"] == pytest.approx((0 + 1 / 2 + 4 / 4) / 3)
    assert metrics["rmse"] == pytest.approx(math.sqrt((0 + 1 + 4) / 3))
    assert [metrics[name] for name in ("delta1", "delta2", "delta3")] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert (metrics["pixels"], metrics["left_out"]) == (3, 1)


def test_perfect_prediction():
    truth = row(1, 2, 3)
    metrics = depth_metrics(truth, truth)
    assert all(metrics[name] == 0 for name in ("abs_rel", "sq_rel", "rmse", "rmse_log", "silog", "log10"))
    assert all(metrics[name] == 1 for name in ("delta1", "delta2", "delta3"))


def test_silog_does_not_see_scale():
    truth = np.random.default_rng(0).uniform(1, 9, (5, 6))
    metrics = depth_metrics(3 * truth, truth)
    assert metrics["silog"] == pytest.approx(0, abs=1e-5)
    assert metrics["rmse_log"] == pytest.approx(math.log(3))


def test_delta_is_strict():
    metrics = depth_metrics(row(1.25, 4, 1.5625), row(1, 5, 1))
    assert (metrics["delta1"], metrics["delta2"], metrics["delta3"]) == (0, pytest.approx(2 / 3), 1)


@pytest.mark.parametrize("value", [0, -1, -1e6, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("negative", ["error", "clip"])
def test_impossible_predictions_are_errors(value, negative):
    metrics = depth_metrics(row(2, value), row(2, 4), negative=negative)
    assert metrics["delta1"] == metrics["delta2"] == metrics["delta3"] == 0.5
    assert metrics["pixels"] == 2
    assert metrics["nonfinite"] == (not np.isfinite(value))
    assert metrics["nonpositive"] == np.isfinite(value)
    depth = value if np.isfinite(value) else 0
    depth = max(depth, MIN_DEPTH) if negative == "clip" else depth
    assert metrics["abs_rel"] == pytest.approx(abs(depth - 4) / 4 / 2)
    assert metrics["rmse"] == pytest.approx(math.sqrt((depth - 4) ** 2 / 2))
    assert metrics["rmse_log"] == pytest.approx(math.sqrt(math.log(4 / MIN_DEPTH) ** 2 / 2))
    assert metrics["log10"] == pytest.approx(math.log10(4 / MIN_DEPTH) / 2)


def test_clipped_depth_is_no_hit_even_near_0():
    assert depth_metrics(row(-1), row(MIN_DEPTH), negative="clip")["delta3"] == 0


def test_moges_code_takes_negative_depth_for_a_hit():
    ours, moges = (depth_metrics(row(2, -1, 0, np.nan), row(2, 4, 4, 4), negative=name) for name in ("error", "hit"))
    assert [ours[f"delta{k}"] for k in (1, 2, 3)] == [1 / 4] * 3
    assert [moges[f"delta{k}"] for k in (1, 2, 3)] == [1 / 2] * 3
    assert all(ours[name] == moges[name] for name in ours if not name.startswith("delta"))


@pytest.mark.parametrize("metric", [depth_metrics, boundary_f1])
def test_metrics_reject(metric):
    one = np.ones((3, 4))
    for prediction, truth, mask, message in [
        (one[0], one[0], None, "no depth map"),
        (one.T, one, None, "does not fit truth"),
        (one, one, one.T, "mask of shape"),
        (one, 0 * one, None, "no pixel has true depth"),
    ]:
        with pytest.raises(ValueError, match=message):
            metric(prediction, truth, mask)
    with pytest.raises(ValueError, match='"error", "clip" or "hit"'):
        depth_metrics(one, one, negative="ignore")
    with pytest.raises(ValueError, match="above 1"):
        boundary_f1(one, one, thresholds=[0.05])


def boundaries(depth, valid, threshold):
    """{(direction, pixel)}: valid pixels from which the valid neighbour in that direction is farther by threshold."""
    height, width = depth.shape
    found = set()
    for i in range(height):
        for j in range(width):
            for di, dj in ((0, 1), (0, -1), (1, 0), (-1, 0)):
                k, m = i + di, j + dj
                inside = 0 <= k < height and 0 <= m < width
                if inside and valid[i, j] and valid[k, m] and float(depth[k, m]) / float(depth[i, j]) > threshold:
                    found.add(((di, dj), i, j))
    return found


def boundary_f1_by_sets(prediction, truth, valid):
    total = weights = 0
    for k in range(10):
        t = 1.05 + k * 0.2 / 9
        predicted, true = boundaries(prediction, valid, t), boundaries(truth, valid, t)
        hits = len(predicted & true)
        total += t * (2 * hits / (len(predicted) + len(true)) if hits else 0)  # equals 2 P R / (P + R)
        weights += t
    return total / weights


@pytest.mark.parametrize("seed", range(5))
def test_boundary_f1_equals_the_formula(seed):
    rng = np.random.default_rng(seed)
    truth = rng.uniform(1, 1.4, (9, 11)).astype(np.float32)
    prediction = 5 * truth * rng.uniform(0.95, 1.05, truth.shape)
    mask = rng.random(truth.shape) < 0.8
    assert boundary_f1(prediction, truth, mask) == pytest.approx(boundary_f1_by_sets(prediction, truth, mask))


def test_boundary_f1_by_hand():
    truth = row(1, 1, 2, 2)
    assert boundary_f1(truth, truth) == 1
    assert boundary_f1(3 * truth, truth) == 1
    assert boundary_f1(row(1, 2, 2, 2), truth) == 0
    assert boundary_f1(row(2, 2, 1, 1), truth) == 0  # the other side is in front
    assert boundary_f1(row(1, 2, 4, 4), truth) == pytest.approx(2 / 3)  # P = 1/2, R = 1
    assert boundary_f1(row(1, 1, 1.1, 1.1), truth, thresholds=[1.05, 1.2]) == pytest.approx(1.05 / (1.05 + 1.2))
    assert math.isnan(boundary_f1(truth, row(1, 1, 1, 1)))
    assert math.isnan(boundary_f1(truth, row(1, 1, 0, 2)))  # a missing pixel makes no boundary


def test_boundary_f1_per_direction():
    truth = row(1, 1, 2, 2)
    assert boundary_f1(truth, truth, per_direction=True) == pytest.approx(0.25)  # one of four directions has any
    corner = np.array([[1, 2], [2, 1]], dtype=np.float32)
    assert boundary_f1(corner, corner, per_direction=True) == 1


@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf])
def test_boundary_f1_of_impossible_predictions(value):
    assert boundary_f1(row(value, 1, 2, 2), row(1, 1, 2, 2)) == pytest.approx(2 / 3)  # one boundary too many


def test_point_cloud_distance_of_parallel_planes():
    truth = np.full((6, 8), 2, dtype=np.float32)
    k = np.array([[1000.0, 0, 3.5], [0, 1000.0, 2.5], [0, 0, 1]])  # neighbours are 0.002 apart
    result = point_cloud_distance(truth + 0.5, truth, k)
    assert result["chamfer"] == pytest.approx(0.5, rel=1e-3)
    assert result["points_missing"] == 0
    assert point_cloud_distance(truth, truth, k)["chamfer"] == 0


def test_point_cloud_distance_equals_brute_force():
    rng = np.random.default_rng(0)
    truth, prediction = rng.uniform(1, 3, (2, 7, 9))
    truth[0, :4] = prediction[3, :2] = 0
    prediction[4, 0] = np.nan
    k = intrinsics_from_fov(9, 7)
    rows, columns = np.mgrid[:7, :9]
    rays = np.stack([(columns - k[0, 2]) / k[0, 0], (rows - k[1, 2]) / k[1, 1], np.ones((7, 9))], axis=-1)
    true = (rays * truth[..., None])[truth > 0]
    predicted = (rays * prediction[..., None])[(truth > 0) & (prediction > 0)]
    distances = np.linalg.norm(predicted[:, None] - true[None], axis=-1)
    accuracy, completeness = distances.min(axis=1).mean(), distances.min(axis=0).mean()
    expected = {
        "accuracy": accuracy,
        "completeness": completeness,
        "chamfer": (accuracy + completeness) / 2,
        "points_missing": 3,
    }
    assert point_cloud_distance(prediction, truth, k) == pytest.approx(expected, rel=1e-5)
    assert point_cloud_distance(prediction, truth, k, max_queries=None) == pytest.approx(expected, rel=1e-5)
    drawn = point_cloud_distance(prediction, truth, k, max_queries=30)
    assert drawn == point_cloud_distance(prediction, truth, k, max_queries=30)
    assert drawn["chamfer"] == pytest.approx(expected["chamfer"], rel=0.5)


def test_point_cloud_distance_rejects():
    one = np.ones((3, 4))
    with pytest.raises(ValueError, match="no pixel has true depth"):
        point_cloud_distance(one, 0 * one, np.eye(3))
    with pytest.raises(ValueError, match="at none of 12 pixels"):
        point_cloud_distance(-one, one, np.eye(3))
    with pytest.raises(ValueError, match="intrinsics"):
        point_cloud_distance(one, one, np.eye(4))


def test_mean_metrics():
    images = [
        {"abs_rel": 0.1, "boundary_f1": 0.5, "pixels": 10, "nonfinite": 1},
        {"abs_rel": 0.3, "boundary_f1": float("nan"), "pixels": 30, "nonfinite": 0},
    ]
    assert mean_metrics(images) == {
        "abs_rel": pytest.approx(0.2),
        "boundary_f1": 0.5,
        "boundary_f1_images": 1,
        "pixels": 40,
        "nonfinite": 1,
        "images": 2,
    }
    assert math.isnan(mean_metrics(images[1:])["boundary_f1"])
    with pytest.raises(ValueError, match="no images"):
        mean_metrics([])
    with pytest.raises(ValueError, match="image 1 has the metrics"):
        mean_metrics([images[0], {"abs_rel": 1}])
