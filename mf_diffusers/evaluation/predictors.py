"""Where predictions come from: a model, the interpolation of known points, or depth files made by any method."""

import hashlib
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator
from scipy.spatial import QhullError

from mf_diffusers.alignment import align_scale
from mf_diffusers.datasets.frame import Frame
from mf_diffusers.depth_io import read_values
from mf_diffusers.evaluation.views import flat_name
from mf_diffusers.files import ESCAPED, atomic_write


if TYPE_CHECKING:
    from mf_diffusers import ModalityForcingPipeline


SUFFIXES = (".npy", ".npz", ".exr", ".pfm", ".tif", ".tiff", ".png")
"""Of prediction files, in the order in which they are looked for: the exact ones first."""

LAYOUTS = (
    "{}",  # ours, Depth Pro, MiDaS
    "{}/depth",  # ours, MoGe
    "{}/depth_metric",  # MoGe's baselines
    "{}/depth_scale_invariant",
    "{}/depth_affine_invariant",
    "depth_npy/{}_depth",  # Marigold
    "depth_npy/{}_pred",  # Marigold before 2025, GeoWizard
    "depth_npy/{}",
    "depth_bw/{}_depth",
    "{}_raw_depth_meter",  # Depth Anything
    "{}_depth",
)
DISPARITY_LAYOUTS = (
    "{}/disparity",  # MoGe's baselines
    "{}/disparity_affine_invariant",
    "{}_disp",  # Monodepth2
    "{}_disparity",
)
"""Where the programs of other methods put the prediction of a picture, its suffix apart."""


class Predictor(Protocol):
    """
    What an evaluation asks for predictions.

    Called with the frame of a protocol's view and its number, it returns the prediction, float32 (H, W), and what to
    note about it in the frame's record. It raises ValueError or OSError where there is no prediction.

    Attributes:
        facts: what decides the predictions, and may not change within a run.
        environment: where they were made.
    """

    facts: dict[str, Any]
    environment: dict[str, str]

    def __call__(self, frame: Frame, number: int) -> tuple[np.ndarray, dict[str, Any]]: ...


class ModelPredictor:
    """Depth by image -> depth of a pipeline, or by completion where the frame has sparse depth; noise drawn with `seed`
    plus the frame's number, whoever computes it when.

    Args:
        pipe: a `ModalityForcingPipeline`.
        facts: what is known of the model beyond its weights, such as its name.
        steps, ensemble: Euler steps (None: the checkpoint's), and samples of which the aligned median is taken.
        disparity: predict the inverse of the depth, for the protocol's alignment in disparity.
        fitted: do not complete sparse depth, but give image -> depth the one scale that fits it best, robustly.
    """

    def __init__(
        self,
        pipe: "ModalityForcingPipeline",
        facts: dict[str, Any],
        steps: int | None = None,
        ensemble: int = 1,
        seed: int = 0,
        disparity: bool = False,
        fitted: bool = False,
    ):
        steps = steps or pipe.config.default_depth_steps
        self.pipe, self.steps, self.ensemble, self.seed, self.disparity = pipe, steps, ensemble, seed, disparity
        self.fitted = fitted
        facts = facts | ({"method": "fitted"} if fitted else {})
        self.facts = facts | {
            "transformer": type(pipe.transformer).__name__,
            "weights_sha256": weights_hash(pipe),
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "steps": steps,
            "ensemble": ensemble,
            "seed": seed,
        }
        device = pipe._execution_device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        self.environment = {"device": f"{device.type} ({name})"}

    def __call__(self, frame: Frame, number: int) -> tuple[np.ndarray, dict[str, Any]]:
        seed = self.seed + number
        depth = self.pipe(
            image=frame.image,
            depth=None if self.fitted else frame.sparse,
            num_inference_steps=self.steps,
            ensemble_size=self.ensemble,
            generator=torch.Generator().manual_seed(seed),
        ).depth[0]
        if self.fitted:
            depth = align_scale(depth, frame.sparse, grid=None).apply(depth).astype(np.float32)
        return (1 / depth if self.disparity else depth), {"seed": seed}


class InterpolationPredictor:
    """Depth completion without a picture or a model: see `interpolated`."""

    facts = {"method": "interpolation"}
    environment: dict[str, str] = {}

    def __call__(self, frame: Frame, number: int) -> tuple[np.ndarray, dict[str, Any]]:
        return interpolated(frame.sparse), {}


class FolderPredictor:
    """Predictions on disk, of the size of the frame's view.

    For the frame `scene/12` that is the file `scene/12.npy` (or another of `SUFFIXES`), or where other programs put
    theirs (`LAYOUTS`). The pictures of `save_views` have the name `scene--12`, which is looked for too.

    Args:
        folder: where they are.
        zero_is_value: see `read_values`.
        disparity: whether they are disparity, which is looked for in `DISPARITY_LAYOUTS` first.

    Raises FileNotFoundError when there is no such folder.
    """

    def __init__(self, folder: str | Path, zero_is_value: bool = False, disparity: bool = False):
        self.folder, self.zero_is_value, self.disparity = Path(folder), zero_is_value, disparity
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder of predictions")
        self.facts = {
            "predictions": str(self.folder.resolve()),
            "files_sha256": self._files_hash(),
            "zero_is_value": zero_is_value,
        }
        self.environment = {}

    def __call__(self, frame: Frame, number: int) -> tuple[np.ndarray, dict[str, Any]]:
        file = self._file(frame.name, (*DISPARITY_LAYOUTS, *LAYOUTS) if self.disparity else LAYOUTS)
        if file is None:
            disparity = self._file(frame.name, DISPARITY_LAYOUTS)
            if disparity is not None:
                raise ValueError(f"prediction {disparity} is disparity: score it with alignment='disparity'")
            raise FileNotFoundError(f"no prediction {frame.name} ({', '.join(SUFFIXES)}) in {self.folder}")
        prediction = read_values(self.folder / file, zero_is_value=self.zero_is_value)
        if prediction.shape != frame.depth.shape:
            sizes = ["x".join(map(str, reversed(array.shape))) for array in (prediction, frame.depth)]
            raise ValueError(f"prediction {file} of {sizes[0]} pixels for a picture of {sizes[1]}; resize it first")
        return prediction, {"file": file}

    def _file(self, name, layouts):
        """The file of a frame relative to the folder, or None: of the first suffix of which there is one."""
        names = dict.fromkeys((name, flat_name(name)))
        files = (layout.format(n) + suffix for suffix in SUFFIXES for layout in layouts for n in names)
        return next((file for file in files if (self.folder / file).is_file()), None)

    def _files_hash(self):
        """Of the names, sizes and times of the files: it changes with the predictions, and does not read them."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.rglob("*")):
            if path.suffix in SUFFIXES:
                status = path.stat()
                name = path.relative_to(self.folder).as_posix()
                digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode(**ESCAPED))
        return digest.hexdigest()


def interpolated(sparse: np.ndarray) -> np.ndarray:
    """Sparse depth (H, W), 0 where missing, interpolated: linear within the triangles of its points (Delaunay), the
    nearest point outside of them. Raises ValueError where there is no point."""
    places = np.argwhere(sparse > 0)
    if len(places) == 0:
        raise ValueError("no depth is given, so there is nothing to interpolate")
    values, grid = sparse[sparse > 0], np.indices(sparse.shape)
    depth = NearestNDInterpolator(places, values)(*grid)
    try:
        linear = LinearNDInterpolator(places, values)(*grid)
    except (QhullError, ValueError):  # fewer than three points, or all in a line
        return depth.astype(np.float32)
    return np.where(np.isnan(linear), depth, linear).astype(np.float32)


def weights_hash(pipe: "ModalityForcingPipeline") -> str:
    """SHA-256 of the weights that make the predictions, in the dtype in which they are loaded, adapters included."""
    digest = hashlib.sha256()
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    for part in sorted(parts):
        for name, tensor in sorted(parts[part].state_dict().items()):
            digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_prediction(folder: Path, name: str, prediction: np.ndarray) -> None:
    """Write a prediction where `FolderPredictor` finds it, exactly as it is."""
    path = Path(folder) / f"{name}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        np.save(temporary, prediction.astype(np.float32))
