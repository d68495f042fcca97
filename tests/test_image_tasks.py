"""The measurements of the tasks that make images, and what reads the pictures."""

import numpy as np
import pytest
import torch

from finetune import scene_reader
from finetune.data import build_source
from finetune.image_tasks import ImageTasks
from finetune.scene_reader import NO_OBJECT, Object, changed, check_on_scenes, named_objects, objects_in, rendered
from finetune.scenes import render_scenes
from finetune.scenes.scene import COLOURS, FIRST_OBJECT, sample_scene


@pytest.fixture
def tasks(pipe):
    source = build_source({"kind": "scenes", "split": "validation", "height": 32, "width": 32, "supersample": 1})
    return ImageTasks(pipe, source, count=3, steps=2)


def test_tasks_that_make_images(tasks):
    for measured in (
        tasks.joint(5),
        tasks.following(-5),
        tasks.following(None),
        tasks.following(None, density=0.05),
        tasks.not_following(),
    ):
        assert measured["images"] == 3
        assert measured["abs_rel"] > 0
        assert 0 <= measured["delta1"] <= 1


def test_sparse_depth_gives_other_images_than_all_of_it(tasks):
    assert tasks.following(None) == tasks.following(None) != tasks.following(None, density=0.05)


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("a red box in a room with a white wall", [("box", "red")]),
        ("two large glossy orange balls and a small purple metal cube", [("sphere", "orange"), ("box", "purple")]),
        ("under a grey sky on dry earth, a teal striped cylinder", [("cylinder", "teal")]),
        ("in a room with a blue floor, three black blocks", [("box", "black")]),
        ("a wide view in a courtyard with a red wall", []),
    ],
)
def test_what_a_caption_names(caption, objects):
    assert named_objects(caption) == [Object(*words) for words in objects]


def test_captions_name_what_is_in_their_scene():
    batch = render_scenes(range(64), height=32, width=32, supersample=1)
    for index, caption in enumerate(batch.captions):
        there = {Object(solid.shape, solid.material.colour) for solid in sample_scene(index).objects}
        assert there.issuperset(named_objects(caption)), caption


def test_labels_of_rendered_scenes():
    images, kinds, colours, _ = rendered(range(8), "train", 32)
    assert images.shape == (8, 3, 32, 32) and kinds.shape == colours.shape == (8, 8, 8)
    is_object = render_scenes(range(8), height=32, width=32).surfaces[:, 2::4, 2::4] >= FIRST_OBJECT
    assert torch.equal(kinds != NO_OBJECT, is_object) and torch.equal(colours >= 0, is_object)


def test_objects_are_connected_pixels_of_one_colour():
    kinds, colours = np.zeros((5, 8, 8)), np.zeros((len(COLOURS), 8, 8))
    kinds[NO_OBJECT] = 1
    red, blue = list(COLOURS).index("red"), list(COLOURS).index("blue")
    for part, kind, colour in ((np.s_[:3, :3], 0, red), (np.s_[:1, :1], 1, red), (np.s_[5:, 5:], 1, blue)):
        for probabilities, number in ((kinds, kind), (colours, colour)):
            probabilities[(slice(None), *part)] = 0
            probabilities[(number, *part)] = 1
    # a red box with one pixel that looks like a sphere, and a blue sphere
    assert objects_in(kinds, colours) == {Object("box", "red"), Object("sphere", "blue")}


def test_changed_names_differ_in_one_word():
    named = [Object("box", "red"), Object("cone", "blue")]
    for what in ("kind", "colour"):
        other = changed(named, np.random.default_rng(0), what)
        assert sum(a != b for a, b in zip(named, other)) == 1
        assert all(
            getattr(a, name) == getattr(b, name) for a, b in zip(named, other) for name in {"kind", "colour"} - {what}
        )


def test_a_reader_learns_and_is_checked(monkeypatch, tmp_path):
    monkeypatch.setattr(scene_reader, "SCENES", 64)
    monkeypatch.setattr(scene_reader, "STEPS", 2)
    reader = scene_reader.reader_at(tmp_path / "reader.safetensors", 32)
    again = scene_reader.reader_at(tmp_path / "reader.safetensors", 32)
    images = rendered(range(2), "validation", 32)[0]
    assert all(torch.equal(a, b) for a, b in zip(reader(images), again(images)))
    shares = check_on_scenes(reader, 32, 40)
    # One that has learnt nothing sees next to nothing: it rejects all captions, right and wrong.
    assert len(shares) == 4 and shares["accepted, with their own captions"] < 0.5
    assert shares["rejected, with one kind changed"] > 0.5
