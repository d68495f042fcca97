"""Benchmarks of depth completion: frames with a second, sparse depth map, from which the rest is to be made."""

from pathlib import Path

import numpy as np

from mf_diffusers.depth_files import read_stored
from mf_diffusers.depth_io import DEPTH_SUFFIXES, read_depth

from .dataset import Dataset, read_rgb
from .frame import Frame


KITTI_SCALE = 1 / 256
"""Metres in a stored unit of KITTI's 16 bits, which most other data sets of depth completion took over."""


class KITTICompletion(Dataset):
    """KITTI depth completion (Uhrig et al. 2017): the 1000 frames of its selected validation, 1216x352.

    `root` is the folder `val_selection_cropped` of the unpacked archive, with
    `image/2011_10_03_drive_0047_sync_image_0000000761_image_02.png`, under `velodyne_raw` and `groundtruth_depth` the
    same with that word in place of the first `image`, 16 bits of metres times 256, and the 9 numbers of the camera
    matrix in `intrinsics/2011_10_03_drive_0047_sync_image_0000000761_image_02.txt`.
    """

    layout = "image/*_image_*.png, velodyne_raw/*_velodyne_raw_*.png and groundtruth_depth/*_groundtruth_depth_*.png"

    def _find(self):
        return [picture.stem for picture in self._files("image/*.png")]

    def _read(self, name):
        def depth(kind):
            file = f"{name.replace('_image_', f'_{kind}_', 1)}.png"
            return read_depth(self.root / kind / file, scale=KITTI_SCALE)

        camera = self.root / "intrinsics" / f"{name}.txt"
        intrinsics = np.loadtxt(camera, dtype=np.float32).reshape(3, 3) if camera.is_file() else None
        image = read_rgb(self.root / "image" / f"{name}.png")
        return Frame(name, image, depth("groundtruth_depth"), intrinsics, sparse=depth("velodyne_raw"))


class SparseFolder(Dataset):
    """A folder with `rgb/`, `sparse/` and `gt/`: for the picture `rgb/a/12.jpg` the depth files `sparse/a/12.png` and
    `gt/a/12.png`, or with another suffix of depth files.

    Depth is in metres; where a file has whole numbers and notes no scale, in metres times 256, as KITTI stores it.
    """

    layout = "rgb/*.png or *.jpg, and under the same names depth files in sparse/ and gt/"

    def _find(self):
        pictures = [path for suffix in ("png", "jpg", "jpeg") for path in self._files(f"rgb/**/*.{suffix}")]
        return [path.relative_to("rgb").as_posix() for path in pictures]

    def _read(self, name):
        maps = [read_metres(self.root / kind / name) for kind in ("gt", "sparse")]
        return Frame(str(Path(name).with_suffix("")), read_rgb(self.root / "rgb" / name), maps[0], sparse=maps[1])


def read_metres(path: Path) -> np.ndarray:
    """Depth (H, W) in metres of the depth file that has this name and any suffix, see `SparseFolder`."""
    file = next(filter(Path.is_file, map(path.with_suffix, DEPTH_SUFFIXES)), None)
    if file is None:
        raise FileNotFoundError(f"no depth file {path.with_suffix('')} ({', '.join(DEPTH_SUFFIXES)})")
    stored = read_stored(file)
    is_kittis = stored.noted_scale is None and stored.values.dtype.kind in "ui"
    return read_depth(file, scale=KITTI_SCALE if is_kittis else None)
