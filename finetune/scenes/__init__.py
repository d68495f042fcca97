"""Procedural RGB-D scenes: rendered image, exact depth and caption, made on the fly in batched torch.

A scene holds one to five solids (box, sphere, cylinder, cone) in a room, in a courtyard or on open ground. Scene
`index` of `seed` is always the same: a NumPy generator of its own draws its parameters on the CPU (scene.py), all rays
of a batch of scenes are then cast and shaded together on the device (renderer.py), and what is visible is put into
words (captions.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .captions import VOCABULARY, describe
from .renderer import render
from .scene import FIRST_OBJECT, SPLITS, sample_scene, scene_rng


__all__ = ["SPLITS", "VOCABULARY", "SceneBatch", "render_scenes"]


@dataclass
class SceneBatch:
    """Rendered scenes. The centre of pixel (row r, column c), the point whose depth and surface it has, is at (c, r) of
    the image plane, as in `mf_diffusers.geometry`, and intrinsics @ (X, Y, Z) / Z gives such coordinates."""

    image: torch.Tensor  # (B, 3, H, W) sRGB in [0, 1]
    depth: torch.Tensor  # (B, 1, H, W) metres along the optical axis; inf for the sky
    intrinsics: torch.Tensor  # (B, 3, 3) in pixels, square, principal point ((W - 1) / 2, (H - 1) / 2)
    surfaces: torch.Tensor  # (B, H, W) int64: SKY, FLOOR, WALL, CEILING or FIRST_OBJECT + object
    captions: list[str]


def render_scenes(
    indices: Iterable[int],
    seed: int = 0,
    height: int = 128,
    width: int = 128,
    device: str | torch.device = "cpu",
    supersample: int = 2,
    split: str = "train",
) -> SceneBatch:
    """Render scenes `indices` of `seed` and `split` (see SPLITS), with supersample^2 rays a pixel for the image."""
    keys = [int(index) for index in indices]
    scenes = [sample_scene(key, seed, split) for key in keys]
    image, depth, intrinsics, surfaces = render(scenes, height, width, torch.device(device), supersample)
    count = FIRST_OBJECT + max(len(scene.objects) for scene in scenes)
    shares = torch.stack([(surfaces == k).flatten(1).float().mean(1) for k in range(count)], dim=1).cpu().numpy()
    rngs = [scene_rng(split, seed, key, 1) for key in keys]
    captions = [describe(*args) for args in zip(scenes, shares, rngs)]
    return SceneBatch(image, depth, intrinsics, surfaces, captions)
