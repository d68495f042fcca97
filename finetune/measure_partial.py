"""Measures what the embedded model makes where images or depth are given in part, on held-out scenes.

    python finetune/measure_partial.py --config finetune/configs/measure_partial.yaml [key=value ...]

- Completion: the depth that was not given, against the truth and without alignment, where 5 %, 1 % and 0.2 % of the
  pixels were; beside image -> depth scaled to the same points, and the points interpolated.
- Inpainting: image and depth inside a hidden box against the truth, where the image around it is given, where its depth
  is too, and where depth is given everywhere; beside both made anew, and the mean of what is hidden.

Prints the numbers, and writes them and pictures of the first scenes into the output folder as `partial.json`,
`completion.png` and `inpainting.png`.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


sys.path.append(str(Path(__file__).parents[1]))  # as the other scripts, which the launcher starts

from finetune.config import load_config
from finetune.data.sources import build_source
from finetune.measures.partial_tasks import PartialTasks
from finetune.measures.studies import load_pipeline
from mf_diffusers.files import atomic_write
from mf_diffusers.visualization import colorize_depth, contact_sheet


SHOWN = 8  # scenes on a sheet


@dataclass
class PartialConfig:
    """
    Args:
        validation_data: the held-out scenes.
        completion_scenes, inpainting_scenes: on how many of them.
        densities: shares of the pixels whose depth is given.
    """

    model: str = "mf_diffusers/embedded/model"
    output: str = "outputs/partial"
    validation_data: dict[str, Any] = field(
        default_factory=lambda: {"kind": "scenes", "split": "validation", "height": 64, "width": 64}
    )
    completion_scenes: int = 200
    inpainting_scenes: int = 100
    densities: list[float] = field(default_factory=lambda: [0.05, 0.01, 0.002])


def completion_sheet(tasks: PartialTasks, densities: list[float]) -> Image.Image:
    rows = {"image": pictures(tasks.images), "true depth": depth_pictures(tasks, tasks.depths)}
    for density in densities:
        sparse = tasks.sparse(density)
        rows[f"{density:.1%} of it"] = depth_pictures(tasks, sparse)
        for name, depths in tasks.completions(sparse).items():
            rows[f"{density:.1%}: {name}"] = depth_pictures(tasks, depths)
    return contact_sheet(list(rows.values()), row_labels=list(rows), cell=128)


def inpainting_sheet(tasks: PartialTasks) -> Image.Image:
    hidden = np.where(tasks.boxes[..., None], 0.5, tasks.images)
    rows = {
        "image": pictures(tasks.images),
        "true depth": depth_pictures(tasks, tasks.depths),
        "given": pictures(hidden),
    }
    for name, inputs in tasks.inpainting_inputs().items():
        images, depths = tasks.made(**inputs)
        rows[name] = pictures(images)
        if depths is not None:
            rows[f"{name}: depth"] = [Image.fromarray(colorize_depth(depth)) for depth in depths[:SHOWN]]
    return contact_sheet(list(rows.values()), row_labels=list(rows), cell=128)


def pictures(images: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(np.uint8(np.round(255 * image))) for image in images[:SHOWN]]


def depth_pictures(tasks: PartialTasks, depths) -> list[Image.Image]:
    """Depth in metres, in the colours of the true depth's range."""
    ranges = [np.percentile(true[true > 0], (2, 98)) for true in tasks.depths[:SHOWN]]
    return [
        Image.fromarray(colorize_depth(depth, near=near, far=far)) for depth, (near, far) in zip(depths[:SHOWN], ranges)
    ]


def main() -> None:
    config = load_config(PartialConfig)
    pipe, source = load_pipeline(config.model), build_source(config.validation_data)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    completion = PartialTasks(pipe, source, config.completion_scenes)
    found = {f"completion, {density:.1%}": completion.completion(density) for density in config.densities}
    found["inpainting"] = PartialTasks(pipe, source, config.inpainting_scenes).inpainting()
    for part, rows in found.items():
        print(part)
        for name, values in rows.items():
            print(f"  {name}:", *(f"{value} {number:.4g}" for value, number in values.items()))
    with atomic_write(folder / "partial.json") as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n")
    first = PartialTasks(pipe, source, SHOWN)
    completion_sheet(first, config.densities).save(folder / "completion.png")
    inpainting_sheet(first).save(folder / "inpainting.png")


if __name__ == "__main__":
    main()
