"""Files that follow the umask, and names that every system takes."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import make_pipeline

from mf_diffusers.files import ESCAPED, atomic_write, legal_name, place_folder, save_whole, temporary_folder
from mf_diffusers.modality_forcing.adapter import save_adapter


def modes(folder):
    """The permissions of all files below a folder."""
    return {oct(stat.S_IMODE(path.stat().st_mode)) for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(params=[0o022, 0o077, 0o002])
def usual(request, tmp_path):
    """What files get under a umask."""
    before = os.umask(request.param)
    yield {oct(0o666 & ~request.param)}
    os.umask(before)


def test_files_of_writers_that_ignore_the_umask_follow_it(usual, tmp_path):
    weights = {"weight": torch.zeros(2)}
    with atomic_write(tmp_path / "one.safetensors") as temporary:
        save_file(weights, temporary)
    save_adapter(make_pipeline().transformer, tmp_path / "adapter.safetensors", "base")
    save_whole(make_pipeline(), tmp_path / "pipeline")
    with temporary_folder(tmp_path) as folder:  # as a checkpoint of a training is written
        (folder / "inner").mkdir()
        save_file(weights, folder / "inner" / "weights.safetensors")
        place_folder(folder, tmp_path / "placed")
    assert modes(tmp_path) == usual
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "name, legal",
    [
        ("a photo", "a photo"),
        ("犬", "犬"),
        ("con", "con_"),
        ("NUL", "NUL_"),
        ("com1.tar", "com1_.tar"),
        ("console", "console"),
        ("a:b?", "a-b-"),
        ('<x>|"y"*', "-x---y--"),
        ("up/down\\left", "up-down-left"),
        ("ends. . ", "ends"),
        ("tab\tnew\nline", "tab-new-line"),
        ("...", "untitled"),
        ("", "untitled"),
    ],
)
def test_names_that_windows_forbids_are_made_legal(name, legal):
    assert legal_name(name) == legal
    assert legal_name(legal) == legal


def test_long_names_are_cut_between_characters():
    assert legal_name("x" * 300) == "x" * 200
    assert legal_name("犬" * 100) == "犬" * 66  # of three bytes each


def test_text_with_a_name_that_is_no_utf8_can_be_written_and_read_back(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / "a.json").write_text(json.dumps({"path": name, "犬": 1}, ensure_ascii=False), **ESCAPED)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"path": name, "犬": 1}
