"""What every reader of a data set yields."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Frame:
    """A picture with its depth.

    A data set is a class with `__init__(root, split=...)`, `__len__`, `__getitem__(i) -> Frame` and `names`, the names
    of its frames in order, which are known without opening the large files. A frame that cannot be read raises
    ValueError or OSError from `__getitem__`, naming the file.

    Attributes:
        name: unique within the data set, like a relative path without suffix: "scene/camera/000012".
        image: uint8 (H, W, 3), RGB.
        depth: float32 (H, W), z-depth: metres along the viewing axis, not along the ray. 0 where missing, +inf where
            known to be infinitely far, as the sky of a rendered scene is.
        intrinsics: float32 (3, 3), camera matrix in pixels of `image`, the centre of the top left pixel at (0, 0). None
            where the data set gives none.
        caption: "" where there is none.

    Raises ValueError, which names the frame, for other types or shapes, and for depth that is negative or NaN.
    """

    name: str
    image: np.ndarray
    depth: np.ndarray
    intrinsics: np.ndarray | None = None
    caption: str = ""

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
        if intrinsics is not None and (intrinsics.shape != (3, 3) or intrinsics.dtype != np.float32):
            raise ValueError(
                f"{self.name}: intrinsics of shape {intrinsics.shape}, {intrinsics.dtype} must be float32 (3, 3)"
            )

    @property
    def mask(self):
        """bool (H, W), True where the depth is known and finite."""
        return np.isfinite(self.depth) & (self.depth > 0)
