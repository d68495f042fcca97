"""Readers of the benchmarks on small files written by hand in the documented formats, and the pixels that count."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from dataset_files import write_picture, write_png16
from PIL import Image
from scipy.io import savemat

from mf_diffusers.datasets.benchmarks import DIODE, ETH3D, KITTI, MoGeLayout, NYUv2, ScanNet800
from mf_diffusers.datasets.folder import Folder, fit_depth
from mf_diffusers.datasets.frame import Frame
from mf_diffusers.evaluation.protocol import BENCHMARKS, Protocol
from mf_diffusers.evaluation.views import center_crop, moge_view
from mf_diffusers.geometry import unproject
from mf_diffusers.visualization import colorize_depth


RGBD = Path(__file__).parents[2] / "shared" / "data" / "rgbd"


def test_nyuv2(tmp_path):
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 3, 6, 5), dtype=np.uint8)  # (N, 3, W, H), as MATLAB's H x W x 3 x N is stored
    raw, filled = rng.uniform(1, 9, (2, 4, 6, 5)).astype(np.float32)
    raw[2, 1, 3] = 0
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"], file["rawDepths"], file["depths"] = images, raw, filled
    savemat(tmp_path / "splits.mat", {"trainNdxs": np.array([[1], [4]]), "testNdxs": np.array([[2], [3]])})
    test = NYUv2(tmp_path)
    assert test.names == ["0002", "0003"]
    frame = test[1]
    assert frame.image.shape == (5, 6, 3)
    assert frame.image[3, 1].tolist() == images[2, :, 1, 3].tolist()
    assert frame.depth[4, 2] == raw[2, 2, 4]
    assert frame.depth[3, 1] == 0
    assert NYUv2(tmp_path, split="train").names == ["0001", "0004"]
    (tmp_path / "splits.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"splits\.mat"):
        len(NYUv2(tmp_path))


def test_kitti(tmp_path):
    drive = "2011_09_26/2011_09_26_drive_0002_sync/image_02/data"
    truth = "2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02"
    lines = [
        f"{drive}/0000000069.png {truth}/0000000069.png 721.5377",
        f"{drive}/0000000054.png None 721.5377",
        f"{drive}/0000000042.png {truth}/0000000042.png 721.5377",
    ]
    (tmp_path / "eigen_test_files_with_gt.txt").write_text("\n".join(lines))
    pixels = write_picture(tmp_path / drive / "0000000069.png", 3, 2)
    write_picture(tmp_path / drive / "0000000054.png", 3, 2)
    write_picture(tmp_path / drive / "0000000042.png", 3, 2)
    write_png16(tmp_path / "val" / truth / "0000000069.png", [[0, 256, 2560], [1, 65535, 300]])
    (tmp_path / "2011_09_26" / "calib_cam_to_cam.txt").write_text(
        "calib_time: 09-Jan-2012 13:57:47\nP_rect_02: 721.5 0 609.5 44.8 0 721.5 172.8 0.2 0 0 1 0.003\n"
    )
    frames = KITTI(tmp_path)
    assert len(frames) == 3
    frame = frames[frames.names.index(f"{drive}/0000000069")]
    assert (frame.image == pixels).all()
    assert frame.depth.tolist() == [[0, 1, 10], [1 / 256, 65535 / 256, 300 / 256]]
    assert frame.intrinsics.tolist() == [[721.5, 0, 609.5], [0, 721.5, np.float32(172.8)], [0, 0, 1]]
    assert not frames[frames.names.index(f"{drive}/0000000054")].depth.any()  # has no improved depth
    with pytest.raises(ValueError, match=r"0000000042.*no such file"):
        frames[frames.names.index(f"{drive}/0000000042")]


@pytest.mark.parametrize("marigold", [False, True])
def test_eth3d(tmp_path, marigold):
    pictures, depths = ("rgb/office", "depth/office_dslr_depth/office") if marigold else ("office", "office")
    exif = Image.Exif()
    exif[274] = 6  # turned: the depth lies as the sensor does, so this must not matter
    path = tmp_path / pictures / "images" / "dslr_images" / "DSC_0219.JPG"
    write_picture(path, 4, 2, quality=95, exif=exif)
    values = [1.5, math.inf, 3, 4, 5, 6, 7, 8.25]
    truth = tmp_path / depths / "ground_truth_depth" / "dslr_images" / "DSC_0219.JPG"
    truth.parent.mkdir(parents=True)
    truth.write_bytes(struct.pack("<8f", *values))
    frames = ETH3D(tmp_path)
    assert frames.names == [f"{pictures}/DSC_0219"]
    assert frames[0].depth.tolist() == [[1.5, 0, 3, 4], [5, 6, 7, 8.25]]
    assert frames[0].intrinsics is None
    truth.write_bytes(truth.read_bytes()[:-4])
    with pytest.raises(ValueError, match="7 values, for a picture of 4x2"):
        frames[0]


def test_scannet(tmp_path):
    lines = ["scene0406_02/color/000300.jpg scene0406_02/depth/000300.png"]
    (tmp_path / "scannet_val_sampled_list_800_1.txt").write_text("\n".join(lines) + "\n")
    write_picture(tmp_path / "scene0406_02" / "color" / "000300.jpg", 8, 6)  # of twice the size of the depth
    write_png16(tmp_path / "scene0406_02" / "depth" / "000300.png", [[0, 1000, 2500, 1]] * 3)
    frames = ScanNet800(tmp_path)
    assert frames.names == ["scene0406_02/color/000300"]
    assert frames[0].image.shape == (3, 4, 3)
    np.testing.assert_allclose(frames[0].depth, [[0, 1, 2.5, 0.001]] * 3)
    assert frames[0].intrinsics is None
    camera = tmp_path / "scene0406_02" / "intrinsic" / "intrinsic_depth.txt"
    camera.parent.mkdir()
    camera.write_text("577 0 319.5 0\n0 578 239.5 0\n0 0 1 0\n0 0 0 1\n")
    assert frames[0].intrinsics.tolist() == [[577, 0, 319.5], [0, 578, 239.5], [0, 0, 1]]


def test_diode(tmp_path):
    for scene, kind in (("00019", "indoors"), ("00022", "outdoor")):
        stem = f"{kind}/scene_{scene}/scan_00183/{scene}_00183_{kind}_000_010"
        write_picture(tmp_path / f"{stem}.png", 3, 2)
        np.save(tmp_path / f"{stem}_depth.npy", np.arange(6, dtype=np.float32).reshape(2, 3, 1) + 1)
        np.save(tmp_path / f"{stem}_depth_mask.npy", np.array([[1.0, 0, 1], [1, 1, 0]]))
    frames = DIODE(tmp_path)
    assert len(frames) == 2
    assert frames[0].depth.tolist() == [[1, 0, 3], [4, 5, 0]]
    assert DIODE(tmp_path, split="outdoor").names == [frames.names[1]]
    (tmp_path / f"{frames.names[0]}_depth.npy").unlink()
    with pytest.raises(ValueError, match=r"_depth\.npy: no such file"):
        frames[0]


def moge_frame(folder, raw, near, far, intrinsics=((0.8, 0, 0.5), (0, 1.2, 0.5), (0, 0, 1)), **texts):
    write_png16(folder / "depth.png", raw, {"near": near, "far": far} | texts)
    (folder / "meta.json").write_text(json.dumps({"intrinsics": intrinsics}))
    return write_picture(folder / "image.jpg", len(raw[0]), len(raw))


def test_moge_layout(tmp_path):
    (tmp_path / ".index.txt").write_text("a room/1\na room/2\n")
    moge_frame(tmp_path / "a room/1", [[0, 1, 65534, 65535], [2, 32768, 1000, 0]], near=0.5, far=80.0)
    moge_frame(tmp_path / "a room/2", [[1, 1], [65534, 1]], near=0.5, far=80.0, unit=2.0)
    frames = MoGeLayout(tmp_path)
    assert frames.names == ["a room/1", "a room/2"]

    def depth(raw):  # log depth runs evenly from near to far
        return math.exp(math.log(0.5) + (raw - 1) / 65533 * (math.log(80) - math.log(0.5)))

    expected = [[0, 0.5, 80, math.inf], [depth(2), depth(32768), depth(1000), 0]]
    np.testing.assert_allclose(frames[0].depth, expected, rtol=1e-6)
    assert frames[0].intrinsics.tolist() == [[np.float32(3.2), 0, 1.5], [0, np.float32(2.4), 0.5], [0, 0, 1]]
    assert frames[1].depth[1, 0] == 160
    write_png16(tmp_path / "a room/2/depth.png", [[1, 2], [3, 4]])
    with pytest.raises(ValueError, match=r"a room/2.*no 16-bit PNG with the text chunks near and far"):
        frames[1]


def test_folder(tmp_path):
    write_picture(tmp_path / "rgb" / "1.png", 4, 2)
    write_picture(tmp_path / "rgb" / "2.png", 4, 2)
    write_png16(tmp_path / "d.png", [[1000, 0]])
    lines = [
        {"file_name": "rgb/2.png", "depth_file_name": "d.png", "depth_encoding": "millimetres", "text": "a wall"},
        {"file_name": "rgb/1.png"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    frames = Folder(tmp_path)
    assert frames.names == ["rgb/2", "rgb/1"]
    assert frames[0].depth.tolist() == [[1, 1, 0, 0]] * 2
    assert frames[0].caption == "a wall"
    assert not frames[1].depth.any()
    (tmp_path / "d.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"d\.png"):
        frames[0]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n{"file_name": "a.jpg"}')
    with pytest.raises(ValueError, match="listed more than once"):
        Folder(tmp_path)


def test_depth_of_another_shape_is_not_the_pictures():
    assert fit_depth(np.array([[1, 2]]), (2, 4), "a").tolist() == [[1, 1, 2, 2]] * 2
    assert fit_depth(np.arange(16).reshape(4, 4), (2, 2), "a").tolist() == [[5, 7], [13, 15]]
    with pytest.raises(ValueError, match="a: depth of 2x1 does not belong to a picture of 4x4"):
        fit_depth(np.array([[1, 2]]), (4, 4), "a")


@pytest.mark.skipif(not RGBD.is_dir(), reason="no real frames here")
def test_a_sun_frame_through_a_folder(tmp_path):
    for name in ("sun_color.jpg", "sun_depth.png"):
        (tmp_path / name).symlink_to(RGBD / name)
    line = {"file_name": "sun_color.jpg", "depth_file_name": "sun_depth.png", "depth_encoding": "sun3d"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    frame = Folder(tmp_path)[0]
    stored = np.asarray(Image.open(RGBD / "sun_depth.png")).astype(np.int64)
    assert frame.image.shape == (*stored.shape, 3)
    np.testing.assert_allclose(frame.depth, (stored // 8 + stored % 8 * 8192) / 1000, rtol=1e-6)
    assert 0.5 < frame.depth[frame.mask].min() < frame.depth.max() < 10
    assert colorize_depth(frame.depth).shape == frame.image.shape


def plane(height, width, camera, normal=(0.1, 0.2, 1.0)):
    """A frame of the plane normal . X = 3, its picture the direction of view."""
    fx, fy, cx, cy = camera
    y, x = np.mgrid[:height, :width]
    rays = np.stack([(x - cx) / fx, (y - cy) / fy, np.ones(x.shape)], axis=-1)
    intrinsics = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=np.float32)
    image = np.clip(128 + 80 * rays, 0, 255).astype(np.uint8)
    return Frame("plane", image, (3 / (rays @ normal)).astype(np.float32), intrinsics)


def test_moges_view_of_a_central_camera_is_a_crop():
    frame = plane(375, 1242, (700, 700, 620.5, 187))
    frame.depth[100, 600] = 0
    frame.depth[101, 601] = np.inf
    view = moge_view(frame, 750, 375)
    expected = frame.depth[:, 246:996].copy()
    expected[101, 601 - 246] = 0
    np.testing.assert_allclose(view.depth, expected, rtol=1e-6)
    assert (view.image == frame.image[:, 246:996]).all()
    np.testing.assert_allclose(view.intrinsics, [[700, 0, 374.5], [0, 700, 187], [0, 0, 1]], rtol=1e-6)


def test_moges_view_turns_the_camera_to_the_centre():
    """Geometry stays: the plane is as far from the camera as before, and what was central is on the axis."""
    frame = plane(240, 320, (250, 260, 190, 100))
    view = moge_view(frame, 320, 240)
    assert (view.depth > 0).all()
    assert view.intrinsics[0, 0] == pytest.approx(view.intrinsics[1, 1], rel=1e-6)
    points = unproject(view.depth, view.intrinsics).reshape(-1, 3).astype(np.float64)
    normal = np.linalg.lstsq(points, np.ones(len(points)))[0]
    assert 1 / np.linalg.norm(normal) == pytest.approx(3 / np.linalg.norm((0.1, 0.2, 1)), rel=1e-3)
    assert np.abs(points @ normal - 1).max() < 5e-3  # depth is that of the nearest pixel
    centre = np.linalg.inv(frame.intrinsics) @ [159.5, 119.5, 1]
    before = 3 / ((0.1, 0.2, 1) @ centre) * np.linalg.norm(centre)
    assert view.depth[119:121, 159:161].mean() == pytest.approx(before, rel=2e-3)
    assert (np.abs(view.image[119:121, 159:161].astype(int) - frame.image[119:121, 159:161]) <= 2).all()
    with pytest.raises(ValueError, match=r"plane: .*needs intrinsics"):
        moge_view(Frame("plane", frame.image, frame.depth), 320, 240)


def test_center_crop():
    frame = plane(30, 50, (40, 40, 20, 14))
    crop = center_crop(frame, 15)
    assert crop.image.shape == (15, 15, 3)
    assert (crop.depth == frame.depth[1::2, 11:41:2]).all()
    point = unproject(frame.depth, frame.intrinsics)[15, 25]  # its pixel is the corner of four in the crop
    at = crop.intrinsics @ (point / point[2])
    np.testing.assert_allclose(at[:2], [(25.5 - 10) / 2 - 0.5, 15.5 / 2 - 0.5], rtol=1e-5)


def counted(protocol, depth, camera=(500, 500, 319.5, 239.5)):
    image = np.zeros((*depth.shape, 3), dtype=np.uint8)
    fx, fy, cx, cy = camera
    intrinsics = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=np.float32)
    view, left_out = protocol.view(Frame("a", image, depth, intrinsics))
    assert sum(left_out.values()) == (view.depth == 0).sum()
    return view.depth, left_out


def test_crops_and_caps():
    depth = np.full((480, 640), 5, dtype=np.float32)
    depth[100, 100:103] = [0, np.inf, 10]
    depth[0, 0] = 0
    truth, left_out = counted(Protocol("nyuv2"), depth)
    outside = 480 * 640 - 426 * 560
    assert left_out == {"missing": 2, "sky": 1, "out_of_range": 1, "cropped": outside - 1}
    rows, columns = np.nonzero(truth)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (45, 470, 41, 600)

    depth = np.full((375, 1242), 79.9, dtype=np.float32)
    depth[200, 600] = 80
    truth, left_out = counted(Protocol("kitti"), depth)
    rows, columns = np.nonzero(truth)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (153, 370, 44, 1196)  # as BTS has them
    assert left_out["out_of_range"] == 1

    depth = np.full((480, 640), 2, dtype=np.float32)
    depth[:, :10] = 1999
    depth[0, 20] = 2001
    truth, left_out = counted(Protocol("moge-nyuv2"), depth)
    assert left_out == {"missing": 0, "sky": 0, "out_of_range": 1, "cropped": 0}


def test_a_center_crop_keeps_to_the_benchmarks_crop():
    depth = np.full((480, 640), 5, dtype=np.float32)
    truth, left_out = counted(Protocol("nyuv2", center_crop=240), depth)
    assert truth.shape == (240, 240)
    rows, columns = np.nonzero(truth)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (22, 234, 0, 239)
    assert left_out["cropped"] == 240 * 240 - len(rows)


def test_every_benchmark_says_what_counts():
    for name, benchmark in BENCHMARKS.items():
        described = Protocol(name).describe()
        assert described["benchmark"] == name
        assert json.loads(json.dumps(described))["view"] == (list(benchmark.view) if benchmark.view else None)
