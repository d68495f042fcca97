"""Procedural scenes: determinism, exact depth, true captions. The checks of geometry are float64 NumPy of their own."""

import re
from dataclasses import asdict

import numpy as np
import pytest
import torch

from finetune.scenes import SPLITS, VOCABULARY, render_scenes, renderer
from finetune.scenes.captions import MIN_VISIBLE, NUMBERS, RELATIONS
from finetune.scenes.scene import CEILING, FIRST_OBJECT, FLOOR, PATTERNS, SHAPES, SKY, WALL, sample_scene


def nearly_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to rounding, which may tip a ray at the edge of an object to either side."""
    return (torch.isclose(a, b, rtol=1e-3, atol=5e-3)).float().mean() > 0.998


def test_scene_does_not_depend_on_its_batch():
    batch = render_scenes([9, 2, 30, 4, 17], seed=3, height=48, width=48)
    for position, index in enumerate([9, 2, 30, 4, 17]):
        alone = render_scenes([index], seed=3, height=48, width=48)
        assert nearly_equal(alone.image[0], batch.image[position])
        assert nearly_equal(alone.depth[0], batch.depth[position])
        assert alone.captions[0] == batch.captions[position]


def test_chunks_do_not_change_the_result(monkeypatch):
    whole = render_scenes(range(6), height=32, width=32)
    monkeypatch.setitem(renderer.RAYS_PER_CHUNK, "cpu", 1)
    parts = render_scenes(range(6), height=32, width=32)
    assert nearly_equal(whole.image, parts.image)
    assert nearly_equal(whole.depth, parts.depth)


def test_seeds_indices_and_splits_share_no_scene():
    views = [
        tuple(sample_scene(index, seed, split).camera_position)
        for split in SPLITS
        for seed in range(4)
        for index in range(25)
    ]
    assert len(set(views)) == len(views)
    assert len(set(SPLITS.values())) == len(SPLITS)
    np.testing.assert_equal(asdict(sample_scene(7, 1)), asdict(sample_scene(7, 1)))
    with pytest.raises(ValueError, match="index"):
        sample_scene(2**32)


def test_shapes_and_ranges():
    batch = render_scenes(range(20), height=40, width=56)
    assert batch.image.shape == (20, 3, 40, 56)
    assert batch.depth.shape == (20, 1, 40, 56)
    assert batch.depth.dtype == torch.float32
    assert batch.image.min() >= 0
    assert batch.image.max() <= 1
    assert 0.2 < batch.image.mean() < 0.8
    assert (batch.depth > 0).all()
    assert torch.equal(batch.depth[:, 0].isinf(), batch.surfaces == SKY)
    assert not batch.depth.isnan().any()
    fov = 2 * torch.rad2deg(torch.atan(28 / batch.intrinsics[:, 0, 0]))
    assert fov.min() >= 40
    assert fov.max() <= 80


def test_crop_of_the_square_view():
    """At equal width a lower image is the middle of the square one, and so is its camera."""
    square, wide = render_scenes(range(8), height=48, width=48), render_scenes(range(8), height=24, width=48)
    tall = render_scenes(range(8), height=96, width=48)
    assert nearly_equal(square.depth[:, :, 12:36], wide.depth)
    assert nearly_equal(square.image[:, :, 12:36], wide.image)
    assert nearly_equal(tall.depth[:, :, 24:72], square.depth)
    shift = square.intrinsics - wide.intrinsics
    assert shift[0, 1, 2] == 12
    assert shift.count_nonzero() == 8


def signed_distance(solid, points: np.ndarray) -> np.ndarray:
    """Negative inside, 0 on the surface, positive outside a solid, at points (n, 3)."""
    offset = points - solid.centre
    c, s = np.cos(solid.yaw), np.sin(solid.yaw)
    x, y, z = c * offset[:, 0] + s * offset[:, 1], c * offset[:, 1] - s * offset[:, 0], offset[:, 2]
    a, b, h = solid.size
    rho = np.hypot(x, y)
    if solid.shape == "box":
        return np.max([abs(x) - a, abs(y) - b, abs(z) - h], axis=0)
    if solid.shape == "sphere":
        return np.sqrt(x * x + y * y + z * z) - a
    if solid.shape == "cylinder":
        return np.maximum(rho - a, abs(z) - h)
    return np.maximum((rho * 2 * h - a * (h - z)) / np.hypot(2 * h, a), -h - z)


def unproject(scene, depth: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """World points (H, W, 3) at z-depths (H, W)."""
    rows, columns = np.mgrid[: depth.shape[0], : depth.shape[1]]
    rays = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ np.linalg.inv(intrinsics).T
    return (rays * depth[..., None]) @ scene.camera_rotation.T + scene.camera_position


@pytest.mark.parametrize("seed", range(4))
def test_depth_lies_on_the_surfaces_with_nothing_before_it(seed):
    indices = range(25)
    batch = render_scenes(indices, seed=seed, height=24, width=32, supersample=1)
    for index, depth, surfaces, intrinsics in zip(indices, batch.depth, batch.surfaces.numpy(), batch.intrinsics):
        scene = sample_scene(index, seed)
        depth = np.minimum(depth[0].numpy().astype(np.float64), 1e3)  # finite in the sky too
        points, tolerance = unproject(scene, depth, intrinsics.numpy()), 1e-4 * (1 + depth)
        assert (abs(points[..., 2]) < tolerance)[surfaces == FLOOR].all()
        assert (abs(points[..., 2] - scene.high[2]) < tolerance)[surfaces == CEILING].all()
        walls = np.minimum(abs(points - scene.low), abs(points - scene.high))[..., :2].min(-1)
        assert (walls < tolerance)[surfaces == WALL].all()
        for k, solid in enumerate(scene.objects):
            mine = surfaces == FIRST_OBJECT + k
            assert (abs(signed_distance(solid, points[mine])) < tolerance[mine]).all()
        for share in np.linspace(0.02, 0.999, 80):  # march along the rays; those into the sky for 40 metres
            before = unproject(scene, share * np.minimum(depth, 40), intrinsics.numpy()).reshape(-1, 3)
            assert (before[:, 2] > -1e-3).all()
            assert all((signed_distance(solid, before) > -2e-3).all() for solid in scene.objects)


def test_objects_rest_and_do_not_intersect():
    for index in range(100):
        objects = sample_scene(index).objects
        assert 1 <= len(objects) <= 5
        for k, solid in enumerate(objects):
            bottom = solid.centre[2] - solid.size[2]
            below = None if solid.support is None else objects[solid.support]
            assert bottom == pytest.approx(0 if below is None else below.centre[2] + below.size[2])
            for other in objects[:k]:
                if solid.support is None and other.support is None:
                    assert np.linalg.norm((solid.centre - other.centre)[:2]) > solid.radius + other.radius


COUNTS = {"a": 1, "an": 1, **{word: number for number, word in NUMBERS.items()}}
SHAPE_OF = {word: shape for shape, words in SHAPES.items() for word in words} | {"cube": "box"}
SHAPE_WORD = "(?:" + "|".join(SHAPE_OF) + ")(?:e?s)?"
NOUN = rf"\b(?:{'|'.join(COUNTS)}) (?:(?!and |on |in |of )\w+ )*?{SHAPE_WORD}\b"
RELATION_OF = {words: name for name, group in RELATIONS.items() for words in group}
RELATION = "|".join(sorted(RELATION_OF, key=len, reverse=True))


def objects_named(phrase: str, scene, shares) -> list[int]:
    """Visible objects that a noun phrase fits, by colour, pattern, finish and shape."""
    words = phrase.split()
    shape = SHAPE_OF[re.sub("(?<=x)es$|s$", "", words[-1])]
    patterns = [word for word in words if word in PATTERNS] or ["plain"]
    return [
        k
        for k, o in enumerate(scene.objects)
        if o.shape == shape
        and o.material.colour in words
        and o.material.pattern == patterns[0]
        and (o.material.finish == "metal") == ("metal" in words)
        and shares[FIRST_OBJECT + k] > MIN_VISIBLE
    ]


@pytest.fixture(scope="module")
def captioned():
    """(scene, caption, surfaces (H, W), depth (H, W)) of many scenes."""
    batch = render_scenes(range(500), seed=11, height=32, width=32, supersample=1)
    found = [sample_scene(index, 11) for index in range(500)]
    return list(zip(found, batch.captions, batch.surfaces.numpy(), batch.depth[:, 0].numpy()))


def test_captions_keep_to_the_vocabulary(captioned):
    assert len(VOCABULARY) < 150
    for _, caption, _, _ in captioned:
        words = caption.replace(",", "").split()
        assert set(words) <= VOCABULARY
        assert 4 <= len(words) <= 25
        assert caption == caption.lower()
    used = {word for _, caption, _, _ in captioned for word in caption.replace(",", "").split()}
    assert VOCABULARY - used <= {"five", "four"} | {"wide", "view"}  # the rarest


def test_captions_count_what_is_visible(captioned):
    several = 0
    for scene, caption, surfaces, _ in captioned:
        shares = np.bincount(surfaces.flatten(), minlength=FIRST_OBJECT + 5) / surfaces.size
        phrases = re.findall(NOUN, caption)
        assert phrases or "wide view" in caption
        for phrase in phrases:
            assert len(objects_named(phrase, scene, shares)) == COUNTS[phrase.split()[0]], caption
            several += COUNTS[phrase.split()[0]] > 1
        if "wall" in caption:
            assert (surfaces == WALL).any()
        if "sky" in caption:
            assert (surfaces == SKY).any()
    assert several > 50


def test_relations_hold_in_the_image(captioned):
    seen = dict.fromkeys(RELATIONS, 0)
    for scene, caption, surfaces, depth in captioned:
        shares = np.bincount(surfaces.flatten(), minlength=FIRST_OBJECT + 5) / surfaces.size
        for first, words, second in re.findall(rf"({NOUN}) (?:is )?({RELATION}) ({NOUN})", caption):
            (i,), (j,) = (objects_named(phrase, scene, shares) for phrase in (first, second))
            masks = [surfaces == FIRST_OBJECT + k for k in (i, j)]
            columns = [np.nonzero(mask)[1].mean() for mask in masks]
            depths = [np.median(depth[mask]) for mask in masks]
            relation = RELATION_OF[words]
            holds = {
                "left": columns[0] < columns[1],
                "right": columns[0] > columns[1],
                "behind": depths[0] > depths[1],
                "front": depths[0] < depths[1],
                "top": scene.objects[i].support == j,
            }
            assert holds[relation], caption
            seen[relation] += 1
    assert min(seen.values()) > 5, seen
