"""Cameras, point clouds and meshes from depth maps.

In memory points are in OpenCV axes: x right, y down, z forward, the camera at the origin. A pixel's centre lies at its
integer coordinates: (0, 0) is the centre of the top left pixel. Files are written with y up and z backward, the axes
of glTF, so that they open upright in the usual viewers.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from mf_diffusers.depth_io import view_as_depth_map
from mf_diffusers.files import atomic_write
from mf_diffusers.pictures import as_rgb


FOV_DEGREES = 65.0
"""What the main camera of a phone sees along the longer side, with lenses of 24 to 28 mm: 63 to 72 degrees."""

EDGE_THRESHOLD = 0.1
"""At a few hundred pixels across, points that fly between surfaces are gone at 10 %, and surfaces seen at a slant are
still whole; at 4 % walls and floors in the distance are torn."""

MAX_POINTS = 800_000
"""A mesh of so many points is a GLB of 38 MB."""

OPENCV_TO_GLTF = np.array([1, -1, -1], dtype=np.float32)
GRAY = 192


@dataclass(frozen=True)
class PointSettings:
    """
    How points and a mesh are made of a depth map.

    Args:
        fov_degrees: field of view along the longer side.
        edge_threshold: see `depth_edges`. None: nothing is cut.
        max_points: see `reduced`.

    Raises ValueError for a threshold that `depth_edges` does not take.
    """

    fov_degrees: float = FOV_DEGREES
    edge_threshold: float | None = EDGE_THRESHOLD
    max_points: int = MAX_POINTS

    def __post_init__(self):
        if self.edge_threshold is not None:
            _check_threshold(self.edge_threshold)


def intrinsics_from_fov(width: int, height: int, fov_degrees: float = FOV_DEGREES) -> np.ndarray:
    """Intrinsics of a camera that sees `fov_degrees` along the longer side of a picture of width x height pixels.

    Pixels are square and the principal point is the centre of the picture, ((width - 1) / 2, (height - 1) / 2).

    Returns float64 (3, 3), in pixels. Raises ValueError for a size below 1 or a field of view outside 0..180 degrees.
    """
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width}x{height} pixels has no camera; give its width and height in pixels")
    if not 0 < fov_degrees < 180:
        raise ValueError(f"fov_degrees={fov_degrees!r} must lie between 0 and 180; phones see 50 to 80")
    focal = max(width, height) / 2 / np.tan(np.radians(fov_degrees) / 2)
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]], dtype=np.float64)


def unproject(depth: ArrayLike, intrinsics: ArrayLike) -> np.ndarray:
    """The 3D point of every pixel.

    Args:
        depth: (H, W), distance along the viewing axis (z-depth, not the length of the ray), in any unit.
        intrinsics: (3, 3), in pixels, for a picture of this size.

    Returns:
        float32 (H, W, 3) in the unit of `depth`, OpenCV axes; (0, 0, 0) where depth is missing.

    Raises ValueError when `depth` is no depth map or `intrinsics` no camera matrix.
    """
    depth = view_as_depth_map(depth)
    intrinsics = np.asarray(intrinsics, dtype=np.float64)
    if intrinsics.shape != (3, 3) or not np.isfinite(intrinsics).all():
        raise ValueError(f"intrinsics {intrinsics.tolist()} must be 3x3 finite numbers")
    if intrinsics[0, 0] <= 0 or intrinsics[1, 1] <= 0 or intrinsics[2].tolist() != [0, 0, 1] or intrinsics[1, 0] != 0:
        raise ValueError(
            f"intrinsics {intrinsics.tolist()} are no camera matrix; "
            "give [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels"
        )
    rows, columns = np.indices(depth.shape, sparse=True)
    y = (rows - intrinsics[1, 2]) / intrinsics[1, 1]
    x = (columns - intrinsics[0, 2] - intrinsics[0, 1] * y) / intrinsics[0, 0]
    return np.stack([x * depth, y * depth, depth], axis=-1, dtype=np.float32)


def depth_edges(depth: ArrayLike, mask: ArrayLike | None = None, threshold: float = EDGE_THRESHOLD) -> np.ndarray:
    """Pixels at a depth jump, where sensors and networks leave points flying between foreground and background.

    Args:
        depth: (H, W).
        mask: (H, W), True where depth counts. None: everywhere.
        threshold: a jump is a 3x3 neighbourhood with (max - min) / min above this. Missing neighbours do not count.

    Returns:
        bool (H, W), False where depth is missing.

    Raises ValueError when `depth`, `mask` or `threshold` is not such a thing.
    """
    depth = view_as_depth_map(depth, mask)
    _check_threshold(threshold)
    valid = depth > 0
    nearest = -_max_3x3(np.where(valid, -depth, -np.inf))
    farthest = _max_3x3(depth)
    return valid & (farthest - nearest > threshold * nearest)


def reduced(depth: np.ndarray, image: Image.Image, pixels: float) -> tuple[np.ndarray, Image.Image]:
    """A depth map and its picture on a grid of at most so many pixels, of about the same aspect ratio.

    Args:
        depth: (H, W), 0 where missing.
        image: `PIL.Image` of that size.
        pixels: 1 or more.

    Returns:
        depth (h, w), of the pixels in the middle of those that become one: none is invented between surfaces; and the
        picture, resampled. Both as they are where they have no more pixels.
    """
    height, width = depth.shape
    factor = math.sqrt(pixels / (height * width))
    if factor >= 1:
        return depth, image
    rows, columns = max(1, int(height * factor)), max(1, int(width * factor))
    rows, columns = min(rows, pixels), min(columns, pixels // rows)
    down, across = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in ((rows, height), (columns, width)))
    return depth[down[:, None], across], image.resize((columns, rows), Image.Resampling.LANCZOS, reducing_gap=3)


def point_cloud(
    depth: ArrayLike,
    image: Image.Image | np.ndarray | None = None,
    mask: ArrayLike | None = None,
    fov_degrees: float = FOV_DEGREES,
    intrinsics: ArrayLike | None = None,
    edge_threshold: float | None = EDGE_THRESHOLD,
) -> tuple[np.ndarray, np.ndarray]:
    """The coloured points of a depth map, without its missing and its edge pixels (`depth_edges`).

    Args:
        depth: (H, W), z-depth in any unit.
        image: the picture of the same size, `PIL.Image` or uint8 (H, W, 3). None: gray points.
        mask: (H, W), True where depth counts. None: everywhere.
        fov_degrees: field of view along the longer side, for want of `intrinsics`.
        intrinsics: (3, 3) in pixels; takes the place of `fov_degrees`.
        edge_threshold: see `depth_edges`. None: edge pixels stay.

    Returns:
        points float32 (N, 3), OpenCV axes, row by row; colors uint8 (N, 3).

    Raises ValueError for bad input, and when no pixel is left.
    """
    depth = view_as_depth_map(depth, mask)
    points, colors = _pixels_in_space(depth, image, fov_degrees, intrinsics)
    kept = depth > 0
    if edge_threshold is not None:
        kept &= ~depth_edges(depth, threshold=edge_threshold)
    if not kept.any():
        raise ValueError(
            f"none of {depth.size} pixels is left: {np.count_nonzero(depth)} have depth and all of these are edges; "
            "check depth and mask, or raise edge_threshold"
        )
    return points[kept], colors[kept]


def mesh(
    depth: ArrayLike,
    image: Image.Image | np.ndarray | None = None,
    mask: ArrayLike | None = None,
    fov_degrees: float = FOV_DEGREES,
    intrinsics: ArrayLike | None = None,
    edge_threshold: float | None = EDGE_THRESHOLD,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The surface of a depth map: two triangles between every four neighbouring pixels.

    Triangles with a missing corner, or with a relative depth jump between corners above `edge_threshold` (None: any
    jump may stay), are left out. Arguments are those of `point_cloud`.

    Returns:
        vertices float32 (N, 3), OpenCV axes; faces int32 (M, 3), which face the camera; colors uint8 (N, 3).

    Raises ValueError for bad input, and when no triangle is left.
    """
    depth = view_as_depth_map(depth, mask)
    points, colors = _pixels_in_space(depth, image, fov_degrees, intrinsics)
    index = np.arange(depth.size, dtype=np.int32).reshape(depth.shape)
    top_left, top_right, bottom_left, bottom_right = index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:]
    triangles = [(top_left, bottom_left, top_right), (top_right, bottom_left, bottom_right)]
    faces = np.concatenate([np.stack(corners, axis=-1).reshape(-1, 3) for corners in triangles])

    corner_depth = depth.ravel()[faces]
    nearest, farthest = corner_depth.min(axis=1), corner_depth.max(axis=1)
    kept = nearest > 0
    if edge_threshold is not None:
        _check_threshold(edge_threshold)
        kept &= farthest - nearest <= edge_threshold * nearest
    if not kept.any():
        raise ValueError(
            f"none of {len(faces)} triangles is left: {np.count_nonzero(nearest)} have depth at all corners "
            "and all of these cross edges; check depth and mask, or raise edge_threshold"
        )
    faces = faces[kept]
    used = np.zeros(depth.size, dtype=bool)
    used[faces] = True
    renumbered = np.cumsum(used, dtype=np.int32) - 1
    return points.reshape(-1, 3)[used], renumbered[faces], colors.reshape(-1, 3)[used]


def save_ply(path: str | Path, points: np.ndarray, colors: np.ndarray) -> None:
    """Write a point cloud as binary PLY, turned from OpenCV axes to y up and z backward so that it opens upright.

    Args:
        path: ends in `.ply`. The file appears whole or not at all.
        points: (N, 3), OpenCV axes.
        colors: uint8 (N, 3).

    Raises ValueError for another suffix, shape or type, FileNotFoundError when the folder is missing.
    """
    _check_model(path, ".ply", points, colors)
    import trimesh  # half a second, of which who only looks at depth needs nothing

    cloud = trimesh.PointCloud(np.asarray(points) * OPENCV_TO_GLTF, colors)
    with atomic_write(path) as temporary:
        temporary.write_bytes(cloud.export(file_type="ply"))


def save_glb(path: str | Path, vertices: np.ndarray, faces: np.ndarray, colors: np.ndarray) -> None:
    """Write a mesh with vertex colours as binary glTF, turned from OpenCV axes to y up and z backward.

    The colours of a photograph hold its light already, so the material is unlit. glTF wants vertex colours linear,
    not sRGB: they are converted, and stored as floats, since 8 bits would show bands in dark parts.

    Args:
        path: ends in `.glb`. The file appears whole or not at all.
        vertices: (N, 3), OpenCV axes.
        faces: integers (M, 3) below N.
        colors: uint8 (N, 3), sRGB.

    Raises ValueError for another suffix, shape or type, FileNotFoundError when the folder is missing.
    """
    _check_model(path, ".glb", vertices, colors)
    faces = np.asarray(faces)
    if faces.ndim != 2 or faces.shape[1] != 3 or faces.dtype.kind not in "ui" or faces.size == 0:
        raise ValueError(f"faces of shape {faces.shape}, {faces.dtype} must be integers (M, 3), M > 0")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(f"faces name vertices {faces.min()}..{faces.max()}, but there are 0..{len(vertices) - 1}")
    import trimesh

    surface = trimesh.Trimesh(
        np.asarray(vertices) * OPENCV_TO_GLTF,
        faces,
        vertex_attributes={"_COLOR": _linear_from_srgb(np.asarray(colors))},
        process=False,
    )
    with atomic_write(path) as temporary:
        temporary.write_bytes(surface.export(file_type="glb", tree_postprocessor=_finish_gltf))


def _check_threshold(threshold):
    if not (threshold > 0 and np.isfinite(threshold)):
        raise ValueError(f"edge_threshold={threshold!r} must be a positive number, e.g. 0.1 for jumps of 10 %")


def _max_3x3(values):
    height, width = values.shape
    padded = np.pad(values, 1, mode="edge")
    wide = np.maximum.reduce([padded[:, shift : shift + width] for shift in range(3)])
    return np.maximum.reduce([wide[shift : shift + height] for shift in range(3)])


def _pixels_in_space(depth, image, fov_degrees, intrinsics):
    """Point (H, W, 3) and colour (H, W, 3) of every pixel."""
    height, width = depth.shape
    if intrinsics is None:
        intrinsics = intrinsics_from_fov(width, height, fov_degrees)
    if image is None:
        colors = np.full((height, width, 3), GRAY, dtype=np.uint8)
    else:
        colors = np.asarray(as_rgb(image) if isinstance(image, Image.Image) else image)
    if colors.dtype != np.uint8 or colors.shape != (height, width, 3):
        raise ValueError(
            f"image of shape {colors.shape}, {colors.dtype} does not fit depth of {width}x{height} pixels; "
            f"give uint8 ({height}, {width}, 3) or a PIL image of that size"
        )
    return unproject(depth, intrinsics), colors


def _check_model(path, suffix, points, colors):
    if Path(path).suffix.lower() != suffix:
        raise ValueError(f"{path}: the name must end in {suffix}")
    points, colors = np.asarray(points), np.asarray(colors)
    if points.ndim != 2 or points.shape[1] != 3 or points.dtype.kind not in "uif" or points.size == 0:
        raise ValueError(f"points of shape {points.shape}, {points.dtype} must be numbers (N, 3), N > 0")
    if not np.isfinite(points).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(points))} coordinates are not finite; leave such points out")
    if colors.shape != points.shape or colors.dtype != np.uint8:
        raise ValueError(f"colors of shape {colors.shape}, {colors.dtype} must be uint8 {points.shape}, as the points")


def _linear_from_srgb(colors):
    levels = np.arange(256) / 255
    table = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    return table.astype(np.float32)[colors]


def _finish_gltf(tree):
    """Name the colours as viewers expect and add the unlit material; trimesh can do neither by itself."""
    primitive = tree["meshes"][0]["primitives"][0]
    primitive["attributes"]["COLOR_0"] = primitive["attributes"].pop("_COLOR")
    primitive["material"] = 0
    tree["materials"] = [{"extensions": {"KHR_materials_unlit": {}}, "pbrMetallicRoughness": {"metallicFactor": 0}}]
    tree["extensionsUsed"] = ["KHR_materials_unlit"]
