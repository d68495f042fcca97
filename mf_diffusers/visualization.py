"""Pictures of depth maps and of errors, and sheets of pictures."""

import functools
from collections.abc import Sequence
from itertools import accumulate

import matplotlib
import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

from mf_diffusers.depth_io import view_as_depth_map
from mf_diffusers.pictures import as_rgb


MISSING_GRAY = 80
PERCENTILES = (2, 98)
BRIGHTEST_ERROR = 0.25  # relative, in the pictures of errors that demo and evaluation make
INK = (40, 40, 40)
BAND = 2**20  # values that are painted at once


def colorize_depth(
    depth: ArrayLike,
    mask: ArrayLike | None = None,
    cmap: str = "Spectral",
    near: float | None = None,
    far: float | None = None,
) -> np.ndarray:
    """Colour a depth map, near in the first colours of the map and far in the last: red to blue by default.

    Colours follow inverse depth, which tells near things apart as the eye does.

    Args:
        depth: (H, W), or (B, H, W), in which every map has its own range.
        mask: of the shape of `depth`, True where depth counts. None: everywhere.
        cmap: name of a matplotlib colour map.
        near, far: depth at which the colours begin and end. None: the 2nd and 98th percentile of the valid pixels'
            inverse depth.

    Returns:
        uint8 (H, W, 3) or (B, H, W, 3); dark gray where depth is missing. A constant depth takes the middle colour.

    Raises ValueError for other shapes, an unknown colour map, or `near` and `far` not positive and in order.
    """
    depth = np.asarray(depth)
    if depth.ndim == 3:
        return _colorize_batch(depth, mask, cmap, near, far)
    depth = view_as_depth_map(depth, mask)
    low, high = _disparity_range(_sample(depth, _is_depth), near, far)

    def farness(depth):
        return 1 - _normalized(1 / depth.astype(np.float64), low, high)

    return _painted(depth, _is_depth, farness, _colormap(cmap))


def colorize_error(error: ArrayLike, mask: ArrayLike | None = None, max: float | None = None) -> np.ndarray:
    """Colour an error map, dark for 0 to bright yellow for `max` and above.

    Args:
        error: (..., H, W), at least 0; NaN and infinite values count as missing.
        mask: of the shape of `error`, True where it counts. None: everywhere.
        max: the error of the brightest colour. None: the 98th percentile of the valid pixels.

    Returns:
        uint8 (..., H, W, 3); neutral gray where the error is missing.

    Raises ValueError for other shapes, negative errors, or a `max` that is not positive.
    """
    error = np.asarray(error)
    if error.ndim < 2 or error.size == 0 or error.dtype.kind not in "uif":
        raise ValueError(f"error of shape {error.shape}, {error.dtype} is no map; give numbers (..., H, W)")
    if max is not None and not (max > 0 and np.isfinite(max)):
        raise ValueError(f"max={max!r} must be a positive error")
    if mask is not None:
        error = np.where(_fitting_mask(mask, error.shape), error, np.nan)
    rows = error.reshape(-1, error.shape[-1])
    lowest = np.min(rows, where=np.isfinite(rows), initial=0)
    if lowest < 0:
        raise ValueError(f"the error goes down to {lowest:.4g}; give its absolute value")
    sample = _sample(rows, np.isfinite)
    highest = max
    if max is None:
        highest = np.percentile(sample.astype(np.float64), PERCENTILES[1]) if sample.size else 0

    def share(error):
        return np.clip(error.astype(np.float64) / highest, 0, 1) if highest > 0 else np.sign(error)

    return _painted(rows, np.isfinite, share, _colormap("inferno")).reshape(*error.shape, 3)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    cell: int = 256,
    title: str | None = None,
) -> Image.Image:
    """Lay pictures out in a labelled grid on white.

    Args:
        rows: lists of equally many `PIL.Image`; None leaves a place empty.
        row_labels, column_labels: one string per row or column. Long ones are wrapped.
        cell: side in pixels of the square into which every picture is fitted, its aspect ratio kept. Rows and columns
            close up to their largest picture.
        title: a line above all.

    Returns:
        an RGB `PIL.Image`.

    Raises ValueError for no pictures, rows of different lengths, what is no picture, labels that do not match, or a
    cell below 32 pixels.
    """
    _check_sheet(rows, row_labels, column_labels, cell)
    rows = [[None if picture is None else _fitted(picture, cell) for picture in row] for row in rows]
    smallest = cell // 2  # room for labels
    widths = [max([smallest, *(p.width for p in column if p)]) for column in zip(*rows)]
    font = _font("DejaVuSans", max(12, cell // 18))
    title_font = _font("DejaVuSans-Bold", max(14, cell // 15))
    gap = max(6, cell // 24)
    row_labels = [_wrapped(label, font, cell * 2 // 3) for label in row_labels or []]
    column_labels = [_wrapped(label, font, width) for label, width in zip(column_labels or [], widths)]
    heights = [max([smallest // 2, *(p.height for p in row if p)]) for row in rows]
    if row_labels:
        heights = [max(height, _text_size(label, font)[1]) for height, label in zip(heights, row_labels)]

    left = 2 * gap + max((_text_size(label, font)[0] + gap for label in row_labels), default=0)
    width = left + sum(widths) + gap * (len(widths) + 1)
    title = _wrapped(title or "", title_font, width - 4 * gap)
    top = 2 * gap + (_text_size(title, title_font)[1] + 2 * gap if title else 0)
    top += max((_text_size(label, font)[1] + gap for label in column_labels), default=0)
    height = top + sum(heights) + gap * (len(heights) + 1)

    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((2 * gap, 2 * gap), title, INK, title_font)
    xs = list(accumulate((w + gap for w in widths), initial=left))
    ys = list(accumulate((h + gap for h in heights), initial=top))
    for label, x, column_width in zip(column_labels, xs, widths):
        draw.multiline_text((x + column_width / 2, top - gap), label, INK, font, anchor="md", align="center")
    for label, y, row_height in zip(row_labels, ys, heights):
        draw.multiline_text((left - gap, y + row_height / 2), label, INK, font, anchor="rm", align="right")
    for row, y, row_height in zip(rows, ys, heights):
        for picture, x, column_width in zip(row, xs, widths):
            if picture:
                corner = x + (column_width - picture.width) // 2, y + (row_height - picture.height) // 2
                sheet.paste(picture, corner)
    return sheet


def _is_depth(depth):
    return depth > 0


def _bands(rows):
    """An array (N, W) in bands of some million values: a picture of many megapixels is painted without large copies."""
    number = max(1, BAND // rows.shape[1])
    return (rows[start : start + number] for start in range(0, len(rows), number))


def _sample(rows, is_valid):
    """About a million of the valid values of an array (N, W), evenly spaced; all where there are no more."""
    step = max(1, rows.size // BAND)
    return np.concatenate([band[is_valid(band)][::step] for band in _bands(rows)])


def _painted(rows, is_valid, share, colors):
    """The picture (N, W, 3) of an array (N, W): `share` makes of valid values where in `colors` they lie, 0 to 1."""
    picture = np.full((*rows.shape, 3), MISSING_GRAY, dtype=np.uint8)
    for band, painted in zip(_bands(rows), _bands(picture)):
        valid = is_valid(band)
        painted[valid] = colors(share(band[valid]), bytes=True)[:, :3]
    return picture


def _colorize_batch(depth, mask, cmap, near, far):
    if 0 in depth.shape or (depth.shape[-1] == 1 and depth.shape[0] > 1):
        raise ValueError(f"depth of shape {depth.shape} is no batch of maps; give (H, W) or (B, H, W)")
    masks = [None] * len(depth) if mask is None else _fitting_mask(mask, depth.shape)
    return np.stack([colorize_depth(one, its_mask, cmap, near, far) for one, its_mask in zip(depth, masks)])


def _fitting_mask(mask, shape):
    mask = np.asarray(mask)
    if mask.shape != shape:
        raise ValueError(f"mask of shape {mask.shape} does not fit a map of shape {shape}; resize it first")
    return mask.astype(bool)


def _colormap(name):
    if name not in matplotlib.colormaps:
        raise ValueError(f"matplotlib has no colour map {name!r}; try Spectral, turbo, viridis or magma")
    return matplotlib.colormaps[name]


def _disparity_range(depth, near, far):
    """Lowest and highest inverse depth of the colour scale, for the valid depths (N,)."""
    for name, bound in (("near", near), ("far", far)):
        if bound is not None and not (bound > 0 and np.isfinite(bound)):
            raise ValueError(f"{name}={bound} must be a positive depth")
    if near is not None and far is not None and near > far:
        raise ValueError(f"near={near} must not be more than far={far}")
    lowest, highest = np.percentile(1 / depth.astype(np.float64), PERCENTILES) if depth.size else (1, 1)
    low = lowest if far is None else 1 / far
    high = highest if near is None else 1 / near
    if low > high:  # one bound is given and all depth lies beyond it: the scale shrinks to that bound
        low = high = low if near is None else high
    return low, high


def _normalized(disparity, low, high):
    if high - low <= 1e-6 * high:  # no more than the rounding of float32: one depth, in the middle of the scale
        return np.where(np.isclose(disparity, low, rtol=1e-6, atol=0), 0.5, np.where(disparity > low, 1.0, 0.0))
    return np.clip((disparity - low) / (high - low), 0, 1)


def _check_sheet(rows, row_labels, column_labels, cell):
    if not rows or not all(isinstance(row, list | tuple) and row for row in rows):
        raise ValueError(f"rows={rows!r} are no rows of pictures; give lists of PIL images")
    for number, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(
                f"row {number} has {len(row)} pictures where row 0 has {len(rows[0])}; fill the gaps with None"
            )
        for picture in row:
            if picture is not None and not isinstance(picture, Image.Image):
                raise ValueError(f"row {number} holds a {type(picture).__name__}; give PIL images (Image.fromarray)")
    for name, labels, count in (("row", row_labels, len(rows)), ("column", column_labels, len(rows[0]))):
        if labels is not None and len(labels) != count:
            raise ValueError(f"{len(labels)} {name} labels for {count} {name}s; give one each")
    if not isinstance(cell, int) or cell < 32:
        raise ValueError(f"cell={cell!r} must be a whole number of at least 32 pixels")


def _fitted(picture, cell):
    picture = as_rgb(picture)
    factor = cell / max(picture.size)
    size = [max(1, round(side * factor)) for side in picture.size]
    return picture.resize(size, Image.Resampling.LANCZOS)


@functools.cache
def _font(name, size):
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", size)


def _text_size(text, font):
    box = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font)
    return int(box[2]), int(box[3])


def _wrapped(text, font, width):
    """`text` with line breaks so that no line is wider than `width` pixels; words that are wider are cut."""
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}" if line else word
            while font.getlength(line) > width and len(line) > 1:
                fitting = next(n for n in range(len(line) - 1, 0, -1) if n == 1 or font.getlength(line[:n]) <= width)
                lines.append(line[:fitting])
                line = line[fitting:]
        lines.append(line)
    return "\n".join(lines)
