"""`inpaint` and `complete` on the command line, with a tiny random model."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny import make_pipeline
from typer.testing import CliRunner

from mf_diffusers import cli
from mf_diffusers.pictures import turned_upright


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path):
    """A picture of 40 x 24, a mask, and a sparse depth map in metres."""
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (24, 40, 3), np.uint8)).save(tmp_path / "room.png")
    mask = np.zeros((24, 40), np.uint8)
    mask[8:16, 10:30] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    depth = np.where(generator.random((24, 40)) < 0.1, 2 + generator.random((24, 40)), 0).astype(np.float32)
    np.save(tmp_path / "sparse.npy", depth)
    np.save(tmp_path / "whole.npy", (2 + generator.random((24, 40))).astype(np.float32))
    return tmp_path


def run(folder, model, command, *arguments):
    arguments = [command, *map(str, arguments), "--model", str(model), "--steps", "2", "-o", str(folder / "out")]
    return CliRunner().invoke(cli.app, [*arguments, "--no-points", "-q"])


def test_inpaint_keeps_what_is_not_hidden(files, model):
    given = ("--mask", files / "mask.png", "--depth", files / "whole.npy", "--prompt", "a sofa")
    result = run(files, model, "inpaint", files / "room.png", *given)
    assert result.exit_code == 0, result.output
    before, after = (np.asarray(Image.open(path)) for path in (files / "room.png", files / "out/room/image.png"))
    hidden = np.asarray(Image.open(files / "mask.png")) > 0
    assert np.array_equal(before[~hidden], after[~hidden]) and not np.array_equal(before[hidden], after[hidden])
    assert np.array_equal(np.load(files / "out/room/depth.npy"), np.load(files / "whole.npy"))
    metadata = json.loads((files / "out/room/metadata.json").read_text())
    assert metadata["command"] == "inpaint" and metadata["options"]["mask"].endswith("mask.png")


def test_another_version_by_strength(files, model):
    result = run(files, model, "inpaint", files / "room.png", "--strength", 0.5, "--prompt", "at night")
    assert result.exit_code == 0, result.output
    assert (files / "out/room/depth.npy").is_file()


def test_complete_keeps_points_and_unit(files, model):
    result = run(files, model, "complete", files / "room.png", files / "sparse.npy")
    assert result.exit_code == 0, result.output
    sparse, completed = np.load(files / "sparse.npy"), np.load(files / "out/room/depth.npy")
    assert np.array_equal(completed[sparse > 0], sparse[sparse > 0]) and (completed > 0).all()


def test_errors_are_a_line_in_the_words_of_the_command_line(files, model):
    result = run(files, model, "inpaint", files / "room.png", "--prompt", "x")
    assert result.exit_code == 1 and "--mask" in result.output and "--strength" in result.output
    Image.new("L", (3, 3), 255).save(files / "small.png")
    result = run(files, model, "inpaint", files / "room.png", "--mask", files / "small.png", "--prompt", "x")
    assert result.exit_code == 1 and "a mask of the size of the image" in result.output
    result = run(files, model, "complete", files / "room.png", files / "whole.npy")
    assert result.exit_code == 1 and "nothing is left to make" in result.output


@pytest.mark.parametrize("command", ["inpaint", "complete"])
@pytest.mark.parametrize("value", [3, 6, 7])
def test_depth_lies_as_the_picture_does(files, model, command, value):
    exif = Image.Exif()
    exif[0x0112] = value
    Image.open(files / "room.png").save(files / "room.png", exif=exif)
    depth = files / ("sparse.npy" if command == "complete" else "whole.npy")
    given = [depth] if command == "complete" else ["--depth", depth, "--strength", 0.5, "--prompt", "at night"]
    result = run(files, model, command, files / "room.png", *given)
    assert result.exit_code == 0, result.output
    known = turned_upright(np.load(depth), value)
    assert np.array_equal(np.load(files / "out/room/depth.npy")[known > 0], known[known > 0])
