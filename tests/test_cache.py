"""Encoded samples on disk: what a cache is named by, builds that go on, batches of one size, what cannot be read."""

import hashlib
import json
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from training_runs import make_frames

from finetune.data import cache as cache_module
from finetune.data.cache import CacheConfig, encode_samples, shard_path, weights_hash
from finetune.data.encoding import Encoder
from finetune.data.sources import ReadReport, TooManyUnreadableError, build_source
from finetune.data.sparsify import thin
from finetune.training.trainer import TrainerConfig


SCENES = {"kind": "scenes", "split": "train", "height": 32, "width": 32, "supersample": 1}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD", 4)


@pytest.fixture
def encoder(pipe):
    return Encoder(pipe.vae, pipe.depth_processor, lambda prompts: pipe.encode_prompt(prompts)[0])


@pytest.fixture
def frames(tmp_path) -> dict:
    make_frames(tmp_path / "frames")
    return {"kind": "folder", "path": str(tmp_path / "frames"), "shuffle": False}


def settings(tmp_path, **others) -> CacheConfig:
    return CacheConfig(**{"folder": str(tmp_path / "cache"), "samples": 12, "pixels": 1024} | others)


def stand_in(rank=0, world_size=1, step=0, **config):
    """What samples ask of a trainer."""
    config = {"batch_size": 8, "micro_batch_size": 2, "steps": 20} | config
    accelerator = SimpleNamespace(process_index=rank, num_processes=world_size)
    return SimpleNamespace(config=TrainerConfig(**config), accelerator=accelerator, step=step)


def test_the_name_of_a_cache_of_scenes(tmp_path, encoder):
    """Fixed: caches of scenes outlive versions of this code."""
    config, pipe_config = settings(tmp_path), {"out_layers": [1, 2, 3]}
    content = [SCENES, asdict(config) | {"folder": ""}, pipe_config, weights_hash(encoder.vae)]
    assert asdict(config).keys() == {
        "folder",
        "samples",
        "pixels",
        "size_rule",
        "text",
        "depth_density",
        "depth_pattern",
    }
    name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    assert encode_samples(config, SCENES, pipe_config, encoder).folder == Path(config.folder) / name


def test_a_cache_of_files_is_named_by_them_too(tmp_path, encoder, frames):
    config = settings(tmp_path)
    first = encode_samples(config, frames, {}, encoder).folder
    assert encode_samples(config, frames, {}, encoder).folder == first
    changed = tmp_path / "frames" / "5.npy"
    os.utime(changed, ns=(0, changed.stat().st_mtime_ns + 1))
    second = encode_samples(config, frames, {}, encoder).folder
    with (tmp_path / "frames" / "metadata.jsonl").open("a") as file:
        file.write("\n")
    assert len({first, second, encode_samples(config, frames, {}, encoder).folder}) == 3


def test_an_interrupted_build_goes_on(tmp_path, encoder, frames, monkeypatch):
    samples = encode_samples(settings(tmp_path), frames, {}, encoder)
    assert len(list(samples.folder.glob("*.safetensors"))) == 3
    before = load_file(shard_path(samples.folder, 1))
    shard_path(samples.folder, 1).unlink()
    written = []
    monkeypatch.setattr(
        cache_module, "encode_shard", lambda *a, f=cache_module.encode_shard: written.append(a[2]) or f(*a)
    )
    encode_samples(settings(tmp_path), frames, {}, encoder)
    assert written == [range(4, 8)]
    after = load_file(shard_path(samples.folder, 1))
    assert after.keys() == before.keys() and all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_batches_hold_what_the_encoder_makes(tmp_path, encoder, frames):
    samples = encode_samples(settings(tmp_path, depth_density=0.5), frames, {}, encoder)
    source = build_source(frames)
    indices = [1, 4, 10]  # of one size, from three shards
    batch = samples[indices, [5, 6, 7]]
    assert batch.positions == [5, 6, 7] and batch.captions == [source[i]["caption"] for i in indices]
    for k, index in enumerate(indices):
        sample = source[index]
        one = encoder(sample["image"][None], sample["depth"][None], [sample["caption"]])
        assert torch.equal(batch.latents[k], one.latents[0]) and torch.equal(
            batch.prompt_embeds[k], one.prompt_embeds[0]
        )
        assert batch.valid[k].sum() == round(0.5 * int(one.valid[0].sum()))
        assert (one.valid[0] | ~batch.valid[k]).all()


def test_a_source_thins_its_own_depth(tmp_path, encoder):
    samples = encode_samples(settings(tmp_path, depth_density=0.5), SCENES | {"depth_density": 0.1}, {}, encoder)
    valid = samples[list(range(12)), list(range(12))].valid
    whole = build_source(SCENES).read(list(range(12)), ReadReport())
    for index, (kept, sample) in enumerate(zip(valid, whole)):
        depth = thin(sample, 0.1, "random", index)["depth"]
        assert torch.equal(kept, (depth > 0) & depth.isfinite())
    other = encode_samples(settings(tmp_path, depth_density=0.5), SCENES, {}, encoder)
    assert other.folder != samples.folder


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_sample_of_a_step_once_in_batches_of_one_size(tmp_path, encoder, frames, world_size):
    samples = encode_samples(settings(tmp_path), frames, {}, encoder)
    plans = [list(samples.plan(stand_in(rank, world_size))) for rank in range(world_size)]
    for plan in plans:
        for indices, positions in plan:
            assert len(indices) == len(positions) <= 2
            assert len({samples[[i], [0]].depth.shape for i in indices}) == 1
    taken = [
        (position, index)
        for plan in plans
        for indices, positions in plan
        for position, index in zip(positions, indices)
    ]
    assert Counter(position for position, _ in taken) == dict.fromkeys(range(8), 20)
    assert max(Counter(index for _, index in taken).values()) == 160 // 12 + 1  # every epoch has each once
    alone = [pair for indices, positions in samples.plan(stand_in()) for pair in zip(positions, indices)]
    assert sorted(alone) == sorted(taken)


def test_a_stream_goes_on_at_any_step(tmp_path, encoder, frames):
    samples = encode_samples(settings(tmp_path), frames, {}, encoder)
    whole = list(samples.stream(stand_in(steps=6)))
    for workers in (0, 1):
        rest = list(samples.stream(stand_in(steps=6, step=4, num_workers=workers)))
        assert all(torch.equal(a.latents, b.latents) for a, b in zip(whole[-len(rest) :], rest))
        assert [batch.positions for batch in whole[-len(rest) :]] == [batch.positions for batch in rest]


def test_unreadable_samples(tmp_path, encoder):
    make_frames(tmp_path / "frames", 101)
    source = {"kind": "folder", "path": str(tmp_path / "frames"), "shuffle": False}
    (tmp_path / "frames" / "5.png").write_bytes(b"")
    config = settings(tmp_path, samples=101)
    report = encode_samples(config, source, {}, encoder).report
    assert report.tried == 102 and len(report.failures) == 1 and "5.png" in str(report)
    assert encode_samples(config, source, {}, encoder).report == report  # known to a later run too
    (tmp_path / "frames" / "6.npy").write_bytes(b"")
    with pytest.raises(TooManyUnreadableError, match=r"(?s)3 of 104 .*6\.npy.*5\.png"):
        encode_samples(config, source, {}, encoder)


def test_one_of_few_is_more_than_a_percent(tmp_path, encoder, frames):
    (tmp_path / "frames" / "5.png").write_bytes(b"")
    with pytest.raises(TooManyUnreadableError, match=r"(?s)1 of 13 .*5\.png"):
        encode_samples(settings(tmp_path), frames, {}, encoder)


class StandInProcess(SimpleNamespace):
    """One of two processes, as `encode_samples` sees itself; what the other does meanwhile is done at the barrier."""

    num_processes = 2
    is_main_process = False

    def wait_for_everyone(self):
        self.meanwhile()


def test_processes_that_look_at_different_times_share_the_shards(tmp_path, encoder, frames, monkeypatch):
    written = []
    monkeypatch.setattr(
        cache_module, "encode_shard", lambda *a, f=cache_module.encode_shard: written.append(a[2]) or f(*a)
    )

    def encode_in(process, meanwhile):
        monkeypatch.setattr(
            cache_module, "PartialState", lambda: StandInProcess(process_index=process, meanwhile=meanwhile)
        )
        return encode_samples(settings(tmp_path), frames, {}, encoder)

    samples = encode_in(0, meanwhile=lambda: encode_in(1, meanwhile=lambda: None))
    assert written == [range(0, 4), range(8, 12), range(4, 8)]
    assert samples.captions(12) == [build_source(frames)[index]["caption"] for index in range(12)]


def test_a_folder_that_processes_do_not_share(tmp_path, encoder, frames, monkeypatch):
    alone = StandInProcess(process_index=0, meanwhile=lambda: None)
    monkeypatch.setattr(cache_module, "PartialState", lambda: alone)
    with pytest.raises(ValueError, match=rf"1 of 3 shards are not in {tmp_path / 'cache'}/\w+: .* shared"):
        encode_samples(settings(tmp_path), frames, {}, encoder)
