"""The field's depth benchmarks, read as they are distributed. Which pixels count is in `evaluation.protocol`.

All are indexed by whole numbers and yield `Frame`s; `names` is known without opening pictures. A frame that has no
ground truth at all has depth 0 everywhere; a file that should be there and is not raises FileNotFoundError.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from mf_diffusers.datasets.frame import Frame
from mf_diffusers.depth_io import read_depth, read_image


NYU_CAMERA = np.array([[518.857901, 0, 325.582449], [0, 519.469611, 253.736166], [0, 0, 1]], dtype=np.float32)
"""Of the RGB camera, from the NYU Depth toolbox; all frames are from one Kinect."""

DIODE_CAMERA = np.array([[886.81, 0, 511.5], [0, 927.06, 383.5], [0, 0, 1]], dtype=np.float32)
"""Of its 1024x768 crops, from the devkit, where the principal point is the middle of the picture, (512, 384)."""


class NYUv2:
    """NYU Depth v2 (Silberman et al. 2012): the 654 test frames of the official split, 640x480.

    `root` holds `nyu_depth_v2_labeled.mat`, an HDF5 file, and `splits.mat`, whose indices count from 1 and name the
    frames. Depth is `rawDepths`, the sensor's own in metres, as in the evaluations of BTS, AdaBins and Marigold; the
    other array, `depths`, has its holes painted in. Needs h5py.
    """

    def __init__(self, root, split="test"):
        import h5py
        from scipy.io import loadmat

        labelled, splits = _files(root, "nyu_depth_v2_labeled.mat", "splits.mat")
        self.numbers = loadmat(splits)[f"{split}Ndxs"].ravel().astype(int).tolist()
        self.names = [f"{number:04}" for number in self.numbers]
        self.file = h5py.File(labelled)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index) -> Frame:
        at = self.numbers[index] - 1
        # MATLAB stores the first axis innermost: pictures are (N, 3, W, H) and depth (N, W, H) here.
        image, depth = self.file["images"][at].T, self.file["rawDepths"][at].T
        return Frame(self.names[index], image, depth.astype(np.float32), NYU_CAMERA)


class KITTI:
    """KITTI (Geiger et al. 2013, Uhrig et al. 2017): the 697 test frames of Eigen et al. with the improved depth.

    `root` holds `eigen_test_files_with_gt.txt` of BTS (Lee et al. 2019), lines of picture, depth (or None, for 45
    frames that have no improved depth) and focal length; the raw data from its date folders on,
    `2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000069.png`; the annotated depth from its drives on, below
    `train`, `val` or `root` itself, `2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02/0000000069.png`, whose
    16 bits are metres times 256; and for intrinsics, if wanted, the `calib_cam_to_cam.txt` of each date.
    """

    def __init__(self, root):
        self.root = Path(root)
        self.files = [line.split() for line in _lines(root, "eigen_test_files_with_gt.txt")]
        self.names = [image.removesuffix(".png") for image, *_ in self.files]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index) -> Frame:
        picture, truth, *_ = self.files[index]
        image = np.asarray(read_image(self.root / picture))
        depth = np.zeros(image.shape[:2], dtype=np.float32)
        if truth != "None":
            places = [self.root / part / truth for part in ("", "train", "val")]
            depth = read_depth(next(filter(Path.is_file, places), places[0]), scale=1 / 256)
        return Frame(self.names[index], image, depth, self._camera(picture))

    def _camera(self, picture):
        calibration = self.root / picture.split("/")[0] / "calib_cam_to_cam.txt"
        if not calibration.is_file():
            return None
        entries = dict(line.split(": ", 1) for line in calibration.read_text().splitlines() if ": " in line)
        return np.array(entries["P_rect_02"].split(), dtype=np.float32).reshape(3, 4)[:, :3]


class ETH3D:
    """ETH3D high-resolution multi-view (Schoeps et al. 2017): the 454 DSLR frames of its training scenes, 6048x4032.

    `root` holds the unpacked `SCENE_dslr_jpg.7z` and `SCENE_dslr_depth.7z`: `SCENE/images/dslr_images/DSC_0219.JPG`,
    the pictures with their lens distortion, and for each, under the same name, the rendered laser scan
    `SCENE/ground_truth_depth/dslr_images/DSC_0219.JPG`, which is no picture but little-endian float32 metres row by
    row, infinite where there is no scan. Marigold's arrangement of the same files, `rgb/SCENE/...` and
    `depth/SCENE_dslr_depth/SCENE/...`, is read too. The lens is no pinhole, so there are no intrinsics.
    """

    def __init__(self, root):
        self.root = Path(root)
        self.pictures = sorted(
            [*self.root.glob("*/images/dslr_images/*.JPG"), *self.root.glob("rgb/*/images/dslr_images/*.JPG")]
        )
        if not self.pictures:
            raise FileNotFoundError(f"{root}: no SCENE/images/dslr_images/*.JPG in this folder")
        self.names = [f"{picture.parents[2].name}/{picture.stem}" for picture in self.pictures]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index) -> Frame:
        picture, scene = self.pictures[index], self.pictures[index].parents[2]
        with Image.open(picture) as stored:  # not turned upright by EXIF: the depth lies as the sensor does
            image = np.asarray(stored.convert("RGB"))
        if scene.parent == self.root / "rgb":
            scene = self.root / "depth" / f"{scene.name}_dslr_depth" / scene.name
        truth = scene / "ground_truth_depth" / "dslr_images" / picture.name
        values = np.fromfile(truth, dtype="<f4")
        if values.size != image.shape[0] * image.shape[1]:
            raise ValueError(f"{truth}: {values.size} values for a picture of {image.shape[1]}x{image.shape[0]}")
        values[~np.isfinite(values)] = 0
        return Frame(self.names[index], image, values.reshape(image.shape[:2]))


class ScanNet:
    """ScanNet v2 (Dai et al. 2017): the 800 validation frames that Marigold sampled, 640x480.

    `root` holds `scannet_val_sampled_list_800_1.txt`, lines of picture and depth, and the frames exported from the
    `.sens` files, `scene0406_02/color/000300.jpg` and `scene0406_02/depth/000300.png`, whose 16 bits are millimetres.
    The larger colour pictures are brought to the size of the depth. Intrinsics, if wanted, are those of the export,
    `scene0406_02/intrinsic/intrinsic_depth.txt`.
    """

    def __init__(self, root):
        self.root = Path(root)
        self.files = [line.split() for line in _lines(root, "scannet_val_sampled_list_800_1.txt")]
        self.names = [image.removesuffix(".jpg") for image, *_ in self.files]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index) -> Frame:
        picture, truth, *_ = self.files[index]
        depth = read_depth(self.root / truth, scale=1 / 1000)
        image = read_image(self.root / picture).resize(depth.shape[::-1], Image.Resampling.LANCZOS)
        camera = self.root / picture.split("/")[0] / "intrinsic" / "intrinsic_depth.txt"
        intrinsics = np.loadtxt(camera, dtype=np.float32)[:3, :3] if camera.is_file() else None
        return Frame(self.names[index], np.asarray(image), depth, intrinsics)


class DIODE:
    """DIODE (Vasiljevic et al. 2019): the validation frames, 325 indoors and 446 outdoor, 1024x768.

    `root` is the folder `val` of the unpacked archive, with
    `indoors/scene_00019/scan_00183/00019_00183_indoors_000_010.png`, `..._depth.npy` (metres, (768, 1024, 1)) and
    `..._depth_mask.npy` (1 where valid). `split` "indoors" or "outdoor" takes a part.
    """

    def __init__(self, root, split=None):
        self.root = Path(root)
        names = [picture.relative_to(root).with_suffix("").as_posix() for picture in self.root.rglob("*.png")]
        self.names = sorted(name for name in names if split is None or f"_{split}_" in name)
        if not self.names:
            raise FileNotFoundError(f"{root}: no {split or ''} pictures (*.png) in this folder")

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index) -> Frame:
        name = self.names[index]
        depth = read_depth(self.root / f"{name}_depth.npy")
        valid = np.load(self.root / f"{name}_depth_mask.npy").squeeze() > 0
        if valid.shape != depth.shape:
            raise ValueError(f"{name}: mask of shape {valid.shape} for depth of shape {depth.shape}")
        image = np.asarray(read_image(self.root / f"{name}.png"))
        return Frame(name, image, np.where(valid, depth, np.float32(0)), DIODE_CAMERA)


class MoGeLayout:
    """A data set in the layout of MoGe's evaluation (Wang et al. 2025), in which it hands out ten benchmarks.

    `root` holds `.index.txt`, a frame's folder per line, and in each folder `image.jpg`, `depth.png` (see
    `read_log_depth`) and `meta.json` with the normalised camera matrix `intrinsics`: in units of the picture's width
    and height, its top left corner at (0, 0).
    """

    def __init__(self, root):
        self.root = Path(root)
        self.names = _lines(root, ".index.txt")

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index) -> Frame:
        folder = self.root / self.names[index]
        image = np.asarray(read_image(folder / "image.jpg"))
        (meta,) = _files(folder, "meta.json")
        height, width = image.shape[:2]
        intrinsics = np.diag([width, height, 1]) @ np.array(json.loads(meta.read_text())["intrinsics"])
        intrinsics[:2, 2] -= 0.5  # the centre of a pixel lies half a pixel from its corner
        return Frame(self.names[index], image, read_log_depth(folder / "depth.png"), intrinsics.astype(np.float32))


def read_log_depth(path) -> np.ndarray:
    """Depth (H, W), float32, of MoGe's 16-bit PNG: 0 missing, infinite where it is said to be.

    With u = (raw - 1) / 65533, depth = near^(1 - u) far^u; raw 0 is missing and 65535 infinite. The text chunks `near`
    and `far`, and in older files `unit`, a factor, are in the file. Raises FileNotFoundError, or ValueError for a file
    of another kind.
    """
    _files(Path(path).parent, Path(path).name)
    try:
        with Image.open(path) as stored:
            raw, notes = np.asarray(stored), stored.info
    except Exception as error:  # decoders meet damaged files with errors of many types
        raise ValueError(f"{path}: cannot be read as a picture: {error}") from error
    if raw.dtype != np.uint16 or not {"near", "far"} <= notes.keys():
        raise ValueError(f"{path}: no 16-bit PNG with the text chunks near and far, but {raw.dtype}, {sorted(notes)}")
    near, far = float(notes["near"]), float(notes["far"])
    share = (raw.astype(np.float64) - 1) / 65533
    depth = near ** (1 - share) * far**share * float(notes.get("unit", 1))
    depth[raw == 0] = 0
    depth[raw == 65535] = np.inf
    return depth.astype(np.float32)


def _files(root, *names):
    paths = [Path(root) / name for name in names]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
    return paths


def _lines(root, name):
    (path,) = _files(root, name)
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} lists no frames")
    return lines
