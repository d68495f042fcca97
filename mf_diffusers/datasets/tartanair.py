"""TartanAir, version 2 and version 1: rendered flights through many worlds.

Source: https://tartanair.org, https://github.com/castacks/tartanairpy (Wang et al., IROS 2020), CC BY 4.0.

    ROOT/ENV/Data_easy/P000/depth_lcam_front/000000_lcam_front_depth.png     version 2, or Data_hard
    ROOT/ENV/Data_easy/P000/image_lcam_front/000000_lcam_front.png
    ROOT/**/ENV/Easy/P000/depth_left/000000_left_depth.npy                   version 1
    ROOT/**/ENV/Easy/P000/image_left/000000_left.png

Version 2 packs the four bytes of a little-endian float32 into the channels blue, green, red, alpha of a PNG; version 1
stores float32 (H, W). Both are z-depth in metres. The sky has a very large value that differs between worlds: from
1000 m on depth counts as infinite. Each camera sees 90 degrees across, in version 2 with 640x640 pixels to six sides
of a left and a right rig, in version 1 with 640x480. Fisheye and panorama are resampled from these and not read.
"""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from .dataset import Dataset, pinhole, read_rgb
from .frame import Frame


INFINITE = 1000.0


class TartanAir(Dataset):
    """Reads TartanAir, unpacked as this module says.

    Frames are called "ENV/Data_easy/P000/lcam_front/000000" or "ENV/Easy/P000/left/000000"."""

    layout = "ENV/Data_easy/P000/depth_lcam_front/000000_lcam_front_depth.png (v2) or ENV/Easy/P000/depth_left/*.npy"

    def _find(self):
        for path in self._files("**/depth_*/*_depth.*"):
            camera = path.parent.name.removeprefix("depth_")
            if re.fullmatch(r"[lr]cam_(front|back|left|right|top|bottom)|left|right", camera):
                yield f"{path.parents[1].as_posix()}/{camera}/{path.name.split('_')[0]}"

    def _read(self, name):
        trajectory, camera, number = name.rsplit("/", 2)
        start = self.root / trajectory / f"depth_{camera}" / f"{number}_{camera}_depth"
        if camera in ("left", "right"):
            depth = np.load(f"{start}.npy", allow_pickle=False).astype(np.float32)
        else:
            depth = unpacked(f"{start}.png")
        depth = np.where(depth >= INFINITE, np.float32(np.inf), np.where(depth > 0, depth, np.float32(0)))
        height, width = depth.shape
        image = read_rgb(self.root / trajectory / f"image_{camera}" / f"{number}_{camera}.png")
        return Frame(name, image, depth, pinhole(width / 2, width / 2, (width - 1) / 2, (height - 1) / 2))


def unpacked(path: str | Path) -> np.ndarray:
    """float32 (H, W) from the four channels of a PNG."""
    with Image.open(path) as image:
        if image.mode != "RGBA":
            raise ValueError(f"{path}: {image.mode} where depth has four channels")
        channels = np.asarray(image)
    return np.ascontiguousarray(channels[..., [2, 1, 0, 3]]).view("<f4")[..., 0]
