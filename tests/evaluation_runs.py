"""Runs of `mf-diffusers evaluate` on frames that are written here: a plugin with a folder of them."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mf_diffusers import cli


SIZE = (24, 32)
STEPS = 2


def truth(number, size=SIZE):
    """Smooth, from 1 to 5 metres, another for every number, with a hole."""
    y, x = np.mgrid[: size[0], : size[1]] / max(size)
    depth = 3 + 2 * np.sin(3 * x + number) * np.cos(2 * y)
    depth[:3, :3] = 0
    return depth.astype(np.float32)


def make_data(path, length=5):
    """A folder of frames with depth."""
    path.mkdir()
    lines = []
    for number in range(length):
        pixels = np.random.default_rng(number).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{number}.png")
        np.save(path / f"{number}.npy", truth(number))
        lines.append({"file_name": f"{number}.png", "depth_file_name": f"{number}.npy"})
    write_lines(path, lines)
    return path


def write_lines(path, lines):
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "data")


def call(*arguments):
    return CliRunner().invoke(cli.app, ["evaluate", "--dataset", "folder", *map(str, arguments)])
