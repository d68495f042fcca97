"""Images and maps at other sizes. Large ones are resampled in bands, so that no more is held than input and result."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F


BAND = 2**22  # values


def resample(
    maps: torch.Tensor,
    size: tuple[int, int],
    mode: str,
    finish: Callable[[torch.Tensor, slice], torch.Tensor] = lambda band, columns: band,
) -> torch.Tensor:
    """
    Antialiased resampling, as `F.interpolate` does it.

    Args:
        maps (`torch.Tensor` of shape (B, C, H, W)): floats, or uint8, which is brought to [0, 1].
        size: (height, width) to resample to.
        mode: "bilinear" or "bicubic".
        finish: given columns of the result (B, C, height, n), and which they are, returns what is kept of them.

    Returns:
        `torch.Tensor` of shape (B, C, *size), of the type that `finish` returns.
    """
    result = None
    for band, columns in resampled_bands(maps, size, mode):
        band = finish(band, columns)
        if columns == slice(0, size[1]):
            return band
        if result is None:
            result = band.new_empty((*band.shape[:-1], size[1]))
        result[..., columns] = band
    return result


def resampled_bands(maps: torch.Tensor, size: tuple[int, int], mode: str) -> Iterator[tuple[torch.Tensor, slice]]:
    """As [`resample`], rows first, and after them columns, of which it yields one band (B, C, height, n) after another,
    and which they are: of a large result no more is held than is made use of."""
    (height, width), (new_height, new_width) = maps.shape[-2:], size
    images = maps.shape[:-2].numel()
    rows = max(1, BAND // (images * max(width, new_width)))
    narrow = torch.cat([_stretch(to_unit_range(band), new_width, mode) for band in maps.split(rows, dim=-2)], dim=-2)
    count = max(1, BAND // (images * max(height, new_height)))
    for start in range(0, new_width, count):
        columns = slice(start, min(start + count, new_width))
        # As rows: torch 2.13 takes wrong values where it makes a single column higher or lower.
        yield _stretch(narrow[..., columns].mT, new_height, mode).mT, columns


def to_unit_range(image: torch.Tensor) -> torch.Tensor:
    """uint8 as float32 in [0, 1]; floats as they are."""
    return image.float() / 255 if image.dtype == torch.uint8 else image


def row_bands(shape: tuple[int, ...]) -> list[slice]:
    """The rows of maps (..., H, W) in bands of some million values."""
    rows = max(1, BAND * shape[-2] // torch.Size(shape).numel())
    return [slice(start, min(start + rows, shape[-2])) for start in range(0, shape[-2], rows)]


def _stretch(maps, width, mode):
    """Maps with rows of `width` pixels."""
    if maps.shape[-1] == width:
        return maps
    return F.interpolate(maps, (maps.shape[-2], width), mode=mode, antialias=True, align_corners=False)
