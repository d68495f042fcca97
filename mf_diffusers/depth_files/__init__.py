"""Files that hold depth, one module a format; each has `read(path, key) -> Stored`."""

from pathlib import Path

from mf_diffusers.depth_files import exr, numpy_files, pfm, png, tiff
from mf_diffusers.depth_files.stored import Stored


READERS = {
    ".png": png.read,
    ".npy": numpy_files.read_npy,
    ".npz": numpy_files.read_npz,
    ".exr": exr.read,
    ".tif": tiff.read,
    ".tiff": tiff.read,
    ".pfm": pfm.read,
}
"""Reader by suffix."""

KEYED = (".npz", ".exr")
"""Formats that may hold several maps, of which a key picks one."""


def read_stored(path: Path, key: str | None = None) -> Stored:
    """The numbers of a depth file as they are stored; the suffix (a key of `READERS`) decides the format.

    Args:
        path: the file.
        key: which array of an npz or channel of an EXR. None: the one that can only be meant.

    Raises FileNotFoundError when there is no such file, and ValueError, which names the file, for everything that holds
    no map that can be picked, and for what would take more memory than is free.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise ValueError(f"{path}: no depth format has the suffix {path.suffix!r}; use {', '.join(READERS)}")
    if key is not None and suffix not in KEYED:
        raise ValueError(f"{path}: key={key!r} picks from an .npz or .exr file; leave it out for {suffix}")
    try:
        return READERS[suffix](path, key)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # decoders meet damaged files with errors of many types
        raise ValueError(f"{path}: damaged, or not the {suffix} file that its name says: {error}") from error
