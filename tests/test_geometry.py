import json
import os
import struct

import numpy as np
import pytest
import trimesh
from PIL import Image

from mf_diffusers.geometry import (
    depth_edges,
    intrinsics_from_fov,
    mesh,
    point_cloud,
    reduced,
    save_glb,
    save_ply,
    unproject,
)


K = np.array([[500.0, 0, 3.25], [0, 400.0, 1.5], [0, 0, 1]])


def step(height=6, width=8):
    """The left half at depth 1, the right half at depth 2."""
    depth = np.ones((height, width), dtype=np.float32)
    depth[:, width // 2 :] = 2
    return depth


@pytest.mark.parametrize("width, height", [(640, 480), (480, 640), (512, 512), (1, 1)])
def test_intrinsics_span_the_longer_side(width, height):
    k = intrinsics_from_fov(width, height, 70)
    outer = max(width, height) / 2  # from the principal point to the outer border of the last pixel
    assert 2 * np.degrees(np.arctan(outer / k[0, 0])) == pytest.approx(70)
    assert k[0, 0] == k[1, 1]
    assert k[:2, 2].tolist() == [(width - 1) / 2, (height - 1) / 2]
    assert k.dtype == np.float64


@pytest.mark.parametrize("arguments", [(0, 5), (5, -1), (5, 5, 0), (5, 5, 180), (5, 5, float("nan"))])
def test_intrinsics_reject(arguments):
    with pytest.raises(ValueError, match=r"width and height|must lie between 0 and 180"):
        intrinsics_from_fov(*arguments)


def test_unproject_inverts_projection():
    depth = np.random.default_rng(0).uniform(1, 5, (4, 7)).astype(np.float32)
    k = K.copy()
    k[0, 1] = 2.5  # skew
    points = unproject(depth, k)
    projected = points.astype(np.float64) @ k.T
    rows, columns = np.mgrid[:4, :7]
    assert np.array_equal(points[..., 2], depth)
    assert np.allclose(projected[..., 0] / depth, columns, atol=1e-4)
    assert np.allclose(projected[..., 1] / depth, rows, atol=1e-4)


def test_unproject_exact_pixel():
    depth = np.zeros((4, 5), dtype=np.float32)
    depth[3, 1] = 8
    points = unproject(depth, [[2, 0, 2], [0, 4, 1], [0, 0, 1]])
    assert points.dtype == np.float32
    assert points[3, 1].tolist() == [(1 - 2) * 8 / 2, (3 - 1) * 8 / 4, 8]
    assert np.count_nonzero(points) == 3


def test_unproject_recovers_a_plane():
    normal, offset = np.array([0.2, -0.5, 1.0]), 3.0
    rows, columns = np.mgrid[:30, :40]
    k = intrinsics_from_fov(40, 30)
    rays = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ np.linalg.inv(k).T
    points = unproject(offset / (rays @ normal), k)
    assert np.allclose(points @ normal, offset, atol=1e-5)


@pytest.mark.parametrize(
    "intrinsics, message",
    [
        (np.eye(4), "3x3"),
        (np.full((3, 3), np.nan), "finite"),
        ([[0, 0, 1], [0, 1, 1], [0, 0, 1]], "no camera matrix"),
        ([[1, 0, 1], [0, -1, 1], [0, 0, 1]], "no camera matrix"),
        (K.T, "no camera matrix"),
    ],
)
def test_unproject_rejects_intrinsics(intrinsics, message):
    with pytest.raises(ValueError, match=message):
        unproject(np.ones((2, 2)), intrinsics)


def test_depth_edges_of_a_step():
    expected = np.zeros((6, 8), dtype=bool)
    expected[:, 3:5] = True
    assert np.array_equal(depth_edges(step()), expected)
    assert not depth_edges(step(), threshold=1).any()
    assert depth_edges(step(), threshold=0.999).any()


def test_depth_edges_against_a_plain_loop():
    rng = np.random.default_rng(0)
    depth = rng.uniform(1, 1.2, (9, 11)).astype(np.float32)
    mask = rng.random((9, 11)) > 0.3
    expected = np.zeros_like(mask)
    for row, column in np.argwhere(mask):
        window = slice(max(row - 1, 0), row + 2), slice(max(column - 1, 0), column + 2)
        values = depth[window][mask[window]]
        expected[row, column] = values.max() - values.min() > np.float32(0.1) * values.min()
    assert expected.any() and (mask & ~expected).any()
    assert np.array_equal(depth_edges(depth, mask), expected)
    assert np.array_equal(depth_edges(np.where(mask, depth, np.nan)), expected)


@pytest.mark.parametrize("pixels", [1, 2, 7, 100, 1000, 2400, 4799])
def test_reduced_to_the_pixels_in_the_middle(pixels):
    rows, columns = np.mgrid[:60, :80].astype(np.float32)
    depth, image = reduced(1 + 100 * rows + columns, Image.linear_gradient("L").resize((80, 60)), pixels)
    assert pixels / 3 < depth.size <= pixels and depth.shape == image.size[::-1]
    row, column = (depth - 1) // 100, (depth - 1) % 100
    expected = (np.arange(depth.shape[0]) + 0.5) * 60 / depth.shape[0] - 0.5
    assert np.abs(row[:, 0] - expected).max() <= 0.5 + 1e-6 and np.abs(np.diff(column[0], n=2)).max(initial=0) <= 1


def test_reduced_invents_no_depth_and_enlarges_nothing():
    depth, image = step(60, 80), Image.new("RGB", (80, 60))
    assert set(np.unique(reduced(depth, image, 500)[0])) == {1, 2}
    for pixels in (4800, 10**9, float("inf")):
        assert reduced(depth, image, pixels) == (depth, image)


def test_edges_of_enlarged_depth_are_cut_where_it_was_made():
    """A jump that bilinear enlargement has made a slope is found again."""
    small = step(24, 32)
    large = np.asarray(Image.fromarray(small).resize((1600, 1200), Image.Resampling.BILINEAR))
    assert not depth_edges(large).any()  # no jump between neighbours is 10 % there
    depth, image = reduced(large, Image.new("RGB", (1600, 1200)), small.size)
    assert depth.shape == (24, 32)
    points, _ = point_cloud(depth, image)
    assert len(points) == 24 * 30 and set(np.unique(points[:, 2])) == {1, 2}


def test_point_cloud_drops_missing_and_edges():
    depth = step()
    depth[0, 0] = np.nan
    mask = np.ones((6, 8), dtype=bool)
    mask[5, 7] = False
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    points, colors = point_cloud(depth, image, mask, intrinsics=K)
    kept = mask & np.isfinite(depth)
    kept[:, 3:5] = False
    assert np.array_equal(points, unproject(depth, K)[kept])
    assert np.array_equal(colors, image[kept])
    assert (points.dtype, colors.dtype) == (np.float32, np.uint8)
    assert len(point_cloud(depth, mask=mask, edge_threshold=None)[0]) == 46


def test_point_cloud_camera_and_gray():
    points, colors = point_cloud(np.full((6, 8), 2.0), fov_degrees=90)
    assert np.allclose(points[[0, -1]], [[-1.75, -1.25, 2], [1.75, 1.25, 2]])  # focal length 4
    assert len(np.unique(colors)) == 1
    assert np.array_equal(point_cloud(np.ones((6, 8)), Image.new("L", (8, 6), 9))[1], np.full((48, 3), 9))


def test_mesh_of_a_plane():
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    vertices, faces, colors = mesh(np.full((6, 8), 3.0), image, intrinsics=K)
    assert (len(vertices), len(faces)) == (48, 2 * 5 * 7)
    assert np.array_equal(colors.reshape(6, 8, 3), image)
    a, b, c = vertices[faces].transpose(1, 0, 2)
    normals = np.cross(b - a, c - a)
    assert (normals[:, 2] < 0).all()  # towards the camera
    assert -normals[:, 2].sum() / 2 == pytest.approx((7 * 3 / 500) * (5 * 3 / 400), rel=1e-5)


def test_mesh_cuts_edges_and_holes():
    vertices, faces, _ = mesh(step())
    assert (len(vertices), len(faces)) == (48, 2 * 5 * 6)
    assert np.ptp(vertices[faces][..., 2], axis=1).max() == 0
    assert len(mesh(step(), edge_threshold=None)[1]) == 2 * 5 * 7
    depth = np.ones((3, 3))
    depth[0, 0] = 0
    vertices, faces, _ = mesh(depth)
    assert (len(vertices), len(faces)) == (8, 7)
    assert np.array_equal(np.unique(faces), np.arange(8))


@pytest.mark.parametrize("build", [point_cloud, mesh])
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"depth": np.ones((2, 3, 4))}, "is no depth map"),
        ({"depth": np.zeros((4, 4))}, "none of .* is left"),
        ({"depth": np.ones((4, 4)), "mask": np.zeros((4, 4))}, "none of .* is left"),
        ({"depth": np.array([[1, 2], [4, 8]])}, "raise edge_threshold"),
        ({"depth": np.ones((4, 4)), "mask": np.ones((4, 5))}, "mask of shape"),
        ({"depth": np.ones((4, 5)), "image": np.ones((5, 4, 3), np.uint8)}, "does not fit depth of 5x4 pixels"),
        ({"depth": np.ones((4, 5)), "image": np.ones((4, 5, 3))}, "float64 does not fit"),
        ({"depth": np.ones((4, 5)), "image": Image.new("RGB", (4, 5))}, "does not fit depth of 5x4 pixels"),
        ({"depth": np.ones((4, 5)), "fov_degrees": 190}, "fov_degrees=190"),
        ({"depth": np.ones((4, 5)), "intrinsics": np.eye(2)}, "3x3"),
        ({"depth": np.ones((4, 5)), "edge_threshold": 0}, "edge_threshold=0 must be a positive number"),
    ],
)
def test_clouds_and_meshes_reject(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_mesh_of_one_row():
    with pytest.raises(ValueError, match="none of 0 triangles"):
        mesh(np.ones((1, 5)))


def test_ply_round_trip(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    points, colors = point_cloud(step(), image)
    save_ply(tmp_path / "a.ply", points, colors)
    assert (tmp_path / "a.ply").read_bytes().startswith(b"ply\nformat binary_little_endian")
    cloud = trimesh.load(tmp_path / "a.ply")
    assert np.array_equal(cloud.vertices, points * [1, -1, -1])
    assert np.array_equal(cloud.colors[:, :3], colors)


def test_glb_round_trip(tmp_path):
    image = np.zeros((6, 8, 3), dtype=np.uint8)
    image[:3] = (255, 128, 0)
    vertices, faces, colors = mesh(step(), image)
    save_glb(tmp_path / "a.glb", vertices, faces, colors)
    surface = trimesh.load(tmp_path / "a.glb", force="mesh", process=False, skip_materials=True)
    assert np.array_equal(surface.vertices, vertices * np.float32([1, -1, -1]))
    assert np.array_equal(surface.faces, faces)
    assert np.array_equal(surface.bounds[:, 2], [-2, -1])  # before the camera, which looks along -z
    linear = surface.visual.vertex_colors[:, :3]
    upright = surface.vertices[:, 1] > 0  # the upper half of the picture
    assert (linear[upright] == [255, 55, 0]).all()  # 128 of 255 in sRGB is a linear 0.216
    assert not linear[~upright].any()


def test_glb_is_unlit(tmp_path):
    save_glb(tmp_path / "a.glb", *mesh(np.ones((2, 2))))
    data = (tmp_path / "a.glb").read_bytes()
    header = json.loads(data[20 : 20 + struct.unpack("<I", data[12:16])[0]])
    primitive = header["meshes"][0]["primitives"][0]
    assert set(primitive["attributes"]) == {"POSITION", "COLOR_0"}
    assert "KHR_materials_unlit" in header["materials"][primitive["material"]]["extensions"]
    assert header["extensionsUsed"] == ["KHR_materials_unlit"]


POINTS = np.ones((4, 3), dtype=np.float32)
COLORS = np.ones((4, 3), dtype=np.uint8)
FACES = np.array([[0, 1, 2], [1, 2, 3]])


@pytest.mark.parametrize(
    "name, points, colors, message",
    [
        ("a.obj", POINTS, COLORS, "must end in"),
        ("a", POINTS[:, :2], COLORS, r"points of shape \(4, 2\)"),
        ("a", POINTS[:0], COLORS[:0], r"points of shape \(0, 3\)"),
        ("a", POINTS * np.nan, COLORS, "12 coordinates are not finite"),
        ("a", POINTS, COLORS[:3], r"colors of shape \(3, 3\)"),
        ("a", POINTS, COLORS / 255, "float64 must be uint8"),
    ],
)
def test_saving_rejects(tmp_path, name, points, colors, message):
    names = (name, name) if "." in name else (f"{name}.ply", f"{name}.glb")
    with pytest.raises(ValueError, match=message):
        save_ply(tmp_path / names[0], points, colors)
    with pytest.raises(ValueError, match=message):
        save_glb(tmp_path / names[1], points, FACES, colors)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "faces, message",
    [
        (FACES + 1, r"name vertices 1\.\.4, but there are 0\.\.3"),
        (FACES - 1, r"name vertices -1\.\.2"),
        (FACES[:, :2], r"faces of shape \(2, 2\)"),
        (FACES[:0], r"faces of shape \(0, 3\)"),
        (FACES * 1.0, "float64 must be integers"),
    ],
)
def test_save_glb_rejects_faces(tmp_path, faces, message):
    with pytest.raises(ValueError, match=message):
        save_glb(tmp_path / "a.glb", POINTS, faces, COLORS)


def test_saving_into_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        save_ply(tmp_path / "nowhere" / "a.ply", POINTS, COLORS)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        save_glb(tmp_path / "nowhere" / "a.glb", POINTS, FACES, COLORS)
