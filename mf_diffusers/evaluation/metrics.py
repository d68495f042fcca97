"""Metrics of predicted depth against true depth.

Predictions come aligned (`mf_diffusers.alignment`) and at the resolution of the truth. In the formulas d is
predicted and g true depth, over the pixels with true depth (finite, above 0, mask True), and log is natural. Every
such pixel counts: where a prediction is missing or impossible it is an error, not a pixel less.
"""

from collections.abc import Sequence

import numpy as np

from mf_diffusers.alignment import checked_maps
from mf_diffusers.geometry import unproject


MIN_DEPTH = 1e-6
"""What predicted depth is raised to before a logarithm or a ratio, in the unit of the truth; Marigold's value."""

BOUNDARY_THRESHOLDS = tuple(np.linspace(1.05, 1.25, 10).tolist())
"""Depth ratios of Depth Pro's boundary F1: jumps of 5 % to 25 %."""

NEGATIVE = ("error", "clip", "hit")
"""What aligned depth at or below 0 is, see `depth_metrics`: ours, as in Marigold's code, as in MoGe's code."""

COUNTS = ("pixels", "left_out", "nonfinite", "nonpositive", "points_missing")
"""Entries of the metrics that are numbers of things: `mean_metrics` adds them up."""


def depth_metrics(
    prediction: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None, negative: str = "error"
) -> dict[str, float]:
    """The depth metrics of one image.

    Args:
        prediction: (H, W), aligned depth.
        truth: (H, W), 0 where missing.
        mask: (H, W), True where depth counts. None: everywhere.
        negative: what a prediction d <= 0 is. "error": it keeps its value in abs_rel, sq_rel and rmse, and is no hit of
            delta. "clip": it becomes `MIN_DEPTH`, which is no hit either, as in Marigold's code; that also clips to the
            data set's depth range before: for that give `np.clip(prediction, near, far)`. "hit": as "error", but d < 0
            is a hit of delta, as in MoGe's code, where max(d / g, g / d) of it is negative and so below any threshold.
            In the logarithms it is `MIN_DEPTH` whatever is chosen.

    A prediction that is not finite is depth 0, which means missing in this package: its relative error is 1.

    Returns:
        A dict of floats:
            abs_rel: mean |d - g| / g
            sq_rel: mean (d - g)^2 / g, as Eigen et al. and Marigold (the KITTI server divides by g^2)
            rmse: sqrt(mean (d - g)^2)
            rmse_log: sqrt(mean (log d - log g)^2)
            silog: 100 sqrt(mean e^2 - (mean e)^2) with e = log d - log g
            log10: mean |log10 d - log10 g|
            delta1, delta2, delta3: the fraction of pixels with max(d / g, g / d) < 1.25, 1.25^2, 1.25^3
        and of ints:
            pixels: those with true depth, over which the means go
            left_out: all others
            nonfinite: among `pixels`, the predictions NaN or infinite
            nonpositive: among `pixels`, the finite predictions d <= 0

    Raises ValueError when the arrays do not fit together, no pixel has true depth, or `negative` is none of these.
    """
    if negative not in NEGATIVE:
        raise ValueError(f'negative={negative!r} must be "error", "clip" or "hit"')
    prediction, truth = checked_maps(prediction, truth, mask)
    valid = truth > 0
    d, g = prediction[valid].astype(np.float64), truth[valid].astype(np.float64)
    finite = np.isfinite(d)
    d[~finite] = 0
    positive = d > 0
    raised = np.maximum(d, MIN_DEPTH)
    error = (raised if negative == "clip" else d) - g
    log_error = np.log(raised / g)
    # Not from log_error: its rounding would move ratios that are 1.25 exactly.
    ratio = np.full(d.shape, np.inf)
    ratio[positive] = np.maximum(d[positive] / g[positive], g[positive] / d[positive])
    if negative == "hit":
        ratio[d < 0] = -1
    return {
        "abs_rel": float(np.mean(np.abs(error) / g)),
        "sq_rel": float(np.mean(error**2 / g)),
        "rmse": float(np.sqrt(np.mean(error**2))),
        "rmse_log": float(np.sqrt(np.mean(log_error**2))),
        "silog": float(100 * np.std(log_error)),
        "log10": float(np.mean(np.abs(log_error)) / np.log(10)),
        "delta1": float(np.mean(ratio < 1.25)),
        "delta2": float(np.mean(ratio < 1.25**2)),
        "delta3": float(np.mean(ratio < 1.25**3)),
        "pixels": int(g.size),
        "left_out": int(truth.size - g.size),
        "nonfinite": int(np.count_nonzero(~finite)),
        "nonpositive": int(np.count_nonzero(finite & ~positive)),
    }


def completion_metrics(prediction: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> dict[str, float]:
    """What depth completion is compared by, beside the `rmse` and `abs_rel` of `depth_metrics`; depth in metres.

    Args:
        prediction, truth, mask: as for `depth_metrics`. What is not finite is depth 0; inverses take `MIN_DEPTH` for
            predictions below it.

    Returns:
        A dict of floats:
            mae: mean |d - g|, in metres
            irmse: sqrt(mean (1/d - 1/g)^2), in 1/km

    Raises ValueError when the arrays do not fit together or no pixel has true depth.
    """
    prediction, truth = checked_maps(prediction, truth, mask)
    valid = truth > 0
    d, g = prediction[valid].astype(np.float64), truth[valid].astype(np.float64)
    d[~np.isfinite(d)] = 0
    inverse_error = 1 / np.maximum(d, MIN_DEPTH) - 1 / g
    return {"mae": float(np.mean(np.abs(d - g))), "irmse": float(1000 * np.sqrt(np.mean(inverse_error**2)))}


def boundary_f1(
    prediction: np.ndarray,
    truth: np.ndarray,
    mask: np.ndarray | None = None,
    thresholds: Sequence[float] | np.ndarray = BOUNDARY_THRESHOLDS,
    per_direction: bool = False,
) -> float:
    """Boundary F1 of Depth Pro (Bochkovskii et al. 2024): do occlusion boundaries lie where they should?

    Between neighbouring pixels i and j (left, right, above, below) depth d has a boundary at threshold t where
    c_d(i, j) = [d(j) / d(i) > t]. Over the pairs of neighbours that both have true depth,

        P(t) = sum c_d c_g / sum c_d,    R(t) = sum c_d c_g / sum c_g,    F1(t) = 2 P R / (P + R),

    with 0 for 0 / 0, and the result is the mean of F1(t) weighted by t (in MoGe's evaluation by t - 1). The scale of
    depth has no influence, its shift has. Predictions that are not finite or below `MIN_DEPTH` become `MIN_DEPTH`, and
    so make boundaries.

    Args:
        prediction, truth, mask: as for `depth_metrics`.
        thresholds: depth ratios t above 1.
        per_direction: False, the formula: the sums go over the pairs in all four directions. True: P and R are means
            of their values in each direction, as in Depth Pro's published code, so compare its numbers with that. It
            gives 0 to a direction without boundaries, even to a perfect prediction.

    Returns:
        float in 0..1, or NaN when the truth has no boundary at the lowest threshold; `mean_metrics` leaves NaN out.

    Raises ValueError when the arrays do not fit together, no pixel has true depth, or a threshold is not above 1.
    """
    thresholds = np.asarray(thresholds, dtype=np.float64)
    if thresholds.ndim != 1 or thresholds.size == 0 or not (thresholds > 1).all():
        raise ValueError(f"thresholds {thresholds.tolist()} must be depth ratios above 1, such as 1.05")
    prediction, truth = checked_maps(prediction, truth, mask)
    with np.errstate(invalid="ignore"):
        usable = np.isfinite(prediction) & (prediction > MIN_DEPTH)
    predicted_ratios = _neighbour_ratios(np.where(usable, prediction, MIN_DEPTH), truth > 0)
    true_ratios = _neighbour_ratios(truth, truth > 0)
    if not any((ratios > thresholds.min()).any() for ratios in true_ratios):
        return float("nan")
    scores = []
    for threshold in thresholds:
        predicted = [ratios > threshold for ratios in predicted_ratios]
        true = [ratios > threshold for ratios in true_ratios]
        hits = np.array([np.count_nonzero(p & t) for p, t in zip(predicted, true)])
        n_predicted, n_true = (np.array([np.count_nonzero(c) for c in found]) for found in (predicted, true))
        if not per_direction:
            hits, n_predicted, n_true = hits.sum(), n_predicted.sum(), n_true.sum()
        precision = np.mean(hits / np.maximum(n_predicted, 1))
        recall = np.mean(hits / np.maximum(n_true, 1))
        scores.append(2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0)
    return float(np.average(scores, weights=thresholds))


def point_cloud_distance(
    prediction: np.ndarray,
    truth: np.ndarray,
    intrinsics: np.ndarray,
    mask: np.ndarray | None = None,
    max_queries: int | None = 100_000,
) -> dict[str, float]:
    """Distances between the point clouds of predicted and true depth, seen by the same camera.

    Args:
        prediction, truth, mask: as for `depth_metrics`. Only pixels with true depth become points; of these,
            predictions that are not finite or not above 0 have none, which can only lower completeness.
        intrinsics: (3, 3), in pixels, see `mf_diffusers.geometry`.
        max_queries: distances from at most this many points of a cloud, drawn at random with a fixed seed, enter its
            mean; they always go to the nearest of all points of the other cloud. None: from all points.

    Returns:
        A dict, in the unit of the truth:
            accuracy: mean distance of the predicted points to the nearest true point
            completeness: mean distance of the true points to the nearest predicted point
            chamfer: (accuracy + completeness) / 2 (some papers add the two, others take squares)
            points_missing: true points whose pixel has no predicted point, an int

    Raises ValueError when the arrays do not fit together, no pixel has true depth or none of these a predicted point.
    """
    from scipy.spatial import cKDTree  # only needed here

    prediction, truth = checked_maps(prediction, truth, mask)
    prediction = np.where(truth > 0, prediction, 0)
    true_points = unproject(truth, intrinsics)[truth > 0]
    predicted_points = unproject(prediction, intrinsics)
    predicted_points = predicted_points[predicted_points[..., 2] > 0]
    if predicted_points.size == 0:
        raise ValueError(f"the prediction is finite and above 0 at none of {len(true_points)} pixels with true depth")
    accuracy = _mean_distance(predicted_points, cKDTree(true_points), max_queries)
    completeness = _mean_distance(true_points, cKDTree(predicted_points), max_queries)
    return {
        "accuracy": accuracy,
        "completeness": completeness,
        "chamfer": (accuracy + completeness) / 2,
        "points_missing": len(true_points) - len(predicted_points),
    }


def mean_metrics(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """The metrics of a data set: the mean over its images, each with the same weight however many pixels it has.

    Args:
        metrics: dicts of one image each, all with the same keys, such as those of `depth_metrics`.

    Returns:
        A dict of the same keys: counts (`COUNTS`) added up, all else averaged; and "images", the number of dicts. A
        metric that is NaN for some images is averaged over the others, whose number is added as "<name>_images".

    Raises ValueError when there is no image, or the keys differ.
    """
    metrics = list(metrics)
    if not metrics:
        raise ValueError("there are no images to take the mean of")
    for index, image in enumerate(metrics):
        if image.keys() != metrics[0].keys():
            raise ValueError(f"image {index} has the metrics {sorted(image)}, the first {sorted(metrics[0])}")
    means = {}
    for name in metrics[0]:
        values = np.array([image[name] for image in metrics])
        if name in COUNTS:
            means[name] = int(values.sum())
            continue
        known = values[~np.isnan(values)]
        means[name] = float(known.mean()) if known.size else float("nan")
        if known.size < values.size:
            means[f"{name}_images"] = int(known.size)
    return means | {"images": len(metrics)}


def _neighbour_ratios(depth, valid):
    """d(j) / d(i) of all pairs of valid neighbours, one array for j right, left, below and above of i."""
    depth = depth.astype(np.float64)
    ratios = []
    for a, b in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1, :], np.s_[1:, :])):
        both = valid[a] & valid[b]
        near, far = depth[a][both], depth[b][both]
        ratios += [far / near, near / far]
    return ratios


def _mean_distance(points, tree, max_queries):
    if max_queries is not None and len(points) > max_queries:
        points = np.random.default_rng(0).choice(points, max_queries, replace=False)
    distances, _ = tree.query(points, workers=-1)
    return float(distances.mean())
