"""The view of a frame that is evaluated: all of it, its centre, or the view of MoGe's evaluation."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from scipy.ndimage import map_coordinates

from mf_diffusers.alignment import nearest_valid
from mf_diffusers.datasets.frame import Frame, Frames
from mf_diffusers.files import atomic_write


if TYPE_CHECKING:
    from mf_diffusers.evaluation.protocol import Protocol


HALF_PIXEL = np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
"""Between camera matrices whose whole numbers are the centres of pixels and those where they are corners."""


def flat_name(name: str) -> str:
    """The name of a frame, "scene/12", as that of a file in one folder of pictures, "scene--12"."""
    return name.replace("/", "--")


def save_views(dataset: Frames, protocol: "Protocol", folder: str | Path, limit: int | None = None) -> list[str]:
    """Write the pictures of a protocol's views for any program to predict on, `scene--12.png` for the frame `scene/12`.

    Args:
        dataset, protocol, limit: as for `evaluation.run.evaluate`.
        folder: where to; it is made where missing, and files of these names are replaced.

    Returns what could not be written, as text.

    Raises ValueError when two frames would have the same file.
    """
    names = dataset.names[:limit]
    twice = [name for name, times in Counter(map(flat_name, names)).items() if times > 1]
    if twice:
        raise ValueError(f"{len(twice)} frames have the same file name with -- for /: {twice[:5]}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for number, name in enumerate(names):
        try:
            view, _ = protocol.view(dataset[number])
        except (ValueError, OSError) as error:
            failed.append(f"{name}: {error}")
            continue
        with atomic_write(folder / f"{flat_name(name)}.png") as temporary:
            Image.fromarray(view.image).save(temporary)
    return failed


def center_crop(frame: Frame, size: int) -> Frame:
    """The largest centred square of a frame at size x size pixels: 256 is the protocol of the from-scratch family.

    The picture is resampled with antialiasing, the depth by nearest neighbour.
    """
    height, width = frame.depth.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    picture = Image.fromarray(frame.image).crop((left, top, left + side, top + side))
    intrinsics = frame.intrinsics
    if intrinsics is not None:
        moved = intrinsics + HALF_PIXEL - [[0, 0, left], [0, 0, top], [0, 0, 0]]
        intrinsics = (np.diag([size / side, size / side, 1]) @ moved - HALF_PIXEL).astype(np.float32)
    return replace(
        frame,
        image=np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS)),
        depth=frame.depth[central_square((height, width), size)],
        intrinsics=intrinsics,
    )


def central_square(shape: tuple[int, int], size: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows (size, 1) and columns (size,) that `center_crop` takes of a map of this shape."""
    side = min(shape)
    at = (2 * np.arange(size) + 1) * side // (2 * size)
    return (shape[0] - side) // 2 + at[:, None], (shape[1] - side) // 2 + at


def moge_view(frame: Frame, width: int, height: int) -> Frame:
    """The view that MoGe's evaluation makes of a frame: width x height pixels, square, looking at the picture's centre.

    The camera is turned so that the centre of the picture lies on its axis, and the view is the largest of that aspect
    ratio within the picture. Of a picture with a central principal point it is a centred crop, resampled. The picture
    is resampled by Pillow (Lanczos) and then bilinearly, depth by `nearest_valid` and then by nearest neighbour, as
    there. Against MoGe's own code pictures differ by at most 1 of 255 levels, and depth where a pixel's centre falls
    on the edge between two (about 1 in 50,000). Infinite depth becomes missing.

    Raises ValueError, which names the frame, when it has no intrinsics.
    """
    if frame.intrinsics is None:
        raise ValueError(f"{frame.name}: the view of MoGe's evaluation needs intrinsics, and the frame has none")
    camera = np.diag([1 / frame.depth.shape[1], 1 / frame.depth.shape[0], 1]) @ (frame.intrinsics + HALF_PIXEL)
    to_rays = np.linalg.inv(camera)
    turn = _rotation_to_axis(to_rays @ [0.5, 0.5, 1])
    span = _largest_span(to_rays, turn, width / height)  # of the view's plane at depth 1: its width
    target = np.array([[1 / span, 0, 0.5], [0, width / (height * span), 0.5], [0, 0, 1]])

    # First to the view's pixel size. The factor makes up for rounding below a whole number.
    size = [int(extent * width / span * (1 + 1e-6)) for extent in (1 / camera[1, 1], 1 / camera[0, 0])]
    picture = np.asarray(Image.fromarray(frame.image).resize(size[::-1], Image.Resampling.LANCZOS))
    rows, columns, found = nearest_valid(frame.mask, size)
    distance = np.where(found, frame.depth[rows, columns], 0) * _ray_lengths(to_rays, *size)

    # Then turned, by the homography between the two views.
    across, down = _uv(width, height)
    sources = np.stack([across, down, np.ones_like(across)], axis=-1) @ (camera @ turn.T @ np.linalg.inv(target)).T
    at = sources[..., 1::-1] / sources[..., 2:] * size - 0.5
    at = np.moveaxis(at, -1, 0)
    channels = np.moveaxis(picture, -1, 0)
    image = [map_coordinates(channel, at, np.float32, order=1, mode="grid-constant") for channel in channels]
    row, column = np.rint(at).astype(int)
    inside = (row >= 0) & (row < size[0]) & (column >= 0) & (column < size[1])
    distance = np.where(inside, distance[np.clip(row, 0, size[0] - 1), np.clip(column, 0, size[1] - 1)], 0)
    return replace(
        frame,
        image=np.rint(np.stack(image, axis=-1)).astype(np.uint8),
        depth=(distance / _ray_lengths(np.linalg.inv(target), height, width)).astype(np.float32),
        intrinsics=(np.diag([width, height, 1]) @ target - HALF_PIXEL).astype(np.float32),
    )


def _uv(width, height):
    """The centres of the pixels in units of the picture's width and height, (height, width) each."""
    return np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)


def _ray_lengths(to_rays, height, width):
    """The length of the ray to depth 1 through every pixel, (height, width)."""
    across, down = _uv(width, height)
    return np.linalg.norm(np.stack([across, down, np.ones_like(across)], axis=-1) @ to_rays.T, axis=-1)


def _rotation_to_axis(direction):
    """The smallest rotation that takes a direction to (0, 0, 1)."""
    x, y, z = direction / np.linalg.norm(direction)
    cross = np.array([[0, 0, -x], [0, 0, -y], [x, y, 0]])  # of the axis direction x (0, 0, 1)
    return np.eye(3) + cross + cross @ cross / (1 + z)


def _largest_span(to_rays, turn, aspect):
    """The width at depth 1 of the largest centred view of this aspect ratio that the turned picture covers.

    As MoGe, on the diagonals of the view: where they meet the (extended) edges of the picture; and no wider or higher
    than the picture before it was turned.
    """
    corners = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 1], [1, 0, 1]]) @ to_rays.T @ turn.T
    corners = corners[:, :2] / corners[:, 2:]
    spans = [to_rays[0, 0], to_rays[1, 1] * aspect]
    for start, end in zip(np.roll(corners, 1, axis=0), corners):
        edge = end - start
        for diagonal in ((aspect, 1), (aspect, -1)):
            along = (start[0] * edge[1] - start[1] * edge[0]) / (diagonal[0] * edge[1] - diagonal[1] * edge[0])
            spans.append(2 * abs(along) * aspect)
    return min(spans)
