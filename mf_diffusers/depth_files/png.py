"""PNG: whole levels of 8 or 16 bits, on a linear scale or on MoGe's logarithmic one."""

from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mf_diffusers.depth_files.stored import Stored, check_memory, one_of_equal, positive


SCALE_KEY = "depth_scale"
LEVELS = 65535


def read(path: Path, key: str | None = None) -> Stored:
    """The levels, or the depth where the text chunks `near` and `far` tell that they are logarithmic (see `log_depth`).

    Of several channels, which must be equal, the first; alpha is left out.
    """
    with Image.open(path, formats=["PNG"]) as image:  # not a JPEG of that name, whose levels are not exact
        check_memory(image.size, 8)
        if image.mode.startswith("I"):
            levels = np.asarray(image)
        else:
            image.load()
            levels = one_of_equal(_channels(path, image))
        notes = image.info  # complete only now: text chunks may stand at the end
    if levels.dtype.itemsize > 1 and {"near", "far"} <= notes.keys():
        near, far, unit = (positive(notes.get(key, 1), f"the text chunk {key!r}") for key in ("near", "far", "unit"))
        return Stored(log_depth(levels, near, far, unit))
    return Stored(levels, notes.get(SCALE_KEY))


def log_depth(levels: np.ndarray, near: float, far: float, unit: float = 1.0) -> np.ndarray:
    """Depth (H, W), float32, of MoGe's levels, uint16: NaN where it is missing (0), inf where it is infinite (65535).

    With u = (level - 1) / 65533, depth = near^(1 - u) far^u, times `unit`, which is in older files.
    """
    share = (levels.astype(np.float64) - 1) / (LEVELS - 2)
    depth = unit * near ** (1 - share) * far**share
    depth[levels == 0] = np.nan
    depth[levels == LEVELS] = np.inf
    return depth.astype(np.float32)


def write(path: Path, depth: np.ndarray) -> None:
    """Write a depth map, 0 where it is missing, as levels up to 65535, the size of one in the chunk "depth_scale"."""
    scale = float(depth.max()) / LEVELS or 1.0
    levels = np.empty(depth.shape, dtype=np.uint16)
    for row, stored in zip(depth, levels):  # row by row: of a large map no copies in floats are made
        # At least level 1: a valid pixel must not round to 0, which means missing.
        stored[:] = np.where(row > 0, np.clip(np.round(row / scale), 1, LEVELS), 0)
    notes = PngInfo()
    notes.add_text(SCALE_KEY, repr(scale))
    Image.fromarray(levels).save(path, format="PNG", pnginfo=notes)


def _channels(path, image):
    """The channels of a picture (H, W, C) without alpha."""
    data = path.read_bytes()
    if data[24] == 16:  # bits, of which Pillow keeps 8 where there are several channels
        import imagecodecs

        channels = imagecodecs.png_decode(data)
        return channels[..., : channels.shape[-1] - 1 if channels.shape[-1] in (2, 4) else None]
    return np.asarray(image.convert("RGB"))
