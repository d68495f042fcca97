"""OpenEXR: channels with names like "Z" or "ViewLayer.Depth.Z", in one part or several."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import OpenEXR

from mf_diffusers.depth_files.stored import Stored, check_memory, one_of_equal


DEPTH_NAMES = {"z", "depth"}
ALPHA = "a"


class Channel(NamedTuple):
    """A channel: its part, its name there, and its name in the file, which has the part's where there are several."""

    part: int
    name: str
    key: str

    @property
    def layer(self) -> str:
        return self.key.rpartition(".")[0]

    @property
    def short_name(self) -> str:
        return self.name.rpartition(".")[2].lower()


class Window(NamedTuple):
    """A rectangle of pixels: its first row and column, and its (height, width)."""

    top: int
    left: int
    size: tuple[int, int]


def read(path: Path, key: str | None = None) -> Stored:
    """A channel, laid on the display window: what the data window does not cover is missing.

    Args:
        key: name of the channel, with its layer and, where there are several parts, its part before it. None: the one
            that is named as depth is ("Z", "depth.V", "ViewLayer.Depth.Z"); where none is, the only one, or the first
            of equal R, G and B.
    """
    with OpenEXR.File(str(path), separate_channels=True, header_only=True) as file:
        channels = _channels([part.header for part in file.parts])
        chosen = _chosen(channels, key)
        header = file.parts[chosen[0].part].header
        data, display = (_window(header[name]) for name in ("dataWindow", "displayWindow"))
    for window in (data, display):
        check_memory(window.size, 4 * len(channels))
    with OpenEXR.File(str(path), separate_channels=True) as file:
        if not file.parts:
            raise ValueError("damaged: no pixels can be read; save the file again")
        pixels = [file.parts[channel.part].channels[channel.name].pixels for channel in chosen]
    return Stored(_on_display(one_of_equal(np.stack(pixels, axis=-1)), data, display))


def write(path: Path, depth: np.ndarray) -> None:
    """Write a depth map as the channel Z."""
    OpenEXR.File({"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}, {"Z": depth}).write(str(path))


def _channels(headers):
    channels = []
    for part, header in enumerate(headers):
        for name in (channel.name for channel in header["channels"]):
            prefix = f"{header['name']}." if len(headers) > 1 and not name.startswith(f"{header['name']}.") else ""
            channels.append(Channel(part, name, prefix + name))
    return channels


def _chosen(channels, key):
    """The channel of this key, or the only one that can be meant; several where one of equal ones is."""
    if key is not None:
        found = [channel for channel in channels if key in (channel.key, channel.name)]
        if len(found) != 1:
            raise ValueError(f"{'no' if not found else 'more than one'} channel {key!r} among {_listed(channels)}")
        return found
    colours = [channel for channel in channels if channel.short_name != ALPHA]
    layers = {}
    for channel in colours:
        layers.setdefault((channel.part, channel.layer), []).append(channel)
    depths = [candidate for layer in layers.values() for candidate in _depths(layer)]
    if len(depths) == 1:
        return depths[0]
    if not depths and len(layers) == 1 and (len(colours) == 1 or {c.short_name for c in colours} == set("rgb")):
        return colours
    what = "several channels could be meant" if depths else "no channel is named as depth is"
    raise ValueError(f"{what} among {_listed(channels)}")


def _depths(layer):
    """What is depth by its name, among the channels of a layer: single channels, or all of a layer of that name."""
    coordinates = any(channel.short_name == "x" for channel in layer)  # a Z beside an X is that of a normal, say
    named = [[channel] for channel in layer if channel.short_name in DEPTH_NAMES and not coordinates]
    return named or ([layer] if layer[0].layer.rpartition(".")[2].lower() in DEPTH_NAMES else [])


def _listed(channels):
    return f"{sorted(channel.key for channel in channels)}; name one of them with key=..."


def _window(corners):
    (left, top), (right, bottom) = ([int(number) for number in corner] for corner in corners)
    return Window(top, left, (bottom - top + 1, right - left + 1))  # both corners are within it


def _on_display(pixels, data, display):
    """Pixels of the data window on the display window, NaN where they do not cover it."""
    if pixels.shape != data.size:
        raise ValueError(f"the channel has {pixels.shape} of the {data.size} pixels of its window: it is subsampled")
    if data == display:
        return pixels
    canvas = np.full(display.size, math.nan, pixels.dtype if pixels.dtype.kind == "f" else np.float64)
    top, left = data.top - display.top, data.left - display.left
    inside = pixels[max(0, -top) : max(0, display.size[0] - top), max(0, -left) : max(0, display.size[1] - left)]
    canvas[max(0, top) :, max(0, left) :][: inside.shape[0], : inside.shape[1]] = inside
    return canvas
