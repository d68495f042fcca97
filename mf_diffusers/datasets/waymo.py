"""Waymo Open Dataset, perception, in the Parquet files of version 2.

Source: https://waymo.com/open, https://github.com/waymo-research/waymo-open-dataset (Sun et al., CVPR 2020), under the
Waymo Dataset License Agreement for Non-Commercial Use.

    ROOT/training/COMPONENT/SEGMENT.parquet        or validation, testing; the seven COMPONENTS below

Columns are called "[CameraImageComponent].image"; rows are found by "key.frame_timestamp_micros", "key.camera_name"
(1 FRONT to 5 SIDE_RIGHT) and "key.laser_name" (1 TOP to 5 REAR). Matrices are 4x4 by rows, camera and vehicle have x
forward, y left, z up.

A range image (H, W, 4) has the distance in metres first, not above 0 where nothing came back. Row i has the
inclination i from the top (the listed ones are in ascending order; where none are listed they are even between min and
max), column j the azimuth pi - 2 pi (j + 0.5) / W less that of the sensor's mounting. The TOP LiDAR turns while the car
drives: lidar_pose gives each of its pixels (roll, pitch, yaw, x, y, z) of the vehicle in the world. Where a point lies
in the pictures, lens distortion and rolling shutter included, is read from lidar_camera_projection (H, W, 6): camera,
x, y, and the same for a second camera.

z-depth is how far the point lies ahead of the camera, along its x, with the pose of the vehicle that the picture notes,
of its middle: to the sides the rolling shutter moves it by some centimetres. It is sparse, and the nearest point of a
pixel counts. First returns of all five LiDARs are read. The intrinsics leave out the lens distortion, a few percent in
the corners. A component of a segment is one long table and read as a stream: ask for frames in order.
"""

import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

from .dataset import Dataset, pinhole
from .frame import Frame
from .lidar import nearest_points, transformed


CAMERAS = {1: "FRONT", 2: "FRONT_LEFT", 3: "FRONT_RIGHT", 4: "SIDE_LEFT", 5: "SIDE_RIGHT"}
TOP = 1
TIME, CAMERA, LASER = "key.frame_timestamp_micros", "key.camera_name", "key.laser_name"
COMPONENTS = {
    "camera_image": ("CameraImageComponent", (TIME, CAMERA)),
    "camera_calibration": ("CameraCalibrationComponent", (CAMERA,)),
    "lidar": ("LiDARComponent", (TIME, LASER)),
    "lidar_calibration": ("LiDARCalibrationComponent", (LASER,)),
    "lidar_camera_projection": ("LiDARCameraProjectionComponent", (TIME, LASER)),
    "lidar_pose": ("LiDARPoseComponent", (TIME, LASER)),
    "vehicle_pose": ("VehiclePoseComponent", (TIME,)),
}
"""Folder: what its columns are called after, and the columns that find a row."""


class Waymo(Dataset):
    """Reads the Waymo Open Dataset, unpacked as this module says.

    Frames are called "training/SEGMENT/MICROSECONDS/FRONT"."""

    splits = ("training", "validation", "testing")
    layout = "training/camera_image/SEGMENT.parquet and the other components"
    library = "pyarrow"
    files_per_frame = False

    def _find(self):
        import pyarrow.parquet

        for path in self._files("**/camera_image/*.parquet"):
            keys = pyarrow.parquet.read_table(self.root / path, columns=[TIME, CAMERA]).to_pydict()
            for time, camera in zip(keys[TIME], keys[CAMERA]):
                yield f"{path.parents[1].as_posix()}/{path.stem}/{time}/{CAMERAS[camera]}"

    def _read(self, name):
        *split, segment, time, camera = name.split("/")
        components = open_segment(self.root.joinpath(*split), segment)
        number = next(k for k, known in CAMERAS.items() if known == camera)
        picture = components["camera_image"][int(time), number]
        with Image.open(io.BytesIO(picture["image"])) as decoded:
            image = np.asarray(decoded.convert("RGB"))
        lens = components["camera_calibration"][number,]
        camera_to_world = matrix(picture["pose.transform"]) @ matrix(lens["extrinsic.transform"])

        points, projections = sweep(self.root.joinpath(*split), segment, int(time))
        depth = transformed(points, np.linalg.inv(camera_to_world))[:, 0]
        first, second = projections[:, 0] == number, projections[:, 3] == number
        x = np.where(first, projections[:, 1], np.where(second, projections[:, 4], -1))
        y = np.where(first, projections[:, 2], np.where(second, projections[:, 5], -1))
        fx, fy, cx, cy = (lens[f"intrinsic.{parameter}"] for parameter in ("f_u", "f_v", "c_u", "c_v"))
        intrinsics = pinhole(fx, fy, cx - 0.5, cy - 0.5)  # its first pixel begins at 0, ours has its centre there
        return Frame(name, image, nearest_points(x, y, depth, image.shape[:2]), intrinsics)


class Rows:
    """Rows of a component, dicts by column, found by the values in its key columns.

    The file is read as a stream, since all its rows may lie in one compressed group of some gigabytes: going forward
    is quick, going back starts over.
    """

    def __init__(self, path: Path, component: str, keys: Sequence[str]):
        import pyarrow.parquet

        self._file = pyarrow.parquet.ParquetFile(path)
        self._prefix = f"[{component}]."
        self._columns = [name for name in self._file.schema_arrow.names if "_return2" not in name]
        columns = self._file.read(columns=list(keys)).to_pydict()
        self._index = {key: row for row, key in enumerate(zip(*(columns[key] for key in keys)))}
        self._stream, self._next = None, 0

    def __getitem__(self, key):
        row = self._index[key]
        if self._stream is None or row < self._next:
            self._stream, self._next = self._file.iter_batches(batch_size=1, columns=self._columns), 0
        while self._next <= row:
            batch = next(self._stream)
            self._next += 1
        return {name.removeprefix(self._prefix): value(batch.column(name)[0]) for name in batch.schema.names}


def value(scalar: Any) -> Any:
    """What a column holds in a row: an array of a list, None, or a Python value."""
    if scalar.is_valid and hasattr(scalar, "values"):
        return scalar.values.to_numpy(zero_copy_only=False)
    return scalar.as_py()


@lru_cache(maxsize=1)
def open_segment(folder: Path, segment: str) -> dict[str, "Rows"]:
    """The `Rows` of every component."""
    return {tag: Rows(folder / tag / f"{segment}.parquet", *names) for tag, names in COMPONENTS.items()}


@lru_cache(maxsize=1)
def sweep(folder: Path, segment: str, time: int) -> tuple[np.ndarray, np.ndarray]:
    """All points of one time: in the world (N, 3), and where they lie in pictures (N, 6)."""
    components = open_segment(folder, segment)
    vehicle_to_world = matrix(components["vehicle_pose"][time,]["world_from_vehicle.transform"])
    points, projections = [], []
    for laser in range(TOP, 6):
        returns = image_of(components["lidar"][time, laser])[..., 0]
        hit = returns > 0
        in_vehicle = cartesian(returns, components["lidar_calibration"][laser,])[hit]
        if laser == TOP:
            poses = image_of(components["lidar_pose"][time, laser])[hit].astype(np.float64)
            turns = Rotation.from_euler("ZYX", poses[:, [2, 1, 0]])
            points.append(turns.apply(in_vehicle) + poses[:, 3:])
        else:
            points.append(transformed(in_vehicle, vehicle_to_world))
        projections.append(image_of(components["lidar_camera_projection"][time, laser])[hit])
    return np.concatenate(points), np.concatenate(projections)


def image_of(row: dict[str, Any]) -> np.ndarray:
    """The first return of a range image (H, W, C)."""
    return row["range_image_return1.values"].reshape(row["range_image_return1.shape"])


def cartesian(returns: np.ndarray, calibration: dict[str, Any]) -> np.ndarray:
    """Points (H, W, 3) in the frame of the vehicle of a range image (H, W)."""
    height, width = returns.shape
    mounting = matrix(calibration["extrinsic.transform"])
    inclination = calibration["beam_inclination.values"]
    if inclination is None:
        low, high = calibration["beam_inclination.min"], calibration["beam_inclination.max"]
        inclination = low + (high - low) * (np.arange(height) + 0.5) / height
    inclination = inclination[::-1, None]
    azimuth = np.pi - 2 * np.pi * (np.arange(width) + 0.5) / width - np.arctan2(mounting[1, 0], mounting[0, 0])
    directions = np.stack(
        [
            np.cos(azimuth) * np.cos(inclination),
            np.sin(azimuth) * np.cos(inclination),
            np.broadcast_to(np.sin(inclination), returns.shape),
        ],
        axis=-1,
    )
    return transformed(returns[..., None] * directions, mounting)


def matrix(values: np.ndarray) -> np.ndarray:
    return np.reshape(values, (4, 4)).astype(np.float64)
