"""Sources, batches and the failure policy of the training data, on small files and scenes made here."""

import io
import json
import warnings
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from source_files import SCENES, encoded, make_folder, make_shards, picture

from finetune.data.batches import BatchLoader, BucketBatchSampler, LoaderConfig, fit, thin_as_asked
from finetune.data.sources import (
    CaptionDraw,
    DepthFormat,
    FolderConfig,
    MixtureConfig,
    ReadReport,
    ScenesConfig,
    TooManyUnreadableError,
    WebDatasetConfig,
    build_source,
    captions_of,
)
from mf_diffusers.depth_io import read_depth, write_depth
from mf_diffusers.input_warning import InputWarning


RGBD = Path(__file__).parents[2] / "shared" / "data" / "rgbd"
LOADER = LoaderConfig(batch_size=4, pixels=32 * 32, multiple=8, workers=0, window=4)


def captioned_folder(path: Path, *texts, **config) -> FolderConfig:
    """A folder of pictures with these captions."""
    path.mkdir()
    lines = [json.dumps({"file_name": f"{k}.png", "text": text}) for k, text in enumerate(texts)]
    for k in range(len(texts)):
        picture(k).save(path / f"{k}.png")
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return FolderConfig(path=str(path), shuffle=False, **config)


def captioned_shard(path: Path, *texts, **config) -> WebDatasetConfig:
    """A shard of pictures with these captions in their JSON."""
    webdataset = pytest.importorskip("webdataset")
    path.mkdir()
    with webdataset.TarWriter(str(path / "s.tar")) as writer:
        for k, text in enumerate(texts):
            writer.write({"__key__": str(k), "png": encoded(picture(k)), "json": {"text": text}})
    return WebDatasetConfig(shards=f"{path}/s.tar", shuffle_buffer=0, **config)


def batches(source, config=LOADER, steps=12, **kwargs) -> list[dict]:
    return list(islice(BatchLoader(build_source(source), config, **kwargs), steps))


def keys(found: list[dict]) -> list[list[str]]:
    return [batch["key"] for batch in found]


@pytest.fixture
def mixture(tmp_path) -> MixtureConfig:
    return MixtureConfig(sources=[SCENES, make_folder(tmp_path / "folder")], weights=[1, 3])


def test_scenes():
    source = build_source(ScenesConfig(split="test", height=24, width=32, supersample=1))
    samples = source.read(range(6), ReadReport())
    for index, sample in enumerate(samples):
        assert sample["key"] == f"scenes:test:{index}"
        assert sample["image"].shape == (3, 24, 32)
        assert sample["depth"].shape == (1, 24, 32)
        assert sample["caption"]
        assert (sample["depth"] > 0).all()
    assert any(sample["depth"].isinf().any() for sample in samples)  # sky
    assert torch.allclose(source[3]["image"], samples[3]["image"], atol=1e-4)
    assert not torch.equal(build_source(ScenesConfig(height=24, width=32))[3]["image"], samples[3]["image"])
    with pytest.raises(ValueError, match="split"):
        build_source(ScenesConfig(split="val"))


def test_folder(tmp_path):
    config = make_folder(tmp_path / "photos", 5)
    source = build_source(FolderConfig(path=config.path, shuffle=False))
    samples = [source[index] for index in range(7)]
    assert [sample["key"] for sample in samples] == [f"photos:{k:05d}" for k in (0, 1, 2, 3, 4, 0, 1)]
    assert [sample["caption"] for sample in samples[:2]] == ["picture 0", "picture 1"]
    assert not samples[0]["depth"].any()
    assert (samples[3]["depth"] == 3).all()
    for index, sample in enumerate(samples[:5]):
        assert tuple(sample["image"].shape[1:]) == tuple(sample["depth"].shape[1:]) == source.size(index)
    assert torch.equal(samples[0]["image"], torch.from_numpy(np.array(picture(0))).movedim(-1, 0) / 255)


def test_folder_shuffles_every_epoch_anew(tmp_path):
    config = make_folder(tmp_path / "folder", 12)
    source, same = build_source(config), build_source(config)
    epochs = [[source[epoch * 12 + k]["key"] for k in range(12)] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 12 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert same[17]["key"] == epochs[1][5]


SEVERAL = {"alt": "a", "recaption": "b", "tags": "c"}


@pytest.mark.parametrize("captioned", [captioned_folder, captioned_shard])
def test_one_of_several_captions(tmp_path, captioned):
    """Those that are there keep the proportions of their weights."""
    texts = [SEVERAL, {"alt": "a", "recaption": None, "tags": "c"}, {"tags": "c"}, "plain", ["x", "y"], None]
    weights = {"alt": 1, "recaption": 3, "tags": 0}
    config = captioned(tmp_path / "data", *texts, caption_weights=weights, seed=1)
    source, found = build_source(config), {k: [] for k in range(len(texts))}
    for index in range(150 * len(texts)):
        found[index % len(texts)].append(source[index]["caption"])
    assert set(found[0]) == {"a", "b"} and set(found[1]) == {"a"} and set(found[2]) == set(found[5]) == {""}
    assert set(found[3]) == {"plain"} and abs(found[4].count("x") / 150 - 0.5) < 0.1
    assert abs(found[0].count("b") / 150 - 0.75) < 0.1
    again = build_source(config)
    assert [again[index]["caption"] for index in range(0, 60, 6)] == found[0][:10]
    config.seed = 2
    assert [build_source(config)[index]["caption"] for index in range(0, 120, 6)] != found[0][:20]


@pytest.mark.parametrize(
    ("weights", "shares"), [({}, [1 / 3] * 3), ({"alt": 0.2, "recaption": 0.5, "tags": 0.3}, [0.2, 0.5, 0.3])]
)
def test_shares_of_captions(weights, shares):
    draw = CaptionDraw(weights, seed=3)
    counts = Counter(draw(captions_of(SEVERAL), index) for index in range(20_000))
    np.testing.assert_allclose([counts[caption] / 20_000 for caption in "abc"], shares, atol=0.01)


def test_kinds_of_captions_without_a_weight(tmp_path):
    folder = captioned_folder(tmp_path / "folder", SEVERAL, caption_weights={"alt": 1, "recap": 1})
    with pytest.raises(ValueError, match=r"\['alt', 'recaption', 'tags'\], of caption_weights \['alt', 'recap'\]"):
        build_source(folder)
    shard = build_source(captioned_shard(tmp_path / "shard", SEVERAL, 3, caption_weights={"alt": 1, "recap": 1}))
    with pytest.raises(ValueError, match=r"s/0: captions of the kinds \['recaption', 'tags'\] have no weight"):
        shard[0]
    with pytest.raises(ValueError, match="s/1: text is a string, a list of strings, or strings by kind, not 3"):
        shard[1]
    for weights in ({"alt": -1}, {"alt": 0}, {"alt": float("nan")}, {"alt": "often"}):
        with pytest.raises(ValueError, match=r"caption_weights|often"):
            CaptionDraw(weights, seed=0)


STORED = np.array([[0, 1000], [2000, 65535]], dtype=np.uint16)


@pytest.mark.parametrize(
    "metadata, stored, expected",
    [
        ({}, STORED, [[0, 1000], [2000, 65535]]),
        ({"depth_encoding": None, "depth_scale": None}, STORED, [[0, 1000], [2000, 65535]]),
        ({"depth_scale": 0.01}, STORED, [[0, 10], [20, 655.35]]),
        ({"depth_scale": 0.01, "depth_invalid": 65535}, STORED, [[0, 10], [20, 0]]),
        ({"depth_invalid": [1000, 65535]}, STORED, [[0, 0], [2000, 0]]),
        ({"depth_encoding": "millimetres", "depth_max": 10}, STORED, [[0, 1], [2, 0]]),
        ({"depth_encoding": "kitti"}, STORED, [[0, 1000 / 256], [2000 / 256, 65535 / 256]]),
        ({"depth_encoding": "inverse", "depth_scale": 0.001}, STORED, [[0, 1], [0.5, 1 / 65.535]]),
        ({"depth_encoding": "sun3d"}, (STORED << 3) | (STORED >> 13), [[0, 1], [2, 65.535]]),
        ({"depth_scale": 0.01, "depth_infinite": 65535}, STORED, [[0, 10], [20, np.inf]]),
        (
            {"depth_encoding": "kitti", "depth_max": 5, "depth_infinite": [2000, 65535]},
            STORED,
            [[0, 1000 / 256], [np.inf, np.inf]],
        ),
        (
            {"depth_encoding": "inverse", "depth_scale": 0.001, "depth_infinite": 0},
            STORED,
            [[np.inf, 1], [0.5, 1 / 65.535]],
        ),
        ({"depth_encoding": "sun3d", "depth_infinite": 65535}, (STORED << 3) | (STORED >> 13), [[0, 1], [2, np.inf]]),
    ],
)
def test_depth_encodings(tmp_path, metadata, stored, expected):
    Image.fromarray(stored.astype(np.uint16)).save(tmp_path / "depth.png")
    depth = DepthFormat.from_metadata(metadata).read(tmp_path / "depth.png")
    assert depth.dtype == np.float32
    np.testing.assert_allclose(depth, expected, rtol=1e-6)


def test_infinity_is_missing_unless_metadata_says_more(tmp_path):
    np.save(tmp_path / "depth.npy", np.array([[np.inf, 1e-45, 2, np.nan]], dtype=np.float32))
    linear, inverse = (DepthFormat(encoding, maximum=np.inf) for encoding in ("linear", "inverse"))
    np.testing.assert_array_equal(linear.read(tmp_path / "depth.npy"), [[0, np.float32(1e-45), 2, 0]])
    np.testing.assert_array_equal(inverse.read(tmp_path / "depth.npy"), [[0, 0, 0.5, 0]])


@pytest.mark.parametrize("encoding, near, far", [("linear", 2, 1e3), ("inverse", 0.5, 1e-3)])
def test_infinity_that_is_known(tmp_path, encoding, near, far):
    np.save(tmp_path / "depth.npy", np.array([[np.inf, 1e3, 2, np.nan, 0, -np.inf]], dtype=np.float32))
    for infinite, second in (("inf", far), (["inf", 1e3], np.inf)):
        entry = {"depth_encoding": encoding, "depth_infinite": infinite}
        depth = DepthFormat.from_metadata(entry).read(tmp_path / "depth.npy")
        np.testing.assert_allclose(depth, [[np.inf, second, near, 0, 0, 0]], rtol=1e-6)


def test_sky_in_shards(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    depth = np.full((32, 32), 2, dtype=np.float32)
    depth[:8] = np.inf
    buffer = io.BytesIO()
    np.save(buffer, depth)
    sample = {"png": encoded(picture(0)), "depth.npy": buffer.getvalue()}
    with webdataset.TarWriter(str(tmp_path / "s.tar")) as writer:
        writer.write({"__key__": "0", **sample, "json": {"depth_infinite": "inf"}})
        writer.write({"__key__": "1", **sample})
    source = build_source(WebDatasetConfig(shards=f"{tmp_path}/s.tar", shuffle_buffer=0))
    assert np.array_equal(source[0]["depth"][0], depth)
    assert np.array_equal(source[1]["depth"][0], np.where(np.isinf(depth), 0, depth))


@pytest.mark.skipif(not RGBD.is_dir(), reason="no real frames here")
def test_real_sun_frame():
    depth = DepthFormat.from_metadata({"depth_encoding": "sun3d"}).read(RGBD / "sun_depth.png")
    assert 0.5 < depth[depth > 0].min() < depth.max() < 10
    assert 0.05 < (depth == 0).mean() < 0.3


def test_fit_keeps_proportions_and_depths():
    depth = torch.zeros(1, 30, 60)
    depth[:, 10:20, 20:40] = 5.0
    sample = {"image": depth.expand(3, -1, -1) / 5, "depth": depth, "caption": "", "key": ""}
    small = fit(sample, (16, 16))
    assert small["image"].shape == (3, 16, 16)
    assert set(small["depth"].unique().tolist()) == {0.0, 5.0}
    agreement = (small["image"][0] > 0.5) == (small["depth"][0] > 0)
    assert agreement.float().mean() > 0.97
    same = fit(sample, (30, 60))
    assert torch.equal(same["image"], sample["image"])
    assert torch.equal(same["depth"], sample["depth"])


def test_shards_round_trip(tmp_path):
    config = make_shards(tmp_path / "shards")
    source = build_source(config)
    epoch = [source[index] for index in range(42)]
    captions = [sample["caption"] for sample in epoch]
    assert sorted(captions) == sorted(f"picture {k}" for k in range(42))
    assert captions != sorted(captions)
    for sample in epoch:
        number = int(sample["caption"].split()[1])
        assert sample["key"] == f"s-{number // 7:03d}/{number:05d}"
        assert (sample["depth"] == (100 + number) / 2).all()
        assert torch.equal(sample["image"], torch.from_numpy(np.array(picture(number))).movedim(-1, 0) / 255)
    second = [source[42 + index]["caption"] for index in range(42)]
    assert sorted(second) == sorted(captions)
    assert second != captions
    again = build_source(config)  # goes straight to a place, and back
    assert [again[index]["caption"] for index in (60, 59, 3, 3)] == [*second[18:16:-1], captions[3], captions[3]]
    config.shuffle_buffer = 0
    ordered = build_source(config)
    assert [ordered[index]["caption"] for index in range(45)] == [f"picture {k % 42}" for k in range(45)]


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_and_workers_share_the_shards(tmp_path, workers):
    config = make_shards(tmp_path / "shards", shards=4, length=8)
    loader = LoaderConfig(batch_size=4, pixels=32 * 32, multiple=8, workers=workers, window=4)
    found = [batches(config, loader, 8, rank=rank, world_size=2) for rank in range(2)]
    epoch = [key for rank in found for batch in keys(rank) for key in batch]
    assert len(set(epoch)) == 32  # each once
    assert keys(batches(config, loader, 8, rank=1, world_size=2)) == keys(found[1])
    assert keys(batches(config, loader, 3, rank=1, world_size=2, start_step=5)) == keys(found[1])[5:]


def test_shards_of_several_aspect_ratios(tmp_path):
    square, wide = (make_shards(tmp_path / name, shards=2) for name in ("square", "wide"))
    wide.height, wide.width = 24, 40
    mixture = MixtureConfig(sources=[square, wide], weights=[1, 1])
    loader = LoaderConfig(**{**vars(LOADER), "window": 16})
    shapes = Counter(tuple(batch["image"].shape[-2:]) for batch in batches(mixture, loader, 16))
    assert shapes.keys() == {(32, 32), (24, 40)} and min(shapes.values()) >= 6


def test_too_few_shards(tmp_path):
    config = make_shards(tmp_path / "shards", shards=2)
    with pytest.raises(ValueError, match="2 shards are too few for 4 workers"):
        BatchLoader(build_source(config), LoaderConfig(workers=2), world_size=2)


def test_mixture_shares_and_order(tmp_path):
    folder = make_folder(tmp_path / "folder")
    nested = MixtureConfig(sources=[SCENES, folder], weights=[1, 1], seed=5)
    source = build_source(MixtureConfig(sources=[folder, nested, SCENES], weights=[5, 3, 2]))
    located = [source.locate(index) for index in range(4000)]
    leaves = source.leaves()
    counts = Counter(leaves.index(leaf) for leaf, _ in located[:3000])
    assert (counts[0], counts[1] + counts[2], counts[3]) == (1500, 900, 600)
    assert abs(counts[1] - 450) < 10
    early = Counter(leaves.index(leaf) for leaf, _ in located[:200])
    assert abs(early[0] - 100) < 30
    for leaf in leaves:  # each source's own indices follow one another
        indices = [index for found, index in located if found is leaf]
        assert sorted(indices) == list(range(len(indices)))
    other = build_source(MixtureConfig(sources=[folder, nested, SCENES], weights=[5, 3, 2], seed=1))
    assert [leaves.index(leaf) for leaf, _ in located[:50]] != [
        other.leaves().index(other.locate(index)[0]) for index in range(50)
    ]


def test_mixture_rejects_bad_weights():
    for weights, words in (([1], "weights"), ([1, -1], "positive"), ([1, 0], "positive"), ([1, 1e-5], "below")):
        with pytest.raises(ValueError, match=words):
            build_source(MixtureConfig(sources=[SCENES, SCENES], weights=weights))


def test_batches_do_not_depend_on_workers_and_processes(mixture):
    alone = batches(mixture)
    workers = batches(mixture, LoaderConfig(**{**vars(LOADER), "workers": 2}))
    assert keys(workers) == keys(alone)
    assert all(torch.allclose(a["image"], b["image"], atol=1e-4) for a, b in zip(alone, workers))
    ranks = [keys(batches(mixture, rank=rank, world_size=2)) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*ranks)] == [sorted(batch) for batch in keys(alone)]
    assert all(len(batch) == 2 for rank in ranks for batch in rank)


def test_resume_needs_only_the_step(mixture):
    whole = batches(mixture)
    for start in (1, 4, 7):
        resumed = batches(mixture, steps=4, start_step=start)
        assert keys(resumed) == keys(whole)[start : start + 4]
        for a, b in zip(resumed, whole[start:]):
            assert torch.allclose(a["image"], b["image"], atol=1e-4)
            assert torch.allclose(a["depth"], b["depth"], atol=1e-3)


def test_buckets_hold_every_sample_once(tmp_path):
    source = build_source(make_folder(tmp_path / "folder", 32))
    sampler = BucketBatchSampler(source, LoaderConfig(batch_size=4, pixels=32 * 32, multiple=8, window=8))
    for window in range(3):
        plan = sampler.plan(window)
        assert len(plan) == 8
        assert all(len(batch) == 4 for _, batch in plan)
        assert sorted(index for _, batch in plan for index in batch) == list(range(32 * window, 32 * window + 32))
    own = [size == tuple(source.size(index)) for size, batch in plan for index in batch if source.size(index)[0] != 30]
    assert np.mean(own) > 0.9
    assert len({size for size, _ in plan}) >= 3
    for batch in batches(make_folder(tmp_path / "other", 22), steps=20):
        assert batch["image"].shape[-2:] == batch["depth"].shape[-2:]
        assert all(side % 8 == 0 for side in batch["image"].shape[-2:])


def test_batch_must_be_shared_equally():
    with pytest.raises(ValueError, match="batch_size 4 cannot be shared equally by 3"):
        BatchLoader(build_source(SCENES), LOADER, world_size=3)


def test_flip_spares_captions_with_sides(tmp_path):
    folder = make_folder(tmp_path / "folder", 16)
    metadata = tmp_path / "folder" / "metadata.jsonl"
    lines = [json.loads(line) for line in metadata.read_text().splitlines()]
    for line in lines[::4]:
        line["text"] = "a cat Left of a dog"
    metadata.write_text("\n".join(map(json.dumps, lines)))
    flipping = LoaderConfig(**{**vars(LOADER), "flip": True})
    mirrored = []
    for plain, batch in zip(batches(folder, steps=8), batches(folder, flipping, steps=8)):
        for k, caption in enumerate(batch["caption"]):
            flipped = torch.equal(batch["image"][k], plain["image"][k].flip(-1))
            assert flipped or torch.equal(batch["image"][k], plain["image"][k])
            assert torch.equal(batch["depth"][k], plain["depth"][k].flip(-1) if flipped else plain["depth"][k])
            assert not (flipped and "Left" in caption)
            mirrored.append(flipped)
    assert 4 < sum(mirrored) < 20


def test_thinned_depth_does_not_depend_on_the_batch(tmp_path):
    folder = make_folder(tmp_path / "folder", 16)
    thinned = LoaderConfig(**{**vars(LOADER), "depth_density": 0.25})
    dense, alone = batches(folder, steps=8), batches(folder, thinned, steps=8)
    ranks = [batches(folder, thinned, steps=8, rank=rank, world_size=2) for rank in range(2)]
    for step in range(8):
        for k in range(4):
            depth = alone[step]["depth"][k]
            assert torch.equal(depth, ranks[k % 2][step]["depth"][k // 2])
            assert (depth > 0).sum() == round(0.25 * int((dense[step]["depth"][k] > 0).sum()))


def test_sources_of_a_mixture_thin_their_own_depth(tmp_path):
    sparse = {"depth_density": [0.1, 0.5], "depth_pattern": "lidar"}
    sources = [replace(SCENES, depth_density=1.0), replace(make_folder(tmp_path / "folder"), **sparse), SCENES]
    mixture = MixtureConfig(sources=sources, weights=[1, 1, 1])
    others = LoaderConfig(**{**vars(LOADER), "depth_density": 0.25, "depth_pattern": "random"})
    source, shares = build_source(mixture), {0: [], 1: [], 2: []}
    for index in range(48):
        leaf, place = source.locate(index)
        sample = leaf[place]
        depth = thin_as_asked(sample, source, index, others)["depth"]
        assert torch.equal(depth[depth > 0], sample["depth"][depth > 0])
        if sample["depth"].any():
            shares[source.sources.index(leaf)].append(((depth > 0).sum() / (sample["depth"] > 0).sum()).item())
    assert shares[0] == [1.0] * len(shares[0]) and shares[2] == pytest.approx([0.25] * len(shares[2]), abs=1e-3)
    assert all(0.099 <= share <= 0.501 for share in shares[1]) and len(set(shares[1])) > 5


def test_unreadable_samples_are_replaced_and_listed(tmp_path):
    folder = make_folder(tmp_path / "folder", 40)
    (tmp_path / "folder" / "7.png").write_bytes(b"no picture")
    found = {}
    for workers in (0, 2):
        config = LoaderConfig(**{**vars(LOADER), "workers": workers, "window": 10})
        loader = BatchLoader(build_source(folder), config)
        found[workers] = keys(list(islice(loader, 10)))
        assert loader.report.tried == 41
        assert len(loader.report.failures) == 1
        assert "7.png" in str(loader.report)
        assert "1 of 41" in str(loader.report)
    assert found[0] == found[2]
    served = [key for batch in found[0] for key in batch]
    assert "folder:00007" not in served
    source = build_source(folder)
    order = [source._row(index) for index in range(41)]
    after = order[order.index(7) + 1]
    assert Counter(served)[f"folder:{after:05d}"] == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_more_than_one_percent_unreadable(tmp_path, workers):
    folder = make_folder(tmp_path / "folder", 40)
    for k in (3, 9):
        (tmp_path / "folder" / f"{k}.npy").write_bytes(b"no depth")
    with pytest.raises(TooManyUnreadableError, match=r"(?s)more than 1 %.*\.npy"):
        batches(folder, LoaderConfig(**{**vars(LOADER), "workers": workers}), steps=100)


def test_nothing_readable_ends(tmp_path):
    folder = make_folder(tmp_path / "folder", 3)
    for k in range(3):
        (tmp_path / "folder" / f"{k}.png").write_bytes(b"")
    with pytest.raises(TooManyUnreadableError):
        batches(folder)


def test_depth_of_another_shape_is_unreadable(tmp_path):
    folder = make_folder(tmp_path / "folder", 8)
    write_depth(tmp_path / "folder" / "1.npy", np.ones((12, 20)))  # half the size: fine
    write_depth(tmp_path / "folder" / "3.npy", np.ones((30, 30)))
    source = build_source(FolderConfig(path=folder.path, shuffle=False))
    assert source[1]["depth"].shape == (1, 24, 40)
    with pytest.raises(ValueError, match=r"folder:00003: depth of 30x30 .* 42x30"):
        source[3]


def test_damaged_shards(tmp_path):
    config = make_shards(tmp_path / "shards", shards=2, length=6)
    path = tmp_path / "shards" / "s-001.tar"
    path.write_bytes(path.read_bytes()[:9000])
    source, report = build_source(config), ReadReport()
    samples = source.read(range(20), report)
    assert len(samples) == 20
    assert all("s-001" in failure for failure in report.failures)
    assert report.tried == 20 + len(report.failures) > 20
    again = build_source(config).read(range(20), ReadReport())
    assert [sample["key"] for sample in again] == [sample["key"] for sample in samples]
    for shard in path.parent.iterdir():
        shard.write_bytes(b"\0" * 10240)
    with pytest.raises(TooManyUnreadableError, match="no samples"):
        build_source(config).read(range(3), ReadReport())


@pytest.mark.parametrize(
    "line, words",
    [
        ("{broken", "line 2"),
        ("[1]", "line 2: no JSON object"),
        ('{"text": "a"}', "line 2: needs file_name"),
        ('{"file_name": "0.png", "depth_file_name": 3}', "line 2: .* strings"),
        ('{"file_name": "0.png", "text": {"alt": 3}}', "line 2: text is a string, .* not {'alt': 3}"),
        ('{"file_name": "0.png", "text": [["a"]]}', "line 2: text is a string, .* not "),
        ('{"file_name": "0.png", "depth_scale": "mm"}', "line 2: depth_scale.* not 'mm'"),
        ('{"file_name": "0.png", "depth_scale": -1}', "line 2: .*positive"),
        ('{"file_name": "0.png", "depth_invalid": ["a"]}', "line 2: .*depth_invalid"),
        ('{"file_name": "0.png", "depth_infinite": "far"}', "line 2: .*depth_infinite.* not 'far'"),
        ('{"file_name": "0.png", "depth_encoding": "feet"}', "line 2: depth_encoding 'feet' is none of linear"),
        ('{"file_name": "0.png", "depth_encoding": "kitti", "depth_scale": 1}', "line 2: depth_scale does not go"),
    ],
)
def test_bad_metadata(tmp_path, line, words):
    picture(0).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "0.png"}}\n{line}\n')
    with pytest.raises(ValueError, match=f"metadata.jsonl, {words}"):
        build_source(FolderConfig(path=str(tmp_path)))


def test_missing_things(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl: no such file"):
        build_source(FolderConfig(path=str(tmp_path / "nowhere")))
    folder = make_folder(tmp_path / "folder", 4)
    (tmp_path / "folder" / "3.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 6 .* absent: .*3\.npy"):
        build_source(folder)
    (tmp_path / "folder" / "metadata.jsonl").write_text("\n")
    with pytest.raises(FileNotFoundError, match="0 of 0"):
        build_source(folder)
    pytest.importorskip("webdataset")
    for shards in ("", f"{tmp_path}/s-{{000..003}}.tar"):
        with pytest.raises(FileNotFoundError, match="absent"):
            build_source(WebDatasetConfig(shards=shards))


def test_metadata_as_editors_on_windows_write_it(tmp_path):
    picture(0).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_bytes(b'\xef\xbb\xbf{"file_name": "0.png", "text": "\xc3\xa4"}\r\n\r\n')
    assert build_source(FolderConfig(path=str(tmp_path)))[0]["caption"] == "ä"


def test_unknown_keys_warn_once(tmp_path):
    picture(0).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "colour": 1, "depht_scale": 2}\n' * 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_source(FolderConfig(path=str(tmp_path)))
    caught = [warning for warning in caught if warning.category is InputWarning]
    assert len(caught) == 1
    assert "colour, depht_scale" in str(caught[0].message)


def test_sources_from_mappings():
    omegaconf = pytest.importorskip("omegaconf")
    settings = {"kind": "mixture", "weights": [1, 2], "sources": [{"kind": "scenes"}, {"kind": "scenes", "seed": 4}]}
    typed = omegaconf.OmegaConf.merge(omegaconf.OmegaConf.structured(MixtureConfig), settings)
    for config in (settings, typed, omegaconf.OmegaConf.to_object(typed)):
        leaves = build_source(config).leaves()
        assert [leaf.config.seed for leaf in leaves] == [0, 4]
    for kind in (ScenesConfig, FolderConfig, WebDatasetConfig, LoaderConfig):
        assert omegaconf.OmegaConf.to_object(omegaconf.OmegaConf.structured(kind)) == kind()
    with pytest.raises(ValueError, match=r"'scenes'.*sed"):
        build_source({"kind": "scenes", "sed": 4})
    with pytest.raises(ValueError, match="kind 'tar'"):
        build_source({"kind": "tar"})


def test_depth_files_written_here_keep_their_units(tmp_path):
    write_depth(tmp_path / "depth.png", np.full((4, 4), 2.5))
    np.testing.assert_array_equal(DepthFormat().read(tmp_path / "depth.png"), read_depth(tmp_path / "depth.png"))
