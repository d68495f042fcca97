"""Measures the tasks of the embedded model that make images; `mf-diffusers evaluate` measures image to depth.

    python finetune/measure_embedded.py --config finetune/configs/measure_embedded.yaml [key=value ...]

- Depth to image: the depth seen in images made from the depth of held-out scenes, and from a few of its points, against
  that depth; over how tightly it is followed, and for images made without it.
- Joint generation: the depth made with images against the depth seen in them.
- Text to image: which of the prompts of the settings file give pictures that show the named kinds of objects in the
  named colours, by finetune/scene_reader.py, with how often that is right on real pictures.

Prints the numbers, and writes them and the pictures of the prompts into the output folder as `measures.json` and
`prompts.png`.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image


sys.path.append(str(Path(__file__).parents[1]))  # as the other scripts, which the launcher starts

from finetune.config import load_config
from finetune.data.sources import build_source
from finetune.measures.image_tasks import ImageTasks
from finetune.measures.studies import load_pipeline
from finetune.scene_reader import check_on_scenes, named_objects, reader_at
from mf_diffusers import ModalityForcingPipeline
from mf_diffusers.demo import joined
from mf_diffusers.errors import errors_as_lines
from mf_diffusers.files import atomic_write
from mf_diffusers.modality_forcing.image_processor import image_to_tensor
from mf_diffusers.visualization import colorize_depth, contact_sheet


@dataclass
class MeasureConfig:
    """
    Args:
        parts: what to measure.
        validation_data: the held-out scenes.
        scenes: how many of them depth to image and joint generation are measured on.
        steps, guidance_scale: of the images.
        strengths: log2_alpha of depth to image, besides following it rigidly.
        sparse_density: share of the points of depth, where few are given.
        joint_log2_alpha: trajectories of joint generation.
        reader: file of the reader of pictures; it is trained where there is none.
        checked_scenes: on which the reader is checked.
        prompts: in the words of finetune/scenes.
    """

    model: str = "mf_diffusers/embedded/model"
    output: str = "outputs/measures"
    parts: list[str] = field(default_factory=lambda: ["prompts", "joint", "depth_to_image"])
    validation_data: dict[str, Any] = field(
        default_factory=lambda: {"kind": "scenes", "split": "validation", "height": 64, "width": 64}
    )
    scenes: int = 100
    steps: int = 25
    guidance_scale: float = 3.0
    strengths: list[float] = field(default_factory=lambda: [-5, -8, -11, -14])
    sparse_density: float = 0.05
    joint_log2_alpha: list[float] = field(default_factory=lambda: [5])
    reader: str = "outputs/reader.safetensors"
    checked_scenes: int = 500
    prompts: list[str] = field(default_factory=list)


def depth_to_image(tasks: ImageTasks, config: MeasureConfig) -> dict[str, dict[str, float]]:
    """How well images follow depth: without it, by how tightly it is followed, and where few points are given."""
    strengths = {f"log2_alpha {alpha:g}": alpha for alpha in config.strengths} | {"rigidly": None}
    found = {"without depth": tasks.not_following()}
    found |= {name: tasks.following(alpha) for name, alpha in strengths.items()}
    return found | {f"rigidly, {config.sparse_density:.0%} of the points": tasks.following(None, config.sparse_density)}


def prompts_shown(pipe: ModalityForcingPipeline, config: MeasureConfig) -> tuple[dict[str, bool], Image.Image]:
    """Which prompts give pictures that show what they name; and the pictures with their depth, on a sheet."""
    side = pipe.config.default_sample_size
    made = pipe(
        config.prompts,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance_scale,
        generator=[torch.Generator().manual_seed(number) for number in range(len(config.prompts))],
    )
    seen = reader_at(Path(config.reader), side).read(image_to_tensor(made.images))
    shown = {prompt: there.issuperset(named_objects(prompt)) for prompt, there in zip(config.prompts, seen)}
    labels = [prompt if is_shown else f"NOT SHOWN: {prompt}" for prompt, is_shown in shown.items()]
    depths = [Image.fromarray(colorize_depth(depth, mask)) for depth, mask in zip(made.depth, made.depth_mask)]
    sheets = [
        contact_sheet(
            [made.images[start : start + 10], depths[start : start + 10]], None, labels[start : start + 10], 144
        )
        for start in range(0, len(labels), 10)
    ]
    return shown, joined(sheets, below=True)


def main() -> None:
    config = load_config(MeasureConfig)
    pipe, found = load_pipeline(config.model), {}
    tasks = ImageTasks(pipe, build_source(config.validation_data), config.scenes, config.steps, config.guidance_scale)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    for part in config.parts:
        if part == "depth_to_image":
            found[part] = depth_to_image(tasks, config)
        elif part == "joint":
            found[part] = {f"log2_alpha {alpha:g}": tasks.joint(alpha) for alpha in config.joint_log2_alpha}
        elif part == "prompts":
            shown, sheet = prompts_shown(pipe, config)
            sheet.save(folder / "prompts.png")
            found["prompts_shown"] = shown
            reader = reader_at(Path(config.reader), pipe.config.default_sample_size)
            found["reader"] = check_on_scenes(reader, pipe.config.default_sample_size, config.checked_scenes)
    print_numbers(found)
    with atomic_write(folder / "measures.json") as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n")


def print_numbers(found: dict) -> None:
    for part, rows in found.items():
        if part == "prompts_shown":
            print(f"prompts shown: {sum(rows.values())} of {len(rows)}")
            print(*(f"  not shown: {prompt}" for prompt, is_shown in rows.items() if not is_shown), sep="\n")
            continue
        print(part.replace("_", " "))
        for name, value in rows.items():
            metrics = value if isinstance(value, dict) else {"share": value}
            print(f"  {name}:", *(f"{metric} {number:.2%}" for metric, number in metrics.items()))


if __name__ == "__main__":
    with errors_as_lines():
        main()
