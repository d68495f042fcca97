"""Pictures of any mode as upright RGB."""

import numpy as np
import PIL.Image
import PIL.ImageOps


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
