"""ParallelDomain-4D: rendered drives, seen by the cameras of the car and by cameras around it.

Source: https://gcd.cs.columbia.edu/#datasets, https://github.com/basilevh/gcd (Van Hoorick et al., ECCV 2024), in the
Dataset Governance Policy format of https://github.com/TRI-ML/dgp; CC BY-NC 4.0.

    ROOT/**/scene_000000/depth/CAMERA/000000000000000005.npz       array "data", float32 (H, W)
    ROOT/**/scene_000000/rgb/CAMERA/000000000000000005.png
    ROOT/**/scene_000000/calibration/*.json                        "names", and in the same order "intrinsics"

Depth is z-depth in metres. The sky lies at some great distance: from 1000 m on depth counts as infinite. Cameras are
pinhole cameras, fx, fy, cx, cy in pixels. The alpha channel that pictures may have is dropped.
"""

import json

import numpy as np
from PIL import Image

from .dataset import Dataset, pinhole
from .frame import Frame


INFINITE = 1000.0


class ParallelDomain(Dataset):
    """Reads PD-4D of Parallel Domain, unpacked as this module says.

    Frames are called "scene_000000/CAMERA/000000000000000005"."""

    layout = "scene_000000/depth/CAMERA/000000000000000005.npz"

    def _find(self):
        for path in self._files("**/depth/*/*.npz"):
            yield f"{path.parents[2].as_posix()}/{path.parent.name}/{path.stem}"

    def _read(self, name):
        scene, camera, number = name.rsplit("/", 2)
        with np.load(self.root / scene / "depth" / camera / f"{number}.npz", allow_pickle=False) as arrays:
            depth = arrays["data"].astype(np.float32)
        depth = np.where(depth >= INFINITE, np.float32(np.inf), np.where(depth > 0, depth, np.float32(0)))
        (path,) = (self.root / scene / "calibration").glob("*.json")
        calibration = json.loads(path.read_text())
        lens = calibration["intrinsics"][calibration["names"].index(camera)]
        with Image.open(self.root / scene / "rgb" / camera / f"{number}.png") as picture:
            image = np.asarray(picture.convert("RGB"))
        return Frame(name, image, depth, pinhole(*(lens[p] for p in ("fx", "fy", "cx", "cy"))))
