"""Where predictions come from: a model, or a folder of depth files made by any method.

A predictor is called with the frame of a protocol's view and its number, and returns the prediction, float32 (H, W),
and what to note about it in the frame's record. It raises ValueError or OSError where there is no prediction. `facts`
decide the predictions, and may not change within a run; `environment` is where they were made.
"""

import hashlib
import platform
from pathlib import Path

import numpy as np
import torch

from mf_diffusers.depth_io import read_values
from mf_diffusers.files import ESCAPED, atomic_write


SUFFIXES = (".npy", ".npz", ".exr", ".pfm", ".tif", ".tiff", ".png")
"""Of prediction files, in the order in which they are looked for: the exact ones first."""


class ModelPredictor:
    """Depth by image -> depth of a pipeline; noise drawn with `seed` plus the frame's number, whoever computes it when.

    Args:
        pipe: a `ModalityForcingPipeline`.
        facts: what is known of the model beyond its weights, such as its name.
        steps, ensemble: Euler steps (None: the checkpoint's), and samples of which the aligned median is taken.
        disparity: predict the inverse of the depth, for the protocol's alignment in disparity.
    """

    def __init__(self, pipe, facts, steps=None, ensemble=1, seed=0, disparity=False):
        steps = steps or pipe.config.default_depth_steps
        self.pipe, self.steps, self.ensemble, self.seed, self.disparity = pipe, steps, ensemble, seed, disparity
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

    def __call__(self, frame, number):
        seed = self.seed + number
        depth = self.pipe(
            image=frame.image,
            num_inference_steps=self.steps,
            ensemble_size=self.ensemble,
            generator=torch.Generator().manual_seed(seed),
        ).depth[0]
        return (1 / depth if self.disparity else depth), {"seed": seed}


class FolderPredictor:
    """Predictions on disk: for the frame `scene/12` the file `scene/12.npy` (or another of `SUFFIXES`), or the result
    folder `scene/12` with `depth.npy`, of the size of the frame's view.

    Raises FileNotFoundError when there is no such folder.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder of predictions")
        self.facts = {"predictions": str(self.folder.resolve()), "files_sha256": self._files_hash()}
        self.environment = {}

    def __call__(self, frame, number):
        names = [f"{frame.name}{suffix}" for suffix in SUFFIXES] + [f"{frame.name}/depth.npy"]
        file = next((name for name in names if (self.folder / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(f"no prediction {frame.name} ({', '.join(SUFFIXES)}) in {self.folder}")
        prediction = read_values(self.folder / file)
        if prediction.shape != frame.depth.shape:
            sizes = ["x".join(map(str, reversed(array.shape))) for array in (prediction, frame.depth)]
            raise ValueError(f"prediction {file} of {sizes[0]} pixels for a picture of {sizes[1]}; resize it first")
        return prediction, {"file": file}

    def _files_hash(self):
        """Of the names, sizes and times of the files: it changes with the predictions, and does not read them."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.rglob("*")):
            if path.suffix in SUFFIXES:
                status = path.stat()
                name = path.relative_to(self.folder).as_posix()
                digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode(**ESCAPED))
        return digest.hexdigest()


def weights_hash(pipe) -> str:
    """SHA-256 of the weights that make the predictions, in the dtype in which they are loaded, adapters included."""
    digest = hashlib.sha256()
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    for part in sorted(parts):
        for name, tensor in sorted(parts[part].state_dict().items()):
            digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_prediction(folder, name, prediction):
    """Write a prediction where `FolderPredictor` finds it, exactly as it is."""
    path = Path(folder) / f"{name}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        np.save(temporary, prediction.astype(np.float32))
