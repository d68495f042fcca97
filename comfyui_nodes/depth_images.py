"""Raw depth in ComfyUI's IMAGE sockets, and as the maps in model space that an RGB-D latent holds."""

import torch


def image_from_depth(depth: torch.Tensor) -> torch.Tensor:
    """Depth maps (B, 1, H, W) -> IMAGE (B, H, W, 3), float32, three equal channels."""
    return depth.float().movedim(1, -1).expand(-1, -1, -1, 3).contiguous()


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
    depth = image.cpu().float().movedim(-1, 1)
    if not torch.equal(depth.nan_to_num(), depth[:, :1].expand_as(depth).nan_to_num()):
        raise ValueError(
            "A colour picture is connected as depth, but colours carry no depth values: connect raw depth, from 'Load "
            "Depth' or 'Decode RGB-D'."
        )
    depth = depth[:, :1]
    valid = torch.isfinite(depth) & (depth > 0)
    if mask is not None:
        if mask.shape[-2:] != depth.shape[-2:] or len(mask) not in (1, len(depth)):
            raise ValueError(
                f"The mask has shape {list(mask.shape)}, the depth {list(depth[:, 0].shape)} (B, H, W): connect the mask "
                "that belongs to the depth."
            )
        valid = valid & (mask.cpu() != 0)[:, None]
    return torch.where(valid, depth, 0.0), valid


def encode_depth(
    image: torch.Tensor, mask: torch.Tensor | None, size: tuple[int, int], inverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Args:
        image, mask: see [`depth_from_image`].
        size: (height, width) to resample to.
        inverse: values are inverse depth, bright is near.

    Returns:
        Contracted depth (B, 1, *size), 0 where it is missing; where it is missing, bool; and the scale (B,) it was
        divided by.

    Raises:
        ValueError: as [`depth_from_image`]; or a map has no valid pixel.
    """
    from mf_diffusers import DepthProcessor

    depth, valid = depth_from_image(image, mask)
    if inverse:
        depth = torch.where(valid, 1 / depth, 0.0)
    processor = DepthProcessor(patch_size=1)
    tokens, valid, scale = processor.preprocess(depth, valid, *size)
    empty = (~valid.flatten(1).any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"Depth map {empty[0]} of the batch has no valid pixel: depth must be positive and finite somewhere. Check the "
            "file and its mask, or leave depth out."
        )
    return torch.where(valid, processor.unpatchify(tokens, *size), 0.0), ~valid, scale
