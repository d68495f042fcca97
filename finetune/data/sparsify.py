"""Masks that thin dense depth as sensors do, to study and to augment training on sparse depth.

Each function takes a depth map (1, H, W) with 0 where depth is missing and inf in the sky, the share of its valid
pixels to keep, in (0, 1], and a CPU generator. It returns a bool mask (1, H, W) that is True at exactly that share of
the valid pixels, rounded, but at one of them at least; and nowhere else. For the two sensors the sky is not valid: it
sends nothing back. The generator alone decides the mask. All raise ValueError for another density or shape.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


LIDAR_FOV_DEGREES = 60.0  # along the longer side; the shape of the rings, not their number, depends on it
LINE_SHARE_EXPONENT = 0.6  # the share of rows with a ring is density**0.6: rings are finer along than across
EDGE_JUMP = 0.2  # of log depth, summed over the neighbourhoods that see it
BLOB_CELLS = (4, 12)  # noise cells along the longer side
CELLS = 8  # rows, and columns, of the grid over the longer side
PATCHES, PATCH_SIDES = 64, (1 / 16, 1 / 8)  # how many are drawn, and between which shares of the longer side


def random_points(depth: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Pixels chosen evenly."""
    return _keep_lowest(torch.rand(depth.shape, generator=generator), depth, density)


def lidar_lines(depth: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Rings of equal elevation around an upright LiDAR at the camera: equally spaced, shaken a little, with dropouts.

    In the image a ring is a hyperbola, bent away from the horizon.
    """
    depth = torch.where(depth.isfinite(), depth, 0.0)
    height, width = depth.shape[-2:]
    focal = max(height, width) / 2 / math.tan(math.radians(LIDAR_FOV_DEGREES) / 2)
    y = (torch.arange(height)[:, None] - (height - 1) / 2) / focal
    x = (torch.arange(width)[None, :] - (width - 1) / 2) / focal
    elevation = torch.atan2(y, torch.sqrt(x * x + 1))  # (H, W)
    row = torch.gradient(elevation, dim=0)[0] if height > 1 else torch.ones_like(elevation)  # elevation of one row
    spacing = (elevation.max() - elevation.min() + row.mean()) / (height * density**LINE_SHARE_EXPONENT)

    phase = torch.rand(1, generator=generator)
    ring = ((elevation / spacing) + phase).floor().long()
    ring = ring - ring.min()
    shake = 0.2 * (torch.rand(int(ring.max()) + 1, generator=generator) - 0.5)[ring] * spacing
    tremor = 0.2 * row * torch.randn(elevation.shape, generator=generator)
    offset = ((elevation + shake + tremor) / spacing + phase).remainder(1) - 0.5
    rows_away = (offset.abs() * spacing / row).round()
    # Of the pixels on a ring a random part; from beside the rings only if these do not suffice.
    return _keep_lowest(rows_away[None] + torch.rand(depth.shape, generator=generator), depth, density)


def sensor_holes(depth: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Holes as of an RGB-D camera: along depth edges, beyond a range, and in blobs, as from shiny or dark surfaces.

    Edges go first; how much the other two take is drawn.
    """
    depth = torch.where(depth.isfinite(), depth, 0.0)
    valid = depth > 0
    height, width = depth.shape[-2:]
    log_depth = torch.where(valid, depth.clamp(min=1e-12).log(), 0.0)
    farther, nearer = (torch.where(valid, sign * log_depth, -torch.inf)[None] for sign in (1, -1))
    jump = torch.zeros(depth.shape)
    for size in (3, 5, 9):  # the closer to an edge the more of these see it
        local = [F.max_pool2d(x, size, stride=1, padding=size // 2)[0] for x in (farther, nearer)]
        jump += torch.where(valid, local[0] + local[1], 0.0)
    blobs = torch.zeros(depth.shape)
    for cells in BLOB_CELLS:
        grid = [max(2, round(cells * side / max(height, width))) for side in (height, width)]
        noise = torch.randn(1, 1, *grid, generator=generator)
        blobs += F.interpolate(noise, (height, width), mode="bicubic", align_corners=True)[0] / cells**0.5

    weights = [1, *(0.5 + 0.5 * torch.rand(2, generator=generator))]  # edges go first
    causes = (torch.where(jump > EDGE_JUMP, jump, 0.0), log_depth, blobs)
    causes = [_rank(cause, valid) * weight for cause, weight in zip(causes, weights)]
    return _keep_lowest(torch.stack(causes).amax(0), depth, density)


def patches(depth: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Small squares anywhere, the last one incomplete. Dense inside, as depth is in sampling, where points alone would
    leave a model to learn that most pixels are noise; small, so that their mean is about that of the scene."""
    height, width = depth.shape[-2:]
    smallest, largest = (share * max(height, width) for share in PATCH_SIDES)
    first = torch.full(depth.shape, float(PATCHES))  # the first patch that a pixel lies in
    draws = torch.rand(PATCHES, 3, generator=generator)
    for number, (size, y, x) in enumerate(draws.tolist()):
        side = round(smallest * (largest / smallest) ** size)
        top, left = round(y * (height + side)) - side, round(x * (width + side)) - side
        cell = first[:, max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)]
        cell.clamp_(max=number)
    return _keep_lowest(first + torch.rand(depth.shape, generator=generator), depth, density)


def cells(depth: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Whole cells of a grid, the last one incomplete. Where a cell is a token, or several, the model meets tokens that
    are depth and nothing else, as in sampling, beside others that are noise. Each comes from another row and column,
    until all have had their turn: so few of them have about the mean of the scene.
    """
    height, width = depth.shape[-2:]
    side = -(-max(height, width) // CELLS)
    column, turn = (torch.randperm(CELLS, generator=generator) for _ in range(2))  # of every row
    lap = (torch.arange(CELLS) - column[:, None]) % CELLS  # in which a row's turn brings that column
    order = (CELLS * lap + turn[:, None]).repeat_interleave(side, 0).repeat_interleave(side, 1)
    return _keep_lowest(order[None, :height, :width] + torch.rand(depth.shape, generator=generator), depth, density)


def _rank(values, valid):
    """Each value's place among the valid ones, in [0, 1]; equal values share one."""
    _, place, number = values[valid].unique(return_inverse=True, return_counts=True)
    ranks = torch.ones(values.shape)
    ranks[valid] = (number.cumsum(0)[place] - number[place]).float() / max(1, len(place))
    return ranks


def _keep_lowest(score, depth, density):
    """True at the valid pixels of the lowest scores, as many as the density says."""
    if depth.ndim != 3 or depth.shape[0] != 1:
        raise ValueError(f"depth of shape {tuple(depth.shape)} is no map (1, H, W)")
    if not 0 < density <= 1:
        raise ValueError(f"density {density!r} is no share in (0, 1]")
    mask = torch.zeros(depth.numel(), dtype=torch.bool)
    valid = (depth > 0).flatten().nonzero()[:, 0]
    if len(valid):
        kept = max(1, round(density * len(valid)))
        mask[valid[score.flatten()[valid].argsort(stable=True)[:kept]]] = True
    return mask.view(depth.shape)


def dense(depth: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Every valid pixel, whatever the density: the share of rendered depth in a mixture of patterns."""
    return _keep_lowest(torch.zeros(depth.shape), depth, density=1.0)


SPARSIFIERS = {
    "dense": dense,
    "random": random_points,
    "lidar": lidar_lines,
    "holes": sensor_holes,
    "patches": patches,
    "cells": cells,
}


LEAST_DENSITY = {"lidar": 0.1, "holes": 0.9}  # of a range: what less would keep has another mean depth than the scene


def thin(sample: dict, density: float | Sequence[float], pattern: str, index: int) -> dict:
    """
    A sample with a part of its depth.

    Args:
        density: share of the valid pixels that is kept; two numbers are the ends of a range from which each sample
            draws its own, evenly in the logarithm. A pattern in `LEAST_DENSITY` draws from there on, if the range
            goes so far: depth is scaled by the mean of what is kept, and a model that cannot see the pattern, as in
            pure noise, could not know that scale.
        pattern: a name in `SPARSIFIERS`, or several joined by "+", which the samples take in turn; a name may stand
            there more than once.
        index: of the sample; it decides which pixels stay.

    Raises ValueError for a pattern that does not exist, and for a density that is no share or range of shares.
    """
    low, high = _range_of(density)
    if low == high == 1:
        return sample
    patterns = pattern.split("+")
    if not SPARSIFIERS.keys() >= set(patterns):
        raise ValueError(f"depth_pattern {pattern!r}: choose of {', '.join(SPARSIFIERS)}, or several joined by +")
    name, generator = patterns[index % len(patterns)], torch.Generator().manual_seed(index)
    if low < high:
        low = max(low, min(LEAST_DENSITY.get(name, low), high))
        low *= (high / low) ** torch.rand((), generator=generator).item()
    mask = SPARSIFIERS[name](sample["depth"], low, generator)
    return sample | {"depth": torch.where(mask, sample["depth"], 0.0)}


def _range_of(density):
    """The ends (low, high) of a density or of a range of densities."""
    ends = [density, density] if isinstance(density, (int, float)) else density
    if not (isinstance(ends, Sequence) and len(ends) == 2 and 0 < ends[0] <= ends[1] <= 1):
        raise ValueError(f"depth_density {density!r} is neither a share in (0, 1] nor a range [low, high] of shares")
    return tuple(ends)
