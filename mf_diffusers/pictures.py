"""Pictures of other programs, of any mode, colour space and orientation, as upright sRGB."""

import io
import math
import warnings
from contextlib import contextmanager
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from mf_diffusers.input_warning import InputWarning


IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".avif", ".gif"),
    *(".bmp", ".tif", ".tiff", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".tga"),
)
"""Image files to look for in a folder; `read_image` itself goes by content and opens all that Pillow knows."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation: what brings such a picture upright."""

LYING = (5, 6, 7, 8)  # EXIF orientations in which height and width change places
FULL_FRAME = math.hypot(36, 24)  # mm, the diagonal to which focal lengths "in 35mm film" are converted
ASPECT_TOLERANCE = 0.02  # by which the aspect ratios of a picture and its depth may differ
SRGB_TOLERANCE = 2  # of 255, by which profiles of sRGB differ among one another
SEQUENCES = ("GIF", "PNG", "TIFF", "WEBP", "AVIF")  # formats whose further pictures are not views of the first


def read_image(path: str | PathLike, upright: bool = True) -> Image.Image:
    """Read a picture of any mode as 8-bit sRGB (see `as_rgb`).

    Args:
        path: the file. Of an animation or of several pages, the first picture is read.
        upright: whether to apply its EXIF orientation. False for pictures of a sensor whose depth lies as the sensor
            does. (TIFF is turned in any case: its decoder does it.)

    Warns with InputWarning of pictures that are left out, and of a colour profile that cannot be used.

    Raises FileNotFoundError when there is no such file, ValueError when Pillow cannot read it.
    """
    return _read(path, upright)[0]


def read_oriented(file: str | PathLike | BinaryIO) -> tuple[Image.Image, int]:
    """An upright picture as `read_image` gives it, and the EXIF orientation (1 to 8) that it has in its file.

    Args:
        file: path, or the open file.

    Warns and raises as `read_image` does.
    """
    return _read(file, upright=True)


def as_rgb(image: Image.Image, upright: bool = True) -> Image.Image:
    """
    A Pillow image of any mode as 8-bit sRGB.

    Colours are converted by the profile of the image, and taken for sRGB where there is none; transparency is laid over
    white; 16-bit gray is rescaled from 0..65535; EXIF rotation is applied, if it is to be `upright`. The result carries
    no metadata: what the file said of its own colours and orientation does not hold for it.

    Warns with InputWarning where the profile is damaged or of another colour space: it is then left out of account.

    Raises:
        ValueError: values without a known range: floats, or integers outside 0..65535.
    """
    return _as_rgb(image, upright, name="")


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 (upright) to 8; 1 where it has none or its EXIF data is damaged."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data is met with errors of many types
        return 1
    return value if value in TURNS else 1


def turned_upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """An array (H, W, ...) that lies as the sensor did, turned as a picture of this EXIF orientation is."""
    if orientation in LYING:
        array = array.swapaxes(0, 1)
    down, across = ((1, 1), (1, -1), (-1, -1), (-1, 1))[(orientation - 1) % 4]
    return array[::down, ::across]


def turned_along(depth: np.ndarray, image: Image.Image, orientation: int) -> np.ndarray:
    """Depth (h, w) of an upright image that has, or had, this EXIF orientation in its file: upright too.

    Depth that has the aspect ratio of the image as it lies in the file is taken to lie the same way, and is turned.
    Other depth stays as it is. Warns with InputWarning where the aspect ratio cannot tell.
    """
    size = image.height, image.width
    if orientation == 1 or not is_like(depth.shape, size[::-1] if orientation in LYING else size):
        return depth
    if is_like(depth.shape, size):
        warnings.warn(
            f"depth of pictures with the EXIF orientation {orientation} is taken to lie as they do in their files, and "
            "turned along; where it is upright already, save the pictures upright",
            InputWarning,
            stacklevel=2,
        )
    return turned_upright(depth, orientation)


def is_like(shape: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether (rows, columns) have the aspect ratio of (height, width)."""
    (rows, columns), (height, width) = shape, size
    return abs(rows * width / (columns * height) - 1) <= ASPECT_TOLERANCE


def upright_size(path: str | PathLike) -> tuple[int, int]:
    """(height, width) of a picture as `read_image` gives it.

    The header tells, unless it says that the picture lies on its side. Then the decoder is asked whether it turns such
    pictures itself, as that of TIFF does; JPEG is decoded at an eighth of its size.
    """
    with _opened(path) as image:
        width, height = image.size
        if orientation(image) in LYING:
            image.draft("RGB", (1, 1))
            image.load()
            width, height = (height, width) if orientation(image) in LYING else image.size
    return height, width


def fov_from_exif(path: str | PathLike) -> float | None:
    """The field of view along the longer side of a photo in degrees, by the tag FocalLengthIn35mmFilm.

    The length is that of a lens that sees as much on film of 36 x 24 mm, measured along the diagonal (CIPA DCG-001).

    Returns None where there is no such tag, or none that makes a field of view from 1 to 179 degrees.
    """
    try:
        with _opened(path) as image:
            length = float(image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.FocalLengthIn35mmFilm, 0))
            width, height = image.size
    except Exception:  # damaged EXIF data is met with errors of many types
        return None
    if not length > 0:
        return None
    focal = length / FULL_FRAME * math.hypot(width, height)  # in pixels
    degrees = 2 * math.degrees(math.atan(max(width, height) / 2 / focal))
    return degrees if 1 <= degrees <= 179 else None


def _read(file, upright):
    """The picture in a file, and its EXIF orientation there."""
    name = f"{file}: " if isinstance(file, (str, PathLike)) else ""
    try:
        with _opened(file) as image:
            stored, pictures = orientation(image), getattr(image, "n_frames", 1)
            if pictures > 1 and image.format in SEQUENCES:
                warnings.warn(f"{name}only the first of {pictures} pictures is used", InputWarning, stacklevel=3)
            return _as_rgb(image, upright, name), stored
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{name}cannot be read as a picture: its content is of no format that Pillow knows (HEIC, raw photos and "
            "colours in floats are none); save it as PNG or JPEG"
        ) from error
    except Exception as error:  # decoders meet damaged files with errors of many types
        raise ValueError(f"{name}cannot be read as a picture: {error}") from error


@contextmanager
def _opened(file):
    """The image in a path or an open file. Raises FileNotFoundError when there is no such file."""
    if not isinstance(file, (str, PathLike)):
        with Image.open(file) as image:
            yield image
        return
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file")
    # Not by its path: Pillow from 11.0 on maps such a file to memory, and scrambles gray TIFFs that lie on their side.
    with open(file, "rb") as stream, Image.open(stream) as image:
        yield image


def _as_rgb(image, upright, name):
    image.load()  # before its orientation is asked for: the decoder of TIFF turns the picture and takes the tag away
    turn = TURNS.get(orientation(image)) if upright else None
    profile = image.info.get("icc_profile")
    image, alpha = _without_alpha(_in_8_bits(image))
    image = _in_srgb(image, profile, name)
    if alpha is not None:
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=alpha)
        image = white
    if turn is not None:
        image = image.transpose(turn)
    image.info = {}
    return image


def _in_8_bits(image):
    if image.mode == "F":
        raise ValueError("A picture of floats has no known range: save it with 8 or 16 bits per channel.")
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image)
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError(
            f"Gray values {levels.min()}..{levels.max()} do not fit 16 bits: save with 8 or 16 bits per channel."
        )
    return Image.fromarray(((levels.astype(np.int32) + 128) // 257).astype(np.uint8))


def _without_alpha(image):
    """An opaque image in its own colour space, and its opacity (mode L) or None."""
    if not image.has_transparency_data:
        return (image if image.mode in ("L", "RGB", "CMYK", "LAB") else image.convert("RGB")), None
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    image = image.convert("RGBA")
    return image.convert("RGB"), image.getchannel("A")


def _in_srgb(image, profile, name):
    """An image of mode L, RGB, CMYK or LAB as RGB."""
    if profile:
        try:
            space = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()
            if image.mode == "L" and space == "RGB":
                image = image.convert("RGB")  # gray, in a file that still has the profile of a colour picture
            to_srgb = _transform_to_srgb(profile, image.mode)
            return image.convert("RGB") if to_srgb is None else ImageCms.applyTransform(image, to_srgb)
        except (ImageCms.PyCMSError, OSError) as error:
            text = f"the colour profile cannot be used for {image.mode} ({error}): colours are taken as without one"
            warnings.warn(f"{name}{text}", InputWarning, stacklevel=4)
    return image.convert("RGB")


@lru_cache(maxsize=8)
def _transform_to_srgb(profile, mode):
    """The transform from images of `mode` by the bytes of an ICC profile, or None where it is sRGB already.

    Raises ImageCms.PyCMSError or OSError for a damaged profile, or one of another colour space.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode != "RGB":
        return transform
    levels = np.arange(0, 256, 51, dtype=np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    changed = np.asarray(ImageCms.applyTransform(Image.fromarray(colors), transform))
    return transform if np.abs(changed.astype(int) - colors).max() > SRGB_TOLERANCE else None
