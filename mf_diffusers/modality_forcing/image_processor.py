"""Images of any mode and size to what the model takes, and the size at which to work on them."""

import math

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F


def as_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """
    A Pillow image of any mode as 8-bit RGB, upright: EXIF rotation is applied, transparency is laid over white, 16-bit
    gray is rescaled from 0..65535, palettes and other colour spaces are converted.

    Raises:
        ValueError: values without a known range: floats, or integers outside 0..65535.
    """
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("A picture of floats has no known range: save it with 8 or 16 bits per channel.")
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(
                f"Gray values {levels.min()}..{levels.max()} do not fit 16 bits: save with 8 or 16 bits per channel."
            )
        image = PIL.Image.fromarray(np.round(levels / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def image_to_tensor(image) -> torch.Tensor:
    """
    Args:
        image: an image or a batch of images. `PIL.Image.Image`; `np.ndarray` of shape (H, W, 3) or (B, H, W, 3), uint8
            or floats in [0, 1]; `torch.Tensor` of shape (3, H, W) or (B, 3, H, W) in [0, 1]; or a list of these, all of
            one size.

    Returns:
        `torch.Tensor` of shape (B, 3, H, W), float32 in [0, 1].

    Raises:
        ValueError: a shape, kind or range that is not in the list, or images of different sizes.
    """
    if isinstance(image, (list, tuple)):
        images = [image_to_tensor(one) for one in image]
        sizes = {tuple(one.shape[-2:]) for one in images}
        if len(sizes) != 1:
            raise ValueError(
                f"The images of a batch must share one size, got {sorted(sizes)} (H, W): call once per size."
            )
        return torch.cat(images)
    if isinstance(image, PIL.Image.Image):
        image = np.array(as_rgb(image))
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image / 255.0 if image.dtype == np.uint8 else image).movedim(-1, -3)
    if not isinstance(image, torch.Tensor):
        raise ValueError(
            f"An image must be a PIL image, np.ndarray, torch.Tensor or a list of these, got {type(image)}."
        )
    image = image[None].float() if image.ndim == 3 else image.float()
    if image.ndim != 4 or image.shape[1] != 3 or image.numel() == 0:
        raise ValueError(
            "An image must have 3 channels and at least one pixel: (H, W, 3) or (B, H, W, 3) as an array, (3, H, W) or "
            f"(B, 3, H, W) as a tensor; got a tensor of {tuple(image.shape)}."
        )
    if not torch.isfinite(image).all() or image.min() < 0 or image.max() > 1:
        raise ValueError(
            f"Image values must lie in [0, 1], got {image.min().item():.4g} to {image.max().item():.4g}: divide 8-bit "
            "values by 255."
        )
    return image


def processing_size(height: int, width: int, pixels: int, multiple: int = 16) -> tuple[int, int]:
    """
    The (height, width) at which to work on an input of `height` x `width`: its aspect ratio at an area near `pixels`,
    both sides rounded to `multiple` (at least one `multiple`).
    """
    scale = math.sqrt(pixels / (height * width))
    return tuple(max(multiple, round(side * scale / multiple) * multiple) for side in (height, width))


def resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bicubic, antialiased, clamped to the input's range; (B, C, H, W) -> (B, C, *size)."""
    if tuple(image.shape[-2:]) == size:
        return image
    resized = F.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(image.min(), image.max())
