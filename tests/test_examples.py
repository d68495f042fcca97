"""The examples in the docstrings, and the README's table of what is given and made, on the embedded model."""

import doctest
import importlib
import inspect
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mf_diffusers
from mf_diffusers import ModalityForcingPipeline
from mf_diffusers.depth_io import read_depth
from mf_diffusers.embedded import EMBEDDED_MODEL, EMBEDDED_SCENES


MODULES = ["adapter", "loaders", "lora", *mf_diffusers._MODULES.values()]
EXAMPLES = {
    test.name.removeprefix("mf_diffusers.modality_forcing."): test
    for module in sorted(set(MODULES))
    for test in doctest.DocTestFinder().find(importlib.import_module(f"mf_diffusers.modality_forcing.{module}"))
    if test.examples
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test = EXAMPLES[name]
    test.globs = {}  # an example stands alone
    said = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize("name", mf_diffusers.__all__)
def test_each_public_class_has_an_example(name):
    assert f"{mf_diffusers._MODULES[name]}.{name}" in EXAMPLES


def test_each_method_of_the_pipeline_occurs_in_an_example():
    own = [cls for cls in ModalityForcingPipeline.__mro__ if cls.__module__.startswith("mf_diffusers.")]
    methods = {
        name
        for cls in own
        for name, value in vars(cls).items()
        if inspect.isroutine(value) and (not name.startswith("_") or name == "__call__")
    }
    called = "".join(example.source for test in EXAMPLES.values() for example in test.examples)
    needs_other_files = {"from_published"}
    missing = {name for name in methods - needs_other_files if f".{name}(" not in called and name != "__call__"}
    assert not missing


def permutations() -> list[tuple[str, str, str]]:
    """Image, depth and code of each row of the README's table."""
    lines = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("| image | depth | code | makes |") + 2
    rows = [line.strip("| ").split(" | ") for line in lines[start : lines.index("", start)]]
    return [(image, depth, code.strip("`")) for image, depth, code, _ in rows]


@pytest.fixture(scope="module")
def given():
    """What the table's code speaks of."""
    pipe = ModalityForcingPipeline.from_pretrained(EMBEDDED_MODEL)
    pipe.set_progress_bar_config(disable=True)
    pipe.register_to_config(default_num_inference_steps=2)
    depth = np.asarray(read_depth(EMBEDDED_SCENES / "test-018-depth.png"))
    known = np.random.default_rng(0).random(depth.shape) < 0.1
    mask = np.zeros(depth.shape)
    mask[64:192, 64:192] = 1
    photo = Image.open(EMBEDDED_SCENES / "test-018.png")
    maps = {"depth": depth, "rough": depth, "lidar": np.where(known, depth, 0), "known": known, "mask": mask}
    return {"pipe": pipe, "prompt": "a red ball", "photo": photo} | maps


def test_every_permutation_is_in_the_readme():
    kinds = [(image, depth) for image, depth, _ in permutations()]
    assert len(set(kinds)) == len(kinds) == 12


@pytest.mark.parametrize(("image", "depth", "code"), permutations())
def test_code_of_the_readme(given, image, depth, code):
    output = eval(code, given)
    assert (output.images is None) == (image == "whole") and (output.depth is None) == (depth == "whole")
    if depth == "in part":
        known = given["known"]
        assert np.allclose(output.depth[0][known], given["depth"][known], rtol=1e-6)
