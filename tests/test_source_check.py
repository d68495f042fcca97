"""Data that stops a run before it starts: damaged shards, and processes that see different ones."""

import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from sharded_runs import launch
from source_files import SCENES, make_folder, make_shards

from finetune.data.source_check import open_sources
from finetune.training.trainer import join_processes


pytest_plugins = ["sharded_runs"]
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_whole_shards(tmp_path):
    join_processes()
    config = make_shards(tmp_path / "shards", shards=2)
    folder, shards, scenes = open_sources(make_folder(tmp_path / "folder"), config, SCENES)
    assert len(folder) == 22 and len(shards.shards) == 2 and scenes[0]["image"].shape == (3, 32, 32)
    shutil.make_archive(str(tmp_path / "packed"), "gztar", tmp_path / "folder")
    open_sources({"kind": "webdataset", "shards": str(tmp_path / "packed.tar.gz")})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda tar: b"", "is empty"),
        (lambda tar: b"\0" * 10240, "holds no files"),
        (lambda tar: b"<html>404</html>" * 1000, "is no tar file"),
        (lambda tar: tar[:9000], "is cut off"),
    ],
    ids=["empty", "zeros", "web page", "cut off"],
)
def test_damaged_shards(tmp_path, content, words):
    join_processes()
    config = make_shards(tmp_path / "shards", shards=3, length=6)
    path = tmp_path / "shards" / "s-001.tar"
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(ValueError, match=f"1 of 3 shards cannot be read: {path} {words}.* Write them anew"):
        open_sources(config)


def test_a_missing_shard(tmp_path):
    join_processes()
    config = make_shards(tmp_path / "shards", shards=2)
    (tmp_path / "shards" / "s-001.tar").unlink()
    with pytest.raises(ValueError, match=r"1 are absent: .*s-001\.tar"):
        open_sources(config)


CASES = {  # what process 1 finds at the same place, and what both say
    "the same": "nothing",
    "a shorter list": "process 1 on HOST: its shards are not those of process 0: it lacks 1: s-002.tar. Copy the same",
    "another size": "process 1 on HOST: its shards are not those of process 0: of another size 1: s-001.tar (",
    "a file less": "process 1 on HOST: shards 's-{000..002}.tar': 1 are absent: ['s-002.tar']",
    "damaged": "process 1 on HOST: 1 of 1 shards cannot be read: s-001.tar is empty",
}


def open_in(folder: Path) -> None:
    """Opens the shards of every case, from the own folder of this process, and writes down what was said."""
    rank = join_processes().process_index
    for case in CASES:
        os.chdir(folder / case / str(rank))
        last = 1 if (case, rank) == ("a shorter list", 1) else 2
        said = "nothing"
        try:
            open_sources({"kind": "webdataset", "shards": f"s-{{000..00{last}}}.tar"})
        except ValueError as error:
            said = str(error)
        (folder / f"{case} {rank}.txt").write_text(said.replace(socket.gethostname(), "HOST"))
    torch.distributed.destroy_process_group()


def test_processes_that_see_different_shards_all_stop(tmp_path):
    make_shards(tmp_path / "whole", shards=3, length=2)
    for case in CASES:
        for rank in "01":
            shutil.copytree(tmp_path / "whole", tmp_path / case / rank)
        shard = tmp_path / case / "1" / "s-001.tar"
        if case == "another size":
            shard.write_bytes(shard.read_bytes() + bytes(512))
        elif case == "a file less":
            shard.with_name("s-002.tar").unlink()
        elif case == "damaged":
            for rank in "01":
                (tmp_path / case / rank / shard.name).write_bytes(b"")
    launch(2, open_in, tmp_path)
    for case, words in CASES.items():
        for rank in "01":
            assert (tmp_path / f"{case} {rank}.txt").read_text().startswith(words), (case, rank)
