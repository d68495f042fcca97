"""The ready workflows: two formats of one graph, readable, of stock nodes and ours; each runs in a ComfyUI server."""

import ast
import json
import os
import re
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import trimesh
from comfyui_server import REPOSITORY, Server
from PIL import Image

from mf_diffusers.depth_io import read_depth
from mf_diffusers.embedded import EMBEDDED_MODEL, EMBEDDED_SCENES


COMFYUI = os.environ.get("COMFYUI_PATH")
WORKFLOWS = REPOSITORY / "workflows"
NODES = "\n".join(
    path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "comfyui_nodes").glob("*_nodes.py"))
)
NAMES = [
    *("complete_depth", "depth_to_image", "inpaint_geometry", "photo_to_depth", "refine_pass", "relight_restyle"),
    "text_to_rgbd",
]
SAVERS = {"PreviewImage", "SaveGLB", "SaveImage", "SaveImageAdvanced"}
CORE_INPUTS = {
    "BatchImagesNode": "images",
    "CLIPTextEncode": "clip text",
    "KSampler": "model positive negative latent_image seed steps cfg sampler_name scheduler denoise",
    "MaskComposite": "destination source x y operation",
    "MoGePointMapToMesh": "moge_geometry batch_index decimation discontinuity_threshold texture",
    "MoGeRender": "moge_geometry output",
    "PreviewImage": "images",
    "SaveGLB": "mesh filename_prefix",
    "SaveImage": "images filename_prefix",
    "SaveImageAdvanced": "images filename_prefix format",
    "SolidMask": "value width height",
}
TITLE_BAR = 30  # of a node, above its position


def read(name):
    """The graph in the editor's format, and in the API's."""
    return [json.loads((WORKFLOWS / folder / f"{name}.json").read_text(encoding="utf-8")) for folder in (".", "api")]


def real_nodes(editor):
    return {str(node["id"]): node for node in editor["nodes"] if node["type"] != "MarkdownNote"}


def inputs_of_ours():
    """Names of each node's inputs, from the source: the nodes themselves need ComfyUI."""
    nodes = {}
    for schema in ast.walk(ast.parse(NODES)):
        if isinstance(schema, ast.Call) and ast.unparse(schema.func) == "io.Schema":
            settings = {keyword.arg: keyword.value for keyword in schema.keywords}
            calls = [call for call in ast.walk(settings["inputs"]) if isinstance(call, ast.Call)]
            names = [(call, ast.unparse(call.func)) for call in calls]
            nodes[settings["node_id"].value] = {
                *(call.args[0].value for call, name in names if name.endswith(".Input")),
                *(name.removesuffix("_input") for _, name in names if name.endswith("_input")),
            }
    return nodes


def test_the_folder():
    """What the template browser lists: graphs with a picture each."""
    assert sorted(path.stem for path in WORKFLOWS.glob("*.json")) == NAMES
    assert sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json")) == NAMES
    for name in NAMES:
        path = WORKFLOWS / f"{name}.jpg"
        with Image.open(path) as picture:
            assert picture.width == picture.height >= 400 and path.stat().st_size < 200_000, name


@pytest.mark.parametrize("name", NAMES)
def test_two_formats_of_one_graph(name):
    editor, api = read(name)
    nodes = real_nodes(editor)
    types = {node: data["class_type"] for node, data in api.items()}
    assert {node: data["type"] for node, data in nodes.items()} == types
    links = {link[0]: link[1:3] for link in editor["links"]}
    for node, data in nodes.items():
        drawn = {
            socket["name"]: [str(links[socket["link"]][0]), links[socket["link"]][1]]
            for socket in data["inputs"]
            if socket.get("link") is not None
        }
        inputs = api[node]["inputs"]
        assert drawn == {key: value for key, value in inputs.items() if isinstance(value, list)}, (name, data["type"])
        values = [value for value in inputs.values() if not isinstance(value, list)]
        assert all(value in data.get("widgets_values", []) for value in values), (name, data["type"])


@pytest.mark.parametrize("name", NAMES)
def test_nodes_are_stock_or_ours(name):
    known = inputs_of_ours() | {node: set(inputs.split()) for node, inputs in CORE_INPUTS.items()}
    for data in read(name)[1].values():
        assert {key.split(".")[0] for key in data["inputs"]} <= known[data["class_type"]], data


@pytest.mark.parametrize("name", NAMES)
def test_a_first_run_needs_no_download(name):
    """The embedded model and scenes, and no file."""
    _, api = read(name)
    embedded = re.search(r'^EMBEDDED = "(.+)"', NODES, re.M)[1]
    loaders = {data["class_type"]: data["inputs"] for data in api.values() if "Load" in data["class_type"]}
    assert loaders.pop("ModalityForcingLoadPipeline") == {"pipeline": embedded}
    scene = loaders.pop("ModalityForcingLoadScene", None)
    assert not loaders and (scene is None or (EMBEDDED_SCENES / f"{scene['scene']}.png").is_file())


@pytest.mark.parametrize("name", NAMES)
def test_readable(name):
    """Nodes lie in titled groups and on no other node; notes say what this is, and the licence of the weights."""
    editor, _ = read(name)

    def within(box, group):
        (left, top, right, bottom), (x, y, width, height) = box, group["bounding"]
        return x <= left and y <= top and right <= x + width and bottom <= y + height

    boxes = {}
    for node in editor["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        boxes[node["id"]] = box = (x, y - TITLE_BAR, x + width, y + height)
        assert node["type"] == "MarkdownNote" or any(within(box, group) for group in editor["groups"]), node["type"]
    for one, (left, top, right, bottom) in boxes.items():
        for other, box in boxes.items():
            apart = box[2] <= left or right <= box[0] or box[3] <= top or bottom <= box[1]
            assert one == other or apart, (name, one, other)
    assert all(group["title"] for group in editor["groups"])
    notes = [node["widgets_values"][0] for node in editor["nodes"] if node["type"] == "MarkdownNote"]
    assert any(note.startswith("# ") for note in notes)
    assert any("CC BY-NC 4.0" in note and "Load Diffusion Model" in note for note in notes)


# In a ComfyUI server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not COMFYUI:
        pytest.skip("needs ComfyUI: set COMFYUI_PATH, and run in ComfyUI's Python environment")
    if not EMBEDDED_MODEL.is_dir():
        pytest.skip(f"needs the embedded model, {EMBEDDED_MODEL}")
    server = Server(Path(COMFYUI), tmp_path_factory.mktemp("comfyui"))
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.mark.comfyui
@pytest.mark.parametrize("name", NAMES)
def test_runs_to_files_on_disk(server, name):
    _, api = read(name)
    files = server.run(api)
    assert set(files) == {node for node, data in api.items() if data["class_type"] in SAVERS}
    with Image.open(next(EMBEDDED_SCENES.glob("*.png"))) as scene:
        size = (64, 64) if name in ("text_to_rgbd", "refine_pass") else scene.size
    for node, paths in files.items():
        of_each_photo = name == "photo_to_depth" and api[node]["class_type"] != "SaveGLB"
        assert len(paths) == (2 if of_each_photo else 1), api[node]
        for path in paths:
            if path.suffix == ".png":
                with Image.open(path) as picture:
                    assert picture.size == size and np.asarray(picture).std() > 0
            elif path.suffix == ".exr":
                depth = read_depth(path)
                assert depth.shape == size[::-1] and np.isfinite(depth).all() and (depth > 0).all()
            else:
                assert trimesh.load(path).bounds is not None


@pytest.mark.comfyui
def test_the_template_browser(server):
    """It lists the graphs, not their API format, and finds the pictures."""
    assert sorted(server.get("/api/workflow_templates")["mf_diffusers"]) == NAMES
    for name in NAMES:
        path = f"/api/workflow_templates/mf_diffusers/{name}"
        assert server.get(f"{path}.json") == read(name)[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}.jpg", timeout=30) as picture:
            assert picture.headers.get_content_type() == "image/jpeg"
