"""Every internal of ComfyUI's core that the pack leans on is there, and takes what it is given."""

import os
import sys

import pytest

from comfyui_nodes.core import LEANS_ON, missing


COMFYUI = os.environ.get("COMFYUI_PATH")
if not COMFYUI:
    pytest.skip("needs ComfyUI: set COMFYUI_PATH, and run in its Python environment", allow_module_level=True)
pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module", autouse=True)
def comfy():
    sys.path.insert(0, COMFYUI)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True


@pytest.mark.parametrize(("name", "parameters"), [item for names in LEANS_ON.values() for item in names.items()])
def test_the_core_has(name, parameters):
    assert list(missing({name: parameters})) == []
