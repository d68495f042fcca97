import numpy as np
import pytest
from scipy.optimize import linprog

from mf_diffusers import alignment
from mf_diffusers.alignment import (
    ALIGNMENTS,
    Alignment,
    align_affine_robust,
    align_disparity_least_squares,
    align_least_squares,
    align_median,
    align_none,
    align_scale,
    masked_nearest,
)


def relative_error(result, prediction, truth):
    return (np.abs(result.scale * prediction.astype(np.float64) + result.shift - truth) / truth).sum()


def linear_program(prediction, truth):
    """The least sum |s p + b - g| / g over s >= 0 and b: minimise sum e / g with -e <= s p + b - g <= e."""
    p, g = prediction.ravel().astype(np.float64), truth.ravel().astype(np.float64)
    line, errors = np.stack([p, np.ones_like(p)], axis=1), np.eye(p.size)
    solution = linprog(
        np.concatenate([[0, 0], 1 / g]),
        A_ub=np.block([[line, -errors], [-line, -errors]]),
        b_ub=np.concatenate([g, -g]),
        bounds=[(0, None), (None, None)] + [(0, None)] * p.size,
        method="highs",
    )
    assert solution.success
    return solution.fun


def check_optimal(result, prediction, truth):
    """Against the linear program as far as HiGHS keeps to its bounds, 1e-7 per pixel, and against all vertices."""
    error = relative_error(result, prediction, truth)
    assert result.scale >= 0
    assert error == pytest.approx(linear_program(prediction, truth), rel=1e-6, abs=float((1e-7 / truth).sum()))
    p, g = prediction.ravel().astype(np.float64), truth.ravel().astype(np.float64)
    rise, run = g[:, None] - g, p[:, None] - p
    slopes = np.divide(rise, run, out=np.zeros_like(run), where=run != 0).clip(0)  # at a bound of s the slope is 0
    residuals = slopes[..., None] * (p - p[:, None, None]) + g[:, None, None] - g
    assert error == pytest.approx((np.abs(residuals) / g).sum(axis=-1).min(), rel=1e-9, abs=1e-11)


def random_problem(seed):
    rng = np.random.default_rng(seed)
    shape = (1, rng.integers(2, 40))
    truth = rng.lognormal(sigma=rng.choice([0.1, 1]), size=shape)
    prediction = rng.uniform(0.1, 2) * truth + rng.normal() + rng.choice([0, 0.1, 1]) * rng.normal(size=shape)
    outliers = rng.random(shape) < rng.choice([0, 0.3])
    prediction[outliers] += rng.choice([1, 100]) * rng.normal(size=outliers.sum())
    return prediction.astype(np.float32), truth.astype(np.float32)


def row(*values):
    return np.array([values], dtype=np.float32)


DEGENERATE = {
    "one pixel": (row(3), row(2)),
    "two pixels": (row(1, 2), row(5, 9)),
    "two pixels, falling": (row(2, 1), row(5, 9)),
    "two pixels, equal prediction": (row(2, 2), row(5, 9)),
    "constant prediction": (row(2, 2, 2, 2), row(1, 5, 9, 9)),
    "constant truth": (row(1, 5, 2, 7), row(4, 4, 4, 4)),
    "both constant": (row(1, 1, 1), row(4, 4, 4)),
    "perfect": (row(1, 2, 3, 4), row(1, 2, 3, 4)),
    "perfect after an affine map": (row(-1, 0, 1, 2), row(3, 5, 7, 9)),
    "all zero prediction": (row(0, 0, 0), row(1, 2, 3)),
    "falling": (row(4, 3, 2, 1), row(1, 2, 3, 4)),
    "repeated pixels": (row(1, 1, 1, 2, 2, 2), row(1, 1, 3, 3, 3, 1)),
    "many lines equally good": (row(0, 0, 1, 1), row(1, 2, 1, 2)),
    "ties of residuals": (row(*range(12)), row(*[1 + k // 3 for k in range(12)])),
    "grid": (row(*[k % 4 for k in range(16)]), row(*[1 + k // 4 for k in range(16)])),
    "outlier in prediction": (row(1, 2, 3, 1e6), row(1, 2, 3, 4)),
    "outlier in truth": (row(1, 2, 3, 4), row(1, 2, 3, 1e6)),
    "truth near 0": (row(1, 2, 3, 4), row(1, 2, 3, 1e-6)),
    "small steps on a large shift": (row(10000, 10000.125, 10000.25, 10000.5), row(1, 2, 4, 5)),
    "half of the pixels on a line": (row(1, 2, 3, 4, 9, 1, 7, 2), row(2, 4, 6, 8, 1, 1, 1, 9)),
}


@pytest.mark.parametrize("seed", range(200))
def test_affine_robust_is_the_linear_programs_optimum(seed):
    prediction, truth = random_problem(seed)
    result = align_affine_robust(prediction, truth, grid=None)
    check_optimal(result, prediction, truth)


@pytest.mark.parametrize("name", DEGENERATE)
def test_affine_robust_degenerate(name):
    prediction, truth = DEGENERATE[name]
    result = align_affine_robust(prediction, truth, grid=None)
    check_optimal(result, prediction, truth)


@pytest.mark.parametrize("seed", range(60))
def test_affine_robust_many_pixels_solved_by_few(seed, monkeypatch):
    """A tiny sample gives a bad rough line, so that every way out of the reduction is taken."""
    prediction, truth = random_problem(seed)
    monkeypatch.setattr(alignment, "SAMPLE_SIZE", 4)
    result = align_affine_robust(prediction, truth, grid=None)
    check_optimal(result, prediction, truth)


@pytest.mark.parametrize("kind", ["dense", "outliers", "half exact", "levels"])
def test_affine_robust_large_map_equals_solving_all_pixels(kind):
    rng = np.random.default_rng(0)
    truth = rng.lognormal(size=(300, 400)).astype(np.float32)
    prediction = 0.3 * truth + 0.5 + 0.1 * rng.normal(size=truth.shape)
    if kind == "outliers":
        prediction[rng.random(truth.shape) < 0.3] = 1e4
        truth[0, 0] = 1e-5
    elif kind == "half exact":
        prediction[:150] = 2 * truth[:150]
    elif kind == "levels":
        prediction = np.round(prediction * 20) / 20
    result = align_affine_robust(prediction, truth, grid=None)
    x, y = prediction.ravel(), truth.ravel().astype(np.float64)
    x = x - x.mean()
    line = alignment._lad_all(x, y, 1 / y)
    assert relative_error(result, prediction, truth) == pytest.approx(line.error, rel=1e-9)


def test_affine_robust_ignores_outliers_by_hand():
    prediction, truth = row(1, 2, 3, 4, 5), row(3, 5, 7, 9, 100)
    result = align_affine_robust(prediction, truth)
    assert (result.scale, result.shift) == (pytest.approx(2), pytest.approx(1))
    assert result.apply(prediction)[0, :4] == pytest.approx(truth[0, :4])


def test_affine_robust_is_invariant():
    rng = np.random.default_rng(0)
    truth = rng.uniform(1, 10, (90, 120)).astype(np.float32)
    prediction = truth**0.8 + 0.1 * rng.normal(size=truth.shape)
    aligned = align_affine_robust(prediction, truth).apply(prediction)
    moved = 0.25 * prediction - 7
    assert np.allclose(align_affine_robust(moved, truth).apply(moved), aligned, rtol=1e-6)
    assert np.allclose(align_affine_robust(prediction, 8 * truth).apply(prediction), 8 * aligned, rtol=1e-6)


def test_only_valid_pixels_count():
    rng = np.random.default_rng(0)
    truth = rng.uniform(1, 10, (20, 30)).astype(np.float32)
    prediction = (truth + rng.normal(size=truth.shape)).clip(0.1)
    kept = rng.random(truth.shape) < 0.5
    spoilt_truth, spoilt_prediction, mask = truth.copy(), prediction.copy(), np.ones_like(kept)
    places = np.argwhere(~kept)
    for value, (i, j) in zip([0, -1, np.nan, np.inf] * len(places), places[: len(places) // 2]):
        spoilt_truth[i, j] = value
    for value, (i, j) in zip([np.nan, np.inf, -np.inf] * len(places), places[len(places) // 2 : -20]):
        spoilt_prediction[i, j] = value
    mask[tuple(places[-20:].T)] = False
    for name, align in ALIGNMENTS.items():
        assert align(spoilt_prediction, spoilt_truth, mask) == align(prediction, truth, kept), name


def test_scale_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(50):
        truth = rng.lognormal(size=(3, 5)).astype(np.float32)
        prediction = rng.normal(1, 1, truth.shape)
        best = min((np.abs(s * prediction - truth) / truth).sum() for s in [0, *(truth / prediction).ravel()] if s >= 0)
        result = align_scale(prediction, truth, grid=None)
        assert result.shift == 0 and result.scale >= 0
        assert relative_error(result, prediction, truth) == pytest.approx(best, rel=1e-12)


def test_scale_by_hand():
    assert align_scale(row(1, 2, 3), row(2, 4, 300)).scale == 2
    assert align_scale(row(-1, -2, -3), row(2, 4, 6)).scale == 0
    with pytest.raises(ValueError, match="0 at every pixel"):
        align_scale(row(0, 0), row(1, 2))


def test_median():
    assert align_median(row(1, 2, 30), row(5, 6, 8)) == Alignment(3)
    with pytest.raises(ValueError, match="above 0"):
        align_median(row(-1, -2, 3), row(5, 6, 8))


def test_least_squares_equals_lstsq():
    rng = np.random.default_rng(0)
    truth = rng.uniform(1, 5, (8, 9)).astype(np.float32)
    prediction = rng.normal(size=truth.shape)
    columns = np.stack([prediction.ravel(), np.ones(truth.size)], axis=1)
    expected = np.linalg.lstsq(columns, truth.ravel().astype(np.float64))[0]
    result = align_least_squares(prediction, truth)
    assert [result.scale, result.shift] == pytest.approx(expected)
    assert align_least_squares(row(2, 2), row(1, 3)) == Alignment(0, 2)

    expected = np.linalg.lstsq(columns, 1 / truth.ravel().astype(np.float64))[0]
    result = align_disparity_least_squares(prediction, truth)
    assert [result.scale, result.shift] == pytest.approx(expected)


def test_disparity_is_inverted():
    truth = row(1, 2, 4, 5)
    result = align_disparity_least_squares(3 / truth + 1, truth)
    assert result.apply(3 / truth + 1) == pytest.approx(truth, rel=1e-6)
    assert result.apply(row(-100, 1))[0] == pytest.approx([5, 5])  # held at the largest true depth


def test_none_is_the_identity():
    assert align_none(row(1, 2), row(2, 1)) == Alignment(1, 0)
    assert Alignment().apply(row(-1, 2)).tolist() == [[-1, 2]]
    assert Alignment(2, -1).apply(row(1, 2)).tolist() == [[1, 3]]


def nearest_by_loops(valid, grid):
    height, width = valid.shape
    found = []
    for i in range(grid):
        for j in range(grid):
            y, x = (i + 0.5) * height / grid, (j + 0.5) * width / grid
            cell = max(1, height / grid), max(1, width / grid)
            top, left = round(y - cell[0] / 2), round(x - cell[1] / 2)
            window = [
                (row, column)
                for row in range(top, min(top + int(np.ceil(cell[0])), height))
                for column in range(left, min(left + int(np.ceil(cell[1])), width))
                if valid[row, column]
            ]
            if window:
                found.append(min(window, key=lambda at: (at[0] + 0.5 - y) ** 2 + (at[1] + 0.5 - x) ** 2))
    return found


@pytest.mark.parametrize("shape", [(64, 64), (128, 192), (100, 75), (30, 20), (1, 1), (65, 200), (3, 300)])
@pytest.mark.parametrize("share", [1, 0.5, 0.02])
def test_masked_nearest_equals_loops(shape, share):
    valid = np.random.default_rng(0).random(shape) < share
    rows, columns = masked_nearest(valid, 64)
    assert valid[rows, columns].all()
    assert list(zip(rows.tolist(), columns.tolist())) == nearest_by_loops(valid, 64)


def test_masked_nearest_by_hand():
    valid = np.ones((4, 4), dtype=bool)
    valid[0, 0] = valid[2:, 2:] = False
    rows, columns = masked_nearest(valid, 2)
    assert list(zip(rows.tolist(), columns.tolist())) == [(0, 1), (0, 2), (2, 0)]


def test_subsample_is_the_default():
    rng = np.random.default_rng(0)
    truth = rng.uniform(1, 5, (200, 300)).astype(np.float32)
    prediction = truth + rng.normal(size=truth.shape)
    at = masked_nearest(truth > 0, 64)
    for align in (align_affine_robust, align_scale):
        assert align(prediction, truth) == align(prediction[at][None], truth[at][None], grid=None)
        assert align(prediction, truth) != align(prediction, truth, grid=None)


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_rejects(name):
    align, one = ALIGNMENTS[name], np.ones((3, 4), dtype=np.float32)
    for prediction, truth, mask, message in [
        (one[0], one[0], None, "no depth map"),
        (one[:2], one, None, "does not fit truth"),
        (one[None], one, None, "does not fit truth"),
        (one.astype(str), one, None, "does not fit truth"),
        (one, one, np.ones((4, 3)), "mask of shape"),
        (one, 0 * one, None, "no pixel has true depth"),
        (one, one, np.zeros((3, 4)), "no pixel has true depth"),
        (one * np.nan, one, None, "finite at none of 12 pixels"),
    ]:
        with pytest.raises(ValueError, match=message):
            align(prediction, truth, mask)
