"""What every reader of a data set yields."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from .lidar import nearest_points


@dataclass
class Frame:
    """A picture with its depth.

    Attributes:
        name: unique within the data set, like a relative path without suffix: "scene/camera/000012".
        image: uint8 (H, W, 3), RGB.
        depth: float32 (H, W), z-depth: metres along the viewing axis, not along the ray. 0 where missing, +inf where
            known to be infinitely far, as the sky of a rendered scene is.
        intrinsics: float32 (3, 3), camera matrix in pixels of `image`, the centre of the top left pixel at (0, 0). None
            where the data set gives none.
        caption: "" where there is none.
        sparse: float32 (H, W), of the kind of `depth`: the part of depth from which the rest is to be made. None but in
            depth completion.

    Raises ValueError, which names the frame, for other types or shapes, and for depth that is negative or NaN.
    """

    name: str
    image: np.ndarray
    depth: np.ndarray
    intrinsics: np.ndarray | None = None
    caption: str = ""
    sparse: np.ndarray | None = None

    def __post_init__(self):
        image, depth, intrinsics = self.image, self.depth, self.intrinsics
        if image.ndim != 3 or image.shape[2] != 3 or image.size == 0 or image.dtype != np.uint8:
            raise ValueError(f"{self.name}: image of shape {image.shape}, {image.dtype} must be uint8 (H, W, 3)")
        if depth.shape != image.shape[:2] or depth.dtype != np.float32:
            raise ValueError(
                f"{self.name}: depth of shape {depth.shape}, {depth.dtype} must be float32 {image.shape[:2]}, "
                "as the image"
            )
        if not (depth >= 0).all():
            raise ValueError(f"{self.name}: depth is negative or NaN in places; missing depth is stored as 0")
        if self.sparse is not None and self.sparse.shape != depth.shape:
            raise ValueError(f"{self.name}: sparse depth is {self.sparse.shape}, but depth {depth.shape}")
        if intrinsics is not None and (intrinsics.shape != (3, 3) or intrinsics.dtype != np.float32):
            raise ValueError(
                f"{self.name}: intrinsics of shape {intrinsics.shape}, {intrinsics.dtype} must be float32 (3, 3)"
            )

    @property
    def mask(self) -> np.ndarray:
        """bool (H, W), True where the depth is known and finite."""
        return np.isfinite(self.depth) & (self.depth > 0)

    def turned(self, quarters: int) -> "Frame":
        """The frame after as many quarter turns clockwise, camera included."""
        frame = self
        for _ in range(quarters % 4):
            intrinsics = frame.intrinsics
            if intrinsics is not None:  # x' = H - 1 - y, y' = x in the picture; X' = -Y, Y' = X in space
                pixels = np.array([[0, -1, len(frame.depth) - 1], [1, 0, 0], [0, 0, 1]])
                space = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]])
                intrinsics = (pixels @ intrinsics @ space.T).astype(np.float32)
            image, depth, sparse = (
                None if array is None else np.ascontiguousarray(np.rot90(array, -1))
                for array in (frame.image, frame.depth, frame.sparse)
            )
            frame = replace(frame, image=image, depth=depth, intrinsics=intrinsics, sparse=sparse)
        return frame

    def within(self, max_pixels: int | None) -> "Frame":
        """The frame, made smaller where it has more than `max_pixels` pixels; its aspect ratio stays (to a pixel).

        The picture is resampled without aliasing. Depth takes the pixel in the middle, and where that is missing, the
        nearest depth of all that become one pixel: no value is invented, and no LiDAR point lost without need.
        """
        height, width = self.depth.shape
        factor = math.sqrt(max_pixels / (height * width))
        if factor >= 1:
            return self
        size = max(1, int(width * factor)), max(1, int(height * factor))
        scale = size[0] / width, size[1] / height
        intrinsics = self.intrinsics
        if intrinsics is not None:
            half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # to pixels whose corners are whole numbers
            intrinsics = (np.linalg.inv(half) @ np.diag([*scale, 1]) @ half @ intrinsics).astype(np.float32)
        image = np.asarray(Image.fromarray(self.image).resize(size, Image.Resampling.LANCZOS))
        depth, sparse = (None if m is None else _shrunk(m, size, scale) for m in (self.depth, self.sparse))
        return replace(self, image=image, depth=depth, intrinsics=intrinsics, sparse=sparse)


def _shrunk(depth, size, scale):
    """A depth map at a smaller size (width, height), `scale` times the old one in each direction."""
    columns, rows = (((np.arange(n) + 0.5) / s).astype(int) for n, s in zip(size, scale))
    to_column, to_row = (((np.arange(n) + 0.5) * s).astype(int) for n, s in zip(depth.shape[::-1], scale))
    small = depth[np.ix_(rows, columns)]
    useful = (depth > 0) & (small == 0)[np.ix_(to_row, to_column)]
    source_rows, source_columns = np.nonzero(useful)
    filling = nearest_points(to_column[source_columns], to_row[source_rows], depth[useful], small.shape)
    return np.where(small == 0, filling, small)


class Frames(Protocol):
    """Frames of a data set by their number, as an evaluation reads them: a `Dataset`, a `Folder`, or the like.

    A frame that cannot be read raises ValueError or OSError from `__getitem__`, naming the file.

    Attributes:
        root: the folder of its files.
        names: of the frames in order, which are known without opening the large files.
    """

    root: Path
    names: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Frame: ...
