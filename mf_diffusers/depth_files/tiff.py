"""TIFF: levels or floats of any size, in one channel or several equal ones."""

import numpy as np

from mf_diffusers.depth_files.stored import Stored, check_memory, one_of_equal
from mf_diffusers.pictures import TURNS, turned_upright


ORIENTATION = 274


def read(path, key=None) -> Stored:
    """The first page, upright; of several channels, which must be equal, the first; alpha is left out."""
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
    return Stored(turned_upright(values, orientation.value) if orientation and orientation.value in TURNS else values)
