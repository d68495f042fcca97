"""FoundationStereo Dataset (FSD): rendered stereo pairs, of which the left picture is read.

Source: https://github.com/NVlabs/FoundationStereo (Wen et al., CVPR 2025), NVIDIA's licence in that repository, not for
commercial use.

    ROOT/**/SCENE/dataset/data/left/disparity/0000.png
    ROOT/**/SCENE/dataset/data/left/rgb/0000.jpg

The disparity in pixels has three digits to the base 255 in red, green and blue, and is scaled by 1000:
(255 * 255 R + 255 G + B) / 1000; 0 is missing. Focal length and baseline were drawn anew for every scene and not kept:
depth is 1 / disparity, z-depth up to a factor, and there are no intrinsics.
"""

import numpy as np
from PIL import Image

from .dataset import Dataset, read_rgb
from .frame import Frame


class FoundationStereo(Dataset):
    """Reads the FoundationStereo data set, unpacked as this module says.

    Frames are called "SCENE/dataset/data/left/0000"."""

    layout = "SCENE/dataset/data/left/disparity/0000.png"
    metric = False

    def _find(self):
        for path in self._files("**/left/disparity/*.png"):
            yield f"{path.parents[1].as_posix()}/{path.stem}"

    def _read(self, name):
        side, number = (self.root / name).parent, name.split("/")[-1]
        with Image.open(side / "disparity" / f"{number}.png") as digits:  # no colours, so no profile applies
            stored = np.asarray(digits.convert("RGB")).astype(np.int64) @ [255 * 255, 255, 1]
        depth = np.divide(1000, stored, out=np.zeros(stored.shape), where=stored > 0)
        return Frame(name, read_rgb(side / "rgb" / f"{number}.jpg"), depth.astype(np.float32))
