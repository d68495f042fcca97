"""The field's depth benchmarks, read as they are distributed. Which pixels count is in `evaluation.protocol`.

A frame that has no ground truth at all has depth 0 everywhere; a file that should be there and is not raises ValueError
from `__getitem__`, and the list of frames, where the benchmark has one, FileNotFoundError from `names`.
"""

import json
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from mf_diffusers.depth_files import read_stored
from mf_diffusers.depth_io import as_depth_map, read_depth
from mf_diffusers.pictures import read_image

from .dataset import Dataset, read_rgb
from .frame import Frame


NYU_CAMERA = np.array([[518.857901, 0, 325.582449], [0, 519.469611, 253.736166], [0, 0, 1]], dtype=np.float32)
"""Of the RGB camera, from the NYU Depth toolbox; all frames are from one Kinect."""

DIODE_CAMERA = np.array([[886.81, 0, 511.5], [0, 927.06, 383.5], [0, 0, 1]], dtype=np.float32)
"""Of its 1024x768 crops, from the devkit, where the principal point is the middle of the picture, (512, 384)."""


class NYUv2(Dataset):
    """NYU Depth v2 (Silberman et al. 2012): the 654 test frames of the official split, 640x480.

    `root` holds `nyu_depth_v2_labeled.mat`, an HDF5 file, and `splits.mat`, whose indices count from 1 and name the
    frames. Depth is `rawDepths`, the sensor's own in metres, as in the evaluations of BTS, AdaBins and Marigold; the
    other array, `depths`, has its holes painted in.
    """

    splits = ("train", "test")
    layout = "nyu_depth_v2_labeled.mat and splits.mat"
    library = "h5py"

    def __init__(self, root: str | Path, split: str = "test"):
        super().__init__(root, split)

    def _find(self):
        from scipy.io import loadmat

        return [f"{number:04}" for number in loadmat(str(self.root / "splits.mat"))[f"{self.split}Ndxs"].ravel()]

    @cached_property
    def _file(self):
        import h5py

        return h5py.File(self.root / "nyu_depth_v2_labeled.mat")

    def _read(self, name):
        # MATLAB stores the first axis innermost: pictures are (N, 3, W, H) and depth (N, W, H) here.
        image, depth = (self._file[array][int(name) - 1].T for array in ("images", "rawDepths"))
        return Frame(name, np.ascontiguousarray(image), np.ascontiguousarray(depth, dtype=np.float32), NYU_CAMERA)


class KITTI(Dataset):
    """KITTI (Geiger et al. 2013, Uhrig et al. 2017): the 697 test frames of Eigen et al. with the improved depth.

    `root` holds `eigen_test_files_with_gt.txt` of BTS (Lee et al. 2019), lines of picture, depth (or None, for 45
    frames that have no improved depth) and focal length; the raw data from its date folders on,
    `2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000069.png`; the annotated depth from its drives on, below
    `train`, `val` or `root` itself, `2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02/0000000069.png`, whose
    16 bits are metres times 256; and for intrinsics, if wanted, the `calib_cam_to_cam.txt` of each date.
    """

    layout = "eigen_test_files_with_gt.txt, 2011_09_26/*_sync/image_02/data/*.png and {train,val}/*_sync/proj_depth"

    @cached_property
    def _truths(self):
        """The depth file of every frame, relative to where the drives lie."""
        lines = [line.split() for line in read_lines(self.root / "eigen_test_files_with_gt.txt")]
        return {picture.removesuffix(".png"): truth for picture, truth, *_ in lines}

    def _find(self):
        return self._truths

    def _read(self, name):
        image, truth = read_rgb(self.root / f"{name}.png"), self._truths[name]
        depth = np.zeros(image.shape[:2], dtype=np.float32)
        if truth != "None":
            places = [self.root / part / truth for part in ("", "train", "val")]
            depth = read_depth(next(filter(Path.is_file, places), places[0]), scale=1 / 256)
        calibration = self.root / name.split("/")[0] / "calib_cam_to_cam.txt"
        camera = None
        if calibration.is_file():
            entries = dict(line.split(": ", 1) for line in read_lines(calibration))
            camera = np.array(entries["P_rect_02"].split(), dtype=np.float32).reshape(3, 4)[:, :3]
        return Frame(name, image, depth, camera)


class ETH3D(Dataset):
    """ETH3D high-resolution multi-view (Schoeps et al. 2017): the 454 DSLR frames of its training scenes, 6048x4032.

    `root` holds the unpacked `SCENE_dslr_jpg.7z` and `SCENE_dslr_depth.7z`: `SCENE/images/dslr_images/DSC_0219.JPG`,
    the pictures with their lens distortion, and for each, under the same name, the rendered laser scan
    `SCENE/ground_truth_depth/dslr_images/DSC_0219.JPG`, which is no picture but little-endian float32 metres row by
    row, infinite where there is no scan. Marigold's arrangement of the same files, `rgb/SCENE/...` and
    `depth/SCENE_dslr_depth/SCENE/...`, is read too. The lens is no pinhole, so there are no intrinsics.
    """

    layout = "SCENE/images/dslr_images/*.JPG and SCENE/ground_truth_depth/dslr_images/*.JPG"

    def _find(self):
        pictures = [*self._files("*/images/dslr_images/*.JPG"), *self._files("rgb/*/images/dslr_images/*.JPG")]
        return [f"{picture.parents[2].as_posix()}/{picture.stem}" for picture in pictures]

    def _read(self, name):
        scene, number = name.rsplit("/", 1)
        image = read_rgb(self.root / scene / "images" / "dslr_images" / f"{number}.JPG")
        if scene.startswith("rgb/"):
            scene = f"depth/{scene[4:]}_dslr_depth/{scene[4:]}"
        truth = self.root / scene / "ground_truth_depth" / "dslr_images" / f"{number}.JPG"
        depth = np.fromfile(truth, dtype="<f4")
        if depth.size != image.shape[0] * image.shape[1]:
            raise ValueError(f"{truth} holds {depth.size} values, for a picture of {image.shape[1]}x{image.shape[0]}")
        depth[~np.isfinite(depth)] = 0
        return Frame(name, image, depth.reshape(image.shape[:2]))


class ScanNet800(Dataset):
    """ScanNet v2 (Dai et al. 2017): the 800 validation frames that Marigold sampled, 640x480.

    `root` holds `scannet_val_sampled_list_800_1.txt`, lines of picture and depth, and the frames exported from the
    `.sens` files, `scene0406_02/color/000300.jpg` and `scene0406_02/depth/000300.png`, whose 16 bits are millimetres.
    The larger colour pictures are brought to the size of the depth. Intrinsics, if wanted, are those of the export,
    `scene0406_02/intrinsic/intrinsic_depth.txt`.
    """

    layout = "scannet_val_sampled_list_800_1.txt, scene0406_02/color/*.jpg and scene0406_02/depth/*.png"

    @cached_property
    def _paths(self):
        lines = [line.split() for line in read_lines(self.root / "scannet_val_sampled_list_800_1.txt")]
        return {Path(picture).with_suffix("").as_posix(): (picture, truth) for picture, truth, *_ in lines}

    def _find(self):
        return self._paths

    def _read(self, name):
        picture, truth = (self.root / path for path in self._paths[name])
        depth = read_depth(truth, scale=1 / 1000)
        image = read_image(picture, upright=False).resize(depth.shape[::-1], Image.Resampling.LANCZOS)
        camera = picture.parents[1] / "intrinsic" / "intrinsic_depth.txt"
        intrinsics = np.loadtxt(camera, dtype=np.float32)[:3, :3] if camera.is_file() else None
        return Frame(name, np.asarray(image), depth, intrinsics)


class DIODE(Dataset):
    """DIODE (Vasiljevic et al. 2019): the validation frames, 325 indoors and 446 outdoor, 1024x768.

    `root` is the folder `val` of the unpacked archive, with
    `indoors/scene_00019/scan_00183/00019_00183_indoors_000_010.png`, `..._depth.npy` (metres, (768, 1024, 1)) and
    `..._depth_mask.npy` (1 where valid).
    """

    splits = ("indoors", "outdoor")
    layout = "{indoors,outdoor}/scene_00019/scan_00183/*.png, *_depth.npy and *_depth_mask.npy"

    def _find(self):
        return [picture.with_suffix("").as_posix() for picture in self._files("**/*.png")]

    def _read(self, name):
        depth = read_depth(self.root / f"{name}_depth.npy")
        valid = np.load(self.root / f"{name}_depth_mask.npy").squeeze() > 0
        return Frame(name, read_rgb(self.root / f"{name}.png"), np.where(valid, depth, np.float32(0)), DIODE_CAMERA)


class MoGeLayout(Dataset):
    """A data set in the layout of MoGe's evaluation (Wang et al. 2025), in which it hands out ten benchmarks.

    `root` holds `.index.txt`, a frame's folder per line, and in each folder `image.jpg`, `depth.png` (see
    `read_log_depth`) and `meta.json` with the normalised camera matrix `intrinsics`: in units of the picture's width
    and height, its top left corner at (0, 0).
    """

    layout = ".index.txt, and of every frame in it image.jpg, depth.png and meta.json"

    def _find(self):
        return read_lines(self.root / ".index.txt")

    def _read(self, name):
        folder = self.root / name
        image = read_rgb(folder / "image.jpg")
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        height, width = image.shape[:2]
        intrinsics = np.diag([width, height, 1]) @ np.array(meta["intrinsics"])
        intrinsics[:2, 2] -= 0.5  # the centre of a pixel lies half a pixel from its corner
        return Frame(name, image, read_log_depth(folder / "depth.png"), intrinsics.astype(np.float32))


def read_log_depth(path: Path) -> np.ndarray:
    """Depth (H, W), float32, of MoGe's 16-bit PNG (see `log_depth`): 0 where missing, inf where infinite.

    Raises FileNotFoundError, and ValueError for other files.
    """
    values = read_stored(path).values
    if values.dtype.kind != "f":
        raise ValueError(f"{path}: no 16-bit PNG with the text chunks near and far")
    return as_depth_map(values, infinite=np.inf)


def read_lines(path: Path) -> list[str]:
    """The lines of a list, without empty ones."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]
