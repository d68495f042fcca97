"""Depth maps on disk.

A depth map in memory is a float32 array (H, W) in which 0 means "no depth here".
"""

import math
import re
import warnings
from pathlib import Path

import numpy as np
import OpenEXR
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mf_diffusers.files import atomic_write


DEPTH_SUFFIXES = (".png", ".npy", ".npz", ".exr", ".tif", ".tiff", ".pfm")
"""What `read_depth` reads."""

DEPTH_WRITE_SUFFIXES = (".npy", ".exr", ".png")
"""What `write_depth` writes."""

EXR_DEPTH_CHANNELS = ("Z", "Y", "depth", "R")
PNG_SCALE_KEY = "depth_scale"
PNG_LEVELS = 65535
COLOURED = "a coloured depth picture carries no depth values; give the raw depth it was made from"


def read_depth(path, scale=None, invalid=None, key=None, infinite=None):
    """Read a depth map; the suffix (any of `DEPTH_SUFFIXES`) decides the format.

    Args:
        path: the file. The first page of a TIFF and the first part of an EXR are read.
        scale: what stored values are multiplied by, e.g. 1/1000 for millimetres or 1/256 for KITTI PNGs. None: the
            scale that `write_depth` noted in a PNG, otherwise 1.
        invalid: a stored value (before scaling), or a tuple of them, that means "missing", e.g. 65535 or 1e10.
        key: which array of an npz or channel of an EXR. None: for npz "depth", or the only array; for EXR the first
            of Z, Y, depth, R, or the only channel.
        infinite: a stored value (before scaling, inf among them), or a tuple of them, that means "infinitely far".

    Returns:
        float32 (H, W), inf where listed in `infinite`, and 0 where depth is missing: NaN, infinite (also when too large
        for float32), zero or negative, or listed in `invalid`.

    Warns with UserWarning when the depth has only the 256 levels of 8 bits.

    Raises FileNotFoundError when there is no such file, and ValueError for everything that holds no depth map: a
    suffix of another format, a damaged file, a coloured picture, a missing key, an array of other than (H, W),
    (1, H, W) or (H, W, 1) numbers.
    """
    if scale is not None and not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"{path}: scale={scale!r} must be a positive number, e.g. 1/1000 for millimetres")
    stored, noted_scale = _read_stored(path, key)
    try:
        depth = _scaled(stored, _noted_scale(noted_scale) if scale is None else scale)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for values, meaning in ((invalid, 0), (infinite, np.inf)):
        if values is not None:
            depth[_is_stored(values, stored).reshape(depth.shape)] = meaning
    if stored.dtype == np.uint8:
        warnings.warn(
            f"{path}: 8-bit depth has only 256 levels; give 16-bit PNG or float depth if there is any",
            UserWarning,
            stacklevel=2,
        )
    return depth


def read_values(path, key=None):
    """The numbers in a depth file whatever they mean: relative depth and disparity may well be 0 or negative.

    Args:
        path, key: as for `read_depth`.

    Returns:
        float32 (H, W), NaN where there is no value: what is not finite, and 0 in files of whole numbers, which have no
        other way to say so. The scale noted in a PNG is applied.

    Raises FileNotFoundError and ValueError as `read_depth` does.
    """
    stored, noted_scale = _read_stored(path, key)
    try:
        if stored.ndim == 3 and 1 in (stored.shape[0], stored.shape[-1]):
            stored = stored.squeeze(0 if stored.shape[0] == 1 else -1)
        if stored.ndim != 2 or stored.dtype.kind not in "uif":
            raise ValueError(f"an array of shape {stored.shape}, {stored.dtype} is no map; write real numbers (H, W)")
        values = (stored * _noted_scale(noted_scale)).astype(np.float32)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return np.where(np.isfinite(values) & ((stored != 0) | (stored.dtype.kind == "f")), values, np.float32(np.nan))


def write_depth(path, depth):
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
    depth = as_depth_map(depth)
    with atomic_write(path) as temporary:
        if suffix == ".npy":
            with temporary.open("wb") as file:  # given a name, np.save would add ".npy" to one that ends in ".NPY"
                np.save(file, depth)
        elif suffix == ".exr":
            header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
            OpenEXR.File(header, {"Z": depth}).write(str(temporary))
        else:
            _write_png(temporary, depth)


def as_depth_map(depth, mask=None):
    """Bring an array to the depth map of this package: float32 (H, W), 0 where depth is missing.

    Args:
        depth: real numbers (H, W), (1, H, W) or (H, W, 1). Values that are not finite in float32 or not above 0 are
            missing.
        mask: (H, W), True where depth counts. None: everywhere.

    Raises ValueError for any other shape, an empty array, or values that are not real numbers.
    """
    depth = np.asarray(depth)
    if depth.dtype.kind not in "uif":
        raise ValueError(f"depth values of type {depth.dtype} are not real numbers; give floats or integers")
    shape = depth.shape
    if depth.ndim == 3 and 1 in (shape[0], shape[-1]):
        depth = depth.squeeze(0 if shape[0] == 1 else -1)
    if depth.ndim != 2 or depth.size == 0:
        raise ValueError(f"depth of shape {shape} is no depth map; give one map (H, W), (1, H, W) or (H, W, 1)")
    with np.errstate(over="ignore", invalid="ignore"):
        depth = depth.astype(np.float32)
        valid = np.isfinite(depth) & (depth > 0)
    if mask is not None:
        mask = np.asarray(mask)
        if mask.shape != depth.shape:
            raise ValueError(f"mask of shape {mask.shape} does not fit depth of shape {depth.shape}; resize it first")
        valid &= mask.astype(bool)
    return np.where(valid, depth, np.float32(0))


def _existing_file(path):
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def _read_stored(path, key):
    """The stored numbers, and the text of the scale that the file notes or None."""
    path = _existing_file(path)
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise ValueError(f"{path}: no depth format has the suffix {path.suffix!r}; use {', '.join(DEPTH_SUFFIXES)}")
    if key is not None and suffix not in (".npz", ".exr"):
        raise ValueError(f"{path}: key={key!r} picks from an .npz or .exr file; leave it out for {suffix}")
    try:
        return _READERS[suffix](path, key)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # decoders meet damaged files with errors of many types
        raise ValueError(f"{path}: damaged, or not the {suffix} file that its name says: {error}") from error


def _scaled(stored, scale):
    depth = as_depth_map(stored)
    return depth if scale == 1 else as_depth_map(np.multiply(depth, scale, dtype=np.float64))


def _is_stored(values, stored):
    """Where a file stores one of some values."""
    # 0.1 as float32 is not 0.1 as float64: compare in the precision in which the file stores its values.
    precision = stored.dtype if stored.dtype.kind == "f" else np.float64
    with np.errstate(over="ignore"):
        return np.isin(stored, np.asarray(values, dtype=precision))


def _read_picture(path, key):
    """PNG and TIFF: the values, and the text of the scale noted in the file, or None."""
    with Image.open(path) as image:
        if image.mode.startswith("I") or image.mode == "F":
            values = np.asarray(image)  # loads the file to its end, where text chunks may stand
            return values, image.info.get(PNG_SCALE_KEY)
        channels = np.asarray(image.convert("RGBA"))[..., :3]
    if (channels != channels[..., :1]).any():
        raise ValueError(COLOURED)
    return channels[..., 0], None


def _noted_scale(text):
    if text is None:
        return 1.0
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f'the text chunk "{PNG_SCALE_KEY}" is {text!r}, no positive number; pass scale=...')
    return scale


def _read_numpy(path, key):
    with path.open("rb") as file:
        if file.read(2) not in (b"\x93N", b"PK"):  # np.load would take it for a pickle and advise to allow that
            raise ValueError("no NumPy file; write it with numpy.save or numpy.savez")
        file.seek(0)
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded, None
        names = loaded.files
        if key is None:
            key = names[0] if len(names) == 1 else "depth"
        if key not in names:
            raise ValueError(f"no array {key!r} among {names}; name one of them with key=...")
        return loaded[key], None


def _read_exr(path, key):
    with OpenEXR.File(str(path), separate_channels=True) as file:
        if not file.parts:
            raise ValueError("damaged: no pixels can be read; save the file again")
        channels = {name: channel.pixels for name, channel in file.channels().items()}
    if key is None and len(channels) == 1:
        key = next(iter(channels))
    elif key is None:
        key = next((name for name in EXR_DEPTH_CHANNELS if name in channels), EXR_DEPTH_CHANNELS[0])
        if key == "R" and not all(np.array_equal(channels["R"], channels[c], True) for c in "GB" if c in channels):
            raise ValueError(COLOURED)
    if key not in channels:
        raise ValueError(f"no channel {key!r} among {sorted(channels)}; name one of them with key=...")
    return channels[key], None


def _read_pfm(path, key):
    data = path.read_bytes()
    header = re.match(rb"(P[Ff])\s+(\d+)\s+(\d+)\s+([-+]?\d*\.?\d+)\s", data)
    if header is None:
        raise ValueError('no PFM header ("Pf", width, height, scale)')
    if header[1] == b"PF":
        raise ValueError('"PF" is a picture of three channels; depth is stored as "Pf", one channel')
    width, height = int(header[2]), int(header[3])
    byte_order = "<" if float(header[4]) < 0 else ">"
    if len(data) - header.end() != 4 * width * height:
        raise ValueError(f"{len(data) - header.end()} bytes of values where {width}x{height} floats need 4 each")
    values = np.frombuffer(data, f"{byte_order}f4", offset=header.end()).reshape(height, width)
    return np.flipud(values), None  # the lowest row comes first


def _write_png(path, depth):
    scale = float(depth.max()) / PNG_LEVELS or 1.0
    # At least level 1: a valid pixel must not round to 0, which means missing.
    levels = np.where(depth > 0, np.clip(np.round(depth / scale), 1, PNG_LEVELS), 0)
    notes = PngInfo()
    notes.add_text(PNG_SCALE_KEY, repr(scale))
    Image.fromarray(levels.astype(np.uint16)).save(path, format="PNG", pnginfo=notes)


_READERS = {
    ".png": _read_picture,
    ".tif": _read_picture,
    ".tiff": _read_picture,
    ".npy": _read_numpy,
    ".npz": _read_numpy,
    ".exr": _read_exr,
    ".pfm": _read_pfm,
}
