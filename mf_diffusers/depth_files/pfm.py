"""PFM: a header of text, then float32, the lowest row first."""

import math
import re
from pathlib import Path

import numpy as np

from mf_diffusers.depth_files.stored import Stored, one_of_equal


# White space and comments stand between the parts of the header; one white space ends it, or what is left of its line,
# and some programs put comments after it.
_GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"
HEADER = re.compile(rb"P([Ff])" + _GAP + rb"(\d{1,9})" + _GAP + rb"(\d{1,9})" + _GAP + rb"([^\s#]{1,40})(?=\s)")
END = re.compile(rb"(?:\s|[ \t]*\r?\n)(?:#[^\r\n]*\r?\n)*")


def read(path: Path, key: str | None = None) -> Stored:
    """The map, the top row first. The sign of the header's scale is the byte order; its size, by which some programs
    multiply and others do not, is no part of the values."""
    data = path.read_bytes()
    header = HEADER.match(data)
    if header is None:
        raise ValueError('no PFM header ("Pf", width, height, scale)')
    channels = 3 if header[1] == b"F" else 1
    width, height, scale = int(header[2]), int(header[3]), _number(header[4])
    start = len(data) - 4 * channels * width * height
    if not END.fullmatch(data[header.end() : max(start, 0)]):
        there = len(data) - header.end() - 1
        raise ValueError(f"{there} bytes of values where {width}x{height} pixels of {channels} floats need 4 each")
    values = np.frombuffer(data, "<f4" if scale < 0 else ">f4", offset=start)
    return Stored(np.flipud(one_of_equal(values.reshape(height, width, channels))))


def _number(text):
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if number == 0 or not math.isfinite(number):
        raise ValueError(f"no PFM header: its scale is {text.decode('latin-1')!r}, no number other than 0")
    return number
