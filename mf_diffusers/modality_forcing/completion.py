"""Depth that is known in part, completed: depth made of the image, scaled to what is known, and drawn towards it."""

import numpy as np
import torch
from scipy.spatial import cKDTree

from mf_diffusers.alignment import align_scale

from .depth_processor import shrink
from .resampling import resampled_bands


NEIGHBOURS = 16
REACH = 0.5  # in mean distances between known pixels
LOG_DEPTH_REACH = 0.4
PRIOR = 0.1  # weight of the depth as it was made, against 1 for a known pixel at the same place
LEAST_DEPTH = 1e-6  # of the depth that was made, whose logarithm is taken


def complete(depth: torch.Tensor, resized: torch.Tensor, known: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """
    Depth in the unit of what is known of it, see [`log_correction`], and with what is known as it is.

    Args:
        depth (`torch.Tensor` of shape (B, 1, h, w)): As it was made, positive.
        resized (`torch.Tensor` of shape (B, 1, H, W)): The same at the size of what is known. The result is written
            into it, so that a large map is held but once.
        known (`torch.Tensor` of shape (B, 1, H, W)): Positive and finite where `valid`.
        valid (`torch.Tensor` of shape (B, 1, H, W)): bool; True somewhere in each map.

    Returns:
        `resized`.
    """
    correction = log_correction(depth, *shrink(known, valid, tuple(depth.shape[-2:])))
    for band, columns in resampled_bands(correction, tuple(resized.shape[-2:]), "bilinear"):
        made = resized[..., columns]
        made *= band.exp()
        made.copy_(torch.where(valid[..., columns], known[..., columns], made))
    return resized


def log_correction(depth: torch.Tensor, known: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """
    What to add to the logarithm of depth that was made of an image, so that it has the unit of depth that is known in
    places, and agrees with it there.

    A map gets one scale, the most robust (the exact minimum of the summed relative errors), because made depth is
    relative. What then is left between the two is spread from each known pixel to those that are near it in the image
    and in depth. Compared on the embedded model with keeping the known pixels at every noise level, also from a start
    that fits them, and with drawing the prediction towards them in every step: these were worse, or alike and dearer.

    Args:
        depth (`torch.Tensor` of shape (B, 1, H, W)): Positive.
        known (`torch.Tensor` of shape (B, 1, H, W)): Positive and finite where `valid`.
        valid (`torch.Tensor` of shape (B, 1, H, W)): bool; True somewhere in each map.

    Returns:
        `torch.Tensor` of shape (B, 1, H, W), float32.
    """
    corrections = [_of_map(*(part[0].cpu().numpy() for part in parts)) for parts in zip(depth, known, valid)]
    return torch.from_numpy(np.stack(corrections))[:, None].to(depth)


def _of_map(depth: np.ndarray, known: np.ndarray, valid: np.ndarray) -> np.ndarray:
    log_scale = np.log(max(align_scale(depth, known, valid, grid=None).scale, np.finfo(np.float64).tiny))
    log_depth = np.log(np.maximum(depth, LEAST_DEPTH))
    left = np.log(known[valid]) - log_depth[valid] - log_scale
    places = np.argwhere(valid)
    grid = np.argwhere(np.ones(depth.shape, bool))
    distance, neighbour = cKDTree(places).query(grid, k=range(1, min(NEIGHBOURS, len(places)) + 1))
    # Far from all that is known, as in a large hole, the nearest decide, so that no seam surrounds the hole.
    reach = np.maximum(REACH * np.sqrt(depth.size / len(places)), distance[:, :1])
    apart = log_depth.reshape(-1, 1) - log_depth[valid][neighbour]
    weight = np.exp(-((distance / reach) ** 2 + (apart / LOG_DEPTH_REACH) ** 2) / 2)
    if len(places) > NEIGHBOURS:
        # The last neighbour counts nothing, so that no edge shows where another takes its place.
        weight *= (1 - (distance / distance[:, -1:]) ** 2) ** 2
    spread = (weight * left[neighbour]).sum(1) / (weight.sum(1) + PRIOR)
    return (log_scale + spread.reshape(depth.shape)).astype(np.float32)
