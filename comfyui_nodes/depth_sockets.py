"""Raw depth in ComfyUI's sockets: pictures, the maps of an RGB-D latent, point clouds and MoGe geometry.

In an IMAGE, raw depth has three equal channels: float32 in any unit, larger is farther, 0 where it is missing, inf
where it is infinitely far. In MOGE_GEOMETRY, where nothing clips it, it is "depth" (B, H, W), with its "mask".
"""

import math
import tempfile
from pathlib import Path

import torch

from mf_diffusers.geometry import (
    EDGE_THRESHOLD,
    FOV_DEGREES,
    GRAY,
    depth_edges,
    intrinsics_from_fov,
    point_cloud,
    save_ply,
    unproject,
)


def image_from_depth(depth: torch.Tensor) -> torch.Tensor:
    """Depth maps (B, 1, H, W) -> IMAGE (B, H, W, 3)."""
    return depth.float().movedim(1, -1).expand(-1, -1, -1, 3).contiguous()


def geometry_from_depth(depth: torch.Tensor, valid: torch.Tensor, image: torch.Tensor | None = None) -> dict:
    """Depth and validity (B, 1, H, W), and their IMAGE, gray without one, as MOGE_GEOMETRY without points."""
    depth, valid = depth[:, 0].float().cpu(), valid[:, 0].bool().cpu()
    gray = torch.full((*depth.shape, 3), GRAY / 255)
    return {
        "depth": torch.where(valid, depth, torch.inf),
        "mask": valid,
        "image": gray if image is None else image.cpu(),
    }


def image_from_socket(depth, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What comes through a socket of depth, IMAGE or MOGE_GEOMETRY, as IMAGE (B, H, W, C) and MASK, if there is one."""
    if not isinstance(depth, dict):
        return depth, mask
    if "depth" not in depth:
        raise ValueError("This geometry has no depth, but points alone: connect one with depth, or raw depth.")
    own = depth.get("mask")
    if own is not None and mask is not None:
        own = own.cpu().bool() & mask.cpu().bool()
    return depth["depth"].float()[..., None], mask if own is None else own.float()


def fov_of(depth) -> float:
    """The field of view of a MOGE_GEOMETRY along the longer side, in degrees. Raises ValueError where it has none."""
    if not isinstance(depth, dict) or "intrinsics" not in depth:
        raise ValueError("Give the `fov`: 0 is that of a geometry, and what is connected as depth has no camera.")
    height, width = depth["depth"].shape[-2:]
    focal = float(depth["intrinsics"][0, 0, 0]) if width >= height else float(depth["intrinsics"][0, 1, 1])
    return math.degrees(2 * math.atan(0.5 / focal))


def depth_from_image(image: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        image: IMAGE (B, H, W, C) of equal channels; 0, negative, NaN and inf are missing.
        mask: MASK (B, H, W) or (1, H, W), not 0 where depth counts.

    Returns:
        Depth (B, 1, H, W), float32, 0 where it is missing; and its validity (B, 1, H, W), bool.

    Raises:
        ValueError: a colour picture, or a mask of another size; the message says what to connect instead.
    """
    depth = known_depth(image, mask)
    valid = (depth > 0) & torch.isfinite(depth)
    return torch.where(valid, depth, 0.0), valid


def known_depth(image: torch.Tensor, mask: torch.Tensor | None, inverse: bool = False) -> torch.Tensor:
    """As [`depth_from_image`], but inf is kept: (B, 1, H, W). Values may be `inverse` depth, bright is near."""
    channels = image.cpu().float().movedim(-1, 1).nan_to_num(0.0, posinf=torch.inf)
    depth = channels[:, :1].clamp(min=0)
    if not torch.equal(channels, channels[:, :1].expand_as(channels)):
        raise ValueError(
            "A colour picture is connected as depth, but colours carry no depth values: connect raw depth, from 'Load "
            "Depth' or 'Decode RGB-D'."
        )
    if inverse:
        depth = torch.where(depth > 0, 1 / depth, 0.0)
    if mask is None:
        return depth
    if mask.shape[-2:] != depth.shape[-2:] or len(mask) not in (1, len(depth)):
        raise ValueError(
            f"The mask has shape {list(mask.shape)}, the depth {list(depth[:, 0].shape)} (B, H, W): connect the mask "
            "that belongs to the depth."
        )
    return torch.where((mask.cpu() != 0)[:, None], depth, 0.0)


def points_from_depth(
    image: torch.Tensor,
    mask: torch.Tensor | None = None,
    colors: torch.Tensor | None = None,
    fov: float = FOV_DEGREES,
    edge_threshold: float | None = EDGE_THRESHOLD,
) -> tuple[list[bytes], dict[str, torch.Tensor]]:
    """
    Args:
        image, mask: see [`depth_from_image`].
        colors: IMAGE (B, H, W, 3) or (1, H, W, 3) of the size of the depth. `None`: gray.
        fov: field of view along the longer side, in degrees.
        edge_threshold: see `mf_diffusers.geometry.depth_edges`. `None`: points at depth jumps stay.

    Returns:
        A binary PLY for each map; and MOGE_GEOMETRY: "points" (B, H, W, 3) in OpenCV axes and "depth" (B, H, W), both
        inf where they do not count, "mask" (B, H, W), "intrinsics" (B, 3, 3) and "image" (B, H, W, 3).

    Raises:
        ValueError: as [`depth_from_image`]; colours of another size; a map has no point left.
    """
    depth, valid = depth_from_image(image, mask)
    batch_size, height, width = image.shape[:3]
    if colors is None:
        colors = torch.full((1, height, width, 3), GRAY / 255)
    if colors.shape[1:3] != image.shape[1:3] or len(colors) not in (1, batch_size):
        raise ValueError(
            f"The image has shape {list(colors.shape)}, the depth {list(image.shape)} (B, H, W, C): connect the image "
            "that belongs to the depth."
        )
    colors = colors[..., :3].cpu().float().expand(batch_size, -1, -1, -1)
    camera = intrinsics_from_fov(width, height, fov)
    files, points, kept = [], [], []
    for values, counts, picture in zip(depth[:, 0].numpy(), valid[:, 0].numpy(), colors):
        picture = (picture.clamp(0, 1) * 255).round().byte().numpy()
        files.append(_ply(*point_cloud(values, picture, counts, intrinsics=camera, edge_threshold=edge_threshold)))
        if edge_threshold is not None:
            counts = counts & ~depth_edges(values, counts, edge_threshold)
        points.append(torch.from_numpy(unproject(values, camera)))
        kept.append(torch.from_numpy(counts))
    kept = torch.stack(kept)
    # ComfyUI's cameras measure in widths and heights of the picture, from its corner.
    focal_x, focal_y = float(camera[0, 0] / width), float(camera[1, 1] / height)
    return files, {
        "points": torch.where(kept[..., None], torch.stack(points), torch.inf),
        "depth": torch.where(kept, depth[:, 0], torch.inf),
        "mask": kept,
        "intrinsics": torch.tensor([[[focal_x, 0, 0.5], [0, focal_y, 0.5], [0, 0, 1]]]).expand(batch_size, -1, -1),
        "image": colors,
    }


def _ply(points, colors) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "points.ply")
        save_ply(path, points, colors)
        return path.read_bytes()
