"""Procedural scenes as a folder on disk."""

import numpy as np
import pytest
import torch

from finetune.data.sources import ReadReport, build_source
from finetune.write_scenes import main
from mf_diffusers.datasets.folder import Folder
from mf_diffusers.evaluation.protocol import Protocol


def test_scenes_come_back_from_the_folder(tmp_path):
    main(tmp_path / "scenes", split="test", count=6, height=24, width=32, seed=3)
    folder = build_source({"kind": "folder", "path": str(tmp_path / "scenes"), "shuffle": False})
    scenes = build_source({"kind": "scenes", "split": "test", "seed": 3, "height": 24, "width": 32})
    samples = scenes.read(range(6), ReadReport())
    assert any(sample["depth"].isinf().any() for sample in samples)
    for index, sample in enumerate(samples):
        read = folder[index]
        assert read["caption"] == sample["caption"]
        assert (read["image"] - sample["image"]).abs().max() <= 0.5 / 255 + 1e-6
        assert torch.equal(read["depth"], sample["depth"])
    with pytest.raises(SystemExit, match="is there already"):
        main(tmp_path / "scenes", split="test", count=1, height=24, width=32, seed=3)


def test_sky_is_evaluated_as_missing_depth_is(tmp_path):
    main(tmp_path / "scenes", split="test", count=6, height=24, width=32, seed=3)
    with_sky, protocol = list(Folder(tmp_path / "scenes")), Protocol("folder")
    metadata = tmp_path / "scenes" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace(', "depth_infinite": "inf"', ""))
    for frame, without in zip(with_sky, Folder(tmp_path / "scenes"), strict=True):
        (view, left_out), (expected, missing) = protocol.view(frame), protocol.view(without)
        assert np.array_equal(frame.mask, without.mask) and np.array_equal(view.depth, expected.depth)
        assert left_out["sky"] == np.isinf(frame.depth).sum() == missing["missing"] and missing["sky"] == 0
    assert any(np.isinf(frame.depth).any() for frame in with_sky)
