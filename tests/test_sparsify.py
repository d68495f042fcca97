"""Sparsifiers: exact densities, determinism, and the structure that their names promise."""

import numpy as np
import pytest
import torch

from finetune.data.sparsify import SPARSIFIERS, cells, lidar_lines, sensor_holes, thin
from finetune.scenes import render_scenes


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def depth() -> torch.Tensor:
    """(1, 96, 128) of an open scene: objects on ground, the sky missing."""
    depth = render_scenes([5], height=96, width=128).depth[0]
    return torch.where(depth.isfinite(), depth, 0.0)


THINNING = [name for name in SPARSIFIERS if name != "dense"]


@pytest.mark.parametrize("name", THINNING)
@pytest.mark.parametrize("density", [0.005, 0.03, 0.2, 0.5, 0.9, 1.0])
def test_density_is_hit_on_valid_pixels_only(depth, name, density):
    mask = SPARSIFIERS[name](depth, density, generator())
    assert mask.dtype == torch.bool
    assert mask.shape == depth.shape
    assert not mask[depth == 0].any()
    assert abs(int(mask.sum()) - density * int((depth > 0).sum())) <= 1


@pytest.mark.parametrize("name", THINNING)
def test_generator_decides(depth, name):
    first, again, other = (SPARSIFIERS[name](depth, 0.1, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", THINNING)
def test_edge_cases(name):
    assert not SPARSIFIERS[name](torch.zeros(1, 8, 8), 0.5, generator()).any()
    assert SPARSIFIERS[name](torch.ones(1, 1, 9), 0.001, generator()).sum() == 1
    for density in (0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="density"):
            SPARSIFIERS[name](torch.ones(1, 8, 8), density, generator())
    with pytest.raises(ValueError, match="shape"):
        SPARSIFIERS[name](torch.ones(2, 8, 8), 0.5, generator())


def test_lidar_points_lie_on_few_lines():
    mask = lidar_lines(torch.ones(1, 120, 160), 0.05, generator())[0]
    middle = mask[:, 70:90].any(1)  # near the middle column the rings are level
    assert 10 < middle.sum() < 60
    assert mask[:, 70:90].sum() > 1.5 * middle.sum()


def test_rings_bend_away_from_the_horizon():
    """Equal elevation is y = tan(e) sqrt(x^2 + 1): sorted by it the points fall into rings, sorted by y they do not."""
    for seed in range(5):
        rows, columns = lidar_lines(torch.ones(1, 200, 200), 0.01, generator(seed))[0].nonzero(as_tuple=True)
        focal = 100 / torch.tensor(30.0).deg2rad().tan()
        y, x = (rows - 99.5) / focal, (columns - 99.5) / focal
        gaps = [(v.sort().values.diff() > 7 / focal).sum() for v in (torch.atan2(y, (x * x + 1).sqrt()), y)]
        assert gaps[0] > 8
        assert gaps[1] < gaps[0]


def test_holes_take_edges_far_points_and_blobs(depth):
    mask = sensor_holes(depth, 0.7, generator())
    near, far = (depth[(depth > 0) & kept].median() for kept in (mask, ~mask))
    assert far > near
    step = torch.ones(1, 64, 64)
    step[..., 32:] = 2
    mask = sensor_holes(step, 0.9, generator())
    assert not mask[..., 31:33].any()
    changes = mask[..., 1:].ne(mask[..., :-1]).float().mean()
    assert changes < 0.1  # blobs, not points


def test_patches_are_dense_inside():
    def full_cells(name):
        masks = [SPARSIFIERS[name](torch.ones(1, 64, 64), 0.1, generator(seed))[0] for seed in range(20)]
        return sum(mask.unflatten(0, (16, 4)).unflatten(2, (16, 4)).all(3).all(1).sum() for mask in masks) / 20

    assert full_cells("random") == 0
    assert full_cells("patches") > 3


@pytest.mark.parametrize("seed", range(5))
def test_cells_are_whole_and_each_of_another_row_and_column(seed):
    mask = cells(torch.ones(1, 64, 64), 8 / 64, generator(seed))[0]
    shares = mask.float().unflatten(0, (8, 8)).unflatten(2, (8, 8)).mean(dim=(1, 3))
    assert torch.equal(shares.sum(0), torch.ones(8)) and torch.equal(shares.sum(1), torch.ones(8))
    assert set(shares.flatten().tolist()) == {0.0, 1.0}
    assert not torch.equal(mask, cells(torch.ones(1, 64, 64), 8 / 64, generator(seed + 5))[0])
    wide = cells(torch.ones(1, 24, 64), 0.1, generator(seed))
    assert wide.sum() == round(0.1 * 24 * 64)


def test_sensors_do_not_see_the_sky():
    depth = torch.ones(1, 32, 32)
    depth[:, :16] = torch.inf
    for name, sees in {"random": True, "patches": True, "cells": True, "lidar": False, "holes": False}.items():
        masks = [SPARSIFIERS[name](depth, 0.2, generator(seed)) for seed in range(5)]
        assert any(mask[:, :16].any() for mask in masks) == sees


def test_samples_take_patterns_in_turn():
    sample = {"depth": torch.full((1, 32, 32), torch.inf), "caption": ""}
    for index in range(4):
        thinned = thin(sample, 0.1, "random+patches", index)["depth"]
        mask = SPARSIFIERS[("random", "patches")[index % 2]](sample["depth"], 0.1, generator(index))
        assert torch.equal(thinned, torch.where(mask, torch.inf, 0.0))
    assert thin(sample, 1, "random", 0) is sample
    with pytest.raises(ValueError, match="choose of dense, random, lidar, holes, patches, cells"):
        thin(sample, 0.1, "random+stripes", 0)


def test_a_range_of_densities_is_drawn_evenly_in_the_logarithm():
    sample = {"depth": torch.ones(1, 64, 64)}
    kept = torch.tensor([thin(sample, [0.01, 1.0], "random", index)["depth"].mean().item() for index in range(400)])
    assert kept.min() < 0.012
    assert kept.max() > 0.95
    assert abs(kept.log10().mean() + 1) < 0.1  # the middle of 1% and 100%
    again = thin(sample, [0.01, 1.0], "random", 7)["depth"]
    assert torch.equal(again, thin(sample, [0.01, 1.0], "random", 7)["depth"])


def test_dense_samples_take_their_turn_in_a_mixture():
    sample = {"depth": torch.ones(1, 16, 16)}
    kept = [thin(sample, [0.01, 0.5], "dense+random", index)["depth"].mean().item() for index in range(6)]
    assert kept[::2] == [1.0] * 3
    assert max(kept[1::2]) <= 0.51


def test_what_a_range_keeps_has_about_the_mean_depth_of_the_scene():
    """Depth is scaled by that mean, and in pure noise a model cannot see how it was thinned."""
    batch = render_scenes(range(40), height=64, width=64, supersample=1)
    for pattern in ("random", "lidar", "holes"):
        ratios = []
        for index, depth in enumerate(batch.depth):
            kept = thin({"depth": depth}, [0.01, 1.0], pattern, index)["depth"]
            seen = depth[depth.isfinite()]
            ratios.append((kept[(kept > 0) & kept.isfinite()].mean() / seen.mean()).item())
        assert np.mean(np.abs(np.log(ratios))) < 0.2, pattern
    for depth in batch.depth:  # a density alone is as asked
        few = thin({"depth": depth}, 0.02, "holes", 0)["depth"]
        assert int((few > 0).sum()) == round(0.02 * int(depth.isfinite().sum()))


@pytest.mark.parametrize("density", [0, [0.5, 0.1], [0.1], [0.1, 2], "all", [0.1, 0.2, 0.3]])
def test_wrong_densities_are_named(density):
    with pytest.raises(ValueError, match="depth_density"):
        thin({"depth": torch.ones(1, 8, 8)}, density, "random", 0)
