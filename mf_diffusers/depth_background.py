"""The far end of a depth map: where it is no depth, but a background that a renderer or a sensor wrote as one."""

from typing import NamedTuple

import numpy as np


BACKGROUND_PIXELS = 4
BACKGROUND_GAP = 2
BACKGROUND_RATIO = 50

TOP_LEVELS = (32767, 65504, 65535)
"""The largest numbers of int16, float16 and uint16."""

TOP_LEVEL_GAP = 1.25
TOP_LEVEL_RATIO = 8

BLENDED_RATIO = 1000
"""Beyond this no depth is known that a model could make use of: `far` of the published one, and of ours."""

IMPOSSIBLE_RATIO = 10_000
SAMPLE = 1_000_000


class FarEnd(NamedTuple):
    """The farthest finite depth of a map: its value, the number of pixels that have it, how many times the next nearer
    one it is, and the median of all nearer ones."""

    value: float
    pixels: int
    gap: float
    median: float

    @property
    def ratio(self) -> float:
        """How many times the median of all nearer depth it is."""
        return self.value / self.median

    def background(self, stored: float) -> float | None:
        """The depth from which on no surface lies; None where all depth may be that of one.

        That is the value itself where at least 4 pixels have it, nothing lies between half of it and it, and it is 50
        times the median of all else. Of a value that the file has as the largest number of a type of 16 bits (`stored`)
        less is asked for: nothing between 4/5 of it and it, and 8 times the median. So a far wall stays whose floor
        leads up to it, and one without a floor at up to 50 times the usual depth; so does sky that was clamped (other
        depths lie just below the clamp, or it is not so much farther), a sensor that saturates at the end of its range,
        and all that has the value in a pixel or three.

        A background that was mixed with what is before it, as by resizing, leaves no such gap. Where at least 4 pixels
        have a value that is 1000 times the median, or any one is 10,000 times it, all beyond 1000 times is background.
        """
        is_top = stored in TOP_LEVELS
        gap, ratio = (TOP_LEVEL_GAP, TOP_LEVEL_RATIO) if is_top else (BACKGROUND_GAP, BACKGROUND_RATIO)
        is_repeated = self.pixels >= BACKGROUND_PIXELS
        if is_repeated and self.gap >= gap and self.ratio >= ratio:
            return self.value
        if self.ratio >= (BLENDED_RATIO if is_repeated else IMPOSSIBLE_RATIO):
            return BLENDED_RATIO * self.median
        return None


def far_end(depth: np.ndarray) -> FarEnd | None:
    """The far end of a depth map (H, W), 0 where missing; None where fewer than 4 pixels are nearer, for their median
    would say nothing. It is that of a regular sample in maps of more than a million pixels."""
    value = np.max(depth, where=np.isfinite(depth), initial=0)
    nearer = (depth > 0) & (depth < value)
    others = int(np.count_nonzero(nearer))
    if others < BACKGROUND_PIXELS:
        return None
    next_nearer = np.max(depth, where=nearer, initial=0)
    pixels = int(np.count_nonzero(depth == value))
    step = 1 + others // SAMPLE
    bands = np.array_split(np.arange(len(depth)), 1 + depth.size // SAMPLE)  # so that no copy of a large map is made
    median = np.median(np.concatenate([depth[rows][nearer[rows]][::step] for rows in bands]))
    return FarEnd(float(value), pixels, float(value) / float(next_nearer), float(median))
