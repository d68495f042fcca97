"""The folder that a run writes: an image, its depth, their geometry, and what it takes to make them again."""

import json
import os
import warnings
from collections.abc import Collection
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mf_diffusers.depth_io import view_as_depth_map, write_depth
from mf_diffusers.files import ESCAPED, legal_name, place_folder
from mf_diffusers.geometry import PointSettings, mesh, point_cloud, reduced, save_glb, save_ply
from mf_diffusers.visualization import colorize_depth, colorize_error


METADATA = "metadata.json"


def place_result(
    folder: Path, output: str | Path, name: str, overwrite: bool = False, written: Collection[Path] = ()
) -> Path:
    """Rename a finished result folder to `output/name`, or to the first free of `name-002`, `name-003`, ...

    What is no name on every system is changed, see `legal_name`.

    Args:
        folder: a `temporary_folder` of `output`.
        overwrite: replace the result that has the name. What is no result, because it has no metadata.json, stays.
        written: paths that are taken whatever `overwrite` says: the other results of this run.

    Returns the path that it got.
    """
    name = legal_name(name)
    for number in count(1):
        path = Path(output) / (name if number == 1 else f"{name}-{number:03}")
        if path not in written and overwrite and (path / METADATA).is_file():
            place_folder(folder, path)
            return path
        if not os.path.lexists(path):
            try:
                folder.rename(path)
                return path
            except OSError:
                if not path.exists():  # else another run was faster: the next name
                    raise


def write_result(
    folder: Path,
    image: Image.Image,
    depth: np.ndarray,
    metadata: dict[str, Any],
    mask: np.ndarray | None = None,
    uncertainty: np.ndarray | None = None,
    exr: bool = False,
    points: PointSettings | None = None,
) -> None:
    """Write the files of a result into `folder`.

    image.png; depth.npy, the depth as it is; depth.png (16 bits), depth_colored.png, with `exr` depth.exr, and with
    `points` points.ply and points.glb, all without the pixels that have no valid depth; mask.png where there are any
    such; uncertainty.npy and uncertainty.png where there is one; metadata.json.

    Args:
        image: RGB `PIL.Image`.
        depth: float32 (H, W), of the size of `image`.
        metadata: what can be written as JSON; paths are written as text.
        mask: bool (H, W), True where `depth` is valid. None: where it is above 0.
        uncertainty: relative uncertainty (H, W).
        points: how points and mesh are made. None: there are none.

    Warns with UserWarning when no pixel is left for the point cloud or the mesh, which is then left out.
    """
    image.save(folder / "image.png")
    np.save(folder / "depth.npy", depth.astype(np.float32, copy=False))
    depth = view_as_depth_map(depth, mask)
    write_depth(folder / "depth.png", depth)
    if exr:
        write_depth(folder / "depth.exr", depth)
    Image.fromarray(colorize_depth(depth)).save(folder / "depth_colored.png")
    valid = depth > 0
    if not valid.all():
        Image.fromarray(valid.astype(np.uint8) * np.uint8(255)).save(folder / "mask.png")
    if uncertainty is not None:
        np.save(folder / "uncertainty.npy", uncertainty.astype(np.float32, copy=False))
        Image.fromarray(colorize_error(uncertainty, valid)).save(folder / "uncertainty.png")
    if points is not None:
        write_points(folder, image, depth, points)
    text = json.dumps(metadata, indent=2, ensure_ascii=False, default=str)
    (folder / METADATA).write_text(text + "\n", **ESCAPED)


def write_points(folder: Path, image: Image.Image, depth: np.ndarray, settings: PointSettings) -> None:
    """Write points.ply and points.glb of an image and its depth (H, W), 0 where missing. Warns as `write_result`."""
    depth, image = reduced(depth, image, settings.max_points)
    for name, build, save in (("points.ply", point_cloud, save_ply), ("points.glb", mesh, save_glb)):
        try:
            geometry = build(depth, image, fov_degrees=settings.fov_degrees, edge_threshold=settings.edge_threshold)
        except ValueError as error:
            warnings.warn(f"no {name} is written: {error}", UserWarning, stacklevel=3)
        else:
            save(folder / name, *geometry)
