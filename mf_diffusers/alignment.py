"""Alignment of predicted to true depth: the scale and the shift that a relative prediction leaves open.

Every function of `ALIGNMENTS` takes (prediction, truth, mask=None) and returns an `Alignment`. It looks at the pixels
where the prediction is finite, the truth is known (finite and above 0) and the mask, if any, is True; it raises
ValueError when there are none, or when the arrays do not fit together. Arithmetic is float64.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from mf_diffusers.depth_io import as_depth_map


GRID = 64
SAMPLE_SIZE = 1 << 14
"""`_lad_line`: points of the sample that gives the rough line; up to twice as many are solved without one."""
KEPT_FRACTION = 1 / 20
"""`_lad_line`: the points nearest to the rough line that are tried first as the ones that decide."""
TOLERANCE = 1e-14
"""`_lowest`: the proven distance from the minimum at which it stops, relative to sum w (|y| + |residual|)."""


@dataclass(frozen=True)
class Alignment:
    """Depth = scale * prediction + shift, or for disparity its inverse.

    With `min_disparity` the prediction is disparity and depth = 1 / max(scale * prediction + shift, min_disparity).
    """

    scale: float = 1.0
    shift: float = 0.0
    min_disparity: float | None = None

    def apply(self, prediction: np.ndarray) -> np.ndarray:
        """The aligned depth, float64 (H, W). It may be 0 or negative, and is not finite where `prediction` is not."""
        aligned = self.scale * np.asarray(prediction, dtype=np.float64) + self.shift
        return aligned if self.min_disparity is None else 1 / np.maximum(aligned, self.min_disparity)


def align_affine_robust(
    prediction: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None, grid: int | None = GRID
) -> Alignment:
    """Scale s >= 0 and shift b that minimise sum |s * prediction + b - truth| / truth, exactly.

    The affine-invariant protocol of MoGe, MoGe-2 and Modality Forcing, by default on MoGe's subsample. The minimum is
    that of a linear program up to rounding. MoGe's code lets s be negative; the results differ only where that
    would be better, that is where the prediction falls as depth rises. A prediction that is constant on the pixels
    used gets scale 0. Where several lines are equally good it is one of them.

    Args:
        prediction: (H, W), depth up to scale and shift.
        truth: (H, W), 0 where missing.
        mask: (H, W), True where depth counts. None: everywhere.
        grid: side of the subsample, see `masked_nearest`. None: all pixels.
    """
    x, y = _pixels(prediction, truth, mask, grid)
    return Alignment(*_lad_line(x, y, 1 / y))


def align_scale(
    prediction: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None, grid: int | None = GRID
) -> Alignment:
    """Scale s >= 0 that minimises sum |s * prediction - truth| / truth: a weighted median of truth / prediction.

    The scale-invariant protocol of MoGe, by default on its subsample; arguments as for `align_affine_robust`. Raises
    ValueError too when the prediction is 0 at every pixel used.
    """
    x, y = _pixels(prediction, truth, mask, grid)
    x, y = x[x != 0], y[x != 0]
    if x.size == 0:
        raise ValueError("the prediction is 0 at every pixel used: no scale fits it to the truth")
    return Alignment(max(_weighted_median(y / x, np.abs(x) / y), 0.0))


def align_median(prediction: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> Alignment:
    """Scale median(truth) / median(prediction): the median scaling of SfMLearner and Monodepth2, on all pixels.

    Raises ValueError too when the median of the prediction is not above 0.
    """
    x, y = _pixels(prediction, truth, mask)
    median = np.median(x)
    if median <= 0:
        raise ValueError(f"the median of the prediction is {median:.6g}; median scaling needs one above 0")
    return Alignment(float(np.median(y) / median))


def align_least_squares(prediction: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> Alignment:
    """Scale s and shift b that minimise sum (s * prediction + b - truth)^2: Marigold's protocol, on all pixels.

    The scale may come out negative, as there. A constant prediction gets scale 0 and the mean truth.
    """
    return Alignment(*_least_squares_line(*_pixels(prediction, truth, mask)))


def align_disparity_least_squares(
    prediction: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None
) -> Alignment:
    """Alignment of predicted disparity: s and b that minimise sum (s * prediction + b - 1 / truth)^2, on all pixels.

    The protocol of MiDaS and Depth Anything. Depth is the inverse; as in MoGe's evaluation, disparity is held at or
    above 1 / max(truth), since near or below 0 its inverse is anything. (Marigold holds it above 1e-3 and fits
    positive predictions only.)
    """
    x, y = _pixels(prediction, truth, mask)
    return Alignment(*_least_squares_line(x, 1 / y), min_disparity=float(1 / y.max()))


def align_none(prediction: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> Alignment:
    """Scale 1 and shift 0, for metric depth."""
    _pixels(prediction, truth, mask)
    return Alignment()


ALIGNMENTS = {
    "robust": align_affine_robust,
    "scale": align_scale,
    "median": align_median,
    "least-squares": align_least_squares,
    "disparity": align_disparity_least_squares,
    "none": align_none,
}


def masked_nearest(valid: np.ndarray, grid: int = GRID) -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns, integers (N,) each, that `nearest_valid` finds on a grid x grid subsample, row by row."""
    rows, columns, found = nearest_valid(valid, (grid, grid))
    return rows[found], columns[found]


def nearest_valid(valid: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """MoGe's masked resampling: for every cell of a grid laid over the picture, the valid pixel nearest to its centre.

    Along an axis of n pixels and m cells, with c = max(1, n / m), cell i has its centre at (i + 1/2) n / m, and its
    window is the ceil(c) pixels from round((i + 1/2) n / m - c / 2) on, halves to even, as far as they lie in the
    picture; pixel j has its centre at j + 1/2. Of equally near pixels the first, row by row, is taken. Neighbouring
    windows may share a row or column, so that a pixel may be given twice, and in a picture smaller than the grid pixels
    repeat.

    Args:
        valid: bool (H, W).
        size: (rows, columns) of the grid.

    Returns rows and columns, integers of shape `size`, and where the window has a valid pixel, bool of shape `size`.
    """
    rows, row_distances = _windows(valid.shape[0], size[0])
    columns, column_distances = _windows(valid.shape[1], size[1])
    distances = row_distances[:, None, :, None] + column_distances[None, :, None, :]
    distances[~valid[rows[:, None, :, None], columns[None, :, None, :]]] = np.inf
    distances = distances.reshape(*size, -1)
    row, column = np.divmod(distances.argmin(axis=-1), columns.shape[1])
    return (
        np.take_along_axis(rows, row, axis=1),
        np.take_along_axis(columns[None], column[..., None], axis=2)[..., 0],
        np.isfinite(distances.min(axis=-1)),
    )


def checked_maps(
    prediction: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The prediction as an array (H, W), and the truth as a depth map of the same shape, 0 where it does not count.

    Raises ValueError when they are no such arrays or no pixel is left.
    """
    prediction = np.asarray(prediction)
    truth = as_depth_map(truth, mask)
    if prediction.dtype.kind not in "uif" or prediction.shape != truth.shape:
        raise ValueError(
            f"prediction of shape {prediction.shape}, {prediction.dtype} does not fit truth of shape {truth.shape}; "
            "give real numbers (H, W), resized to the truth"
        )
    if not truth.any():
        raise ValueError("no pixel has true depth (finite, above 0, inside the mask): there is nothing to compare")
    return prediction, truth


def _pixels(prediction, truth, mask, grid=None):
    """The values of the pixels used, float64 (N,) each."""
    prediction, truth = checked_maps(prediction, truth, mask)
    used = np.isfinite(prediction) & (truth > 0)
    if not used.any():
        raise ValueError(f"the prediction is finite at none of {np.count_nonzero(truth)} pixels with true depth")
    if grid is not None:
        used = masked_nearest(used, grid)
    return prediction[used].astype(np.float64), truth[used].astype(np.float64)


def _windows(size, grid):
    """For every cell along one axis: the pixels of its window (grid, n), and their squared distances to its centre."""
    cell = max(1, size / grid)
    centres = (np.arange(grid)[:, None] + 0.5) * size / grid
    pixels = np.round(centres - cell / 2).astype(np.int64) + np.arange(math.ceil(cell))
    return np.minimum(pixels, size - 1), np.where(pixels < size, (pixels + 0.5 - centres) ** 2, np.inf)


def _weighted_median(values, weights):
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    return float(values[order[min(np.searchsorted(cumulative, cumulative[-1] / 2), order.size - 1)]])


def _least_squares_line(x, y):
    centred = x - x.mean()
    variance = centred @ centred
    slope = float(centred @ (y - y.mean()) / variance) if x.min() < x.max() else 0.0
    return slope, float(y.mean() - slope * x.mean())


# Least absolute deviations. For a given slope the best level of the line is a weighted median, and the error as a
# function of the slope alone is convex and piecewise linear. `_lowest` closes in on its minimum between two tangents.


class _Tangent(NamedTuple):
    """The line's slope and level (its height at x = 0), its error, and the derivative of the error by the slope."""

    slope: float
    level: float
    error: float
    derivative: float


def _lad_line(x, y, w):
    """Slope >= 0 and intercept that minimise sum w |slope x + intercept - y|.

    Many points are reduced to few by the preprocessing of Portnoy and Koenker (1997): a sample gives a rough line;
    points too far from it for any line nearby to reach keep their side, so that their error is linear and goes into
    three sums. This error is nowhere above the true one and equals it nearby, so a minimum found nearby is the
    minimum; if it is not nearby, more points are kept.
    """
    if x.min() == x.max():
        return 0.0, _weighted_median(y, w)
    centre = np.average(x, weights=w)
    spread = np.average(np.abs(x - centre), weights=w)
    u = (x - centre) / spread
    best = _lad_many(u, y, w) if u.size > 2 * SAMPLE_SIZE else _lad_all(u, y, w)
    slope = best.slope / spread
    return float(slope), float(best.level - slope * centre)


def _lad_all(u, y, w):
    tangent_at = partial(_tangent, u=u, y=y, w=w)
    left, right = tangent_at(0.0), tangent_at(np.average(np.abs(y - np.average(y, weights=w)), weights=w) or 1.0)
    while right.derivative < 0:
        left, right = right, tangent_at(2 * right.slope)
    return _lowest(tangent_at, left, right, w @ np.abs(y))


def _lad_many(u, y, w):
    reach = 1 + np.abs(u)  # how far, at most, a line moves at u when its slope and its level move by up to 1
    chances = np.cumsum(w * reach)
    draws = np.random.default_rng(0).random(SAMPLE_SIZE) * chances[-1]
    sample = np.minimum(np.searchsorted(chances, draws), u.size - 1)
    rough = _lad_all(u[sample], y[sample], 1 / reach[sample])
    residuals = rough.slope * u + rough.level - y
    distances = np.abs(residuals) / reach
    kept = 1 + int(u.size * KEPT_FRACTION)
    while kept < u.size:
        # At least a little, so that rounding does not leave the box when very many points lie on the line.
        radius = max(np.partition(distances, kept)[kept], 1e-9 * abs(y[sample]).mean())
        near = distances <= radius
        side = np.where(near, 0.0, w * np.sign(residuals))
        tangent_at = partial(_tangent, u=u[near], y=y[near], w=w[near], far=(side @ u, side.sum(), side @ y))
        left, right = tangent_at(max(rough.slope - radius, 0.0)), tangent_at(rough.slope + radius)
        if left and right and (left.derivative <= 0 or left.slope == 0) and right.derivative >= 0:
            best = _lowest(tangent_at, left, right, w @ np.abs(y))
            if best and abs(best.level - rough.level) <= radius:
                return best
        kept *= 4
    return _lad_all(u, y, w)


def _tangent(slope, u, y, w, far=(0.0, 0.0, 0.0)):
    """The best line of this slope: error = sum w |slope u + level - y| + far[0] slope + far[1] level - far[2].

    None when no level is best because the far points outweigh the others.
    """
    heights = y - slope * u
    order = np.argsort(heights)
    cumulative = np.cumsum(w[order])
    half = (cumulative[-1] - far[1]) / 2
    if not 0 <= half <= cumulative[-1]:
        return None
    middle = min(np.searchsorted(cumulative, half), order.size - 1)
    below, pivot, above = order[:middle], order[middle], order[middle + 1 :]
    level = heights[pivot]
    # The pivot takes the part of its weight, of either sign, that balances the points below and above.
    part = cumulative[-1] - 2 * cumulative[middle] + w[pivot] - far[1]
    moments = w * u
    derivative = moments[below].sum() - moments[above].sum() + part * u[pivot] + far[0]
    error = w @ np.abs(heights - level) + far[0] * slope + far[1] * level - far[2]
    return _Tangent(slope, level, error, derivative)


def _lowest(tangent_at, left, right, scale):
    """The minimum between two tangents. Where they meet is a lower bound, so it is known when it is reached."""
    step = 0
    while left.derivative < 0 < right.derivative:
        best = min(left, right, key=lambda tangent: tangent.error)
        width = right.slope - left.slope
        offset = (right.error - left.error - right.derivative * width) / (left.derivative - right.derivative)
        bound = left.error + left.derivative * offset
        step += 1
        slope = left.slope + (offset if step % 3 else width / 2)  # halving now and then guards against slow progress
        if best.error - bound <= TOLERANCE * (scale + best.error) or not left.slope < slope < right.slope:
            return best
        middle = tangent_at(slope)
        if middle is None:
            return None
        left, right = (middle, right) if middle.derivative < 0 else (left, middle)
    return left if left.derivative >= 0 else right
