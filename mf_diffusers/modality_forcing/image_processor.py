"""Images of any mode and size to what the model takes, and the size at which to work on them."""

import math

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from mf_diffusers.pictures import as_rgb


# Rounding, as of a resized float image, that is not worth an error.
RANGE_TOLERANCE = 1e-3


def image_to_tensor(image) -> torch.Tensor:
    """
    Args:
        image: an image or a batch of images. `PIL.Image.Image`; `np.ndarray` of shape (H, W, 3) or (B, H, W, 3),
            unsigned integers or floats in [0, 1]; `torch.Tensor` of shape (3, H, W) or (B, 3, H, W) in [0, 1]; or a
            list of these, all of one size.

    Returns:
        `torch.Tensor` of shape (B, 3, H, W), float32 in [0, 1].

    Raises:
        ValueError: a shape, kind or range that is not in the list, or images of different sizes.
    """
    if isinstance(image, (list, tuple)):
        if not image:
            raise ValueError("The list holds no image.")
        images = [image_to_tensor(one) for one in image]
        sizes = {tuple(one.shape[-2:]) for one in images}
        if len(sizes) != 1:
            raise ValueError(
                f"The images of a batch must share one size, got {sorted(sizes)} (H, W): call once per size."
            )
        return torch.cat(images)
    if isinstance(image, PIL.Image.Image):
        image = np.array(as_rgb(image))
    kind = type(image)
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "uf" or image.ndim not in (3, 4):
            raise ValueError(
                f"An image array holds floats or unsigned integers (H, W, 3), got {image.dtype} {image.shape}."
            )
        scale = np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1.0
        image = torch.from_numpy(np.divide(image, scale, dtype=np.float32, casting="unsafe")).movedim(-1, -3)
    if not isinstance(image, torch.Tensor):
        raise ValueError(f"An image must be a PIL image, np.ndarray, torch.Tensor or a list of these, got {kind}.")
    image = image[None].float() if image.ndim == 3 else image.float()
    if image.ndim != 4 or image.shape[1] != 3 or image.numel() == 0:
        raise ValueError(
            "An image must have 3 channels and at least one pixel: (H, W, 3) or (B, H, W, 3) as an array, (3, H, W) or "
            f"(B, 3, H, W) as a tensor; got a {kind.__name__} that makes {tuple(image.shape)}."
        )
    low, high = image.min().item(), image.max().item()
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise ValueError(
            f"Image values must lie in [0, 1], got {low:.4g} to {high:.4g}: divide 8-bit values by 255, or map [-1, 1] "
            "by x / 2 + 0.5."
        )
    return image.clamp(0, 1)


def processing_size(height: int, width: int, pixels: int, multiple: int = 16, rule: str = "area") -> tuple[int, int]:
    """
    The (height, width) at which to work on an input of `height` x `width`: its aspect ratio, both sides rounded to
    `multiple`.

    Args:
        pixels: area of the square that the `rule` is about.
        rule: "area": an area near `pixels`; "long_side": the longer side as long as that square's.

    Raises:
        ValueError: so long and thin that the short side would be less than half a `multiple`.
    """
    scale = math.sqrt(pixels / (height * width if rule == "area" else max(height, width) ** 2))
    if min(height, width) * scale < multiple / 2:
        raise ValueError(
            f"{height}x{width} (H x W) is too long and thin for {pixels} pixels in steps of {multiple}: crop it, or "
            "give `height` and `width`."
        )
    return tuple(round(side * scale / multiple) * multiple for side in (height, width))


def resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bicubic, antialiased, clamped to the input's range; (B, C, H, W) -> (B, C, *size)."""
    if tuple(image.shape[-2:]) == size:
        return image
    resized = F.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(image.min(), image.max())
