"""How well what is hidden of images and depth is made: depth completed, images and their depth inpainted."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from finetune.data.sources import ReadReport, Source
from finetune.data.sparsify import random_points
from finetune.measures.image_tasks import mean_of
from mf_diffusers import ModalityForcingPipeline
from mf_diffusers.alignment import align_scale
from mf_diffusers.evaluation.metrics import depth_metrics
from mf_diffusers.evaluation.predictors import interpolated


BATCH = 50
BOX = (1 / 4, 5 / 8)  # the sides of a hidden box, of those of the picture


@dataclass
class PartialTasks:
    """
    The tasks in which a part is given, on a source's first samples. Result number i comes from seed i in every task, so
    the tasks compare.

    Args:
        pipe: what is measured, by its own defaults.
        source: its samples have one size.
        count: how many of its samples.
    """

    pipe: ModalityForcingPipeline
    source: Source
    count: int

    def __post_init__(self):
        self.samples = self.source.read(list(range(self.count)), ReadReport())
        self.images = np.stack([sample["image"].permute(1, 2, 0).numpy() for sample in self.samples])
        self.given_depths = np.stack([sample["depth"][0].numpy() for sample in self.samples])
        self.depths = np.where(np.isfinite(self.given_depths), self.given_depths, np.float32(0))  # metres, no sky
        self.prompts = [sample["caption"] for sample in self.samples]
        self.boxes = np.stack([hidden_box(self.depths.shape[1:], number) for number in range(self.count)])

    def made(self, **inputs) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The images (N, H, W, 3) and depth maps (N, H, W) that the pipeline makes of `inputs`, which are arrays or
        lists over all samples, or single values."""
        outputs = []
        for start in range(0, self.count, BATCH):
            numbers = range(start, min(start + BATCH, self.count))
            batch = {
                name: value[start : numbers.stop] if isinstance(value, (np.ndarray, list)) else value
                for name, value in inputs.items()
            }
            generator = [torch.Generator().manual_seed(number) for number in numbers]
            output = self.pipe(**batch, generator=generator, output_type="np")
            outputs.append((output.images, output.depth))
        images, depths = zip(*outputs)
        return tuple(None if made[0] is None else np.concatenate(made) for made in (images, depths))

    @cached_property
    def estimated(self) -> np.ndarray:
        """Image -> depth, (N, H, W), relative."""
        return self.made(image=self.images)[1]

    def sparse(self, density: float) -> np.ndarray:
        """A share of the pixels of the true depth, (N, H, W), 0 elsewhere."""
        sparse = np.zeros_like(self.depths)
        for number, depth in enumerate(torch.tensor(self.depths)[:, None]):
            mask = random_points(depth, density, torch.Generator().manual_seed(number))[0].numpy()
            sparse[number, mask] = self.depths[number, mask]
        return sparse

    @cached_property
    def tenth(self) -> np.ndarray:
        """bool (N, H, W): a random tenth of the pixels."""
        return np.random.default_rng(0).random(self.depths.shape) < 0.1

    def completions(self, sparse: np.ndarray) -> dict[str, np.ndarray]:
        """Sparse depth made dense: by the model, by its image -> depth times the scale that fits best, and by linear
        interpolation."""
        fitted = [align_scale(depth, known, grid=None).apply(depth) for depth, known in zip(self.estimated, sparse)]
        return {
            "completed": self.made(image=self.images, depth=sparse)[1],
            "image to depth, scaled": np.stack(fitted),
            "interpolated": np.stack([interpolated(known) for known in sparse]),
        }

    def completion(self, density: float) -> dict[str, dict[str, float]]:
        """AbsRel and delta1, without alignment, of the depth that was not given, where a share of the pixels was, see
        `completions`; and how far the model moved what was given, in metres."""
        sparse = self.sparse(density)
        made = self.completions(sparse)
        moved = np.abs(made["completed"] - sparse)[sparse > 0].max()
        errors = {name: self.depth_error(depths, sparse == 0) for name, depths in made.items()}
        return errors | {"given depth moved": {"by": float(moved)}}

    def inpainting_inputs(self) -> dict[str, dict]:
        """What the pipeline is given in each task."""
        part_of_image = {"prompt": self.prompts, "image": self.images, "mask_image": self.boxes}
        height, width = self.depths.shape[1:]
        return {
            "image in part": part_of_image,
            "image and depth in part": part_of_image | {"depth": self.given_depths, "depth_mask": ~self.boxes},
            "image in part, 10% of the depth": part_of_image | {"depth": self.given_depths, "depth_mask": self.tenth},
            "image in part, depth whole": part_of_image | {"depth": self.given_depths},
            "both made anew": {"prompt": self.prompts, "height": height, "width": width},
        }

    def inpainting(self) -> dict[str, dict[str, float]]:
        """
        Errors inside a hidden box: of the picture, the mean absolute difference of its values in [0, 1]; AbsRel and
        delta1 of the depth made with it, which is scaled by the true depth of the whole picture where none is given;
        and AbsRel of the depth that the model sees in the result. And how far the task moved what was given.
        """
        found = {name: self.errors_in_boxes(inputs) for name, inputs in self.inpainting_inputs().items()}
        means, scales = np.zeros_like(self.images), np.zeros_like(self.depths)
        for number, box in enumerate(self.boxes):
            means[number] = self.images[number, box].mean(axis=0)
            if self.depths[number, box].any():
                flat = np.ones_like(self.depths[number])
                scales[number] = align_scale(flat, self.depths[number], box, grid=None).scale
        found["mean of what is hidden"] = self.image_error(means) | self.depth_error(scales, self.boxes)
        return found | {"the true image": self.seen_in(self.images)}

    def errors_in_boxes(self, inputs: dict) -> dict[str, float]:
        images, depths = self.made(**inputs)
        found = self.image_error(images)
        if depths is not None and "depth" in inputs:
            known = inputs.get("depth_mask", self.depths > 0) & (self.depths > 0)
            found["given depth moved by"] = float(np.abs(depths - self.depths)[known].max())
            found |= self.depth_error(depths, self.boxes)
        elif depths is not None:
            found |= self.scaled_error(depths)
        if "image" in inputs:
            found["given image moved by"] = float(np.abs(images - self.images)[~self.boxes].max())
        return found | self.seen_in(images)

    def seen_in(self, images: np.ndarray) -> dict[str, float]:
        return {"depth seen in it": self.scaled_error(self.made(image=images)[1])["abs_rel"]}

    def image_error(self, images: np.ndarray) -> dict[str, float]:
        errors = [np.abs(made - true)[box].mean() for made, true, box in zip(images, self.images, self.boxes)]
        return {"image": float(np.mean(errors))}

    def scaled_error(self, depths: np.ndarray) -> dict[str, float]:
        """The error of relative depth inside the boxes."""
        scaled = [align_scale(made, true, grid=None).apply(made) for made, true in zip(depths, self.depths)]
        return self.depth_error(scaled, self.boxes)

    def depth_error(self, depths, masks: np.ndarray) -> dict[str, float]:
        """Mean over the samples whose depth is known in places under their mask."""
        rows = zip(depths, self.depths, masks)
        return mean_of(depth_metrics(made, true, mask) for made, true, mask in rows if true[mask].any())


def hidden_box(shape: tuple[int, int], number: int) -> np.ndarray:
    """bool (H, W), True in a box of random size and place; the number of the sample decides which."""
    rng = np.random.default_rng(number)
    mask = np.zeros(shape, bool)
    slices = []
    for length in shape:
        side = round(length * rng.uniform(*BOX))
        start = rng.integers(length - side + 1)
        slices.append(slice(start, start + side))
    mask[tuple(slices)] = True
    return mask
