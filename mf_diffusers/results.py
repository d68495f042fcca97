"""The folder that a run writes: an image, its depth, their geometry, and what it takes to make them again."""

import json
import os
import warnings
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from mf_diffusers.depth_io import as_depth_map, write_depth
from mf_diffusers.files import ESCAPED, legal_name, place_folder
from mf_diffusers.geometry import FOV_DEGREES, mesh, point_cloud, save_glb, save_ply
from mf_diffusers.visualization import colorize_depth, colorize_error


METADATA = "metadata.json"


def place_result(folder, output, name, overwrite=False, written=()):
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
    folder, image, depth, metadata, mask=None, uncertainty=None, fov_degrees=FOV_DEGREES, exr=False, points=True
):
    """Write the files of a result into `folder`.

    image.png; depth.npy, the depth as it is; depth.png (16 bits), depth_colored.png, with `points` points.ply and
    points.glb, and with `exr` depth.exr, all without the pixels that have no valid depth; mask.png where there are any
    such; uncertainty.npy and uncertainty.png where there is one; metadata.json.

    Args:
        image: RGB `PIL.Image`.
        depth: float32 (H, W), of the size of `image`.
        metadata: what can be written as JSON; paths are written as text.
        mask: bool (H, W), True where `depth` is valid. None: where it is above 0.
        uncertainty: relative uncertainty (H, W).
        fov_degrees: field of view of the point cloud and the mesh along the longer side.

    Warns with UserWarning when no pixel is left for the point cloud or the mesh, which is then left out.
    """
    image.save(folder / "image.png")
    np.save(folder / "depth.npy", depth.astype(np.float32))
    depth = as_depth_map(depth, mask)
    valid = depth > 0
    write_depth(folder / "depth.png", depth)
    if exr:
        write_depth(folder / "depth.exr", depth)
    Image.fromarray(colorize_depth(depth)).save(folder / "depth_colored.png")
    if not valid.all():
        Image.fromarray(255 * valid.astype(np.uint8)).save(folder / "mask.png")
    if uncertainty is not None:
        np.save(folder / "uncertainty.npy", uncertainty.astype(np.float32))
        Image.fromarray(colorize_error(uncertainty, valid)).save(folder / "uncertainty.png")
    geometries = (("points.ply", point_cloud, save_ply), ("points.glb", mesh, save_glb)) if points else ()
    for name, build, save in geometries:
        try:
            geometry = build(depth, image, fov_degrees=fov_degrees)
        except ValueError as error:
            warnings.warn(f"no {name} is written: {error}", UserWarning, stacklevel=2)
        else:
            save(folder / name, *geometry)
    text = json.dumps(metadata, indent=2, ensure_ascii=False, default=str)
    (folder / METADATA).write_text(text + "\n", **ESCAPED)
