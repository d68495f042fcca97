"""Depth evaluation: alignment of relative predictions to the truth, and the metrics of the field."""

from mf_diffusers.alignment import (
    ALIGNMENTS,
    Alignment,
    align_affine_robust,
    align_disparity_least_squares,
    align_least_squares,
    align_median,
    align_none,
    align_scale,
)

from .metrics import boundary_f1, depth_metrics, mean_metrics, point_cloud_distance


__all__ = [
    "ALIGNMENTS",
    "Alignment",
    "align_affine_robust",
    "align_disparity_least_squares",
    "align_least_squares",
    "align_median",
    "align_none",
    "align_scale",
    "boundary_f1",
    "depth_metrics",
    "mean_metrics",
    "point_cloud_distance",
]
