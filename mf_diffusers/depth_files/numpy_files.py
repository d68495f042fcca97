"""Arrays as NumPy saves them, of which the header is looked at before anything is unpacked."""

import math
import zipfile
from pathlib import Path

import numpy as np

from mf_diffusers.depth_files.stored import Stored, check_memory


MAGIC = b"\x93NUMPY"


def read_npy(path: Path, key: str | None = None) -> Stored:
    """The array of a file that `numpy.save` wrote."""
    with path.open("rb") as file:
        return Stored(_read_array(file, path.stat().st_size))


def read_npz(path: Path, key: str | None = None) -> Stored:
    """The array `key` of a file that `numpy.savez` wrote. None: "depth", or the only one."""
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            raise ValueError("no NumPy file; write it with numpy.save or numpy.savez")
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if key is None:
            key = names[0] if len(names) == 1 else "depth"
        if key not in names:
            raise ValueError(f"no array {key!r} among {names}; name one of them with key=...")
        entry = archive.infolist()[names.index(key)]
        with archive.open(entry) as file:
            return Stored(_read_array(file, entry.file_size))


def _read_array(file, size):
    """The array in a stream of `size` bytes."""
    if file.read(len(MAGIC)) != MAGIC:  # numpy would take it for a pickle, and advise to allow that
        raise ValueError("no NumPy file; write it with numpy.save or numpy.savez")
    file.seek(0)
    version = np.lib.format.read_magic(file)
    read_header = {1: np.lib.format.read_array_header_1_0}.get(version[0], np.lib.format.read_array_header_2_0)
    shape, _, dtype = read_header(file)
    if dtype.kind not in "biufc":
        raise ValueError(f"values of type {dtype} are no numbers; write floats or integers")
    announced, stored = math.prod(shape) * dtype.itemsize, size - file.tell()
    if announced != stored:
        raise ValueError(
            f"damaged: {stored} bytes of values, but its header says {shape} of {dtype}, {announced} bytes"
        )
    check_memory(shape, dtype.itemsize)
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)
