"""Procedural scenes as a folder on disk."""

import pytest
import torch

from finetune.data import ReadReport, build_source
from finetune.write_scenes import main


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
        assert torch.equal(read["depth"], torch.where(sample["depth"].isfinite(), sample["depth"], 0.0))
    with pytest.raises(SystemExit, match="is there already"):
        main(tmp_path / "scenes", split="test", count=1, height=24, width=32, seed=3)
