"""Hypersim: rendered interiors.

Source: https://github.com/apple/ml-hypersim (Roberts et al., ICCV 2021), CC BY-SA 3.0.

    ROOT/metadata_camera_parameters.csv            from contrib/mikeroberts3000 of that repository
    ROOT/metadata_images_split_scene_v1.csv        from evermotion_dataset/analysis of it; only for a split
    ROOT/ai_VVV_NNN/images/scene_cam_XX_geometry_hdf5/frame.IIII.depth_meters.hdf5
    ROOT/ai_VVV_NNN/images/scene_cam_XX_geometry_hdf5/frame.IIII.render_entity_id.hdf5
    ROOT/ai_VVV_NNN/images/scene_cam_XX_final_hdf5/frame.IIII.color.hdf5
    ROOT/ai_VVV_NNN/images/scene_cam_XX_final_preview/frame.IIII.tonemap.jpg      where there is no color.hdf5

Every HDF5 file holds one array, "dataset". depth_meters is the distance to the camera in metres, along the ray; NaN
where no geometry is. color is linear light without a bound; the data set's own tone mapping is applied.

The cameras of 285 of the 482 scenes in the CSV are tilted or shifted against the plane of the picture, up to 41
degrees. M_cam_from_uv takes picture coordinates, -1 to 1 with v up, to rays of a camera that looks along -z with y up.
Its inverse is split into an upper triangular camera matrix and a rotation: z-depth is measured at right angles to the
picture, as in every pinhole camera, not along the axis that the scene file names.
"""

import csv
from pathlib import Path

import numpy as np
import scipy.linalg

from .dataset import Dataset, read_rgb
from .frame import Frame


class Hypersim(Dataset):
    """Reads Hypersim, unpacked as this module says.

    Frames are called "ai_001_001/cam_00/0000"; the splits are those of the published CSV, v1."""

    splits = ("train", "val", "test")
    library = "h5py"
    layout = "ai_VVV_NNN/images/scene_cam_XX_geometry_hdf5/frame.IIII.depth_meters.hdf5"

    def __init__(self, root: str | Path, split: str | None = None):
        super().__init__(root, split)
        self._cameras = {row["scene_name"]: row for row in self._table("metadata_camera_parameters.csv")}

    def _table(self, name):
        if not (self.root / name).is_file():
            raise FileNotFoundError(f"{self.root / name}: no such file; copy it from github.com/apple/ml-hypersim")
        with (self.root / name).open(newline="") as file:
            return list(csv.DictReader(file))

    def _find(self):
        found = set()
        for path in self.root.glob("ai_*/images/scene_cam_*_geometry_hdf5/frame.*.depth_meters.hdf5"):
            camera = path.parent.name.removeprefix("scene_").removesuffix("_geometry_hdf5")
            found.add(f"{path.parents[2].name}/{camera}/{path.name.split('.')[1]}")
        if self.split is None:
            return found
        return found & {
            f"{row['scene_name']}/{row['camera_name']}/{int(row['frame_id']):04d}"
            for row in self._table("metadata_images_split_scene_v1.csv")
            if row["split_partition_name"] == self.split
        }

    def _read(self, name):
        import h5py

        scene, camera, number = name.split("/")
        start = self.root / scene / "images" / f"scene_{camera}"

        def array(folder, kind):
            with h5py.File(f"{start}_{folder}_hdf5/frame.{number}.{kind}.hdf5") as file:
                return file["dataset"][:]

        distance = array("geometry", "depth_meters").astype(np.float64)
        preview = start.with_name(f"{start.name}_final_preview") / f"frame.{number}.tonemap.jpg"
        if start.with_name(f"{start.name}_final_hdf5").is_dir():
            image = tone_mapped(array("final", "color"), array("geometry", "render_entity_id") != -1)
        else:
            image = read_rgb(preview)

        row = self._cameras[scene]
        height, width = distance.shape
        pixel_to_uv = np.array([[2 / width, 0, 1 / width - 1], [0, -2 / height, 1 - 1 / height], [0, 0, 1]])
        uv_to_ray = np.array([[float(row[f"M_cam_from_uv_{i}{j}"]) for j in range(3)] for i in range(3)])
        intrinsics, _ = scipy.linalg.rq(np.linalg.inv(np.diag([1, -1, -1]) @ uv_to_ray @ pixel_to_uv))
        intrinsics = intrinsics @ np.diag(np.sign(np.diag(intrinsics))) / abs(intrinsics[2, 2])

        columns, rows = np.meshgrid(np.arange(width), np.arange(height))
        rays = np.linalg.solve(intrinsics, np.stack([columns, rows, np.ones_like(rows)]).reshape(3, -1))
        depth = distance / np.linalg.norm(rays, axis=0).reshape(height, width)
        depth = np.where(depth > 0, depth, 0)  # NaN becomes 0
        return Frame(name, image, depth.astype(np.float32), intrinsics.astype(np.float32))


def tone_mapped(color: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Linear light (H, W, 3) to uint8, exposed so that the 90th percentile of the brightness becomes 0.8.

    Args:
        valid: (H, W), True on geometry; what lies beyond does not count for the exposure. A picture without geometry
            keeps its exposure, and one that is dark almost everywhere becomes black.
    """
    color = np.nan_to_num(color.astype(np.float32), posinf=np.finfo(np.float16).max, neginf=0)
    brightness = (color @ np.array([0.30, 0.59, 0.11], dtype=np.float32))[valid]
    scale = 1.0
    if brightness.size:
        bright = np.percentile(brightness, 90)
        scale = 0.8**2.2 / bright if bright >= 1e-4 else 0.0
    return np.round(255 * np.clip(scale * color, 0, 1) ** (1 / 2.2)).astype(np.uint8)
