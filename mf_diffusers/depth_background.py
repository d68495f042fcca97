"""The far end of a depth map: where it is no depth, but a background that a renderer or a sensor wrote as one."""

from typing import NamedTuple

import numpy as np


BACKGROUND_PIXELS = 4
BACKGROUND_GAP = 2
BACKGROUND_RATIO = 50

TOP_LEVELS = (32767, 65504, 65535)
"""The largest numbers of int16, float16 and uint16."""

TOP_LEVEL_RATIO = 8
SUSPICIOUS_RATIO = 10_000
SAMPLE = 1_000_000


class FarEnd(NamedTuple):
    """The farthest finite depth of a map: its value, the number of pixels that have it, and how many times the next
    nearer one and the median of all nearer ones it is."""

    value: float
    pixels: int
    gap: float
    ratio: float

    def is_background(self, stored) -> bool:
        """Whether no surface has this depth, which the file has as the number `stored`.

        It is said to be so where at least 4 pixels have the value, nothing lies between half of it and it, and it is 50
        times the median of all else; 8 times where the number is the largest of a type of 16 bits. So a far wall stays
        whose floor leads up to it, and one without a floor at up to 50 times the usual depth; so does sky that was
        clamped (other depths lie just below the clamp, or it is not so much farther), a sensor that saturates at the
        end of its range, and all that has the value in a pixel or three.
        """
        ratio = TOP_LEVEL_RATIO if stored in TOP_LEVELS else BACKGROUND_RATIO
        return self.pixels >= BACKGROUND_PIXELS and self.gap >= BACKGROUND_GAP and self.ratio >= ratio

    @property
    def is_suspicious(self) -> bool:
        """Whether all other depth is next to nothing beside it."""
        return self.ratio >= SUSPICIOUS_RATIO


def far_end(depth) -> FarEnd | None:
    """The far end of a depth map (H, W), 0 where missing; None where there are no two depths. The median is that of a
    regular sample in maps of more than a million pixels."""
    finite = np.isfinite(depth)
    value = np.max(depth, where=finite, initial=0)
    nearer = (depth > 0) & (depth < value)
    if not nearer.any():
        return None
    pixels = int(np.count_nonzero(depth == value))
    next_nearer = np.max(depth, where=nearer, initial=0)
    rest = depth[nearer]
    median = np.median(rest[:: 1 + rest.size // SAMPLE])
    return FarEnd(float(value), pixels, float(value) / float(next_nearer), float(value) / float(median))
