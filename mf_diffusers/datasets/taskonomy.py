"""Taskonomy: scanned buildings.

Source: https://github.com/StanfordVL/taskonomy/tree/master/data (Zamir et al., CVPR 2018), downloaded with Omnidata's
omnitools; its own licence, research and education without profit.

    ROOT/depth_zbuffer/taskonomy/BUILDING/point_I_view_J_domain_depth_zbuffer.png
    ROOT/rgb/taskonomy/BUILDING/point_I_view_J_domain_rgb.png
    ROOT/point_info/taskonomy/BUILDING/point_I_view_J_domain_point_info.json

Depth is z-depth as 16 bits in units of 1/512 m; 65535 marks holes of the mesh. The camera is square, has its principal
point in the middle, and sees "field_of_view_rads" of the point_info across; without point_info there is none.
"""

import json
import math

from mf_diffusers.depth_io import read_depth

from .dataset import Dataset, pinhole, read_rgb
from .frame import Frame


HOLE = 65535


class Taskonomy(Dataset):
    """Reads Taskonomy, unpacked as this module says.

    Frames are called "taskonomy/BUILDING/point_I_view_J"; other or no folders between will do."""

    layout = "depth_zbuffer/taskonomy/BUILDING/point_I_view_J_domain_depth_zbuffer.png"

    def _find(self):
        for path in self._files("depth_zbuffer/**/*_domain_depth_zbuffer.png"):
            yield "/".join(path.parts[1:]).removesuffix("_domain_depth_zbuffer.png")

    def _file(self, name, domain, suffix):
        return self.root / domain / f"{name}_domain_{domain}{suffix}"

    def _read(self, name):
        depth = read_depth(self._file(name, "depth_zbuffer", ".png"), scale=1 / 512, invalid=HOLE)
        intrinsics = None
        info = self._file(name, "point_info", ".json")
        if info.is_file():
            height, width = depth.shape
            focal = width / 2 / math.tan(json.loads(info.read_text())["field_of_view_rads"] / 2)
            intrinsics = pinhole(focal, focal, (width - 1) / 2, (height - 1) / 2)
        return Frame(name, read_rgb(self._file(name, "rgb", ".png")), depth, intrinsics)
