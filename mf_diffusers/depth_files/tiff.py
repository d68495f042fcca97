"""TIFF: levels or floats of any size, in one channel or several equal ones."""

import warnings
from pathlib import Path

import numpy as np

from mf_diffusers.depth_files.stored import Stored, check_memory, one_of_equal
from mf_diffusers.input_warning import InputWarning
from mf_diffusers.pictures import TURNS, turned_upright


ORIENTATION = 274
GDAL_NODATA = 42113


def read(path: Path, key: str | None = None) -> Stored:
    """The first page, upright; of several channels, which must be equal, the first; alpha is left out. Values that
    GDAL's tag calls missing are NaN, or 0 among whole numbers.

    Warns with InputWarning of further pages, but for smaller copies and masks.
    """
    import tifffile  # on use: it takes as long to import as all else here together

    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        check_memory(page.shape, page.dtype.itemsize)
        values = page.asarray()
        channels = page.samplesperpixel
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
            raise ValueError("a palette holds colours, no depth values; give the raw depth it was made from")
        if channels > 1:
            values = np.moveaxis(values, page.axes.index("S"), -1)
            values = one_of_equal(values[..., : channels - 1 if channels in (2, 4) else channels])
        orientation = page.tags.get(ORIENTATION)
        if GDAL_NODATA in page.tags:
            values = np.where(values == page.nodata, np.nan if values.dtype.kind == "f" else 0, values)
        others = sum(not (other.is_reduced or other.is_mask) for other in file.pages[1:])
    if others:
        warnings.warn(f"{path}: only the first of {others + 1} pages is used", InputWarning, stacklevel=2)
    return Stored(turned_upright(values, orientation.value) if orientation and orientation.value in TURNS else values)
