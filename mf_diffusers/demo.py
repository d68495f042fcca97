"""The demo: all tasks with the embedded model, in under a minute on a CPU, and a sheet of pictures to show."""

import json
import platform
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import mf_diffusers
from mf_diffusers import ModalityForcingPipelineOutput
from mf_diffusers.alignment import align_affine_robust
from mf_diffusers.checkpoints import load_pipeline
from mf_diffusers.depth_io import read_depth
from mf_diffusers.embedded import EMBEDDED_MODEL, EMBEDDED_SCENES
from mf_diffusers.evaluation.metrics import depth_metrics, mean_metrics
from mf_diffusers.files import temporary_folder
from mf_diffusers.geometry import PointSettings
from mf_diffusers.pictures import read_image
from mf_diffusers.results import METADATA, place_result, write_result
from mf_diffusers.visualization import BRIGHTEST_ERROR, PERCENTILES, colorize_depth, colorize_error, contact_sheet


PROMPTS = (  # in the words of the embedded model, those of finetune/scenes
    "a large orange box on a snowy plain under a clear sky",
    "a green box in a room with a tiled wall and a blue floor",
    "a blue box left of a red cylinder on a grassy plain under a clear sky",
)
GIVEN_SCENE, NEW_PROMPT = "test-116", "a large purple cone and a purple cube on a snowy plain under a clear sky"
SCANNED_SCENE, SCANNED_ROWS = "test-038", slice(18, None, 32)  # of 256, as few as a simple LiDAR has
PAINTED_SCENE, PAINTED_PROMPT = "test-004", "a large red box on dry earth"
PAINTED_BOX = (60, 60, 200, 200)  # left, top, right, bottom in pixels
STRENGTHS = {"loosely": -5, "tightly": -11, "rigidly": None}  # log2_alpha of depth -> image
ERRORS = ("abs_rel", "delta1")
CELL = 144  # a little more than twice the side of the embedded model's pictures

Steps = namedtuple("Steps", "image depth")  # of the tasks that make images, and of those that make depth of one
Scene = namedtuple("Scene", "name caption image depth")  # depth (H, W) in metres, 0 for the sky
Make = Callable[..., ModalityForcingPipelineOutput]  # the pipeline, with what it is making and the seeds in front


def demo_scenes() -> list[Scene]:
    """Scenes that the embedded model has not seen in training: of the split "test" of finetune/scenes, seed 0.

    The number in a name is the scene's index. They are rendered at 256x256 with supersample=3.
    """
    captions = json.loads((EMBEDDED_SCENES / "captions.json").read_text(encoding="utf-8"))
    files = {name: (EMBEDDED_SCENES / f"{name}.png", EMBEDDED_SCENES / f"{name}-depth.png") for name in captions}
    return [Scene(name, captions[name], read_image(image), read_depth(depth)) for name, (image, depth) in files.items()]


def run_demo(
    model: str | Path | None,
    output: str | Path,
    seed: int,
    steps: int | None,
    device: str | torch.device,
    dtype: torch.dtype,
    overwrite: bool = False,
    quiet: bool = False,
    **loading,
) -> dict[str, Any]:
    """Write a folder of results, `contact_sheet.png` and `metadata.json`; print the depth errors and the folder.

    Args:
        model: folder or Hub id of a pipeline. None: the embedded model.
        output: the new folder; see `place_result` for what happens when there is one already.
        seed: of the first result of a task; the second has the next, and so on. Conditioning strengths share one.
        steps: Euler steps of the tasks that make images; None: the checkpoint's, as for the rest.
        loading: `text_encoder`, `lora`, `lora_weight`, `adapter`, `any_base`, `offload`, `offline` of `load_pipeline`.

    Returns what metadata.json says. Raises FileNotFoundError when there is no such model.
    """
    started = time.perf_counter()
    if model is None and not EMBEDDED_MODEL.is_dir():
        raise FileNotFoundError(f"this installation has no embedded model, {EMBEDDED_MODEL}: give one by `model`.")
    model = str(model or EMBEDDED_MODEL)
    output = Path(output) if Path(output).name else Path(output).resolve()
    console = Console(stderr=True)
    progress = Progress(console=console, disable=quiet or not console.is_terminal, transient=True)
    with temporary_folder(output.parent) as folder, progress:
        task = progress.add_task("loading", total=None)
        pipe = load_pipeline(model, device, dtype, **loading)
        counts = Steps(steps or pipe.config.default_num_inference_steps, pipe.config.default_depth_steps)
        progress.update(task, total=counts.image * (2 + len(STRENGTHS)) + 4 * counts.depth)
        pipe.set_progress_bar_config(disable=True)

        def make(what, seeds, **inputs):
            """The pipeline's output, a result for every seed."""
            progress.update(task, description=what)
            return pipe(
                **inputs,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                callback_on_step_end=lambda *_: progress.advance(task) or {},
                callback_on_step_end_tensor_inputs=[],
            )

        scenes = demo_scenes()
        texts, text_sheet = from_text(make, folder, seed, counts)
        depths, depth_sheet = from_images(make, folder, seed, counts, scenes)
        images, image_sheet = from_depth(make, folder, seed, counts, scenes)
        completed, scan_sheet = from_scan(make, folder, seed, scenes)
        painted, paint_sheet = from_painted(make, folder, seed, counts, scenes)
        whole = joined([joined([text_sheet, image_sheet], below=True), depth_sheet])
        joined([whole, joined([scan_sheet, paint_sheet])], below=True).save(folder / "contact_sheet.png")
        mean = mean_metrics([{name: facts[name] for name in ERRORS} for facts in depths])
        metadata = {
            "command": "demo",
            "model": Path(model).resolve() if Path(model).exists() else model,
            "seed": seed,
            "steps": {"images": counts.image, "depth": counts.depth},
            "guidance_scale": pipe.config.default_guidance_scale,
            "device": device,
            "dtype": str(dtype).removeprefix("torch."),
            "versions": {"python": platform.python_version()}
            | {library.__name__: library.__version__ for library in (mf_diffusers, torch, diffusers, transformers)},
            "text_to_image_and_depth": texts,
            "image_to_depth": depths,
            "image_to_depth_mean": mean,
            "depth_to_image": images,
            "completion": completed,
            "inpainting": painted,
            "seconds": round(time.perf_counter() - started, 3),
        }
        (folder / METADATA).write_text(json.dumps(metadata, indent=2, default=str) + "\n", encoding="utf-8")
        path = place_result(folder, output.parent, output.name, overwrite)
    if not quiet:
        table = Table("scene", "AbsRel", "delta1", title="Depth of held-out scenes, after affine alignment")
        for facts in [*depths, {"scene": "mean"} | mean]:
            table.add_row(facts["scene"], *(f"{facts[name]:.4f}" for name in ERRORS))
        Console().print(table)
        print(path)
    return metadata


def from_text(make: Make, folder: Path, seed: int, steps: Steps) -> tuple[list[dict[str, Any]], Image.Image]:
    """Results of `PROMPTS`, their depth made anew from the image: what metadata.json says of each, and their sheet."""
    facts, rows = [], []
    seeds = range(seed, seed + len(PROMPTS))
    inputs = {"num_inference_steps": steps.image, "num_refinement_steps": steps.depth}
    made = make("text to image and depth", seeds, prompt=list(PROMPTS), **inputs)
    for number, (prompt, image, depth, mask) in enumerate(zip(PROMPTS, made.images, made.depth, made.depth_mask)):
        facts.append({"result": f"text-{number + 1}", "prompt": prompt, "seed": seed + number})
        write(folder, facts[-1], image, depth, mask=mask, points=PointSettings())
        rows.append([image, Image.fromarray(colorize_depth(depth, mask))])
    return facts, contact_sheet(rows, PROMPTS, ("image made", "depth made"), CELL, "Text to image and depth")


def from_images(
    make: Make, folder: Path, seed: int, steps: Steps, scenes: list[Scene]
) -> tuple[list[dict[str, Any]], Image.Image]:
    """Depth of the images of `scenes`: its errors after affine alignment for each, and the sheet."""
    facts, rows, labels = [], [], []
    images = [scene.image for scene in scenes]
    made = make("image to depth", range(seed, seed + len(scenes)), image=images)
    for number, (scene, depth, mask) in enumerate(zip(scenes, made.depth, made.depth_mask)):
        valid = scene.depth > 0
        aligned = align_affine_robust(depth, scene.depth).apply(depth)
        errors = {name: depth_metrics(aligned, scene.depth)[name] for name in ERRORS}
        facts.append({"result": f"depth-{scene.name}", "scene": scene.caption, "seed": seed + number} | errors)
        write(folder, facts[-1], scene.image, depth, mask=mask)
        near, far = np.percentile(scene.depth[valid], PERCENTILES)
        relative = np.abs(aligned - scene.depth) / np.where(valid, scene.depth, 1)
        error = Image.fromarray(colorize_error(relative, valid, max=BRIGHTEST_ERROR))
        error.save(folder / facts[-1]["result"] / "error.png")
        depths = (aligned, mask), (scene.depth, valid)
        rows.append([scene.image, *(Image.fromarray(colorize_depth(*d, near=near, far=far)) for d in depths), error])
        labels.append(f"AbsRel {errors['abs_rel']:.1%}\nδ1 {errors['delta1']:.1%}")
    columns = "image given", "depth made", "true depth", f"error, yellow from {BRIGHTEST_ERROR:.0%}"
    return facts, contact_sheet(rows, labels, columns, CELL, f"Image to depth, steps: {steps.depth}")


def from_depth(
    make: Make, folder: Path, seed: int, steps: Steps, scenes: list[Scene]
) -> tuple[list[dict[str, Any]], Image.Image]:
    """Images of the depth of `GIVEN_SCENE` at every conditioning strength: what metadata.json says, and the sheet."""
    facts, rows = [], []
    given = next(scene.depth for scene in scenes if scene.name == GIVEN_SCENE)
    inputs = {"depth": given, "prompt": NEW_PROMPT, "num_inference_steps": steps.image}
    for strength, log2_alpha in STRENGTHS.items():
        image = make(f"depth to image, {strength}", [seed], log2_alpha=log2_alpha, **inputs).images[0]
        facts.append({"result": f"image-{strength}", "prompt": NEW_PROMPT, "seed": seed, "log2_alpha": log2_alpha})
        write(folder, facts[-1], image, given)
        rows.append([Image.fromarray(colorize_depth(given)), image])
    labels = [f"depth followed {name}" + (f", log2_alpha {a}" if a else "") for name, a in STRENGTHS.items()]
    return facts, contact_sheet(rows, labels, ("depth given", "image made"), CELL, f"Depth to image: {NEW_PROMPT}")


def from_scan(make: Make, folder: Path, seed: int, scenes: list[Scene]) -> tuple[list[dict[str, Any]], Image.Image]:
    """Depth of the image of `SCANNED_SCENE` and of a few rows of its depth: its errors without any alignment,
    and the sheet."""
    scene = next(scene for scene in scenes if scene.name == SCANNED_SCENE)
    scan = np.zeros_like(scene.depth)
    scan[SCANNED_ROWS] = scene.depth[SCANNED_ROWS]
    inputs = {"image": scene.image, "depth": scan}
    made = make("image and depth in part to depth", [seed], **inputs)
    depth, mask = made.depth[0], made.depth_mask[0]
    errors = {name: depth_metrics(depth, scene.depth)[name] for name in ERRORS}
    facts = {"result": "completed", "scene": scene.caption, "seed": seed} | errors
    write(folder, facts, scene.image, depth, mask=mask)
    near, far = np.percentile(scene.depth[scene.depth > 0], PERCENTILES)
    maps = (scan, scan > 0), (depth, mask), (scene.depth, scene.depth > 0)
    row = [scene.image, *(Image.fromarray(colorize_depth(*d, near=near, far=far)) for d in maps)]
    columns, label = ("image given", "depth given", "depth made", "true depth"), f"AbsRel {errors['abs_rel']:.1%}"
    return [facts], contact_sheet([row], [label], columns, CELL, "Completion of depth, in the unit of what is given")


def from_painted(
    make: Make, folder: Path, seed: int, steps: Steps, scenes: list[Scene]
) -> tuple[list[dict[str, Any]], Image.Image]:
    """The image of `PAINTED_SCENE` with a part made anew from a prompt: what metadata.json says, and the sheet."""
    scene = next(scene for scene in scenes if scene.name == PAINTED_SCENE)
    mask = Image.new("L", scene.image.size)
    mask.paste(255, PAINTED_BOX)
    inputs = {"image": scene.image, "mask_image": mask, "prompt": PAINTED_PROMPT}
    inputs |= {"num_inference_steps": steps.image, "num_refinement_steps": steps.depth}
    made = make("image in part to image and depth", [seed], **inputs)
    facts = {"result": "inpainted", "scene": scene.caption, "prompt": PAINTED_PROMPT, "seed": seed}
    write(folder, facts, made.images[0], made.depth[0], mask=made.depth_mask[0])
    hidden = Image.composite(Image.new("RGB", scene.image.size, "white"), scene.image, mask)
    row = [scene.image, hidden, made.images[0], Image.fromarray(colorize_depth(made.depth[0], made.depth_mask[0]))]
    columns = ("image", "what is given of it", "image made", "depth made")
    return [facts], contact_sheet([row], None, columns, CELL, f"Inpainting: {PAINTED_PROMPT}")


def write(folder: Path, facts: dict[str, Any], image: Image.Image, depth: np.ndarray, **options) -> None:
    (folder / facts["result"]).mkdir()
    write_result(folder / facts["result"], image, depth, {"command": "demo"} | facts, **options)


def joined(sheets: list[Image.Image], below: bool = False) -> Image.Image:
    """Sheets beside one another, or below one another with their right edges in line."""
    width, height = (max, sum) if below else (sum, max)
    sheet = Image.new("RGB", (width(s.width for s in sheets), height(s.height for s in sheets)), "white")
    x = y = 0
    for part in sheets:
        sheet.paste(part, (sheet.width - part.width, y) if below else (x, 0))
        x, y = x + part.width, y + part.height
    return sheet
