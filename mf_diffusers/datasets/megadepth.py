"""MegaDepth v1: landmarks in photographs from the Internet, with multi-view stereo depth.

Source: https://www.cs.cornell.edu/projects/megadepth (Li and Snavely, CVPR 2018); the photographs belong to those who
took them, see the project for the terms.

    ROOT/**/0000/dense0/depths/NAME.h5             array "depth"
    ROOT/**/0000/dense0/imgs/NAME.jpg

Depth is z-depth at the scale of its reconstruction: relative, not metres; 0 is missing. About a quarter of the files
holds no depth but an order of regions, "nearer" and "farther", marked by negative values: all of it is missing here.
The cameras are in another archive (MegaDepth_v1_SfM) and are not read.
"""

import numpy as np

from .dataset import Dataset, read_rgb
from .frame import Frame


class MegaDepth(Dataset):
    """Reads MegaDepth, unpacked as this module says.

    Frames are called "0000/dense0/NAME", after the folders above 0000 where there are any."""

    layout = "0000/dense0/depths/NAME.h5"
    library = "h5py"
    metric = False

    def _find(self):
        for path in self._files("**/dense*/depths/*.h5"):
            yield f"{path.parents[1].as_posix()}/{path.stem}"

    def _read(self, name):
        import h5py

        scene, stem = (self.root / name).parent, name.split("/")[-1]
        with h5py.File(scene / "depths" / f"{stem}.h5") as file:
            depth = file["depth"][:].astype(np.float32)
        if depth.min() < 0:
            depth = np.zeros_like(depth)
        suffix = next((s for s in (".jpg", ".JPG", ".jpeg", ".png") if (scene / "imgs" / (stem + s)).is_file()), ".jpg")
        return Frame(name, read_rgb(scene / "imgs" / (stem + suffix)), depth)
