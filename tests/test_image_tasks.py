"""The measurements of the tasks that make images, and what reads the pictures."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import measure_embedded, scene_reader
from finetune.config import load_config
from finetune.data.sources import build_source
from finetune.measure_embedded import MeasureConfig
from finetune.measures.image_tasks import ImageTasks
from finetune.scene_reader import (
    KINDS,
    NO_OBJECT,
    Object,
    changed,
    check_on_scenes,
    crop,
    named_objects,
    regions,
    rendered,
)
from finetune.scenes import VOCABULARY, render_scenes
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
    batch = rendered(range(8), "train", 32)
    surfaces = render_scenes(range(8), height=32, width=32).surfaces
    assert batch.images.shape == (8, 3, 32, 32)
    assert torch.equal(batch.places != NO_OBJECT, surfaces[:, 2::4, 2::4] >= FIRST_OBJECT)
    boxes = iter(zip(batch.owners, batch.boxes, batch.kinds))
    for index in range(8):
        for number, solid in enumerate(sample_scene(index).objects, start=FIRST_OBJECT):
            rows, columns = (surfaces[index] == number).nonzero(as_tuple=True)
            if len(rows) > 0.005 * 32 * 32:
                box = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
                assert next(boxes) == (index, box, KINDS.index(solid.shape))
    assert next(boxes, None) is None


def test_objects_are_connected_places_of_one_colour():
    places = np.full((16, 16), NO_OBJECT)
    red, blue = list(COLOURS).index("red"), list(COLOURS).index("blue")
    places[:3, :4], places[10:, 8:10], places[13:, 12:], places[6, 6] = red, red, blue, blue  # the last is too small
    boxes, colours = regions(places)
    assert sorted(zip(boxes, colours)) == [
        ((0, 0, 12, 16), "red"),
        ((40, 32, 64, 40), "red"),
        ((52, 48, 64, 64), "blue"),
    ]


def test_a_crop_holds_a_box_and_its_margin():
    image = torch.zeros(3, 64, 64)
    image[:, 16:32, 24:40] = 1
    inside = crop(image, (16, 24, 32, 40))
    assert inside.shape == (3, 32, 32)
    assert inside.mean() == pytest.approx(1 / 1.5**2, abs=0.03)
    assert torch.allclose(crop(image, (-32, -32, -16, -16)), torch.tensor(0.5))  # beyond the picture


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
    images = rendered(range(2), "validation", 32).images
    assert torch.equal(reader.places(images), again.places(images)) and reader.read(images) == again.read(images)
    shares = check_on_scenes(reader, 32, 40)
    # One that has learnt nothing rejects most captions, right and wrong.
    assert len(shares) == 4 and shares["accepted, with their own captions"] < 0.5
    assert shares["rejected, with one kind changed"] > 0.5


def test_the_command_measures_all_parts(pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scene_reader, "SCENES", 64)
    monkeypatch.setattr(scene_reader, "STEPS", 2)
    pipe.register_to_config(default_sample_size=32)
    pipe.save_pretrained(tmp_path / "model")
    settings = {
        "model": tmp_path / "model",
        "output": tmp_path / "measures",
        "reader": tmp_path / "reader.safetensors",
        "validation_data": "{height: 32, width: 32, supersample: 1}",
        "scenes": 2,
        "steps": 1,
        "strengths": [-5],
        "checked_scenes": 20,
    }
    config = ["--config", "finetune/configs/measure_embedded.yaml"]
    monkeypatch.setattr("sys.argv", ["measure", *config, *(f"{name}={value}" for name, value in settings.items())])
    measure_embedded.main()
    found = json.loads((tmp_path / "measures" / "measures.json").read_text())
    assert len(found["prompts_shown"]) == 30
    assert list(found["depth_to_image"]) == ["without depth", "log2_alpha -5", "rigidly", "rigidly, 5% of the points"]
    assert found["joint"].keys() == {"log2_alpha 5"}
    assert f"prompts shown: {sum(found['prompts_shown'].values())} of 30" in capsys.readouterr().out
    with Image.open(tmp_path / "measures" / "prompts.png") as sheet:
        assert sheet.width > 10 * 144


def test_the_prompts_are_in_the_words_of_the_scenes():
    config = load_config(MeasureConfig, ["--config", "finetune/configs/measure_embedded.yaml"])
    named = [named_objects(prompt) for prompt in config.prompts]
    assert len(set(config.prompts)) == 30 and all(named)
    assert {word for prompt in config.prompts for word in prompt.replace(",", "").split()} <= VOCABULARY
    assert {thing.colour for things in named for thing in things} == set(COLOURS)
    assert {thing.kind for things in named for thing in things} == set(KINDS)
