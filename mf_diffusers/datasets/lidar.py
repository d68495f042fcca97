"""LiDAR points to the depth map of a camera."""

import numpy as np


def nearest_points(columns: np.ndarray, rows: np.ndarray, depth: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Depth map of points that fall on pixels.

    Args:
        columns, rows: whole numbers (N,); points outside the picture are left out.
        depth: z-depth (N,); points that are not in front of the camera are left out.
        shape: (H, W).

    Returns float32 (H, W): the nearest point of every pixel, 0 where none falls. A LiDAR that stands above the camera
    also sees what is hidden from it, so some pixels at the edge of things have the depth of what lies behind.
    """
    height, width = shape
    seen = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height) & (depth > 0)
    nearest = np.full(shape, np.inf, dtype=np.float32)
    np.minimum.at(nearest, (rows[seen].astype(int), columns[seen].astype(int)), depth[seen].astype(np.float32))
    return np.where(np.isinf(nearest), np.float32(0), nearest)


def transformed(points: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """Points (N, 3) by a rigid transform (4, 4)."""
    return points @ transform[:3, :3].T + transform[:3, 3]
