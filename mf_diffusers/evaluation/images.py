"""The image side: made images against real ones, and against the depth that they should show.

None of this needs torchvision. The packages that carry the Inception network of FID do, so features are those of any
vision model of `transformers`, or of any function: a Fréchet distance has the name of its features, and only that of
Inception's is FID. Where torch-fidelity is installed, its extractor is such a function.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from scipy.linalg import qr, svdvals
from transformers import AutoImageProcessor, AutoModel, pipeline

from mf_diffusers.alignment import align_affine_robust, align_disparity_least_squares
from mf_diffusers.datasets.frame import Frame
from mf_diffusers.evaluation.metrics import depth_metrics, mean_metrics


if TYPE_CHECKING:
    from mf_diffusers import ModalityForcingPipeline


def frechet_distance(first: ArrayLike, second: ArrayLike) -> float:
    """Fréchet distance between two sets of features, each taken for a normal distribution (Heusel et al. 2017):

        |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))

    with means m and covariances C (of n - 1). The trace of the root is computed exactly: with F = Q R the centred
    features by their root of n - 1, it is the sum of the singular values of R1 R2^T, also where C has no full rank. The
    distance falls with the number of images: compare only equal numbers, thousands where it can be.

    Args:
        first, second: (N, D) and (M, D), at least two of each.

    Raises ValueError for other shapes or features that are not finite.
    """
    first, second = (np.asarray(features, dtype=np.float64) for features in (first, second))
    for features in (first, second):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != first.shape[-1]:
            raise ValueError(f"features of shapes {first.shape} and {second.shape} must be (N, D) and (M, D), N, M > 1")
        if not np.isfinite(features).all():
            raise ValueError("features must be finite: an image has none of them")
    spreads = [(features - features.mean(axis=0)) / np.sqrt(len(features) - 1) for features in (first, second)]
    triangles = [qr(spread, mode="r")[0][: spread.shape[1]] for spread in spreads]
    root_trace = svdvals(triangles[0] @ triangles[1].T).sum()
    offset = first.mean(axis=0) - second.mean(axis=0)
    return float(max(offset @ offset + sum((spread**2).sum() for spread in spreads) - 2 * root_trace, 0.0))


class VisionFeatures:
    """Pooled features of a vision model of `transformers`, such as DINOv2 or CLIP.

    Args:
        model: folder or Hub id of a model with an image processor: "facebook/dinov2-large" for the distance of Stein
            et al. 2023, "openai/clip-vit-large-patch14" for CLIP's.
        device: where it runs.
        batch_size: images at a time.
    """

    def __init__(self, model: str | Path, device: str | torch.device = "cpu", batch_size: int = 32):
        self.name, self.device, self.batch_size = str(model), device, batch_size
        self.processor = AutoImageProcessor.from_pretrained(model)
        loaded = AutoModel.from_pretrained(model)
        self.model = (
            getattr(loaded, "vision_model", loaded).to(device).eval()
        )  # of a pair with text, the half that sees

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        """(N, D), float64."""
        features = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            inputs = self.processor(images=batch, return_tensors="pt").to(self.device)
            features.append(self.model(**inputs).pooler_output.double().cpu().numpy())
        return np.concatenate(features)


@dataclass
class DepthEstimator:
    """Any method that estimates depth from an image.

    Attributes:
        estimate: `PIL.Image` -> (H, W), of the size of the image.
        disparity: whether the estimate is disparity, up to scale and shift, as that of MiDaS and Depth Anything; else
            it is depth up to scale and shift.
    """

    estimate: Callable[[Image.Image], np.ndarray]
    disparity: bool

    @classmethod
    def from_transformers(
        cls, model: str | Path, device: str | torch.device = "cpu", disparity: bool | None = None
    ) -> "DepthEstimator":
        """A model of transformers' depth-estimation pipeline, folder or Hub id, such as Depth Anything V2.

        `disparity` is read from the model's configuration where that says so ("relative" Depth Anything is disparity);
        ValueError where it does not and none is given.
        """
        estimator = pipeline("depth-estimation", model=str(model), device=device)
        kind = getattr(estimator.model.config, "depth_estimation_type", None)
        if disparity is None and kind is None:
            raise ValueError(f"{model} does not say whether it estimates depth or disparity: give disparity=...")
        disparity = kind == "relative" if disparity is None else disparity
        return cls(lambda image: estimator(image)["predicted_depth"].float().cpu().numpy(), disparity)

    @classmethod
    def from_pipeline(cls, pipe: "ModalityForcingPipeline", steps: int = 4, seed: int = 0) -> "DepthEstimator":
        """Image -> depth of a `ModalityForcingPipeline`, the same noise for every image."""

        def estimate(image):
            generator = torch.Generator().manual_seed(seed)
            return pipe(image=image, num_inference_steps=steps, generator=generator).depth[0]

        return cls(estimate, disparity=False)


def depth_following(
    image: Image.Image, depth: np.ndarray, estimator: DepthEstimator, mask: np.ndarray | None = None
) -> dict[str, float]:
    """How well an image follows the depth it was made of: `depth_metrics` of its estimated depth, aligned, against it.

    Args:
        image: the image that was made.
        depth: the depth that was given, (H, W), 0 where missing; of the size of the image.
        estimator: a `DepthEstimator`. Disparity is aligned by least squares, depth robustly.
        mask: (H, W), True where `depth` counts. None: everywhere.

    Raises ValueError when nothing can be compared, or the sizes differ.
    """
    estimate = np.asarray(estimator.estimate(image))
    align = align_disparity_least_squares if estimator.disparity else align_affine_robust
    return depth_metrics(align(estimate, depth, mask).apply(estimate), depth, mask)


def joint_consistency(
    image: Image.Image, depth: np.ndarray, estimator: DepthEstimator, mask: np.ndarray | None = None
) -> dict[str, float]:
    """How well depth belongs to the image made with it: `depth_metrics` against the depth estimated from the image.

    The estimate is the truth, as MoGe-2's is in the paper, and the depth made is aligned to it robustly. An estimate of
    disparity is no truth, since its inverse needs a shift that is not known: then it is aligned to the depth made, and
    the result is that of `depth_following`. Arguments are as there.
    """
    if estimator.disparity:
        return depth_following(image, depth, estimator, mask)
    estimate = np.asarray(estimator.estimate(image))
    return depth_metrics(align_affine_robust(depth, estimate, mask).apply(depth), estimate, mask)


def depth_to_image_scores(
    frames: Sequence[Frame],
    images: Sequence[Image.Image],
    estimator: DepthEstimator,
    features: Callable[[Sequence[Image.Image]], np.ndarray],
) -> dict[str, float]:
    """The scores of depth -> image over a data set.

    Args:
        frames: `Frame`s, whose depth was given and whose pictures are the real images.
        images: what was made of each, `PIL.Image` of the same size.
        estimator: a `DepthEstimator`.
        features: images -> (N, D), a `VisionFeatures` or another function.

    Returns the mean of `depth_following`, with `frechet_distance` between the features of real and of made images.
    """
    following = [
        depth_following(image, frame.depth, estimator, frame.mask) for frame, image in zip(frames, images, strict=True)
    ]
    real = features([Image.fromarray(frame.image) for frame in frames])
    return mean_metrics(following) | {"frechet_distance": frechet_distance(real, features(images))}
