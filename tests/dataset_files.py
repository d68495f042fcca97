"""Writers of small files in the formats in which data sets are distributed, from their documentation.

Each writes one or more frames of a scene whose depth is known in closed form: a tilted plane. None of them uses the
readers, or is used by them.
"""

import csv
import json
import math
import struct
import zlib

import numpy as np
import pytest
from PIL import Image


def plane(rays, normal=(0.2, -0.3, 1.0), offset=4.0):
    """How far along each ray (..., 3) the plane `normal` * X = `offset` is."""
    return offset / (np.asarray(rays) @ np.array(normal))


def pixel_rays(width, height, fx, fy, cx, cy):
    """Directions (H, W, 3) with z = 1."""
    return np.array([[((c - cx) / fx, (r - cy) / fy, 1.0) for c in range(width)] for r in range(height)])


def picture(width, height, seed=0):
    """uint8 (H, W, 3): smooth, so that JPEG keeps it, and different in every corner."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return np.stack([40 + 180 * x, 30 + 200 * y, 128 + 100 * np.sin(3 * x + 2 * y + seed)], axis=-1).astype(np.uint8)


def save_image(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def write_hypersim(root, scene, uv_to_ray, width=64, height=48, hole=(5, 7)):
    """One frame of a scene with the given M_cam_from_uv. Returns the points (H, W, 3) of the camera with y up."""
    h5py = pytest.importorskip("h5py")
    images = root / scene / "images"
    for folder in ("scene_cam_00_geometry_hdf5", "scene_cam_00_final_hdf5"):
        (images / folder).mkdir(parents=True)
    points = np.zeros((height, width, 3))
    for row in range(height):
        for column in range(width):
            u, v = -1 + (2 * column + 1) / width, 1 - (2 * row + 1) / height
            ray = uv_to_ray @ (u, v, 1)
            points[row, column] = ray * plane(ray * (1, -1, -1))
    distance = np.linalg.norm(points, axis=-1)
    distance[hole] = np.nan
    entity = np.full((height, width), 3, dtype=np.int32)
    entity[hole] = -1
    color = np.repeat(np.linspace(0, 4, height * width).reshape(height, width, 1), 3, axis=-1)
    color[0, 0] = np.inf
    for folder, kind, array in (
        ("geometry", "depth_meters", distance.astype(np.float32)),
        ("geometry", "render_entity_id", entity),
        ("final", "color", color.astype(np.float16)),
    ):
        with h5py.File(images / f"scene_cam_00_{folder}_hdf5" / f"frame.0000.{kind}.hdf5", "w") as file:
            file["dataset"] = array
    return points


def write_blendedmvs(folder, number, width=24, height=18):
    depth = plane(pixel_rays(width, height, 20, 21, 11.5, 8.25)).astype("<f4")
    depth[2, 3] = 0
    for name in ("rendered_depth_maps", "cams"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows_from_below = b"".join(depth[row].tobytes() for row in reversed(range(height)))
    header = f"Pf\n{width} {height}\n-1.000000\n".encode()
    (folder / "rendered_depth_maps" / f"{number}.pfm").write_bytes(header + rows_from_below)
    extrinsic = "extrinsic\n1.0 0.0 0.0 5.0\n0.0 1.0 0.0 6.0\n0.0 0.0 1.0 7.0\n0.0 0.0 0.0 1.0\n\n"
    intrinsic = "intrinsic\n20.0 0.0 11.5\n0.0 21.0 8.25\n0.0 0.0 1.0\n\n"
    (folder / "cams" / f"{number}_cam.txt").write_text(f"{extrinsic}{intrinsic}3.0 0.01 128.0 9.0\n")
    save_image(folder / "blended_images" / f"{number}.jpg", picture(width, height), quality=95)
    save_image(folder / "blended_images" / f"{number}_masked.jpg", np.zeros((height, width, 3), np.uint8))
    return depth


def write_megadepth(folder, name, depth):
    h5py = pytest.importorskip("h5py")
    (folder / "depths").mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "depths" / f"{name}.h5", "w") as file:
        file["depth"] = depth
    save_image(folder / "imgs" / f"{name}.jpg", picture(depth.shape[1], depth.shape[0]), quality=95)


def write_tartanair_2(trajectory, number, size=32, sky=(0, 0), image=None, depth=None):
    if depth is None:
        depth = plane(pixel_rays(size, size, size / 2, size / 2, (size - 1) / 2, (size - 1) / 2), offset=40)
        depth[sky] = 65504.0
    packed = np.zeros((*depth.shape, 4), dtype=np.uint8)
    for row, column in np.ndindex(depth.shape):
        blue, green, red, alpha = struct.pack("<f", depth[row, column])
        packed[row, column] = red, green, blue, alpha
    save_image(trajectory / "depth_lcam_front" / f"{number}_lcam_front_depth.png", packed)
    colours = picture(*depth.shape[::-1], seed=int(number)) if image is None else image
    save_image(trajectory / "image_lcam_front" / f"{number}_lcam_front.png", colours)
    return depth


def write_tartanair_1(trajectory, number, width=40, height=30):
    depth = plane(pixel_rays(width, height, 20, 20, 19.5, 14.5), offset=9).astype(np.float32)
    (trajectory / "depth_left").mkdir(parents=True)
    np.save(trajectory / "depth_left" / f"{number}_left_depth.npy", depth)
    save_image(trajectory / "image_left" / f"{number}_left.png", picture(width, height))
    return depth


ARKIT_LENS = (30.0, 31.0, 15.2, 11.8)


def write_arkitscenes(video, seconds, colour="lowres_wide", shift=0.0, confidence=True, width=32, height=24):
    """Returns depth in millimetres, as stored, and the confidence; both before the picture is turned."""
    depth_kind = "lowres_depth" if colour == "lowres_wide" else "highres_depth"
    stem = f"{video.name}_{seconds:.3f}"
    millimetres = np.rint(1000 * plane(pixel_rays(width, height, *ARKIT_LENS))).astype(np.uint16)
    millimetres[1, 2] = 0
    levels = np.full((height, width), 2, dtype=np.uint8)
    levels[:4], levels[4:7] = 0, 1
    save_image(video / depth_kind / f"{stem}.png", millimetres)
    save_image(video / colour / f"{stem}.png", picture(width, height))
    if confidence:
        save_image(video / "confidence" / f"{stem}.png", levels)
    folder = video / f"{colour}_intrinsics"
    folder.mkdir(parents=True, exist_ok=True)
    lens = " ".join(map(str, ARKIT_LENS))
    (folder / f"{video.name}_{seconds + shift:.3f}.pincam").write_text(f"{width} {height} {lens}\n")
    return millimetres, levels


SCANNET_LENS = np.array([[25.0, 0, 15.5, 0], [0, 26.0, 11.5, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype="<f4")


def scannet_depth(number, width=32, height=24):
    depth = np.rint(1000 * plane(pixel_rays(width, height, 25, 26, 15.5, 11.5), offset=2 + number)).astype("<u2")
    depth[3, 4] = 0
    return depth


def write_sens(path, frames=3, width=32, height=24, compress=True):
    path.parent.mkdir(parents=True)
    sensor = b"StructureSensor"
    data = struct.pack("<IQ", 4, len(sensor)) + sensor
    colour_lens = SCANNET_LENS * 2
    for lens in (colour_lens, np.eye(4, dtype="<f4"), SCANNET_LENS, np.eye(4, dtype="<f4")):
        data += lens.astype("<f4").tobytes()
    data += struct.pack("<ii", 2, 1 if compress else 0)
    data += struct.pack("<IIII", 2 * width, 2 * height, width, height) + struct.pack("<f", 1000.0)
    data += struct.pack("<Q", frames)
    for number in range(frames):
        jpeg = path.with_name("colour.jpg")
        save_image(jpeg, picture(2 * width, 2 * height, number), quality=95)
        depth = scannet_depth(number).tobytes()
        depth = zlib.compress(depth) if compress else depth
        data += np.eye(4, dtype="<f4").tobytes() + struct.pack("<QQ", number, number)
        data += struct.pack("<QQ", jpeg.stat().st_size, len(depth)) + jpeg.read_bytes() + depth
        jpeg.unlink()
    path.write_bytes(data)


def write_scannet_export(scan, numbers, width=32, height=24):
    for number in numbers:
        save_image(scan / "depth" / f"{number}.png", scannet_depth(number).astype(np.uint16))
        save_image(scan / "color" / f"{number}.jpg", picture(2 * width, 2 * height, number), quality=95)
    (scan / "intrinsic").mkdir()
    np.savetxt(scan / "intrinsic" / "intrinsic_depth.txt", SCANNET_LENS, fmt="%f")


def write_taskonomy(root, building, point, fov=1.0489, size=32):
    focal = size / (2 * math.tan(fov / 2))
    centre = (size - 1) / 2
    depth = np.rint(512 * plane(pixel_rays(size, size, focal, focal, centre, centre))).astype(np.uint16)
    depth[0, :3] = 65535
    for domain, array in (("depth_zbuffer", depth), ("rgb", picture(size, size))):
        save_image(root / domain / "taskonomy" / building / f"{point}_domain_{domain}.png", array)
    info = root / "point_info" / "taskonomy" / building / f"{point}_domain_point_info.json"
    info.parent.mkdir(parents=True, exist_ok=True)
    info.write_text(json.dumps({"field_of_view_rads": fov, "resolution": size}))
    return depth, focal


def write_foundationstereo(scene, number, thousandths, image=None):
    """`thousandths`: whole numbers (H, W), disparity in thousandths of a pixel."""
    digits = np.stack([thousandths // 255**2, thousandths // 255 % 255, thousandths % 255], axis=-1)
    data = scene / "dataset" / "data" / "left"
    save_image(data / "disparity" / f"{number}.png", digits.astype(np.uint8))
    colours = picture(*thousandths.shape[::-1], seed=int(number)) if image is None else image
    save_image(data / "rgb" / f"{number}.jpg", colours, quality=95)


def write_paralleldomain(scene, camera, number, depth, image=None, lens=(30.0, 31.0, 15.0, 10.0)):
    (scene / "depth" / camera).mkdir(parents=True, exist_ok=True)
    np.savez_compressed(scene / "depth" / camera / f"{number:018d}.npz", data=depth)
    colours = picture(*depth.shape[::-1], seed=number) if image is None else image
    opaque = np.concatenate([colours, np.full((*depth.shape, 1), 255, np.uint8)], axis=-1)
    save_image(scene / "rgb" / camera / f"{number:018d}.png", opaque)
    other = dict(zip(("fx", "fy", "cx", "cy"), (1.0, 2.0, 3.0, 4.0)))
    calibration = {"names": ["other", camera], "intrinsics": [other, dict(zip(("fx", "fy", "cx", "cy"), lens))]}
    (scene / "calibration").mkdir(exist_ok=True)
    (scene / "calibration" / "0a1b.json").write_text(json.dumps(calibration))


def quaternion_row(rotation, translation):
    qx, qy, qz, qw = rotation.as_quat()
    return dict(zip(("qw", "qx", "qy", "qz", "tx_m", "ty_m", "tz_m"), (qw, qx, qy, qz, *translation)))


def write_feather(path, columns):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.feather

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.feather.write_feather(pa.table(columns), path)


def write_parquet(path, rows, types):
    """`types`: Arrow type of every column."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in types.items()}
    pyarrow.parquet.write_table(pa.table(columns), path)


def write_png16(path, rows, texts=None):
    """A 16-bit gray PNG from its specification, not by the library that reads it."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 16, 0, 0, 0, 0)
    lines = b"".join(b"\0" + struct.pack(f">{len(row)}H", *row) for row in rows)
    notes = [chunk(b"tEXt", f"{name}\0{text}".encode("latin-1")) for name, text in (texts or {}).items()]
    parts = [chunk(b"IHDR", header), *notes, chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def write_picture(path, width, height, seed=0, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **settings)
    return pixels
