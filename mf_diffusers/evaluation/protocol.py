"""What is compared, and how: the benchmarks with their pixels that count, alignment, and the metrics of one frame."""

import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mf_diffusers.alignment import ALIGNMENTS
from mf_diffusers.datasets.benchmarks import DIODE, ETH3D, KITTI, MoGeLayout, NYUv2, ScanNet800
from mf_diffusers.datasets.completion import KITTICompletion, SparseFolder
from mf_diffusers.datasets.folder import Folder
from mf_diffusers.datasets.frame import Frame
from mf_diffusers.evaluation.metrics import boundary_f1, completion_metrics, depth_metrics, point_cloud_distance
from mf_diffusers.evaluation.views import center_crop, central_square, moge_view
from mf_diffusers.files import ESCAPED


TASKS = ("depth", "completion")
METHODS = ("model", "fitted", "interpolation")
"""Of depth completion: by the model; by its image -> depth times a scale; and without a model."""

FAR_AWAY = 1000.0
"""Metres. A map with nothing nearer is most likely in millimetres, or of another unit."""

CROPS = {
    # Rows and columns of 480x640 (Eigen et al. 2014).
    "eigen": lambda rows, columns: np.s_[45:471, 41:601],
    # Of KITTI's pictures, whose size varies (Garg et al. 2016).
    "garg": lambda rows, columns: np.s_[
        int(0.40810811 * rows) : int(0.99189189 * rows), int(0.03594771 * columns) : int(0.96405229 * columns)
    ],
}
"""The part of a picture that counts, of its size."""

COUNTED, MISSING, SKY, OUT_OF_RANGE, CROPPED = range(5)
LEFT_OUT = {"missing": MISSING, "sky": SKY, "out_of_range": OUT_OF_RANGE, "cropped": CROPPED}
"""Why a pixel does not count: no depth is known, it is infinitely far, beyond the depths or outside the crop that
count. A pixel has the first reason that applies."""


@dataclass(frozen=True)
class Benchmark:
    """A data set and the pixels of it that count: with true depth between `near` and `far`, inside the crop.

    Attributes:
        open: makes the data set of its folder.
        near, far: metres, both excluded. None: no limit.
        far_ratio: depth above so many times the picture's 1st percentile does not count. None: no such limit.
        crop: a key of `CROPS`. None: the whole picture.
        view: (width, height) of the view that MoGe's evaluation makes of a frame, see `moge_view`. None: all of it.
        published: its column among the published results, see `evaluation.report`. None: there are none for it.
        has_sparse: whether its frames bring the sparse depth of depth completion.
    """

    open: Callable[[Path], Any]
    near: float = 0.0
    far: float | None = None
    far_ratio: float | None = None
    crop: str | None = None
    view: tuple[int, int] | None = None
    published: str | None = None
    has_sparse: bool = False


def _moge(*view, published=None):
    return Benchmark(MoGeLayout, far_ratio=1000, view=view or None, published=published)


BENCHMARKS = {
    "nyuv2": Benchmark(NYUv2, near=1e-3, far=10, crop="eigen"),
    "kitti": Benchmark(KITTI, near=1e-3, far=80, crop="garg"),
    "eth3d": Benchmark(ETH3D),
    "scannet": Benchmark(ScanNet800, near=1e-3, far=10, published="ScanNet"),
    "diode": Benchmark(DIODE, near=0.6, far=350),
    "diode-indoors": Benchmark(partial(DIODE, split="indoors"), near=0.6, far=350),
    "diode-outdoor": Benchmark(partial(DIODE, split="outdoor"), near=0.6, far=350),
    "moge-nyuv2": _moge(640, 480, published="NYUv2"),
    "moge-kitti": _moge(750, 375, published="KITTI"),
    "moge-eth3d": _moge(2048, 1365, published="ETH3D"),
    "moge-ibims-1": _moge(640, 480),
    "moge-gso": _moge(512, 512),
    "moge-sintel": _moge(872, 436),
    "moge-ddad": _moge(1400, 700),
    "moge-diode": _moge(1024, 768, published="DIODE"),
    "moge-spring": _moge(1920, 1080),
    "moge-hammer": _moge(1664, 832),
    "moge": _moge(),
    "folder": Benchmark(Folder),
    "kitti-completion": Benchmark(KITTICompletion, has_sparse=True),
    "sparse-folder": Benchmark(SparseFolder, has_sparse=True),
}
"""What counts in which benchmark. In the data sets' own layouts the crops and depths are those of BTS's and Marigold's
evaluations (in KITTI Garg's crop, and the model gets the whole picture); in MoGe's, whose data sets need their name to
be given for the view, they are MoGe's. "moge" takes frames in that layout as they are."""


@dataclass(frozen=True)
class Protocol:
    """How every frame of a benchmark is evaluated.

    Attributes:
        benchmark: a key of `BENCHMARKS`.
        alignment: a key of `ALIGNMENTS`. With "disparity" predictions are disparity.
        negative: what aligned depth at or below 0 is, see `depth_metrics`. With "clip" aligned depth is clipped to the
            benchmark's near..far before, as in Marigold's code.
        center_crop: side of the centred square that is evaluated, see `evaluation.views`. None: all of the view.
        geometry: whether boundary F1 and, where the camera is known, point-cloud distances are computed too.
        task: "depth" of a picture, or "completion": of a picture and a part of its depth, in metres, unaligned.
        points, density: number or share of the known pixels that are given in completion: of the benchmark's sparse
            depth where it has one, else of the true depth. They are drawn evenly, for each frame the same in every run.
            None: all of the benchmark's sparse depth.

    Raises ValueError for what does not go together.
    """

    benchmark: str
    alignment: str = "robust"
    negative: str = "error"
    center_crop: int | None = None
    geometry: bool = False
    task: str = "depth"
    points: int | None = None
    density: float | None = None

    def __post_init__(self):
        if self.task == "depth":
            if (self.points, self.density) != (None, None):
                raise ValueError("`points` and `density` are of depth completion: give `task` completion, or neither.")
            return
        if self.alignment != "none":
            raise ValueError(f"completed depth is metric: `alignment` must be none, not {self.alignment}.")
        has_sparse = BENCHMARKS[self.benchmark].has_sparse
        if (self.points is not None) + (self.density is not None) + has_sparse == 0:
            raise ValueError(f"{self.benchmark} brings no sparse depth: give the number of `points`, or a `density`.")
        if self.points is not None and self.density is not None:
            raise ValueError("give the number of `points` or their `density`, not both.")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"`density` is a share above 0, up to 1, not {self.density:g}.")
        if has_sparse and self.center_crop is not None:
            raise ValueError(f"{self.benchmark} brings its own sparse depth: evaluate it without `center_crop`.")

    def view(self, frame: Frame) -> tuple[Frame, dict[str, int]]:
        """The frame as the model gets it, its depth 0 where it does not count, and the number of such pixels by reason.

        Returns a `Frame` and a dict of ints with the keys of `LEFT_OUT`.
        """
        size = BENCHMARKS[self.benchmark].view
        frame = frame if size is None else moge_view(frame, *size)
        reasons = self._reasons(frame)
        if self.center_crop is not None:
            reasons = reasons[central_square(reasons.shape, self.center_crop)]
            frame = center_crop(replace(frame, sparse=None), self.center_crop)
        sparse = self._sparse(frame) if self.task == "completion" else None
        frame = replace(frame, depth=np.where(reasons == COUNTED, frame.depth, np.float32(0)), sparse=sparse)
        return frame, {name: int(np.count_nonzero(reasons == reason)) for name, reason in LEFT_OUT.items()}

    def _sparse(self, frame):
        """float32 (H, W): the depth that is given in completion."""
        depth = frame.depth if frame.sparse is None else frame.sparse
        depth = np.where(np.isfinite(depth), depth, np.float32(0))
        known = np.flatnonzero(depth)
        if self.points is None and self.density is None:
            return depth
        count = max(1, round(self.density * len(known))) if self.points is None else self.points
        chosen = np.random.default_rng(zlib.crc32(frame.name.encode(**ESCAPED))).permutation(known)[:count]
        sparse = np.zeros_like(depth)
        sparse.flat[chosen] = depth.flat[chosen]
        return sparse

    def _reasons(self, frame):
        """int (H, W): `COUNTED`, or why the pixel is not."""
        benchmark, depth, known = BENCHMARKS[self.benchmark], frame.depth, frame.mask
        in_range = depth > benchmark.near
        if benchmark.far is not None:
            in_range &= depth < benchmark.far
        if benchmark.far_ratio is not None and known.any():
            in_range &= depth <= benchmark.far_ratio * float(np.quantile(depth[known], 0.01))
        inside = np.ones_like(known)
        if benchmark.crop is not None:
            inside[:] = False
            inside[CROPS[benchmark.crop](*depth.shape)] = True
        return np.select(
            [np.isinf(depth), ~known, ~in_range, ~inside], [SKY, MISSING, OUT_OF_RANGE, CROPPED], default=COUNTED
        )

    def align(self, prediction: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, str]:
        """The prediction as depth in metres, float64 (H, W), and what is to be said about it, or "".

        A prediction that cannot be aligned, such as one that is NaN everywhere, is missing everywhere: NaN.
        """
        try:
            aligned = ALIGNMENTS[self.alignment](prediction, truth).apply(prediction)
        except ValueError as error:
            return np.full(truth.shape, np.nan), f"scored as missing everywhere: {error}"
        if self.negative == "clip":
            aligned = np.clip(aligned, BENCHMARKS[self.benchmark].near, BENCHMARKS[self.benchmark].far)
        return aligned, ""

    def score(self, aligned: np.ndarray, truth: np.ndarray, intrinsics: np.ndarray | None = None) -> dict[str, float]:
        """The metrics of one frame: `depth_metrics`; in completion `completion_metrics` too; with `geometry`
        `boundary_f1` and `point_cloud_distance`.

        Point-cloud distances are NaN when the camera is not known or no prediction is above 0.
        """
        metrics = depth_metrics(aligned, truth, negative=self.negative)
        if self.task == "completion":
            metrics |= completion_metrics(aligned, truth)
        if self.geometry:
            metrics["boundary_f1"] = boundary_f1(aligned, truth)
            points_missing = metrics["nonfinite"] + metrics["nonpositive"]
            if intrinsics is not None and points_missing < metrics["pixels"]:
                metrics |= point_cloud_distance(aligned, truth, intrinsics)
            else:
                metrics |= dict.fromkeys(("accuracy", "completeness", "chamfer"), np.nan)
                metrics["points_missing"] = points_missing
        return metrics

    def describe(self) -> dict[str, Any]:
        """All that decides the numbers, for the report."""
        benchmark = asdict(BENCHMARKS[self.benchmark])
        return asdict(self) | {name: benchmark[name] for name in ("near", "far", "far_ratio", "crop", "view")}
