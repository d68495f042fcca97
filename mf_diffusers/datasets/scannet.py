"""ScanNet v2: rooms filmed with a depth camera on a tablet.

Source: http://www.scan-net.org, https://github.com/ScanNet/ScanNet (Dai et al., CVPR 2017), to be had under its signed
terms of use.

    ROOT/**/scene0000_00/scene0000_00.sens         the stream as it is distributed, or
    ROOT/**/scene0000_00/depth/0.png               as its SensReader exports it: 16 bits
    ROOT/**/scene0000_00/color/0.jpg
    ROOT/**/scene0000_00/intrinsic/intrinsic_depth.txt       4x4

Depth is z-depth in millimetres (in a .sens: 1 / its own "depth shift" of a metre), 0 is missing. Colour has more
pixels than depth and is registered to it: it is brought to the size of the depth, 640x480, and the camera is that of
the depth.

A .sens file, little-endian: uint32 version 4; uint64 length and text, the name of the sensor; four float32 4x4:
intrinsics and extrinsics of colour, then of depth; int32 compression of colour (1 PNG, 2 JPEG) and of depth (0 none,
1 zlib); uint32 width and height of colour, then of depth; float32 depth shift; uint64 number of frames. Of each frame:
float32 4x4 pose; two uint64 times; two uint64 lengths, of colour and of depth; the bytes of both.
"""

import io
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from mf_diffusers.depth_io import read_depth

from .dataset import Dataset, read_rgb
from .frame import Frame


FRAME_HEADER = struct.Struct("<16f4Q")


class ScanNet(Dataset):
    """Reads ScanNet, unpacked as this module says.

    Frames are called "scene0000_00/scene0000_00/000012" (.sens) or "scene0000_00/12"."""

    layout = "scene0000_00/scene0000_00.sens or scene0000_00/depth/0.png"
    files_per_frame = False

    def _find(self):
        for path in self._files("**/*.sens"):
            stream = path.with_suffix("").as_posix()
            yield from (f"{stream}/{k:06d}" for k in range(SensHeader.read(self.root / path).frames))
        for path in self._files("**/depth/*.png"):
            scan = path.parents[1]
            if not (self.root / scan / f"{scan.name}.sens").is_file():
                yield f"{scan.as_posix()}/{path.stem}"

    def _read(self, name):
        scan, number = (self.root / name).parent, Path(name).name
        if (stream := scan.with_suffix(".sens")).is_file():
            image, depth, intrinsics = read_sens(stream, int(number))
        else:
            image = read_rgb(scan / "color" / f"{number}.jpg")
            depth = read_depth(scan / "depth" / f"{number}.png", scale=1 / 1000)
            intrinsics = np.loadtxt(scan / "intrinsic" / "intrinsic_depth.txt")
        size = depth.shape[::-1]
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
        return Frame(name, image, depth, intrinsics[:3, :3].astype(np.float32))


@dataclass
class SensHeader:
    """What a .sens file says before its frames."""

    intrinsic_depth: np.ndarray
    color_compression: int
    depth_compression: int
    depth_size: tuple[int, int]  # width, height
    depth_shift: float
    frames: int
    length: int  # bytes before the first frame

    @classmethod
    def read(cls, path: Path) -> "SensHeader":
        """Raises ValueError for another version or an unknown compression."""
        with path.open("rb") as file:
            version, name_length = struct.unpack("<IQ", file.read(12))
            if version != 4:
                raise ValueError(f"{path}: version {version} of .sens, where ScanNet v2 has 4")
            file.seek(name_length, 1)
            matrices = np.frombuffer(file.read(256), "<f4").reshape(4, 4, 4)
            color, depth, _, _, *depth_size, shift, frames = struct.unpack("<2i4IfQ", file.read(36))
            if color not in (1, 2) or depth not in (0, 1):
                raise ValueError(f"{path}: compression {color}, {depth}; export it with ScanNet's SensReader")
            return cls(matrices[2], color, depth, tuple(depth_size), shift, frames, file.tell())


@lru_cache(maxsize=4)
def frame_offsets(path: Path) -> list[int]:
    """Where each frame of a .sens file begins."""
    header = SensHeader.read(path)
    offsets = [header.length]
    with path.open("rb") as file:
        for _ in range(header.frames - 1):
            file.seek(offsets[-1])
            *_, color_length, depth_length = FRAME_HEADER.unpack(file.read(FRAME_HEADER.size))
            offsets.append(offsets[-1] + FRAME_HEADER.size + color_length + depth_length)
    return offsets


def read_sens(path: Path, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frame `number` of a .sens file: uint8 (h, w, 3), depth in metres (H, W) and the 4x4 intrinsics of the depth."""
    header = SensHeader.read(path)
    with path.open("rb") as file:
        file.seek(frame_offsets(path)[number])
        *_, color_length, depth_length = FRAME_HEADER.unpack(file.read(FRAME_HEADER.size))
        with Image.open(io.BytesIO(file.read(color_length))) as picture:
            image = np.asarray(picture.convert("RGB"))
        stored = file.read(depth_length)
    stored = zlib.decompress(stored) if header.depth_compression else stored
    width, height = header.depth_size
    depth = np.frombuffer(stored, "<u2").reshape(height, width) / np.float32(header.depth_shift)
    return image, depth.astype(np.float32), header.intrinsic_depth
