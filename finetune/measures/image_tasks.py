"""How well made images fit the depth they were made of, and made depth the image it was made with."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from finetune.data.sources import ReadReport, Source
from finetune.data.sparsify import thin
from mf_diffusers import ModalityForcingPipeline
from mf_diffusers.depth_io import as_depth_map
from mf_diffusers.evaluation.images import DepthEstimator, depth_following, joint_consistency
from mf_diffusers.evaluation.metrics import mean_metrics


BATCH = 50
METRICS = ("abs_rel", "delta1")


@dataclass
class ImageTasks:
    """
    The tasks that make images, on the captions and the depth of a source's first samples.

    The model itself sees the depth of a made image, in one step, where the embedded model errs least. Image number i
    comes from seed i in every task, so the tasks compare.

    Args:
        pipe: what is measured.
        source: its samples have one size.
        count: how many of its samples.
        steps: Euler steps of an image.
        guidance_scale: None: the pipeline's default.
    """

    pipe: ModalityForcingPipeline
    source: Source
    count: int
    steps: int
    guidance_scale: float | None = None

    def __post_init__(self):
        self.samples = self.source.read(list(range(self.count)), ReadReport())
        self.estimator = DepthEstimator.from_pipeline(self.pipe, steps=1)

    def following(self, log2_alpha: float | None, density: float = 1.0) -> dict[str, float]:
        """AbsRel and delta1 of the depth seen in images that were made of a share of the depth's pixels, against all of
        it; `log2_alpha` says how tightly it is followed, None rigidly."""
        given = [thin(sample, density, "random", number)["depth"] for number, sample in enumerate(self.samples)]
        return self.distance_to_depth(image for image, *_ in self.made(log2_alpha, given))

    def not_following(self) -> dict[str, float]:
        """The same, of images that were made of the captions alone."""
        return self.distance_to_depth(image for image, *_ in self.made(0.0))

    def joint(self, log2_alpha: float) -> dict[str, float]:
        """AbsRel and delta1 of the depth made with images, but for the sky, against the depth seen in them."""
        made = self.made(log2_alpha)
        return mean_of(joint_consistency(image, depth, self.estimator, mask) for image, depth, mask in made)

    def distance_to_depth(self, images: Iterator) -> dict[str, float]:
        depths = (as_depth_map(sample["depth"]) for sample in self.samples)
        return mean_of(depth_following(image, depth, self.estimator) for image, depth in zip(images, depths))

    def made(self, log2_alpha: float | None, given: list[torch.Tensor] | None = None) -> Iterator[tuple]:
        """What was made of every sample: the picture, and where no depth was given the depth (H, W) that was made with
        it, and where that is valid."""
        height, width = self.samples[0]["image"].shape[-2:]
        for start in range(0, self.count, BATCH):
            numbers = range(start, min(start + BATCH, self.count))
            made = self.pipe(
                [self.samples[number]["caption"] for number in numbers],
                **({"height": height, "width": width} if given is None else {"depth": [given[n] for n in numbers]}),
                num_inference_steps=self.steps,
                guidance_scale=self.guidance_scale,
                log2_alpha=log2_alpha,
                generator=[torch.Generator().manual_seed(number) for number in numbers],
            )
            yield from zip(made.images, *([made.depth, made.depth_mask] if given is None else []))


def mean_of(metrics: list[dict[str, float]]) -> dict[str, float]:
    return mean_metrics([{name: row[name] for name in METRICS} for row in metrics])
