"""What the node pack does without ComfyUI: streams, depth sockets, and the pack's own files."""

import math
import re
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from comfyui_nodes import core
from comfyui_nodes.core import OLDEST, WHOLE_PACK, missing, state_of_the_core, state_of_the_packages
from comfyui_nodes.depth_sockets import (
    depth_from_image,
    fov_of,
    geometry_from_depth,
    image_from_depth,
    image_from_socket,
    known_depth,
    points_from_depth,
)
from comfyui_nodes.streams import DEPTH_STRENGTHS, Streams, held_at, log2_alpha_between
from mf_diffusers.modality_forcing.depth_processor import DepthProcessor
from mf_diffusers.modality_forcing.noise import add_noise, shift_timestep, velocity_from_clean


PACK = Path(__file__).parents[1] / "comfyui_nodes"
PYPROJECT = (PACK.parent / "pyproject.toml").read_text(encoding="utf-8")
PROCESSOR = DepthProcessor()
SHAPES = [(2, 4, 2, 3), (2, 1, 8, 12)]


def masks(image=1.0, depth=1.0):
    return Streams.join(torch.full(SHAPES[0], image), torch.full(SHAPES[1], depth))


def latents(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


# Streams


@pytest.mark.parametrize("log2_alpha", [-14.0, -5.0, 0.0, 5.0, 14.0])
def test_depth_that_is_made_lags_behind(log2_alpha):
    """What the sampler carries is a flow at sigma; what the model sees is depth at the trajectory's level."""
    streams = Streams(SHAPES, masks(), log2_alpha)
    clean, noise = latents(0), latents(1)
    carried = streams.to_sampler(*clean, given=torch.zeros_like(masks()))
    for sigma in (1.0, 0.9, 0.3, 0.01):
        sigma = torch.full((2,), sigma)
        sampled = add_noise(carried, Streams.join(*noise), sigma)
        image, depth = streams.to_model(sampled, sigma, masks(), masks())
        image_level, depth_level = streams.levels(sigma)
        assert torch.equal(image_level, sigma)
        assert torch.allclose(depth_level, shift_timestep(sigma, 2.0**log2_alpha))
        torch.testing.assert_close(image, add_noise(clean[0], noise[0], sigma))
        torch.testing.assert_close(depth, add_noise(clean[1], noise[1], depth_level), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(carried * streams.scale, Streams.join(*clean))


@pytest.mark.parametrize("log2_alpha", [-5.0, 5.0])
def test_euler_steps_are_those_of_the_trajectory(log2_alpha):
    """Euler steps over sigma, of what is carried, are the Euler steps of depth over its own levels; floor included."""
    streams, given = Streams(SHAPES, masks(), log2_alpha), masks()
    noise, target = latents(1), latents(2)
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.04, 0.0])
    sampled, depth = Streams.join(*noise), noise[1].clone()
    levels = [streams.levels(sigma.expand(2))[1] for sigma in sigmas]
    for i in range(5):
        sigma = sigmas[i].expand(2)
        _, seen = streams.to_model(sampled, sigma, given, given)
        torch.testing.assert_close(seen, depth, rtol=1e-4, atol=1e-4)
        estimate = torch.tanh(depth) + target[1]  # any denoiser
        velocity = velocity_from_clean(depth, estimate, levels[i])
        clean = streams.to_sampler(target[0], depth - levels[i].view(-1, 1, 1, 1) * velocity, given)
        depth = depth + (levels[i + 1] - levels[i]).view(-1, 1, 1, 1) * velocity
        sampled = sampled + (sampled - clean) * (sigmas[i + 1] - sigmas[i]) / sigmas[i]
    torch.testing.assert_close(streams.split(sampled * streams.scale)[1], depth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("strength", "log2_alpha"), DEPTH_STRENGTHS.items())
def test_given_depth_is_held(strength, log2_alpha):
    mask = masks(depth=held_at(strength))
    _, holes = Streams(SHAPES, mask, 5.0).split(mask)
    holes[:, :, 2:4, 3] = 1  # a view
    streams = Streams(SHAPES, mask, 5.0)
    clean, noise = latents(0), latents(1)
    for sigma in (1.0, 0.6, 0.1):
        sigma = torch.full((2,), sigma)
        _, depth = streams.to_model(masks(), sigma, Streams.join(*clean), Streams.join(*noise))
        level = streams.levels(sigma)[1]
        expected = torch.zeros(2) if log2_alpha is None else shift_timestep(sigma, 2.0**log2_alpha)
        torch.testing.assert_close(level, expected)
        assert torch.equal(depth[:, :, 2:4, 3], noise[1][:, :, 2:4, 3])
        expected = add_noise(clean[1], noise[1], level)
        assert torch.equal(depth[:, :, 5:], clean[1][:, :, 5:] if log2_alpha is None else expected[:, :, 5:])
    # Its estimate is what was given, so the sampler arrives there.
    _, estimate = streams.split(streams.to_sampler(*latents(2), Streams.join(*clean)))
    assert torch.equal(estimate, clean[1])


def test_depth_beside_a_given_image_walks_sigma():
    streams = Streams(SHAPES, masks(image=0.0), 5.0)
    sigma, given = torch.full((2,), 0.7), Streams.join(*latents(0))
    sampled = Streams.join(*latents(1))
    image, depth = streams.to_model(sampled, sigma, given, sampled)
    assert torch.equal(image, latents(0)[0]) and torch.allclose(depth, latents(1)[1])
    image_level, depth_level = streams.levels(sigma)
    assert torch.equal(image_level, torch.zeros(2)) and torch.allclose(depth_level, sigma)
    assert torch.equal(streams.scale, torch.ones_like(sampled))


@pytest.mark.parametrize(("level", "strength"), [(0.7, 0.3), (0.4, 0.9), (0.5, 0.5)])
def test_depth_starts_at_a_level_of_its_own(level, strength):
    """Before the trajectory's warp, which then follows."""
    log2_alpha = 2.0 + log2_alpha_between(level, strength)
    start = Streams(SHAPES, masks(), log2_alpha).levels(torch.full((2,), level))[1]
    torch.testing.assert_close(start, shift_timestep(torch.full((2,), strength), 4.0))


def test_samples_of_a_batch_may_differ():
    mask = masks()
    mask[0, :, : math.prod(SHAPES[0][1:])] = 0
    streams = Streams(SHAPES, mask, 5.0)
    assert streams.image_given.tolist() == [True, False] and streams.alpha.tolist() == [1.0, 32.0]
    image_level, depth_level = streams.levels(torch.full((2,), 0.5))
    assert image_level.tolist() == [0.0, 0.5] and torch.allclose(depth_level, torch.tensor([0.5, 32 / 33]))
    # Part of an image being kept is inpainting, which ComfyUI does: the stream is made.
    mask[1, :, :5] = 0
    assert Streams(SHAPES, mask, 5.0).image_given.tolist() == [True, False]


def test_masks_that_do_not_fit():
    with pytest.raises(ValueError, match="nothing is left to make"):
        Streams(SHAPES, masks(0.0, 0.0), 5.0).check()
    mask = masks(depth=0.0)
    mask[0, 0, -1] = 0.5
    with pytest.raises(ValueError, match="has several values"):
        Streams(SHAPES, mask, 5.0).check()
    mask[0, 0, -1] = 1
    Streams(SHAPES, mask, 5.0).check()


# Depth sockets


def plane(height=12, width=20, batch=2):
    return torch.linspace(1, 3, height * width).view(1, height, width, 1).expand(batch, -1, -1, 3).clone()


def test_depth_pictures():
    image = plane()
    image[0, 2, 3], image[0, 2, 4], image[0, 2, 5], image[1, 0, 0] = torch.nan, torch.inf, -1, 0
    mask = torch.ones(1, 12, 20)
    mask[0, 5, 5] = 0
    depth, valid = depth_from_image(image, mask)
    assert depth.shape == valid.shape == (2, 1, 12, 20)
    assert not valid[0, 0, 2, 3:6].any() and not valid[:, 0, 5, 5].any() and not valid[1, 0, 0, 0]
    assert valid.sum() == 2 * 240 - 6 and torch.equal(depth > 0, valid)
    assert torch.equal(image_from_depth(depth)[1, 3], image[1, 3])
    colour = plane()
    colour[..., 2] += 0.1
    with pytest.raises(ValueError, match="A colour picture is connected as depth"):
        depth_from_image(colour)
    with pytest.raises(ValueError, match=r"mask has shape \[3, 12, 20\], the depth \[2, 12, 20\]"):
        depth_from_image(image, torch.ones(3, 12, 20))


def test_inverse_depth():
    image = plane()
    image[:, :2, :3] = 0
    assert torch.equal(known_depth(image, None), image[..., :1].movedim(-1, 1))
    torch.testing.assert_close(known_depth(1 / image, None, inverse=True)[:, :, 2:], known_depth(image, None)[:, :, 2:])
    assert (known_depth(1 / image, None, inverse=True)[:, :, :2, :3] == 0).all()  # inf is at the camera


def test_geometry_is_depth_too():
    depth, valid = depth_from_image(plane())
    valid[:, :, 3:5] = False
    geometry = geometry_from_depth(depth, valid)
    assert geometry["image"].shape == (2, 12, 20, 3)
    back, kept = depth_from_image(*image_from_socket(geometry))
    assert torch.equal(kept, valid) and torch.equal(back[valid], depth[valid])
    mask = torch.ones(2, 12, 20)
    mask[:, 0] = 0
    assert torch.equal(depth_from_image(*image_from_socket(geometry, mask))[1], valid & (mask != 0)[:, None])
    image, mask = image_from_socket(plane(), None)
    assert torch.equal(image, plane()) and mask is None
    with pytest.raises(ValueError, match="no depth, but points alone"):
        image_from_socket({"points": torch.zeros(1, 2, 2, 3)})


@pytest.mark.parametrize("size", [(12, 20), (20, 12)])
def test_the_field_of_view_of_a_geometry(size):
    _, geometry = points_from_depth(plane(*size), fov=47.0)
    assert fov_of(geometry) == pytest.approx(47.0)
    with pytest.raises(ValueError, match="Give the `fov`"):
        fov_of(plane())


def test_points():
    depth = plane()
    depth[:, :, 10:] *= 4  # a jump
    valid = torch.ones(2, 12, 20)
    valid[:, 0] = 0
    colors = torch.rand(1, 12, 20, 3)
    files, geometry = points_from_depth(depth, valid, colors, fov=60, edge_threshold=0.5)
    assert len(files) == 2 and geometry["mask"].shape == (2, 12, 20)
    for ply, mask in zip(files, geometry["mask"]):
        cloud = trimesh.load(BytesIO(ply), file_type="ply")
        assert len(cloud.vertices) == mask.sum() == 11 * 18  # without the first row, and the two columns of the jump
        assert np.array_equal(cloud.colors[:, :3], (colors[0][mask] * 255).round().numpy())
    mask = geometry["mask"]
    assert torch.isinf(geometry["points"][~mask]).all() and torch.isinf(geometry["depth"][~mask]).all()
    # The camera, in ComfyUI's units, takes every point back to the centre of its pixel.
    pixels = torch.einsum("bij,bhwj->bhwi", geometry["intrinsics"], geometry["points"])
    pixels = pixels[..., :2] / geometry["depth"][..., None]
    rows, columns = torch.meshgrid((torch.arange(12) + 0.5) / 12, (torch.arange(20) + 0.5) / 20, indexing="ij")
    torch.testing.assert_close(pixels[mask], torch.stack([columns, rows], -1).expand(2, -1, -1, -1)[mask])
    torch.testing.assert_close(geometry["depth"][mask], depth[..., 0][mask])
    assert geometry["image"].shape == (2, 12, 20, 3)

    everything, _ = points_from_depth(depth[:1], edge_threshold=None)
    assert len(trimesh.load(BytesIO(everything[0]), file_type="ply").vertices) == 240
    with pytest.raises(ValueError, match="connect the image that belongs to the depth"):
        points_from_depth(depth, colors=torch.rand(1, 6, 10, 3))


# The pack's own files


def node_ids():
    sources = (path.read_text(encoding="utf-8") for path in PACK.glob("*_nodes.py"))
    return re.findall(r'node_id="(\w+)"', "".join(sources))


def test_every_node_has_a_help_page():
    assert len(node_ids()) == 14 and all(name.startswith("ModalityForcing") for name in node_ids())
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (PACK / "web" / "docs").glob("*.md")}
    assert set(pages) == set(node_ids())
    assert all(page.startswith("# ") and len(page) > 300 for page in pages.values())


def test_nodes_that_need_no_diffusers_do_not_import_it():
    """ComfyUI imports every pack as it starts."""
    code = "import sys, comfyui_nodes.depth_sockets, comfyui_nodes.streams; print('diffusers' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACK.parent).stdout
        == "False\n"
    )


# The core


def test_what_the_core_has_lost_is_named():
    names = {"json.dumps": ("obj", "indent"), "json.melt": (), "absent.module": (), "fractions.Fraction.limit": ()}
    assert list(missing(names)) == ["json.melt", "absent.module", "fractions.Fraction.limit"]
    assert list(missing({"pathlib.Path.read_text": ("encoding", "colour")})) == ["pathlib.Path.read_text(colour)"]
    assert list(missing({"json.dumps": ("colour",)})) == []  # it takes any keyword


def test_a_core_that_does_not_serve_is_named_in_one_line(monkeypatch):
    assert state_of_the_core("0.26.9") == (
        False,
        ["Modality Forcing needs ComfyUI 0.27 or newer, and this is 0.26.9: update ComfyUI."],
    )
    fine = {"json.dumps": ("obj",)}
    monkeypatch.setattr(core, "LEANS_ON", {WHOLE_PACK: fine, "'Load It'": fine})
    assert state_of_the_core("0.27.0") == state_of_the_core("1.2.3-dev") == (True, [])
    monkeypatch.setattr(core, "LEANS_ON", {WHOLE_PACK: fine, "'Load It'": {"json.melt": ()}})
    works, (line,) = state_of_the_core("0.50.1")
    assert works and "ComfyUI 0.50.1" in line and "'Load It' may not work (json.melt; tested with" in line
    assert core.serves(WHOLE_PACK) and not core.serves("'Load It'")
    monkeypatch.setattr(core, "LEANS_ON", {WHOLE_PACK: {"json.dumps": (), "pathlib.Path.read_text": ("colour",)}})
    works, (line,) = state_of_the_core("0.50.1")
    assert works and "the whole pack may not work (pathlib.Path.read_text(colour); tested with" in line
    monkeypatch.setattr(core, "LEANS_ON", {WHOLE_PACK: {"json.melt": ()}})
    assert not state_of_the_core("0.50.1")[0]


def test_the_oldest_core_is_that_of_the_registry():
    assert f'requires-comfyui = ">={OLDEST}.0"' in PYPROJECT


# Installation


def test_requirements_are_those_of_the_package():
    dependencies = re.search(r"^dependencies = \[(.*?)^\]", PYPROJECT, re.DOTALL | re.MULTILINE)[1]
    listed = (PACK.parent / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in listed if not line.startswith("#")] == re.findall(r'"(.+)"', dependencies)


def test_a_missing_package_is_named_with_the_remedy(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text("# A list.\ntorch>=1.0\nnumpy>=1.0\n")
    assert state_of_the_packages(file) == (True, [])
    file.write_text("torch>=1.0\nno-such-package>=2.0\nnumpy>=99.0\nnone-either\n")
    works, (absent, old) = state_of_the_packages(file)
    assert not works
    assert "needs packages that are not installed (no-such-package; none-either): run" in absent
    assert f'-m pip install -r "{file}" and restart ComfyUI.' in absent
    assert "may not work with older packages (numpy>=99.0, and " in old
    file.write_text("numpy>=99.0\n")
    assert state_of_the_packages(file)[0]


def test_the_registrys_archive_is_small():
    """What `comfy node publish` sends: files under git without those of .comfyignore, in less than 20 MB."""
    lines = (PACK.parent / ".comfyignore").read_text(encoding="utf-8").splitlines()
    ignored = tuple(line for line in lines if not line.startswith("#"))
    done = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=PACK.parent)
    if done.returncode:
        pytest.skip("this is no git checkout")
    names = [name for name in done.stdout.splitlines() if not name.startswith(ignored)]
    assert {"__init__.py", "requirements.txt", "workflows/text_to_rgbd.json"} <= set(names)
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name in names:
            file.write(PACK.parent / name, name)
    assert archive.tell() < 20e6
