"""What a depth file stores."""

import math
from dataclasses import dataclass

import numpy as np
import psutil
from rich.filesize import decimal


BYTES_A_PIXEL = 16
"""What it takes, beside the stored numbers, to make a depth map of them."""


@dataclass(frozen=True)
class Stored:
    """The numbers of a map, whole or real, (H, W) or with axes of length 1 around it; and the text of the scale that
    the file notes, by which they are to be multiplied."""

    values: np.ndarray
    noted_scale: str | None = None

    @property
    def scale(self) -> float:
        """1 where the file notes none. Raises ValueError when what it notes is no positive number."""
        return (
            1.0 if self.noted_scale is None else positive(self.noted_scale, "the noted depth_scale", "; pass scale=...")
        )


def positive(text: str, what: str, remedy: str = "") -> float:
    """The number that a text is. Raises ValueError when it is none, or not above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{what} is {text!r}, no positive number{remedy}")
    return number


def one_of_equal(channels: np.ndarray) -> np.ndarray:
    """One map (H, W) of equal channels (H, W, C); what is to be left out, alpha for one, is not among them.

    Raises ValueError when they differ.
    """
    first, has_nan = channels[..., 0], channels.dtype.kind == "f"
    if any(not np.array_equal(channels[..., at], first, equal_nan=has_nan) for at in range(1, channels.shape[-1])):
        raise ValueError("a coloured depth picture carries no depth values; give the raw depth it was made from")
    return first


def check_memory(shape: tuple[int, ...], bytes_a_pixel: int) -> None:
    """Raises ValueError, before anything is decoded, when a map of this shape would not fit into free memory."""
    pixels, free = math.prod(shape), psutil.virtual_memory().available
    needed = pixels * (bytes_a_pixel + BYTES_A_PIXEL)
    if needed > free:
        size = "x".join(map(str, shape))
        raise ValueError(
            f"its header says {size}, which takes {decimal(needed)} of memory, and {decimal(free)} are free"
        )
