"""Depth maps on disk and in memory.

A depth map in memory is a float32 array (H, W) in which 0 means "no depth here" and inf "infinitely far".
"""

import math
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from mf_diffusers.depth_background import far_end
from mf_diffusers.depth_files import READERS, exr, png, read_stored
from mf_diffusers.files import atomic_write
from mf_diffusers.input_warning import InputWarning


DEPTH_SUFFIXES = tuple(READERS)
"""What `read_depth` reads."""

DEPTH_WRITE_SUFFIXES = (".npy", ".exr", ".png")
"""What `write_depth` writes."""

LARGEST = float(np.finfo(np.float32).max)


def read_depth(
    path: str | Path,
    scale: float | None = None,
    invalid: float | tuple[float, ...] | None = None,
    key: str | None = None,
    infinite: float | tuple[float, ...] | None = None,
    maximum: float | None = None,
    inverse: bool = False,
) -> np.ndarray:
    """Read a depth map; the suffix (any of `DEPTH_SUFFIXES`) decides the format.

    Where one value at the far end repeats and dwarfs the rest, as the background of a renderer does (1e10 of Blender,
    65504 of half floats, 65535, a clip plane), it is missing, and an InputWarning says so: `FarEnd.background` has the
    rule. A `maximum` of inf keeps it.

    Args:
        path: the file. The first page of a TIFF is read. Levels of a PNG with the text chunks `near` and `far` of MoGe
            are logarithmic, and stand for the depth that they mean.
        scale: what stored values are multiplied by, e.g. 1/1000 for millimetres or 1/256 for KITTI PNGs. None: the
            scale that `write_depth` noted in a PNG, otherwise 1.
        invalid: a stored value (before scaling), or a tuple of them, that means "missing", e.g. 65535 or inf.
        key: which array of an npz or channel of an EXR. None: for npz "depth", or the only array; for EXR the one that
            is named as depth is (Z, depth.Z, Depth.V), or the only channel.
        infinite: a stored value (before scaling), or a tuple of them, that means "infinitely far" besides inf.
        maximum: the farthest depth (after scaling); what is farther is missing. None: no limit but the background.
        inverse: whether the stored values, times `scale`, are 1 / depth. Then inf is missing.

    Returns:
        float32 (H, W): inf where infinite, and 0 where depth is missing: NaN, zero, negative, too large for float32,
        beyond `maximum`, or listed in `invalid`.

    Warns with UserWarning when the depth has only the 256 levels of 8 bits, with InputWarning of a background and of
    values too large for float32.

    Raises FileNotFoundError when there is no such file, and ValueError for everything that holds no depth map: a
    suffix of another format, a damaged file, a coloured picture, several channels that could be meant, a missing key,
    an array of other than (H, W) numbers, one that is larger than the free memory.
    """
    if scale is not None and not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"{path}: scale={scale!r} must be a positive number, e.g. 1/1000 for millimetres")
    if maximum is not None and not maximum > 0:
        raise ValueError(f"{path}: maximum={maximum!r} must be a positive number, or inf for no limit")
    stored = read_stored(path, key)
    try:
        scale = stored.scale if scale is None else scale
        infinite = [*_listed(infinite), *([] if inverse or math.inf in _listed(invalid) else [math.inf])]
        depth = _scaled(as_depth_map(stored.values, invalid=invalid, infinite=infinite), scale, inverse)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    values = stored.values.reshape(depth.shape)
    too_large = (
        (values > np.float64(LARGEST / max(scale, 1))) & np.isfinite(values) & ~_is_stored(_listed(invalid), values)
    )
    if too_large.any():
        _warn(
            path, f"{np.count_nonzero(too_large)} pixels are missing, {values[too_large][0]:g}: too large for float32"
        )
    if maximum is not None:
        depth[(depth > maximum) & np.isfinite(depth)] = 0
    else:
        _drop_background(path, depth, values)
    if values.dtype == np.uint8:
        _warn(path, "8-bit depth has only 256 levels; give 16-bit PNG or float depth if there is any", UserWarning)
    return depth


def read_values(path: str | Path, key: str | None = None, zero_is_value: bool = False) -> np.ndarray:
    """The numbers in a depth file whatever they mean: relative depth and disparity may well be 0 or negative.

    Args:
        path, key: as for `read_depth`.
        zero_is_value: whether 0 is a value in files of whole numbers too, as it is where relative depth was spread
            over all levels (Marigold's and Depth Anything's PNGs).

    Returns:
        float32 (H, W), NaN where there is no value: what is not finite, and unless `zero_is_value`, 0 in files of
        whole numbers, which have no other way to say so. The scale noted in a PNG is applied.

    Raises FileNotFoundError and ValueError as `read_depth` does.
    """
    stored = read_stored(path, key)
    try:
        values, masked = _one_map(stored.values)
        with np.errstate(over="ignore"):
            read = (values * stored.scale).astype(np.float32)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    zero_is_value |= values.dtype.kind == "f"
    return np.where(np.isfinite(read) & ~masked & ((values != 0) | zero_is_value), read, np.float32(np.nan))


def write_depth(path: str | Path, depth: ArrayLike) -> None:
    """Write a depth map (H, W); missing pixels (not finite, or not above 0) are stored as 0.

    The suffix decides: `.npy` float32; `.exr` one float32 channel "Z"; `.png` 16 bits, spread over 0..max depth, with
    the size of one level in the text chunk "depth_scale", which `read_depth` applies to restore the units. The PNG
    rounds to 1/65535 of the largest depth; the other two are exact. The file appears whole or not at all.

    Raises ValueError for another suffix or for what is no depth map, FileNotFoundError when the folder is missing.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in DEPTH_WRITE_SUFFIXES:
        raise ValueError(
            f"{path}: depth cannot be written with the suffix {suffix!r}; use {', '.join(DEPTH_WRITE_SUFFIXES)}"
        )
    depth = view_as_depth_map(depth)
    with atomic_write(path) as temporary:
        if suffix == ".npy":
            with temporary.open("wb") as file:  # given a name, np.save would add ".npy" to one that ends in ".NPY"
                np.save(file, depth)
        elif suffix == ".exr":
            exr.write(temporary, depth)
        else:
            png.write(temporary, depth)


def as_depth_map(
    depth: ArrayLike,
    mask: ArrayLike | None = None,
    invalid: float | tuple[float, ...] | None = None,
    infinite: float | tuple[float, ...] | None = None,
    maximum: float | None = None,
) -> np.ndarray:
    """Bring an array to the depth map of this package: float32 (H, W), 0 where depth is missing.

    Args:
        depth: real numbers (H, W), or with axes of length 1 before or behind these. Values that are not finite in
            float32 or not above 0, and the masked ones of a masked array, are missing.
        mask: (H, W), True where depth counts. None: everywhere.
        invalid: a value, or a tuple of them, that means "missing", e.g. 65535.
        infinite: a value, or a tuple of them, that means "infinitely far", inf for one, and becomes inf.
        maximum: the farthest depth; what is farther, but not infinite, is missing. None: no limit.

    Raises ValueError for any other shape, an empty array, or values that are not real numbers.
    """
    values, masked = _one_map(depth)
    with np.errstate(over="ignore", invalid="ignore"):
        depth = values.astype(np.float32, copy=False)
        valid = np.isfinite(depth) & (depth > 0) & ~masked
    if maximum is not None:
        valid &= depth <= maximum
    valid &= ~_is_stored(_listed(invalid), values)
    if mask is not None:
        mask = np.asarray(mask)
        if mask.shape != depth.shape:
            raise ValueError(f"mask of shape {mask.shape} does not fit depth of shape {depth.shape}; resize it first")
        valid &= mask.astype(bool)
        masked = masked | ~mask.astype(bool)
    depth = np.where(valid, depth, np.float32(0))
    if infinite is not None:
        depth[_is_stored(_listed(infinite), values) & ~masked] = np.inf
    return depth


def view_as_depth_map(depth: ArrayLike, mask: ArrayLike | None = None) -> np.ndarray:
    """A depth map as of `as_depth_map`, but an array that is one already is returned itself: do not write into it."""
    is_map = isinstance(depth, np.ndarray) and not isinstance(depth, np.ma.MaskedArray) and depth.dtype == np.float32
    if mask is None and is_map and depth.ndim == 2 and depth.size and depth.min() >= 0 and depth.max() < np.inf:
        return depth
    return as_depth_map(depth, mask)


def _one_map(depth):
    """An array as (H, W) in the type it has, and where it is masked."""
    depth = np.asanyarray(depth)
    if depth.dtype.kind not in "uif":
        raise ValueError(f"depth values of type {depth.dtype} are not real numbers; give floats or integers")
    shape = depth.shape
    while depth.ndim > 2 and 1 in (depth.shape[0], depth.shape[-1]):
        depth = depth.squeeze(0 if depth.shape[0] == 1 else -1)
    if depth.ndim != 2 or depth.size == 0:
        raise ValueError(f"depth of shape {shape} is no depth map; give one map (H, W), (1, H, W) or (H, W, 1)")
    return np.ma.getdata(depth), np.ma.getmaskarray(depth)


def _drop_background(path, depth, values):
    """Set to 0 what is background in a depth map, and warn of it. `values` are those that the file has."""
    while end := far_end(depth):
        number = float(values[depth == end.value][0])
        start = end.background(number)
        if start is None:
            return
        background = (depth >= start) & np.isfinite(depth)
        held, remedy = f"hold {number:.9g}", f"give infinite={number:.9g} if it is infinitely far, maximum=inf"
        if start < end.value:
            held, remedy = f"hold up to {number:.9g}", "give maximum=... for another limit, maximum=inf"
        _warn(
            path,
            f"{np.count_nonzero(background)} pixels {held}, {end.ratio:.3g} times the median of the others: taken for "
            f"background, and missing; {remedy} if it is their depth",
        )
        depth[background] = 0


def _listed(values):
    """None, a value or several of them as a list."""
    return [] if values is None else np.ravel(values).tolist()


def _is_stored(numbers, stored):
    """Where an array holds one of some numbers."""
    if not numbers:
        return np.zeros(stored.shape, dtype=bool)
    # 0.1 as float32 is not 0.1 as float64: compare in the precision in which the values are stored.
    precision = stored.dtype if stored.dtype.kind == "f" else np.float64
    with np.errstate(over="ignore"):
        return np.isin(stored, np.asarray(numbers, dtype=precision))


def _scaled(depth, scale, inverse):
    """A depth map times a number, or the inverse of that. What becomes too large for float32 is missing."""
    if scale == 1 and not inverse:
        return depth
    scaled = np.multiply(depth, scale, dtype=np.float64)
    known = (scaled > 0) & np.isfinite(scaled)
    if inverse:
        np.divide(1, scaled, out=scaled, where=known)
    scaled[known & (scaled > LARGEST)] = 0
    return scaled.astype(np.float32)


def _warn(path, message, category=InputWarning):
    warnings.warn(f"{path}: {message}", category, stacklevel=3)
