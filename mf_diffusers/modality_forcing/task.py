"""What a call of the pipeline makes, and in which steps: both follow from what is given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .inputs import GivenDepth, GivenImage


Levels = Sequence[float] | np.ndarray
"""Noise levels of the leading stream, from the first, without the last, 0, and before the scheduler's shift."""


@dataclass(frozen=True)
class Task:
    r"""
    The passes of a call. The first makes the image, and its depth beside it; those that follow go over the finished
    image and make its depth.

    Args:
        makes_image: Whether there is a first pass; without it, the image is given whole.
        completes_depth: Whether the later passes make the rest of a depth map that is given in part, or another version
            of it.
        depth_passes: How many later passes there are; of several, the depth is the aligned median.
        sigmas, depth_sigmas: Noise levels of the first pass and of each of the later ones.
        num_inference_steps: Steps that the call asked for or that the checkpoint says; `strength` makes a share of
            them.
        guidance_scale: Of the first pass, or of the later ones where there is no first.
    """

    makes_image: bool
    completes_depth: bool
    depth_passes: int
    sigmas: Levels
    depth_sigmas: Levels
    num_inference_steps: int
    guidance_scale: float

    @classmethod
    def of_call(
        cls,
        image: GivenImage | None,
        depth: GivenDepth | None,
        defaults: Mapping[str, Any],
        *,
        strength: float | None,
        depth_strength: float | None,
        num_inference_steps: int | None,
        sigmas: Levels | None,
        guidance_scale: float | None,
        num_refinement_steps: int,
        ensemble_size: int,
    ) -> "Task":
        """The task of a call with these inputs; see the pipeline's `__call__`. `defaults` is the pipeline's config."""
        makes_image = image is None or not image.is_whole
        completes_depth = depth is not None and not depth.is_whole and not (makes_image and depth.is_start)
        has_depth_passes = not makes_image or completes_depth or num_refinement_steps > 0
        steps, scale = defaults["default_depth_steps"], defaults["default_depth_guidance_scale"]
        depth_steps = num_refinement_steps or steps
        if makes_image:
            steps, scale = defaults["default_num_inference_steps"], defaults["default_guidance_scale"]
        if sigmas is None:
            sigmas = even_levels(num_inference_steps or steps)
        return cls(
            makes_image=makes_image,
            completes_depth=completes_depth,
            depth_passes=ensemble_size if has_depth_passes else 0,
            sigmas=remaining_levels(sigmas, strength),
            depth_sigmas=even_levels(depth_steps) if makes_image else remaining_levels(sigmas, depth_strength),
            num_inference_steps=len(sigmas),
            guidance_scale=scale if guidance_scale is None else guidance_scale,
        )

    @property
    def num_timesteps(self) -> int:
        """Steps of all passes together."""
        return len(self.sigmas) * self.makes_image + len(self.depth_sigmas) * self.depth_passes


def even_levels(steps: int) -> np.ndarray:
    """Noise levels from 1 in equal steps, without the last, 0."""
    return np.linspace(1.0, 1 / steps, steps)


def remaining_levels(levels: Levels, strength: float | None) -> Levels:
    """The share `strength` of the levels, the last of them; one at least. All, where it is `None`."""
    return levels if strength is None else levels[int(len(levels) - min(len(levels) * strength, len(levels))) :]
