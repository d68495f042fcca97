"""Sources of training samples: folders and shards of small files that are written here."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.data.sources import FolderConfig, ScenesConfig, WebDatasetConfig
from mf_diffusers.depth_io import write_depth


SCENES = ScenesConfig(height=32, width=32, supersample=1)
SIZES = [(32, 32), (24, 40), (40, 24), (30, 42)]  # (height, width) of the pictures of a folder, in turn


def picture(number: int, size=(32, 32)) -> Image.Image:
    """Another one for every number."""
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def make_folder(path: Path, length: int = 22) -> FolderConfig:
    path.mkdir()
    lines = []
    for k in range(length):
        size = SIZES[k % len(SIZES)]
        picture(k, size).save(path / f"{k}.png")
        entry = {"file_name": f"{k}.png", "text": f"picture {k}"}
        if k % 2:
            write_depth(path / f"{k}.npy", np.full(size, k))
            entry["depth_file_name"] = f"{k}.npy"
        lines.append(json.dumps(entry))
    (path / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return FolderConfig(path=str(path))


def make_shards(path: Path, shards: int = 6, length: int = 7) -> WebDatasetConfig:
    webdataset = pytest.importorskip("webdataset")
    path.mkdir()
    for shard in range(shards):
        with webdataset.TarWriter(str(path / f"s-{shard:03d}.tar")) as writer:
            for k in range(length):
                number = shard * length + k
                depth = io.BytesIO()
                np.save(depth, np.full((32, 32), 100 + number, dtype=np.float32))
                sample = {"__key__": f"{number:05d}", "png": encoded(picture(number)), "txt": f"picture {number}"}
                writer.write(sample | {"depth.npy": depth.getvalue(), "json": {"depth_scale": 0.5, "anything": [1]}})
    return WebDatasetConfig(shards=f"{path}/s-{{000..{shards - 1:03d}}}.tar", height=32, width=32, shuffle_buffer=5)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
