"""The demo, with a tiny random model: its files, its numbers, its errors; and the scenes in the package."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import make_pipeline
from typer.testing import CliRunner

from finetune.scenes import VOCABULARY, render_scenes
from mf_diffusers import cli, demo


RESULTS = {f"text-{number}" for number in (1, 2, 3)} | {f"image-{strength}" for strength in demo.STRENGTHS}
RESULTS |= {"completed", "inpainted"}
TASKS = ("text_to_image_and_depth", "image_to_depth", "depth_to_image", "completion", "inpainting")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    pipe = make_pipeline()
    pipe.register_to_config(default_depth_steps=1, default_guidance_scale=3.0)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MF_DIFFUSERS_DEBUG", raising=False)


def call(*arguments):
    return CliRunner().invoke(cli.app, ["demo", "--device", "cpu", *map(str, arguments)])


def run(*arguments):
    result = call(*arguments, "--steps", 1)
    assert result.exit_code == 0, result.output
    return result.stdout


def scene_of(scenes, name):
    return next(scene for scene in scenes if scene.name == name)


def metadata(folder):
    return json.loads(Path(folder, "metadata.json").read_text())


def test_all_files_and_numbers_are_written(model):
    stdout = run("--model", model, "--seed", 3)
    assert stdout.splitlines()[-1] == "outputs/demo"
    assert "AbsRel" in stdout
    scenes = demo.demo_scenes()
    results = RESULTS | {f"depth-{scene.name}" for scene in scenes}
    output = Path("outputs/demo")
    assert {path.name for path in output.iterdir()} == results | {"contact_sheet.png", "metadata.json"}
    for name in results:
        files = {"image.png", "depth.npy", "depth.png", "depth_colored.png", "metadata.json"}
        files |= {"error.png"} if name.startswith("depth-") else set()
        assert files <= {path.name for path in (output / name).iterdir()}, name
    facts = metadata(output)
    assert facts["model"] == str(model) and facts["seconds"] > 0 and facts["steps"] == {"images": 1, "depth": 1}
    listed = [facts[task] for task in TASKS]
    assert {result["result"] for task in listed for result in task} == results
    assert [[result["seed"] for result in task] for task in listed] == [
        [3, 4, 5],
        [3, 4, 5, 6, 7, 8],
        [3, 3, 3],
        [3],
        [3],
    ]
    assert [result["log2_alpha"] for result in listed[2]] == [-5, -11, None]
    assert facts["image_to_depth_mean"]["abs_rel"] == np.mean([scene["abs_rel"] for scene in listed[1]])
    with Image.open(output / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 6 * demo.CELL
    given = scene_of(scenes, demo.GIVEN_SCENE).depth
    assert np.array_equal(np.load(output / "image-rigidly" / "depth.npy"), given)
    scanned, painted = (scene_of(scenes, name) for name in (demo.SCANNED_SCENE, demo.PAINTED_SCENE))
    known = np.zeros_like(scanned.depth, dtype=bool)
    known[demo.SCANNED_ROWS] = scanned.depth[demo.SCANNED_ROWS] > 0
    assert 0.01 < known.mean() < 0.05
    np.testing.assert_allclose(np.load(output / "completed" / "depth.npy")[known], scanned.depth[known], rtol=1e-3)
    with Image.open(output / "inpainted" / "image.png") as image:
        differs = (np.asarray(image) != np.asarray(painted.image)).any(axis=-1)
    rows, columns = np.nonzero(differs)
    left, top, right, bottom = demo.PAINTED_BOX
    assert differs[top:bottom, left:right].mean() > 0.9
    assert columns.min() >= left and columns.max() < right and rows.min() >= top and rows.max() < bottom


def test_the_seed_decides_and_nothing_is_overwritten_unless_asked(model, monkeypatch):
    monkeypatch.setattr(demo, "EMBEDDED_MODEL", model)
    for _ in range(2):
        run("--output", "here")
    first, second = metadata("here"), metadata("here-002")
    assert first["image_to_depth"] == second["image_to_depth"]
    for name in ("contact_sheet.png", "text-1/image.png", "image-loosely/image.png"):
        assert Path("here", name).read_bytes() == Path("here-002", name).read_bytes()
    assert run("--model", model, "--output", "here", "--seed", 9, "--overwrite", "--quiet") == ""
    assert {path.name for path in Path().iterdir()} == {"here", "here-002"}
    assert metadata("here")["image_to_depth"] != first["image_to_depth"]


def test_a_model_that_is_not_there_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "EMBEDDED_MODEL", tmp_path / "embedded" / "model")
    for arguments, message in (((), "no embedded model"), (("--model", "gone/model", "--offline"), "gone/model")):
        result = call(*arguments)
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ") and message in line
        assert not list(Path().rglob("metadata.json"))


def test_an_interrupted_demo_leaves_nothing(model, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "colorize_error", interrupt)
    assert call("--model", model, "--steps", 1).exit_code != 0
    assert list(Path("outputs").iterdir()) == []


def test_the_scenes_are_held_out_ones_and_the_prompts_in_their_words():
    scenes = demo.demo_scenes()
    indices = [int(scene.name.removeprefix("test-")) for scene in scenes]
    rendered = render_scenes(indices, height=256, width=256, supersample=1, split="test")
    assert [scene.caption for scene in scenes] == rendered.captions
    for scene, depth, image in zip(scenes, rendered.depth[:, 0].numpy(), rendered.image):
        expected = np.where(np.isfinite(depth), depth, 0)
        same = np.isclose(scene.depth, expected, rtol=0, atol=1.01 * expected.max() / 65535)
        assert same.mean() > 0.999  # pixels on an edge may fall to either side
        pixels = np.asarray(scene.image) / 255
        assert np.abs(pixels - image.permute(1, 2, 0).numpy()).mean() < 0.03  # this one is not antialiased
    for prompt in (*demo.PROMPTS, demo.NEW_PROMPT, demo.PAINTED_PROMPT):
        assert set(prompt.replace(",", "").split()) <= VOCABULARY
