"""A folder of pictures with `metadata.jsonl`: the project's own convention, for training and for evaluation.

`metadata.jsonl` has one JSON object per line, as Hugging Face `datasets` reads with ImageFolder. Keys: `file_name`
(required) and `depth_file_name`, relative to the folder; `text`, the caption, or several of them in a list or by kind
({"alt": "...", "recaption": "..."}); and for the depth `depth_encoding` (linear, the default; inverse: 1/depth is
stored; millimetres; kitti: metres times 256; sun3d: millimetres, their 16 bits rotated left by 3), `depth_scale` (what
stored values of the first two are multiplied by), `depth_invalid` (a stored value, or a list, that means missing),
`depth_infinite` (the same, or "inf", that means infinitely far) and `depth_max` (what else is farther is missing).

Pictures are turned upright by their EXIF orientation. Depth that has the aspect ratio of the picture as it lies in its
file is taken to lie the same way, and is turned along.

A frame of SUN RGB-D, for one, needs no conversion:

    {"file_name": "image/0000101.jpg", "depth_file_name": "depth/0000101.png", "depth_encoding": "sun3d"}
"""

import json
import math
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mf_diffusers.depth_io import as_depth_map, read_depth
from mf_diffusers.input_warning import InputWarning
from mf_diffusers.pictures import is_like, read_oriented, turned_along

from .frame import Frame


METADATA = "metadata.jsonl"
DEPTH_ENCODINGS = {"linear": None, "inverse": None, "millimetres": 1 / 1000, "kitti": 1 / 256, "sun3d": 1 / 1000}
"""Encoding: its scale to metres, or None where `depth_scale` gives the scale."""

DEPTH_KEYS = {"depth_scale", "depth_invalid", "depth_infinite", "depth_encoding", "depth_max"}
METADATA_KEYS = {"file_name", "depth_file_name", "text"} | DEPTH_KEYS


@dataclass(frozen=True)
class DepthFormat:
    """How stored numbers become depth: the `depth_*` keys of metadata."""

    encoding: str = "linear"
    scale: float | None = None
    invalid: tuple[float, ...] = ()
    infinite: tuple[float, ...] = ()
    maximum: float | None = None

    @classmethod
    def from_metadata(cls, entry: Mapping) -> "DepthFormat":
        """Raises ValueError for a value that its key does not take."""
        entry = {key: value for key, value in entry.items() if value is not None}
        encoding = entry.get("depth_encoding", "linear")
        if encoding not in DEPTH_ENCODINGS:
            raise ValueError(f"depth_encoding {encoding!r} is none of {', '.join(DEPTH_ENCODINGS)}")
        if "depth_scale" in entry and DEPTH_ENCODINGS[encoding] is not None:
            raise ValueError(f"depth_scale does not go with depth_encoding {encoding!r}, which has its own")
        stored = (entry.get(key, []) for key in ("depth_invalid", "depth_infinite"))
        invalid, infinite = (value if isinstance(value, list) else [value] for value in stored)
        infinite = [math.inf if value == "inf" else value for value in infinite]
        scale, maximum = entry.get("depth_scale", DEPTH_ENCODINGS[encoding]), entry.get("depth_max")
        given = [value for value in (scale, maximum) if value is not None]
        for value in (*invalid, *infinite, *given):
            if isinstance(value, bool) or not isinstance(value, int | float):
                keys = "depth_scale, depth_invalid, depth_infinite and depth_max"
                raise ValueError(f"{keys} take numbers, not {value!r}")
        if not all(value > 0 for value in given):
            raise ValueError("depth_scale and depth_max must be positive")
        return cls(encoding, scale, tuple(invalid), tuple(infinite), maximum)

    def read(self, path: str | Path) -> np.ndarray:
        """Depth (H, W), float32, 0 where missing and inf where infinite.

        Raises ValueError and FileNotFoundError as `read_depth` does.
        """
        invalid = self.invalid if math.inf in self.infinite else (*self.invalid, math.inf)
        listed = {"invalid": invalid, "infinite": self.infinite}
        if self.encoding != "sun3d":
            return read_depth(path, self.scale, **listed, maximum=self.maximum, inverse=self.encoding == "inverse")
        stored = read_depth(path, 1, **listed, maximum=math.inf)
        infinite = np.isinf(stored)
        bits = np.where(infinite, 0, stored).astype(np.uint16)
        depth = ((bits >> 3) | (bits << 13)) * np.float32(self.scale)
        return np.where(infinite, np.float32(np.inf), as_depth_map(depth, maximum=self.maximum))


class Caption(NamedTuple):
    """A caption and its kind, None where it has none."""

    text: str
    kind: str | None = None


def captions_of(text: Any) -> list[Caption]:
    """The captions in `text` of a sample's metadata, without the empty ones.

    Raises ValueError unless it is a string, a list of strings, or strings by kind; null counts as empty.
    """
    if isinstance(text, Mapping):
        captions = [Caption(caption, kind) for kind, caption in text.items()]
    else:
        captions = [Caption(caption) for caption in (text if isinstance(text, list) else [text])]
    if not all(isinstance(caption.text, str | None) for caption in captions):
        raise ValueError(f"text is a string, a list of strings, or strings by kind, not {text!r}")
    return [caption for caption in captions if caption.text]


@dataclass(frozen=True)
class Row:
    """A line of `metadata.jsonl`: files relative to the folder, `depth` "" where there is none."""

    image: str
    depth: str
    captions: list[Caption]
    depth_format: DepthFormat


def read_rows(folder: Path) -> list[Row]:
    """The lines of a folder's `metadata.jsonl`, which is not to say that the files are there.

    Warns once of keys that it does not know. Raises FileNotFoundError for a missing folder or metadata, ValueError for
    a bad line (with its number).
    """
    metadata = Path(folder) / METADATA
    if not metadata.is_file():
        raise FileNotFoundError(f"{metadata}: no such file; it lists the samples of a folder, one JSON per line")
    rows, unknown = [], set()
    for number, line in enumerate(metadata.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                entry = json.loads(line)
                rows.append(_parsed(entry))
            except ValueError as error:
                raise ValueError(f"{metadata}, line {number}: {error}") from error
            unknown |= entry.keys() - METADATA_KEYS
    if unknown:
        keys = ", ".join(sorted(unknown))
        warnings.warn(f"{metadata}: keys without a meaning here: {keys}", InputWarning, stacklevel=3)
    return rows


def fit_depth(depth: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
    """The depth (h, w) of a picture of `size` (H, W) at this size, by nearest neighbour.

    Raises ValueError, which names it, if the aspect ratios differ: then the depth is not that of the picture.
    """
    if not is_like(depth.shape, size):
        (rows, columns), (height, width) = depth.shape, size
        raise ValueError(f"{name}: depth of {columns}x{rows} does not belong to a picture of {width}x{height}")
    down, across = ((2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(depth.shape, size))
    return depth[down[:, None], across]


def read_pair(folder: Path, row: Row, name: str) -> tuple[Image.Image, np.ndarray | None]:
    """The upright picture of a row and its depth at the same size (H, W), None where it has none.

    Raises ValueError and FileNotFoundError when one of them cannot be read or they do not belong together.
    """
    image, orientation = read_oriented(Path(folder) / row.image)
    if not row.depth:
        return image, None
    depth = turned_along(row.depth_format.read(Path(folder) / row.depth), image, orientation)
    return image, fit_depth(depth, (image.height, image.width), name)


class Folder:
    """The frames of a folder with `metadata.jsonl`. Depth is brought to the size of its picture, see `fit_depth`.

    A frame's name is its `file_name` without the suffix, its caption the first of its line. Raises what `read_rows`
    raises, and ValueError when two lines have the same name.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.rows = read_rows(root)
        self.names = [PurePath(row.image).with_suffix("").as_posix() for row in self.rows]
        twice = [name for name, times in Counter(self.names).items() if times > 1]
        if twice:
            raise ValueError(f"{self.root / METADATA}: {len(twice)} pictures are listed more than once: {twice[:5]}")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index) -> Frame:
        row, name = self.rows[index], self.names[index]
        image, depth = read_pair(self.root, row, name)
        if depth is None:
            depth = np.zeros((image.height, image.width), dtype=np.float32)
        return Frame(name, np.asarray(image), depth, caption=row.captions[0].text if row.captions else "")


def _parsed(entry) -> Row:
    if not isinstance(entry, dict):
        raise ValueError("no JSON object")
    image, depth = (entry.get(key) or "" for key in ("file_name", "depth_file_name"))
    if not image or not all(isinstance(value, str) for value in (image, depth)):
        raise ValueError("needs file_name; it and depth_file_name are strings")
    return Row(image, depth, captions_of(entry.get("text")), DepthFormat.from_metadata(entry))
