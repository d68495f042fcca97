"""Images of any mode and size to what the model takes, and the size at which to work on them."""

import math
from collections.abc import Callable

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import PipelineImageInput

from mf_diffusers.pictures import as_rgb

from .resampling import resample, to_unit_range


# Rounding, as of a resized float image, that is not worth an error.
RANGE_TOLERANCE = 1e-3


def image_to_tensor(image: PipelineImageInput) -> torch.Tensor:
    """
    Args:
        image: an image or a batch of images. `PIL.Image.Image`; `np.ndarray` of shape (H, W, 3) or (B, H, W, 3),
            unsigned integers or floats in [0, 1]; `torch.Tensor` of shape (3, H, W) or (B, 3, H, W), uint8 or floats
            in [0, 1]; or a list of these, all of one size.

    Returns:
        `torch.Tensor` of shape (B, 3, H, W), float32 in [0, 1].

    Raises:
        ValueError: a shape, kind or range that is not in the list, or images of different sizes.
    """
    return to_unit_range(image_to_pixels(image))


def image_to_pixels(image: PipelineImageInput) -> torch.Tensor:
    """Images as `image_to_tensor` gives them, but those of 8 bits stay uint8, a quarter of the memory."""
    if isinstance(image, (list, tuple)):
        if not image:
            raise ValueError("The list holds no image.")
        images = [image_to_pixels(one) for one in image]
        sizes = {tuple(one.shape[-2:]) for one in images}
        if len(sizes) != 1:
            raise ValueError(
                f"The images of a batch must share one size, got {sorted(sizes)} (H, W): call once per size."
            )
        if len({one.dtype for one in images}) != 1:
            images = [to_unit_range(one) for one in images]
        return torch.cat(images)
    if isinstance(image, PIL.Image.Image):
        image = np.array(as_rgb(image))
    kind = type(image)
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "uf" or image.ndim not in (3, 4):
            raise ValueError(
                f"An image array holds floats or unsigned integers (H, W, 3), got {image.dtype} {image.shape}."
            )
        if image.dtype != np.uint8:
            scale = np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1.0
            image = np.divide(image, scale, dtype=np.float32, casting="unsafe")
        image = torch.from_numpy(np.require(image, requirements="CW")).movedim(-1, -3)
    if not isinstance(image, torch.Tensor):
        raise ValueError(f"An image must be a PIL image, np.ndarray, torch.Tensor or a list of these, got {kind}.")
    if image.dtype != torch.uint8:
        if not image.is_floating_point():
            raise ValueError(f"An image tensor holds floats in [0, 1] or uint8, got {image.dtype}.")
        image = image.float()
    if image.ndim == 3:
        image = image[None]
    if image.ndim != 4 or image.shape[1] != 3 or image.numel() == 0:
        raise ValueError(
            "An image must have 3 channels and at least one pixel: (H, W, 3) or (B, H, W, 3) as an array, (3, H, W) or "
            f"(B, 3, H, W) as a tensor; got a {kind.__name__} that makes {tuple(image.shape)}."
        )
    if image.dtype == torch.uint8:
        return image
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


def resize(
    image: torch.Tensor, size: tuple[int, int], finish: Callable[[torch.Tensor, slice], torch.Tensor] | None = None
) -> torch.Tensor:
    """
    Images at another size, bicubic and antialiased, each clamped to its own range.

    Args:
        image (`torch.Tensor` of shape (B, C, H, W)): floats, or uint8, which is brought to [0, 1].
        size: (height, width).
        finish: see [`resample`].

    Returns:
        `torch.Tensor` of shape (B, C, *size), of the type that `finish` returns.
    """
    if tuple(image.shape[-2:]) == tuple(size):
        image = to_unit_range(image)
        return image if finish is None else finish(image, slice(None))
    low, high = (to_unit_range(extreme(dim=(1, 2, 3), keepdim=True)) for extreme in (image.amin, image.amax))

    def within_range(band, columns):
        band = band.clamp(low, high)
        return band if finish is None else finish(band, columns)

    return resample(image, size, "bicubic", within_range)
