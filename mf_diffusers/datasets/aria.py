"""Aria Synthetic Environments: rendered walks through rooms, seen through the fisheye lens of Project Aria glasses.

Source: https://www.projectaria.com/datasets/ase, https://github.com/facebookresearch/projectaria_tools (Avetisyan et
al., ECCV 2024), under Meta's licence of the data set, research only.

    ROOT/**/SCENE/depth/depth0000000.png           704x704, 16 bits
    ROOT/**/SCENE/rgb/vignette0000000.jpg

Depth is the distance along the ray of the pixel in millimetres; 0 is missing, and so is 65535, the end of the scale.
The lens is the same in all scenes, projectaria's model "Fisheye624". A fisheye picture has no camera matrix, so the
frame is what a pinhole camera at the same place sees: 90 degrees across, with the focal length of the middle of the
lens. Colours are interpolated, distances are taken from the nearest pixel; z-depth is the distance times the cosine of
the angle to the axis. The camera is mounted on its side: frames are turned upright.
"""

import numpy as np
from PIL import Image
from scipy.ndimage import map_coordinates

from .dataset import Dataset, pinhole, read_rgb
from .frame import Frame


SIZE = 704
FOCAL = 297.6375381033778
CENTRE = 357.6599197217746, 349.1922497127481
RADIAL = (
    0.3650890375644368,
    -0.1738082418112771,
    -0.7534945484033189,
    2.434788882752295,
    -2.57786220300886,
    0.8788483538598834,
)
TANGENTIAL = (0.0008005198595407136, -0.000294237814554143)
END_OF_SCALE = 65535
PINHOLE_SIZE = 592
INTRINSICS = pinhole(*[PINHOLE_SIZE / 2] * 2, *[(PINHOLE_SIZE - 1) / 2] * 2)


class Aria(Dataset):
    """Reads Aria Synthetic Environments, unpacked as this module says.

    Frames are called "SCENE/0000000"."""

    layout = "SCENE/depth/depth0000000.png"

    def _find(self):
        for path in self._files("**/depth/depth*.png"):
            yield f"{path.parents[1].as_posix()}/{path.stem.removeprefix('depth')}"

    def _read(self, name):
        scene, number = (self.root / name).parent, name.split("/")[-1]
        picture = read_rgb(scene / "rgb" / f"vignette{number}.jpg")
        with Image.open(scene / "depth" / f"depth{number}.png") as stored:
            distance = np.asarray(stored) / 1000
        if distance.shape != (SIZE, SIZE) or picture.shape[:2] != (SIZE, SIZE):
            raise ValueError(f"{distance.shape} and {picture.shape} where the lens is known for {SIZE}x{SIZE} pixels")
        distance[distance == END_OF_SCALE / 1000] = 0

        columns, rows = np.meshgrid(*[np.arange(PINHOLE_SIZE)] * 2)
        x, y = (columns - INTRINSICS[0, 2]) / INTRINSICS[0, 0], (rows - INTRINSICS[1, 2]) / INTRINSICS[1, 1]
        u, v = fisheye(x, y)
        image = np.stack(
            [map_coordinates(channel, (v, u), order=1) for channel in np.moveaxis(picture, -1, 0)], axis=-1
        )
        depth = distance[np.rint(v).astype(int), np.rint(u).astype(int)] / np.sqrt(x**2 + y**2 + 1)
        return Frame(name, image, depth.astype(np.float32), INTRINSICS).turned(1)


def fisheye(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Column and row of the pixel that sees the direction (x, y, 1).

    Radial terms in odd powers of the angle to the axis, then tangential ones; the thin prism of the model is 0 here.
    """
    radius = np.hypot(x, y)
    angle = np.arctan(radius)
    distorted = angle * (1 + sum(k * angle ** (2 * i) for i, k in enumerate(RADIAL, start=1)))
    factor = np.divide(distorted, radius, out=np.ones_like(radius), where=radius > 0)
    x, y = x * factor, y * factor
    p, q = TANGENTIAL
    along, square = 2 * (p * x + q * y), x**2 + y**2
    return (
        FOCAL * (x + along * x + square * p) + CENTRE[0],
        FOCAL * (y + along * y + square * q) + CENTRE[1],
    )
