"""Argoverse 2, sensor data set: drives in six cities.

Source: https://www.argoverse.org/av2.html, https://github.com/argoverse/av2-api (Wilson et al., 2021), CC BY-NC-SA 4.0.

    ROOT/train/LOG/sensors/lidar/NANOSECONDS.feather                   x, y, z (float16), metres, frame of the vehicle
    ROOT/train/LOG/sensors/cameras/ring_front_center/NANOSECONDS.jpg   seven ring cameras, 20 pictures a second
    ROOT/train/LOG/calibration/intrinsics.feather                      fx_px, fy_px, cx_px, cy_px of a sensor_name
    ROOT/train/LOG/calibration/egovehicle_SE3_sensor.feather           its pose: qw, qx, qy, qz, tx_m, ty_m, tz_m
    ROOT/train/LOG/city_SE3_egovehicle.feather                         pose of the vehicle at every time of a sensor

Ten sweeps a second are compensated for the motion of the vehicle within them; pictures are undistorted (k1 to k3 belong
to the lenses before that and are not applied). A frame is a picture within 25 ms of a sweep. The sweep is moved by the
motion of the vehicle between both times, projected, and the nearest point of each pixel kept: depth is z-depth in
metres and sparse, about one pixel in two hundred. float16 rounds coordinates beyond 64 m to 6 cm.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from .dataset import Dataset, pinhole, read_rgb
from .frame import Frame
from .lidar import nearest_points, transformed


TOLERANCE = 25_000_000  # nanoseconds, half the time between two pictures


class Argoverse2(Dataset):
    """Reads Argoverse 2, unpacked as this module says.

    Frames are called "train/LOG/ring_front_center/NANOSECONDS"."""

    splits = ("train", "val", "test")
    layout = "train/LOG/sensors/lidar/NANOSECONDS.feather"
    library = "pyarrow"

    def _find(self):
        for sensors in self._files("**/sensors"):
            log = sensors.parent
            sweeps = sweep_times(self.root / log)
            for path in (self.root / sensors / "cameras").glob("ring_*/[0-9]*.jpg"):
                time = int(path.stem)
                if len(sweeps) and abs(nearest(sweeps, time) - time) <= TOLERANCE:
                    yield f"{log.as_posix()}/{path.parent.name}/{time}"

    def _read(self, name):
        *log, camera, time = name.split("/")
        log, time = self.root.joinpath(*log), int(time)
        image = read_rgb(log / "sensors" / "cameras" / camera / f"{time}.jpg")
        lens = table(log / "calibration" / "intrinsics.feather", "sensor_name")[camera]
        intrinsics = pinhole(lens["fx_px"], lens["fy_px"], lens["cx_px"], lens["cy_px"])

        sweep = nearest(sweep_times(log), time)
        columns = feather(log / "sensors" / "lidar" / f"{sweep}.feather")
        points = np.stack([columns[axis].astype(np.float64) for axis in "xyz"], axis=-1)
        poses = table(log / "city_SE3_egovehicle.feather", "timestamp_ns")
        mounting = pose(table(log / "calibration" / "egovehicle_SE3_sensor.feather", "sensor_name")[camera])
        x, y, z = transformed(points, np.linalg.inv(pose(poses[time]) @ mounting) @ pose(poses[sweep])).T
        ahead = z > 0
        x, y, z = x[ahead], y[ahead], z[ahead]
        u = np.rint(lens["fx_px"] * x / z + lens["cx_px"])
        v = np.rint(lens["fy_px"] * y / z + lens["cy_px"])
        return Frame(name, image, nearest_points(u, v, z, image.shape[:2]), intrinsics)


@lru_cache(maxsize=4)
def sweep_times(log: Path) -> np.ndarray:
    """The times of the LiDAR sweeps of a log in order, int64 (N,)."""
    paths = (log / "sensors" / "lidar").glob("[0-9]*.feather")
    return np.array(sorted(int(path.stem) for path in paths), dtype=np.int64)


def nearest(times: np.ndarray, time: int) -> int:
    """The one of the sorted `times` that is nearest to `time`."""
    after = np.searchsorted(times, time)
    return min((int(t) for t in times[max(0, after - 1) : after + 1]), key=lambda t: abs(t - time))


def feather(path: Path) -> dict[str, np.ndarray]:
    """The columns of a feather file by name, as arrays."""
    from pyarrow.feather import read_table

    read = read_table(path)
    return {column: read[column].to_numpy() for column in read.column_names}


@lru_cache(maxsize=16)
def table(path: Path, key: str) -> dict[Any, dict[str, Any]]:
    """The rows of a feather file, dicts, by what they have in column `key`."""
    columns = feather(path)
    rows = (dict(zip(columns, values)) for values in zip(*columns.values()))
    return {row[key]: row for row in rows}


def pose(row: dict[str, Any]) -> np.ndarray:
    """The transform (4, 4) that the quaternion and translation of a row give."""
    transform = np.eye(4)
    transform[:3, :3] = Rotation.from_quat([row["qx"], row["qy"], row["qz"], row["qw"]]).as_matrix()
    transform[:3, 3] = row["tx_m"], row["ty_m"], row["tz_m"]
    return transform
