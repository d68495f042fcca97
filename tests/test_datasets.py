"""Readers of the training sets, on small files written in the documented formats by `dataset_files`."""

import importlib.util
import io
import json
import math

import numpy as np
import pytest
from dataset_files import (
    ARKIT_LENS,
    SCANNET_LENS,
    picture,
    pixel_rays,
    plane,
    quaternion_row,
    save_image,
    scannet_depth,
    write_arkitscenes,
    write_blendedmvs,
    write_csv,
    write_feather,
    write_foundationstereo,
    write_hypersim,
    write_megadepth,
    write_paralleldomain,
    write_parquet,
    write_scannet_export,
    write_sens,
    write_tartanair_1,
    write_tartanair_2,
    write_taskonomy,
)
from PIL import Image
from scipy.spatial.transform import Rotation

from mf_diffusers.datasets import DATASETS, Frame
from mf_diffusers.datasets.folder import Folder
from mf_diffusers.geometry import unproject


def close_pictures(a, b):
    return np.abs(a.astype(float) - b).mean() < 2.5  # JPEG


def test_frame_names_what_is_wrong():
    image, depth = np.zeros((2, 3, 3), np.uint8), np.ones((2, 3), np.float32)
    for wrong in (
        {"image": image.astype(np.float32)},
        {"image": image[..., 0]},
        {"depth": depth.T},
        {"depth": depth.astype(np.float64)},
        {"depth": -depth},
        {"depth": depth * np.float32(np.nan)},
        {"intrinsics": np.eye(3)},
        {"intrinsics": np.eye(4, dtype=np.float32)},
    ):
        with pytest.raises(ValueError, match=r"^scene/1: "):
            Frame(**{"name": "scene/1", "image": image, "depth": depth} | wrong)


def test_frame_mask_leaves_out_missing_and_infinite_depth():
    depth = np.array([[0, 1, np.inf]], dtype=np.float32)
    assert Frame("a", np.zeros((1, 3, 3), np.uint8), depth).mask.tolist() == [[False, True, False]]


@pytest.mark.parametrize("change", [lambda f: f.turned(1), lambda f: f.turned(3), lambda f: f.within(200)])
def test_points_stay_where_they_are_when_a_frame_is_turned_or_made_smaller(change):
    lens = (30.0, 31.0, 15.2, 11.8)
    depth = plane(pixel_rays(32, 24, *lens)).astype(np.float32)
    image = np.stack([np.indices((24, 32))[0] * 10, np.indices((24, 32))[1] * 7, depth * 0], axis=-1).astype(np.uint8)
    intrinsics = np.array([[30, 0, 15.2], [0, 31, 11.8], [0, 0, 1]], dtype=np.float32)
    changed = change(Frame("a", image, depth, intrinsics))
    points = unproject(changed.depth, changed.intrinsics)
    assert changed.depth.size <= depth.size and points.shape[:2] == changed.image.shape[:2]
    turned = changed.depth.shape[0] > changed.depth.shape[1]
    if turned:  # back to the axes of the original: (X, Y) was (Y', -X') after a quarter turn clockwise, or its opposite
        clockwise = changed.image[0, 0, 0] > changed.image[0, -1, 0]
        points = points[..., [1, 0, 2]] * ([1, -1, 1] if clockwise else [-1, 1, 1])
    tolerance = 1e-4 if turned else 0.06  # half a pixel of the original beside the middle of a larger one
    assert np.abs(points @ [0.2, -0.3, 1.0] - 4).max() < tolerance


def test_a_smaller_frame_keeps_values_and_aspect():
    depth = np.arange(24 * 32, dtype=np.float32).reshape(24, 32)
    frame = Frame("a", np.zeros((24, 32, 3), np.uint8), depth)
    assert frame.within(24 * 32) is frame
    small = frame.within(24 * 32 // 4)
    assert small.depth.shape == (12, 16) and np.isin(small.depth, depth).all()
    assert small.depth[0, 0] == depth[1, 1] and small.intrinsics is None


def test_a_smaller_frame_keeps_sparse_points():
    depth = np.zeros((24, 32), dtype=np.float32)
    depth[4, 6], depth[4, 7], depth[5, 7] = 9, 3, 5  # one pixel afterwards, whose middle is at row 5, column 7
    depth[8, 8], depth[9, 8], depth[20, 30] = 4, 2, np.inf
    small = Frame("a", np.zeros((24, 32, 3), np.uint8), depth).within(24 * 32 // 4)
    assert small.depth[2, 3] == 5 and small.depth[4, 4] == 2 and (small.depth > 0).sum() == 2


STANDARD = np.diag([math.tan(math.pi / 6), 0.75 * math.tan(math.pi / 6), -1])
TILTED = np.array([[0.5796, 0, -0.0696], [0, 0.4347, 0.0927], [0, 0.2041, -1.0039]])


@pytest.mark.parametrize("uv_to_ray", [STANDARD, TILTED], ids=["standard", "tilted"])
def test_hypersim(tmp_path, uv_to_ray):
    points = write_hypersim(tmp_path, "ai_001_001", uv_to_ray)
    columns = {f"M_cam_from_uv_{i}{j}": uv_to_ray[i, j] for i in range(3) for j in range(3)}
    write_csv(tmp_path / "metadata_camera_parameters.csv", [{"scene_name": "ai_001_001"} | columns])
    dataset = DATASETS["hypersim"](tmp_path)
    assert dataset.names == ["ai_001_001/cam_00/0000"]
    frame = dataset[0]

    # The viewing axis is at right angles to the directions in which u and v grow.
    axis = np.cross(uv_to_ray[:, 1], uv_to_ray[:, 0])
    z = points @ (axis / np.linalg.norm(axis))
    assert frame.depth[5, 7] == 0 and frame.mask.sum() == frame.mask.size - 1
    assert frame.depth[frame.mask] == pytest.approx(z[frame.mask], rel=1e-5)
    # The camera sees the scene undeformed: all distances between points are right.
    seen, true = (p[frame.mask][::97].astype(float) for p in (unproject(frame.depth, frame.intrinsics), points))
    distances = [np.linalg.norm(p[:, None] - p[None], axis=-1) for p in (seen, true)]
    assert distances[0] == pytest.approx(distances[1], rel=1e-4, abs=1e-4)
    if uv_to_ray is STANDARD:
        focal = 886.81 * 64 / 1024  # as everybody has it
        assert frame.intrinsics == pytest.approx(np.array([[focal, 0, 31.5], [0, focal, 23.5], [0, 0, 1]]), abs=1e-3)


def test_hypersim_tone_mapping_and_preview(tmp_path):
    write_hypersim(tmp_path, "ai_001_001", STANDARD)
    columns = {f"M_cam_from_uv_{i}{j}": STANDARD[i, j] for i in range(3) for j in range(3)}
    write_csv(tmp_path / "metadata_camera_parameters.csv", [{"scene_name": "ai_001_001"} | columns])
    image = DATASETS["hypersim"](tmp_path)[0].image
    assert image[0, 0].tolist() == [255] * 3  # infinite light
    # The 90th percentile of a ramp from 0 to 4 is 3.6, which becomes 0.8; the ramp follows with gamma 2.2.
    light = np.linspace(0, 4, 48 * 64).reshape(48, 64)
    expected = 255 * np.clip(0.8 * (light / 3.6) ** (1 / 2.2), 0, 1)
    assert np.abs(image[1:, :, 0] - expected[1:]).max() < 1.5

    for file in (tmp_path / "ai_001_001/images/scene_cam_00_final_hdf5").iterdir():
        file.unlink()
    (tmp_path / "ai_001_001/images/scene_cam_00_final_hdf5").rmdir()
    preview = tmp_path / "ai_001_001/images/scene_cam_00_final_preview/frame.0000.tonemap.jpg"
    save_image(preview, picture(64, 48), quality=95)
    assert close_pictures(DATASETS["hypersim"](tmp_path)[0].image, picture(64, 48))


def test_hypersim_split_and_missing_tables(tmp_path):
    for scene in ("ai_001_001", "ai_002_002"):
        write_hypersim(tmp_path, scene, STANDARD)
    with pytest.raises(FileNotFoundError, match=r"metadata_camera_parameters\.csv.*ml-hypersim"):
        DATASETS["hypersim"](tmp_path)
    write_csv(tmp_path / "metadata_camera_parameters.csv", [{"scene_name": "ai_001_001"}])
    rows = [
        {"scene_name": scene, "camera_name": "cam_00", "frame_id": 0, "split_partition_name": split}
        for scene, split in (("ai_001_001", "train"), ("ai_002_002", "val"), ("ai_003_003", "val"))
    ]
    write_csv(tmp_path / "metadata_images_split_scene_v1.csv", rows)
    assert DATASETS["hypersim"](tmp_path, "val").names == ["ai_002_002/cam_00/0000"]
    assert len(DATASETS["hypersim"](tmp_path)) == 2
    with pytest.raises(ValueError, match="no split 'dev', but train, val, test"):
        DATASETS["hypersim"](tmp_path, "dev")


def test_blendedmvs(tmp_path):
    depth = write_blendedmvs(tmp_path / "low_res" / "5b7a3890", "00000001")
    dataset = DATASETS["blendedmvs"](tmp_path)
    assert dataset.names == ["low_res/5b7a3890/00000001"] and not dataset.metric
    frame = dataset[0]
    assert (frame.depth == depth).all() and not frame.mask[2, 3]
    assert frame.intrinsics.tolist() == [[20, 0, 11.5], [0, 21, 8.25], [0, 0, 1]]
    assert close_pictures(frame.image, picture(24, 18))


def test_megadepth(tmp_path):
    depth = plane(pixel_rays(24, 18, 20, 20, 11, 8)).astype(np.float32)
    depth[0] = 0
    scene = tmp_path / "phoenix" / "0001" / "dense0"
    write_megadepth(scene, "123_ab_o", depth)
    write_megadepth(scene, "124_cd_o", np.where(depth > 4, -1, -2).astype(np.float32))
    dataset = DATASETS["megadepth"](tmp_path)
    assert dataset.names == ["phoenix/0001/dense0/123_ab_o", "phoenix/0001/dense0/124_cd_o"] and not dataset.metric
    assert (dataset[0].depth == depth).all() and dataset[0].intrinsics is None
    assert not dataset[1].mask.any()  # an order of regions is no depth


def test_tartanair(tmp_path):
    second = write_tartanair_2(tmp_path / "Ocean" / "Data_hard" / "P001", "000007")
    first = write_tartanair_1(tmp_path / "abandoned" / "abandoned" / "Easy" / "P002", "000011")
    save_image(tmp_path / "Ocean/Data_hard/P001/depth_lcam_fish/000007_lcam_fish_depth.png", picture(4, 4))
    dataset = DATASETS["tartanair"](tmp_path)
    assert dataset.names == ["Ocean/Data_hard/P001/lcam_front/000007", "abandoned/abandoned/Easy/P002/left/000011"]
    frame = dataset[0]
    assert frame.depth[0, 0] == np.inf
    assert (frame.depth[frame.mask] == second.astype(np.float32)[frame.mask]).all() and frame.mask.sum() == 32 * 32 - 1
    assert frame.intrinsics.tolist() == [[16, 0, 15.5], [0, 16, 15.5], [0, 0, 1]]
    assert (frame.image == picture(32, 32, 7)).all()
    assert (dataset[1].depth == first).all()
    assert dataset[1].intrinsics.tolist() == [[20, 0, 19.5], [0, 20, 14.5], [0, 0, 1]]


def test_arkitscenes(tmp_path):
    write_csv(
        tmp_path / "metadata.csv",
        [
            {"video_id": "41.0", "fold": "Training", "sky_direction": "Up"},
            {"video_id": "42.0", "fold": "Training", "sky_direction": "Left"},
            {"video_id": "43", "fold": "Validation", "sky_direction": "NA"},
        ],
    )
    millimetres, levels = write_arkitscenes(tmp_path / "Training" / "41", 305.244, shift=0.001)
    write_arkitscenes(tmp_path / "Training" / "42", 7.001)
    write_arkitscenes(tmp_path / "Validation" / "43", 1.5, colour="wide", confidence=False)
    save_image(tmp_path / "Training/41/lowres_depth/41_305.300.png", millimetres)  # without a picture of that time
    dataset = DATASETS["arkitscenes"](tmp_path)
    assert dataset.names == [
        "Training/41/lowres_wide/41_305.244",
        "Training/42/lowres_wide/42_7.001",
        "Validation/43/wide/43_1.500",
    ]
    upright, left, high = (dataset[k] for k in range(3))
    expected = np.where(levels == 2, millimetres / 1000, 0)
    assert upright.depth == pytest.approx(expected, abs=1e-6) and upright.depth[:7].max() == 0
    fx, fy, cx, cy = ARKIT_LENS
    assert upright.intrinsics == pytest.approx(np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]))
    # With the sky to the left of the stored picture, its left edge comes up: the lower left corner becomes upper left.
    assert left.image.shape == (32, 24, 3) and (left.image[0, 0] == picture(32, 24)[-1, 0]).all()
    assert left.depth[0, 0] == pytest.approx(millimetres[-1, 0] / 1000)
    assert left.intrinsics == pytest.approx(np.array([[fy, 0, 23 - cy], [0, fx, cx], [0, 0, 1]]))
    assert high.depth == pytest.approx(millimetres / 1000)
    assert DATASETS["arkitscenes"](tmp_path, "Validation").names == ["Validation/43/wide/43_1.500"]


@pytest.mark.parametrize("compress", [True, False])
def test_scannet(tmp_path, compress):
    write_sens(tmp_path / "scans" / "scene0000_00" / "scene0000_00.sens", compress=compress)
    write_scannet_export(tmp_path / "scans" / "scene0001_00", (0, 20))
    dataset = DATASETS["scannet"](tmp_path)
    stream = "scans/scene0000_00/scene0000_00"
    assert dataset.names == [f"{stream}/{k:06d}" for k in range(3)] + [f"scans/scene0001_00/{k}" for k in (0, 20)]
    for index, number in ((2, 2), (0, 0), (4, 20)):
        frame = dataset[index]
        assert frame.depth == pytest.approx(scannet_depth(number) / 1000, abs=1e-6) and frame.depth[3, 4] == 0
        assert (frame.intrinsics == SCANNET_LENS[:3, :3]).all()
        assert close_pictures(frame.image, picture(32, 24, number))


def test_taskonomy(tmp_path):
    depth, focal = write_taskonomy(tmp_path, "allensville", "point_0_view_1")
    dataset = DATASETS["taskonomy"](tmp_path)
    assert dataset.names == ["taskonomy/allensville/point_0_view_1"]
    frame = dataset[0]
    assert frame.depth == pytest.approx(np.where(depth == 65535, 0, depth / 512))
    assert frame.intrinsics == pytest.approx(np.array([[focal, 0, 15.5], [0, focal, 15.5], [0, 0, 1]]))
    points = unproject(frame.depth, frame.intrinsics)[frame.mask]
    assert points @ [0.2, -0.3, 1] == pytest.approx(4, abs=0.003)  # half of 1/512 m, and the tilt


def test_foundationstereo(tmp_path):
    disparity = np.array([[1000, 254, 255], [65025, 123456, 0]])
    write_foundationstereo(tmp_path / "kitchen_1", "0003", disparity)
    dataset = DATASETS["foundationstereo"](tmp_path)
    assert dataset.names == ["kitchen_1/dataset/data/left/0003"] and not dataset.metric
    frame = dataset[0]
    assert frame.depth == pytest.approx(np.array([[1, 1 / 0.254, 1 / 0.255], [1 / 65.025, 1 / 123.456, 0]]))
    assert frame.intrinsics is None


def test_paralleldomain(tmp_path):
    depth = plane(pixel_rays(32, 20, 30, 31, 15, 10)).astype(np.float32)
    depth[0] = 5e4
    write_paralleldomain(tmp_path / "scene_000001", "yaw-0", 5, depth)
    dataset = DATASETS["paralleldomain"](tmp_path)
    assert dataset.names == ["scene_000001/yaw-0/000000000000000005"]
    frame = dataset[0]
    assert (frame.depth[0] == np.inf).all() and (frame.depth[1:] == depth[1:]).all()
    assert frame.intrinsics.tolist() == [[30, 0, 15], [0, 31, 10], [0, 0, 1]]
    assert (frame.image == picture(32, 20, 5)).all()


ARIA_LENS = (297.6375381033778, 357.6599197217746, 349.1922497127481)
ARIA_RADIAL = (0.36508903756, -0.17380824128, -0.75349454840, 2.43478888275, -2.57786220301, 0.87884835386)
ARIA_TANGENTIAL = (0.00080051985954, -0.00029423781455)


def aria_rays():
    """The direction (704, 704, 3) that each fisheye pixel sees, of length 1: the lens model undone step by step."""
    focal, cx, cy = ARIA_LENS
    target = np.stack(np.meshgrid((np.arange(704) - cx) / focal, (np.arange(704) - cy) / focal), axis=-1)
    radial = target.copy()
    for _ in range(20):  # tangential distortion is small: iterate
        square = (radial**2).sum(-1, keepdims=True)
        radial = target - 2 * radial * (radial @ ARIA_TANGENTIAL)[..., None] - square * ARIA_TANGENTIAL
    angles = np.linspace(0, 1.3, 100_000)
    radii = angles * np.polyval([*ARIA_RADIAL[::-1], 1], angles**2)
    rising = int(np.argmax(np.diff(radii) <= 0)) or len(radii)
    radius = np.linalg.norm(radial, axis=-1)
    angle = np.interp(radius, radii[:rising], angles[:rising])
    sideways = radial * (np.sin(angle) / np.maximum(radius, 1e-12))[..., None]
    return np.concatenate([sideways, np.cos(angle)[..., None]], axis=-1)


def test_aria(tmp_path):
    rays = aria_rays()
    distance = plane(rays, normal=(0.1, -0.15, 1.0), offset=3.0)
    stored = np.clip(np.rint(1000 * distance), 0, 65535).astype(np.uint16)
    slopes = rays[..., :2] / rays[..., 2:]
    colours = np.clip(128 + 80 * np.concatenate([slopes, 0 * slopes[..., :1]], axis=-1), 0, 255).astype(np.uint8)
    save_image(tmp_path / "12" / "depth" / "depth0000034.png", stored)
    save_image(tmp_path / "12" / "rgb" / "vignette0000034.jpg", colours, quality=98, subsampling=0)
    dataset = DATASETS["aria"](tmp_path)
    assert dataset.names == ["12/0000034"]
    frame = dataset[0]
    assert frame.mask.all() and frame.depth.shape == (592, 592)
    points = unproject(frame.depth, frame.intrinsics)
    # The frame was turned clockwise: its x is the sensor's -y, its y the sensor's x.
    x, y, z = points[..., 1], -points[..., 0], points[..., 2]
    offset = 0.1 * x - 0.15 * y + z
    assert np.abs(offset - 3).max() < 0.015 and abs(np.mean(offset) - 3) < 1e-4  # nearest pixel, and millimetres
    assert np.abs(frame.image[..., 0] - (128 + 80 * x / z)).mean() < 1
    assert np.abs(frame.image[..., 1] - (128 + 80 * y / z)).mean() < 1


def test_argoverse2(tmp_path):
    """A picture sees points that a sweep 10 ms before it saw from another place."""
    width, height, fx, fy, cx, cy = 40, 30, 35.0, 36.0, 19.0, 14.0
    log = tmp_path / "val" / "log-1"
    mounting = (
        Rotation.from_euler("ZYX", [-90, 0, -90], degrees=True),
        np.array([1.6, 0.1, 1.4]),
    )  # z of the camera ahead
    poses = {
        time: (
            Rotation.from_euler("ZYX", [20 + time / 1e8, 1, 2], degrees=True),
            np.array([5000 + time / 2e8, 2400.0, 60]),
        )
        for time in (1_000_000_000, 1_010_000_000, 1_060_000_000, 1_090_000_000, 1_100_000_000)
    }
    camera = quaternion_row(*mounting)
    sensors = [{"sensor_name": "up_lidar"} | quaternion_row(Rotation.identity(), np.zeros(3))]
    sensors.append({"sensor_name": "ring_front_center"} | camera)
    lens = {"sensor_name": "ring_front_center", "fx_px": fx, "fy_px": fy, "cx_px": cx, "cy_px": cy, "k1": -0.2}
    lens |= {"k2": 0.1, "k3": 0.1, "height_px": height, "width_px": width}
    rows = [{"timestamp_ns": time} | quaternion_row(*pose) for time, pose in poses.items()]
    for name, table in (("calibration/egovehicle_SE3_sensor", sensors), ("calibration/intrinsics", [lens])):
        write_feather(log / f"{name}.feather", {key: [row[key] for row in table] for key in table[0]})
    write_feather(log / "city_SE3_egovehicle.feather", {key: [row[key] for row in rows] for key in rows[0]})
    for time in (1_010_000_000, 1_060_000_000, 1_090_000_000):
        colours = picture(width, height)
        save_image(log / "sensors/cameras/ring_front_center" / f"{time}.jpg", colours, quality=95)

    rays = pixel_rays(width, height, fx, fy, cx, cy)
    depth = plane(rays, offset=8.0)
    hit = np.zeros((height, width), bool)
    hit[2:-2:3, 1:-1:3] = True
    seen = (rays * depth[..., None])[hit]
    seen = np.concatenate([seen, seen * 1.5, seen * [1, 1, -1]])  # also what they hide, and points behind

    def apply(transform, points):
        return transform[0].apply(points) + transform[1]

    def undo(transform, points):
        return transform[0].inv().apply(points - transform[1])

    for sweep, image_time in ((1_000_000_000, 1_010_000_000), (1_100_000_000, 1_090_000_000)):
        city = apply(poses[image_time], apply(mounting, seen))
        points = undo(poses[sweep], city).astype(np.float16)
        columns = {axis: points[:, k] for k, axis in enumerate("xyz")} | {"intensity": np.zeros(len(points), np.uint8)}
        write_feather(log / "sensors" / "lidar" / f"{sweep}.feather", columns)

    dataset = DATASETS["argoverse2"](tmp_path)
    assert dataset.names == [f"val/log-1/ring_front_center/{time}" for time in (1_010_000_000, 1_090_000_000)]
    for frame in (dataset[0], dataset[1]):
        assert (frame.mask == hit).all()
        assert np.abs(frame.depth - depth)[hit].max() < 0.01  # float16
        assert frame.intrinsics == pytest.approx(np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]))
        assert close_pictures(frame.image, picture(width, height))


def rigid(yaw, pitch, roll, translation):
    """4x4: turned about x by roll, then about y by pitch, then about z by yaw."""
    (sx, cx), (sy, cy), (sz, cz) = ((math.sin(a), math.cos(a)) for a in (roll, pitch, yaw))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    transform = np.eye(4)
    transform[:3, :3], transform[:3, 3] = about_z @ about_y @ about_x, translation
    return transform


def write_waymo(root, segment, times, width=48, height=32):
    """Two cameras, five LiDARs. Returns the true depth map by (time, camera)."""
    pa = pytest.importorskip("pyarrow")
    rng = np.random.default_rng(0)
    focal, middle = 40.0, (24.0, 16.0)  # the first pixel begins at 0
    mountings = {1: rigid(0, 0.01, 0, (1.5, 0, 2)), 4: rigid(0.6, 0, 0.02, (1.4, 0.3, 2))}
    lidars = {1: rigid(2.5, 0.01, 0.02, (1.4, 0, 2.2))}
    lidars |= {name: rigid(0.3 * name, 0, 0, (1, 0.2 * name, 1)) for name in range(2, 6)}
    listed = np.sort(rng.uniform(-0.3, 0.2, 8))
    key = {"key.segment_context_name": segment}
    tables = {tag: [] for tag in ("camera_image", "lidar", "lidar_camera_projection", "lidar_pose", "vehicle_pose")}
    truth = {}
    for count, time in enumerate(times):
        key_time = key | {"key.frame_timestamp_micros": time}
        vehicle = rigid(0.7 + 0.01 * count, 0.01, 0, (860 + count, 1500, -65))
        tables["vehicle_pose"].append(
            key_time | {"[VehiclePoseComponent].world_from_vehicle.transform": vehicle.ravel()}
        )
        cameras = {}
        for camera in mountings:
            moved = vehicle @ rigid(0.002 * camera, 0, 0, (0.1 * camera, 0, 0))
            cameras[camera] = moved @ mountings[camera]
            truth[time, camera] = np.full((height, width), np.inf)
            jpeg = io.BytesIO()
            Image.fromarray(picture(width, height, camera + count)).save(jpeg, "JPEG", quality=95)
            row = {"image": jpeg.getvalue(), "pose.transform": moved.ravel()}
            named = {f"[CameraImageComponent].{column}": value for column, value in row.items()}
            tables["camera_image"].append(key_time | {"key.camera_name": camera} | named)
        for laser, mounting in lidars.items():
            rows, columns = (8, 64) if laser == 1 else (4, 16)
            ranges = rng.uniform(3, 30, (rows, columns))
            ranges[rng.random((rows, columns)) < 0.1] = -1
            poses, projections = np.zeros((rows, columns, 6)), np.zeros((rows, columns, 6))
            for i, j in np.ndindex(rows, columns):
                inclination = listed[rows - 1 - i] if laser == 1 else -0.5 + 0.9 * (rows - i - 0.5) / rows
                azimuth = (columns - j - 0.5) / columns * 2 * math.pi - math.pi
                azimuth -= math.atan2(mounting[1, 0], mounting[0, 0])
                flat = math.cos(inclination) * ranges[i, j]
                point = (flat * math.cos(azimuth), flat * math.sin(azimuth), math.sin(inclination) * ranges[i, j], 1)
                poses[i, j] = 0.01 * j / columns, 0.02, 0.7, 860 + count + 0.5 * j / columns, 1500, -65
                roll, pitch, yaw, *place = np.float32(poses[i, j]).astype(float)
                frame = rigid(yaw, pitch, roll, place) if laser == 1 else vehicle
                world = frame @ mounting @ point
                found = []
                for camera, pose in cameras.items():
                    ahead, left, up, _ = np.linalg.inv(pose) @ world
                    if ahead <= 0 or ranges[i, j] < 0:
                        continue
                    x, y = math.floor(middle[0] - focal * left / ahead), math.floor(middle[1] - focal * up / ahead)
                    if 0 <= x < width and 0 <= y < height:
                        found += [camera, x, y]
                        truth[time, camera][y, x] = min(truth[time, camera][y, x], ahead)
                projections[i, j, : len(found)] = found
            ranges = np.stack([ranges, *np.zeros((3, rows, columns))], axis=-1)
            for tag, component, array in (
                ("lidar", "LiDARComponent", ranges),
                ("lidar_camera_projection", "LiDARCameraProjectionComponent", projections),
                ("lidar_pose", "LiDARPoseComponent", poses),
            ):
                if tag != "lidar_pose" or laser == 1:
                    start = f"[{component}].range_image_return1"
                    row = {f"{start}.values": np.float32(array.ravel()), f"{start}.shape": np.int32(array.shape)}
                    row |= {name.replace("return1", "return2"): value for name, value in row.items()}
                    tables[tag].append(key_time | {"key.laser_name": laser} | row)
    tables["camera_calibration"] = [
        key
        | {"key.camera_name": camera, "[CameraCalibrationComponent].extrinsic.transform": mounting.ravel()}
        | {
            f"[CameraCalibrationComponent].intrinsic.{name}": value
            for name, value in zip(("f_u", "f_v", "c_u", "c_v", "k1"), (focal, focal, *middle, 0.05))
        }
        for camera, mounting in mountings.items()
    ]
    tables["lidar_calibration"] = [
        key
        | {"key.laser_name": laser, "[LiDARCalibrationComponent].extrinsic.transform": mounting.ravel()}
        | {
            f"[LiDARCalibrationComponent].beam_inclination.{name}": value
            for name, value in (("min", -0.5), ("max", 0.4), ("values", listed if laser == 1 else None))
        }
        for laser, mounting in lidars.items()
    ]
    kinds = {"segment_context_name": pa.string(), "frame_timestamp_micros": pa.int64(), "image": pa.binary()}
    kinds |= {"camera_name": pa.int8(), "laser_name": pa.int8(), "transform": pa.list_(pa.float64(), 16)}
    kinds |= {"values": pa.list_(pa.float32()), "shape": pa.list_(pa.int32(), 3)}
    for tag, rows in tables.items():
        types = {column: kinds.get(column.split(".")[-1], pa.float64()) for column in rows[0]}
        write_parquet(root / tag / f"{segment}.parquet", rows, types)
    return {key: np.where(np.isinf(depth), 0, depth) for key, depth in truth.items()}


def test_waymo(tmp_path):
    times = [1_552_440_195_362_591, 1_552_440_195_462_600]
    truth = write_waymo(tmp_path / "training", "1002_112", times)
    dataset = DATASETS["waymo"](tmp_path)
    cameras = {"FRONT": 1, "SIDE_LEFT": 4}
    assert dataset.names == [f"training/1002_112/{time}/{camera}" for time in times for camera in cameras]
    for index in (3, 0, 1, 2):  # going back too
        *_, time, camera = dataset.names[index].split("/")
        frame, expected = dataset[index], truth[int(time), cameras[camera]]
        assert (frame.mask == (expected > 0)).all() and frame.mask.sum() > 20
        assert frame.depth == pytest.approx(expected, abs=2e-3)  # world coordinates as float32, as in the files
        assert frame.intrinsics.tolist() == [[40, 0, 23.5], [0, 40, 15.5], [0, 0, 1]]
        assert close_pictures(frame.image, picture(48, 32, cameras[camera] + times.index(int(time))))


def test_what_is_missing_or_damaged_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="absent: no such folder; give the one into which TartanAir"):
        DATASETS["tartanair"](tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no frame of Taskonomy lies here; expected depth_zbuffer/"):
        len(DATASETS["taskonomy"](tmp_path))
    with pytest.raises(ValueError, match="ScanNet has no split 'train', but none"):
        DATASETS["scannet"](tmp_path, "train")

    trajectory = tmp_path / "Ocean" / "Data_easy" / "P000"
    write_tartanair_2(trajectory, "000001")
    depth = trajectory / "depth_lcam_front" / "000001_lcam_front_depth.png"
    depth.write_bytes(depth.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"Ocean/Data_easy/P000/lcam_front/000001: .*truncated"):
        DATASETS["tartanair"](tmp_path)[0]
    save_image(depth, picture(32, 32))
    with pytest.raises(ValueError, match="RGB where depth has four channels"):
        DATASETS["tartanair"](tmp_path)[0]
    depth.unlink()
    write_sens(tmp_path / "s" / "s.sens")
    stream = tmp_path / "s" / "s.sens"
    stream.write_bytes(stream.read_bytes()[:-50])
    assert DATASETS["scannet"](tmp_path)[1].mask.any()
    with pytest.raises(ValueError, match="s/s/000002: "):
        DATASETS["scannet"](tmp_path)[2]

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"read with pyarrow: pip install 'mf-diffusers\[datasets\]'"):
        DATASETS["waymo"](tmp_path)


def test_names_leave_out_hidden_files(tmp_path):
    trajectory = tmp_path / "Ocean" / "Data_easy" / "P000"
    write_tartanair_2(trajectory, "000001")
    (trajectory / "depth_lcam_front" / "._000001_lcam_front_depth.png").write_bytes(b"from another system")
    assert len(DATASETS["tartanair"](tmp_path)) == 1


def test_folder_frames_have_the_first_caption(tmp_path):
    texts = [{"alt": "a kitchen", "recaption": "a bright kitchen"}, ["a", "b"], "c", None]
    lines = [json.dumps({"file_name": f"{k}.png", "text": text}) for k, text in enumerate(texts)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    for k in range(len(texts)):
        save_image(tmp_path / f"{k}.png", picture(4, 5))
    assert [frame.caption for frame in Folder(tmp_path)] == ["a kitchen", "a", "c", ""]
