"""Shards of a data set: what is in them, interruptions, damaged files, and the way into training."""

import json
import tarfile
import time
from multiprocessing import get_context

import numpy as np
import pytest
from dataset_files import (
    pixel_rays,
    plane,
    write_arkitscenes,
    write_csv,
    write_foundationstereo,
    write_paralleldomain,
    write_scannet_export,
    write_tartanair_2,
)
from PIL import Image
from typer.testing import CliRunner

from finetune.data.batches import BatchLoader, LoaderConfig
from finetune.data.sources import build_source
from mf_diffusers.cli import app
from mf_diffusers.datasets import DATASETS
from mf_diffusers.datasets.prepare import TooManyUnreadableError, prepare_dataset, read_frame


ROUNDING = 2.0**-11


def make_tartanair(root, frames=12, size=32):
    for number in range(frames):
        write_tartanair_2(root / "Ocean" / "Data_easy" / f"P{number // 5:03d}", f"{number:06d}", size)
    return root


def make_paralleldomain(root, frames, size=(20, 32)):
    depth = plane(pixel_rays(32, 20, 30, 31, 15, 10)).astype(np.float32)
    for number in range(frames):
        write_paralleldomain(root / "scene_000001", "yaw-0", number, depth * np.float32(1 + number / 100))
    return root


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_hold_every_frame(tmp_path):
    source = make_tartanair(tmp_path / "source")
    summary = prepare_dataset("tartanair", source, tmp_path / "shards", frames_per_shard=5)
    assert summary["shards"] == {f"tartanair-{k:06d}.tar": n for k, n in enumerate((5, 5, 2))}
    dataset = DATASETS["tartanair"](source)
    names = []
    for shard in summary["shards"]:
        with tarfile.open(tmp_path / "shards" / shard) as tar:
            for key in [name.removesuffix(".jpg") for name in tar.getnames() if name.endswith(".jpg")]:
                image, depth, entry = read_frame(tar, key)
                frame = dataset.read(entry["name"])
                names.append(entry["name"])
                assert np.abs(np.asarray(image).astype(float) - frame.image).mean() < 2
                assert (np.isinf(depth) == np.isinf(frame.depth)).all() and np.isinf(depth).sum() == 1
                error = np.abs(depth.astype(np.float32)[frame.mask] / frame.depth[frame.mask] - 1)
                assert 1e-5 < error.max() <= ROUNDING
                assert entry["intrinsics"] == frame.intrinsics.tolist()
                assert entry["dataset"] == "tartanair" and entry["metric"] is True
    assert sorted(names) == dataset.names and names != dataset.names  # all of them, mixed
    assert summary["frames"] == 12 and summary["pixels"] == 12 * 32 * 32 and summary["infinite_pixels"] == 12
    assert summary["valid_pixels"] == 12 * (32 * 32 - 1) and summary["with_intrinsics"] == 12
    assert json.loads((tmp_path / "shards" / "summary.json").read_text()) == summary
    with Image.open(tmp_path / "shards" / "contact_sheet.jpg") as sheet:
        assert sheet.height > sheet.width > 300


def test_frames_in_one_stream_keep_their_order(tmp_path):
    write_scannet_export(tmp_path / "scans" / "scene0001_00", range(6))
    prepare_dataset("scannet", tmp_path, tmp_path / "shards")
    with tarfile.open(tmp_path / "shards" / "scannet-000000.tar") as tar:
        names = [read_frame(tar, f"{k:08d}")[2]["name"] for k in range(6)]
    assert names == [f"scans/scene0001_00/{k}" for k in range(6)]


def test_max_pixels(tmp_path):
    source = make_tartanair(tmp_path / "source", frames=1)
    summary = prepare_dataset("tartanair", source, tmp_path / "shards", max_pixels=256)
    assert summary["sizes"] == {"16x16": 1}
    with tarfile.open(tmp_path / "shards" / "tartanair-000000.tar") as tar:
        image, depth, entry = read_frame(tar, "00000000")
    assert image.size == (16, 16) and depth.shape == (16, 16)
    assert entry["intrinsics"] == [[8, 0, 7.5], [0, 8, 7.5], [0, 0, 1]]


def test_a_killed_run_goes_on_to_the_same_shards(tmp_path):
    """Killed after some shards, one of them damaged since, then finished by two processes."""
    source = make_paralleldomain(tmp_path / "source", 400)
    shards = tmp_path / "shards"
    arguments = {"name": "paralleldomain", "source": source, "destination": shards, "frames_per_shard": 10}
    process = get_context("fork").Process(target=prepare_dataset, kwargs=arguments)
    process.start()
    while process.is_alive() and len(list(shards.glob("[!.]*.tar"))) < 3:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not (shards / "summary.json").exists()
    finished = sorted(path.name for path in shards.glob("[!.]*.tar"))
    assert 3 <= len(finished) < 40
    damaged = shards / finished[1]
    damaged.write_bytes(damaged.read_bytes()[:-2000])
    (shards / ".leftover.tar").write_bytes(b"half a shard")
    with (shards / "manifest.jsonl").open("a") as manifest:
        manifest.write('{"shard": "paralleldomain-0000')
    kept = (shards / finished[0]).stat().st_mtime_ns

    seen = []
    summary = prepare_dataset(**arguments, workers=2, on_shard=lambda record, total: seen.append(total))
    prepare_dataset(**arguments | {"destination": tmp_path / "whole"})
    assert seen == [400] * 40 and summary["frames"] == 400
    assert (shards / finished[0]).stat().st_mtime_ns == kept
    resumed, whole = contents(shards), contents(tmp_path / "whole")
    assert resumed.keys() == whole.keys() and len(whole) == 43
    for name in whole.keys() - {"manifest.jsonl"}:
        assert resumed[name] == whole[name], name


def test_other_settings_need_another_folder(tmp_path):
    source = make_paralleldomain(tmp_path / "source", 3)
    prepare_dataset("paralleldomain", source, tmp_path / "shards")
    with pytest.raises(
        ValueError, match=r"holds shards made in another way \(max_pixels was None\); take another folder"
    ):
        prepare_dataset("paralleldomain", source, tmp_path / "shards", max_pixels=100)
    make_paralleldomain(source, 4)
    with pytest.raises(ValueError, match="frames was 3"):
        prepare_dataset("paralleldomain", source, tmp_path / "shards")


def test_unreadable_frames_are_listed_and_tried_again(tmp_path):
    source = make_paralleldomain(tmp_path / "source", 120)
    name = "scene_000001/{}/yaw-0/000000000000000007"
    broken = source / name.format("depth") / "..npz"
    broken = broken.parent.with_suffix(".npz")
    good = broken.read_bytes()
    broken.write_bytes(good[:100])
    empty = np.zeros((20, 32), dtype=np.float32)
    np.savez(source / "scene_000001/depth/yaw-0/000000000000000008.npz", data=empty)

    summary = prepare_dataset("paralleldomain", source, tmp_path / "shards", frames_per_shard=50)
    assert summary["frames"] == 118 and summary["frames_unreadable"] == 1 and summary["frames_without_depth"] == 1
    assert "scene_000001/yaw-0/000000000000000007: " in summary["unreadable"][0]
    assert summary["without_depth"] == ["scene_000001/yaw-0/000000000000000008"]

    broken.write_bytes(good)
    summary = prepare_dataset("paralleldomain", source, tmp_path / "shards", frames_per_shard=50)
    assert summary["frames"] == 119 and summary["unreadable"] == []
    assert sum(summary["shards"].values()) == 119


def test_more_than_one_percent_unreadable_is_an_error(tmp_path):
    source = make_paralleldomain(tmp_path / "source", 120)
    for number in (3, 50):
        (source / f"scene_000001/rgb/yaw-0/{number:018d}.png").unlink()
    with pytest.raises(
        TooManyUnreadableError, match=r"2 of 120 frames are unreadable so far, more than 1%.*No such file"
    ):
        prepare_dataset("paralleldomain", source, tmp_path / "shards", frames_per_shard=30)
    assert not (tmp_path / "shards" / "summary.json").exists()


def test_depth_beyond_16_bit_floats_is_not_stored_wrongly(tmp_path):
    source = make_paralleldomain(tmp_path / "source", 120)
    depth = np.full((20, 32), 1e-7, dtype=np.float32)
    np.savez(source / "scene_000001/depth/yaw-0/000000000000000008.npz", data=depth)
    summary = prepare_dataset("paralleldomain", source, tmp_path / "shards")
    assert "1e-07 to 1e-07 does not fit 16-bit floats" in summary["unreadable"][0]


def test_nothing_but_missing_depth_is_an_error(tmp_path):
    write_foundationstereo(tmp_path / "source" / "scene", "0000", np.zeros((8, 8), dtype=int))
    with pytest.raises(ValueError, match="none of 1 frames has a valid pixel of depth"):
        prepare_dataset("foundationstereo", tmp_path / "source", tmp_path / "shards")


def arkitscenes_source(root):
    write_csv(root / "metadata.csv", [{"video_id": "42", "fold": "Training", "sky_direction": "Left"}])
    for number in range(6):
        write_arkitscenes(root / "Training" / "42", 7 + number)
    return root


@pytest.mark.parametrize("name", ["tartanair", "arkitscenes"])
def test_training_reads_the_shards(tmp_path, name):
    pytest.importorskip("webdataset")
    root = tmp_path / "source"
    root.mkdir()
    source = make_tartanair(root, frames=6) if name == "tartanair" else arkitscenes_source(root)
    prepare_dataset(name, source, tmp_path / "shards", frames_per_shard=3)
    config = {"kind": "webdataset", "shards": f"{tmp_path}/shards/{name}-{{000000..000001}}.tar", "shuffle_buffer": 0}
    config |= {"height": 32, "width": 32}
    read, dataset = build_source(config), DATASETS[name](source)
    for index in range(6):
        sample = read[index]
        with tarfile.open(tmp_path / "shards" / f"{name}-{index // 3:06d}.tar") as tar:
            frame = dataset.read(read_frame(tar, f"{index:08d}")[2]["name"])
        depth = sample["depth"][0].numpy()
        assert np.array_equal(depth > 0, frame.depth > 0) and np.array_equal(np.isinf(depth), np.isinf(frame.depth))
        assert np.abs(depth[frame.mask] / frame.depth[frame.mask] - 1).max() <= ROUNDING
        assert np.abs(255 * sample["image"].numpy().transpose(1, 2, 0) - frame.image).mean() < 2
    loader = BatchLoader(read, LoaderConfig(batch_size=2, pixels=32 * 32, multiple=16, workers=0, window=2))
    batch = next(iter(loader))
    assert batch["image"].shape[-2:] == (32, 32) and (batch["depth"] > 0).any()


def test_command(tmp_path):
    source = make_paralleldomain(tmp_path / "source", 5)
    result = CliRunner().invoke(app, ["prepare", "paralleldomain", str(source), str(tmp_path / "shards")])
    assert result.exit_code == 0, result.output
    assert "5 frames in 1 shards" in result.output and "contact_sheet.jpg" in result.output
    result = CliRunner().invoke(app, ["prepare", "imagenet", str(source), str(tmp_path / "shards")])
    assert result.exit_code == 1 and "error: data set 'imagenet' is none of argoverse2, aria" in result.output
    result = CliRunner().invoke(app, ["prepare", "waymo", str(source), str(tmp_path / "waymo"), "--split", "dev"])
    assert result.exit_code == 1 and "no split 'dev', but training, validation, testing" in result.output
