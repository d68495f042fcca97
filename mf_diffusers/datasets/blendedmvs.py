"""BlendedMVS, BlendedMVS+ and BlendedMVS++ (together BlendedMVG): pictures blended with renderings of their scenes.

Source: https://github.com/YoYo000/BlendedMVS (Yao et al., CVPR 2020), CC BY 4.0.

    ROOT/**/PID/rendered_depth_maps/00000000.pfm
    ROOT/**/PID/blended_images/00000000.jpg        _masked.jpg beside it is not read
    ROOT/**/PID/cams/00000000_cam.txt              "extrinsic" 4x4, "intrinsic" 3x3, depth range

Depth is z-depth of the reconstruction, 0 where its mesh has holes; some maps are empty altogether. The scale of a
reconstruction is its own: depth is relative, not metres.
"""

import numpy as np

from mf_diffusers.depth_io import read_depth

from .dataset import Dataset, read_rgb
from .frame import Frame


class BlendedMVS(Dataset):
    """Reads BlendedMVS, unpacked as this module says.

    Frames are called "PID/00000000", after the folders above PID where there are any."""

    layout = "PID/rendered_depth_maps/00000000.pfm"
    metric = False

    def _find(self):
        for path in self._files("**/rendered_depth_maps/*.pfm"):
            yield f"{path.parents[1].as_posix()}/{path.stem}"

    def _read(self, name):
        scene, number = (self.root / name).parent, name.split("/")[-1]
        words = (scene / "cams" / f"{number}_cam.txt").read_text().split()
        start = words.index("intrinsic") + 1
        return Frame(
            name,
            read_rgb(scene / "blended_images" / f"{number}.jpg"),
            read_depth(scene / "rendered_depth_maps" / f"{number}.pfm"),
            np.array(words[start : start + 9], dtype=np.float32).reshape(3, 3),
        )
