"""The measurements of what is given in part, with a tiny random model."""

import numpy as np
import pytest

from finetune.data.sources import build_source
from finetune.measure_partial import completion_sheet, inpainting_sheet
from finetune.measures.partial_tasks import PartialTasks, hidden_box


@pytest.fixture
def tasks(pipe):
    pipe.register_to_config(default_num_inference_steps=2, default_depth_steps=1)
    source = build_source({"kind": "scenes", "split": "validation", "height": 32, "width": 48, "supersample": 1})
    return PartialTasks(pipe, source, count=3)


def test_completion(tasks):
    sparse = tasks.sparse(0.05)
    for depth, known in zip(tasks.depths, sparse):
        assert (known > 0).sum() == round(0.05 * (depth > 0).sum())
        assert (known[known > 0] == depth[known > 0]).all()
    measured = tasks.completion(0.05)
    assert measured.pop("given depth moved") == {"by": 0}
    assert measured.keys() == {"completed", "image to depth, scaled", "interpolated"}
    assert all(row["images"] == 3 and row["abs_rel"] > 0 for row in measured.values())
    assert tasks.completion(0.05)["completed"] == measured["completed"]


def test_what_was_given_does_not_count(tasks):
    hidden = np.ones_like(tasks.boxes)
    hidden[:, 0, 0] = False
    wrong = tasks.depths.copy()
    wrong[:, 0, 0] *= 100
    assert tasks.depth_error(wrong, hidden)["abs_rel"] == 0
    assert tasks.scaled_error(tasks.depths / 7)["abs_rel"] == pytest.approx(0, abs=1e-6)


def test_inpainting(tasks):
    measured = tasks.inpainting()
    for name in ("image in part", "image and depth in part", "image in part, depth whole"):
        assert measured[name]["given image moved by"] < 1e-6
    assert measured["image and depth in part"]["given depth moved by"] == 0
    assert measured["image in part, depth whole"].get("abs_rel", 0) == 0  # it is given, but for the sky
    made = measured["both made anew"]
    assert made["image"] > measured["mean of what is hidden"]["image"] > 0  # by a random model
    assert made["depth seen in it"] > 0 and measured["the true image"]["depth seen in it"] > 0


def test_boxes():
    boxes = [hidden_box((40, 64), number) for number in range(20)]
    assert (hidden_box((40, 64), 3) == boxes[3]).all() and len({box.tobytes() for box in boxes}) == 20
    for box in boxes:
        rows, columns = np.nonzero(box)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert height * width == box.sum()
        assert 10 <= height <= 25 and 16 <= width <= 40


def test_sheets(tasks):
    assert completion_sheet(tasks, [0.05]).width > 3 * 128
    assert inpainting_sheet(tasks).height > 11 * 64
