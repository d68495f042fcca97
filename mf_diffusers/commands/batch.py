"""A batch of sources, each of which becomes a result folder; the model is loaded once."""

import math
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import mf_diffusers
from mf_diffusers.checkpoints import load_pipeline
from mf_diffusers.commands.machine import device_and_dtype, hush_libraries
from mf_diffusers.commands.options import FLAGS, Options
from mf_diffusers.commands.sources import InputFile
from mf_diffusers.errors import is_debugging, one_line, with_options
from mf_diffusers.files import sha256, temporary_folder
from mf_diffusers.geometry import FOV_DEGREES, PointSettings
from mf_diffusers.pictures import fov_from_exif
from mf_diffusers.results import place_result, write_result


@dataclass(frozen=True)
class Made:
    """A result, before it is written: a picture, its depth (H, W), and what there is to say of them.

    Args:
        points: how many pixels' depth was given, or made by the model; that of others is interpolated.
        mask: bool (H, W), True where depth is valid. None: where it is above 0.
        uncertainty: relative, (H, W).
    """

    image: PIL.Image.Image
    depth: np.ndarray
    points: int
    facts: dict[str, Any]
    mask: np.ndarray | None = None
    uncertainty: np.ndarray | None = None


class Batch:
    """The results of one call of a command.

    Args:
        command: its name.
        options: what the commands share.
        own: the command's other options by name, for metadata.json.
    """

    def __init__(self, command: str, options: Options, own: dict[str, Any]):
        self.command, self.options, self.own = command, options, own
        self.written = []

    def run(self, sources: list[str] | list[InputFile], inputs: Callable[[str | Path], dict[str, Any]]) -> None:
        """Make and write the result of every source; what failed is reported when all are through.

        Args:
            sources: prompts, or input files.
            inputs: makes the pipeline's arguments of a prompt or a path.
        """
        self.check(sources)
        self.load()
        failures = []
        progress = progress_bar(self.options.quiet)
        all_results = progress.add_task(self.command, total=len(sources), visible=len(sources) > 1)
        this_result = progress.add_task("", total=None)

        def after_step(pipe, step, timestep, tensors):
            progress.update(this_result, total=pipe.num_timesteps, advance=1)
            progress.advance(all_results, 1 / pipe.num_timesteps)
            return {}

        with progress:
            for number, source in enumerate(sources):
                progress.reset(this_result, total=None, description=name_of(source))
                try:
                    path = self.write(source, self.make(source, number, inputs, after_step))
                except (ValueError, OSError, torch.OutOfMemoryError) as error:
                    if is_debugging() or isinstance(error, BrokenPipeError):
                        raise
                    failures.append(with_options(one_line(error, source), FLAGS))
                else:
                    self.written.append(path)
                    if not self.options.quiet:
                        print(path, flush=True)  # not typer.echo, which would write past the live display
                progress.update(all_results, completed=number + 1)

        for failure in failures:
            typer.echo(f"error: {failure}", err=True)
        if failures and len(sources) > 1:
            typer.echo(f"{len(failures)} of {len(sources)} failed, {len(self.written)} are written.", err=True)
        if failures:
            raise typer.Exit(1)

    def check(self, sources: list[str] | list[InputFile]) -> None:
        """Find out what cannot work before the model is loaded."""
        with temporary_folder(self.options.output):
            pass
        files = [source.path for source in sources if isinstance(source, InputFile)]
        if files and not any(file.is_file() for file in files):
            raise FileNotFoundError(f"{', '.join(map(str, files))}: no such file")

    def load(self) -> None:
        options = self.options
        self.device, self.dtype = device_and_dtype(options.device, options.dtype, options.offload)
        if options.quiet:
            hush_libraries(errors_alone=True)
        self.pipe = load_pipeline(
            options.model,
            self.device,
            self.dtype,
            text_encoder=options.text_encoder,
            lora=options.lora,
            lora_weight=options.lora_weight,
            size=options.size,
            adapter=options.adapter,
            any_base=options.any_base,
            offload=options.offload,
            offline=options.offline,
        )
        self.pipe.set_progress_bar_config(disable=True)  # its steps are the second line of the display

    def make(
        self, source: str | Path, number: int, inputs: Callable[..., dict[str, Any]], after_step: Callable[..., dict]
    ) -> Made:
        """The result of a source. What was given, and is not part of it, is let go: it may be large."""
        started = time.perf_counter()
        seed = self.options.seed + number
        given = inputs(source.path if isinstance(source, InputFile) else source)
        made = self.pipe(
            **given,
            height=self.options.height,
            width=self.options.width,
            num_inference_steps=self.options.steps,
            guidance_scale=self.options.guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=after_step,
            callback_on_step_end_tensor_inputs=[],
        )
        image = given["image"] if made.images is None else made.images[0]
        facts = self.describe(source, given["prompt"], seed) | {
            "seconds": round(time.perf_counter() - started, 3),
            "size": {"width": image.width, "height": image.height},
        }
        known = 0 if given.get("depth") is None else np.count_nonzero(given["depth"])
        if made.depth is None:
            return Made(image, given["depth"], known, facts)
        points = max(known, math.prod(self.pipe.working_size))
        uncertainty = None if made.depth_uncertainty is None else made.depth_uncertainty[0]
        return Made(image, made.depth[0], points, facts, made.depth_mask[0], uncertainty)

    def write(self, source: str | Path, made: Made) -> Path:
        """Write the result folder of a source, and return its path."""
        options = self.options
        with temporary_folder(options.output) as folder:
            write_result(
                folder,
                made.image,
                made.depth,
                made.facts,
                mask=made.mask,
                uncertainty=made.uncertainty,
                exr=options.exr,
                points=self.point_settings(source, made.points) if options.points else None,
            )
            return place_result(folder, options.output, name_of(source), options.overwrite, self.written)

    def point_settings(self, source: str | Path, points: int) -> PointSettings:
        """Settings of the point cloud of a result with so many `Made.points`: there are no more to be had."""
        return PointSettings(
            fov_degrees=self.field_of_view(source)["degrees"],
            edge_threshold=self.options.edge_threshold or None,
            max_points=min(self.options.max_points, points),
        )

    def field_of_view(self, source: str | Path) -> dict[str, Any]:
        """Field of view of a source along its longer side, and what says so."""
        if self.options.fov is not None:
            return {"degrees": self.options.fov, "from": "fov"}
        degrees = fov_from_exif(source.path) if isinstance(source, InputFile) else None
        if degrees is not None:
            return {"degrees": round(degrees, 2), "from": "EXIF FocalLengthIn35mmFilm"}
        return {"degrees": FOV_DEGREES, "from": "default"}

    def describe(self, source: str | Path, prompt: str | None, seed: int) -> dict[str, Any]:
        """All it takes to make a result again."""
        model = Path(self.options.model)
        options = self.own | asdict(self.options)
        if model.exists():
            options["model"] = model.resolve()
        facts = {
            "command": self.command,
            "prompt": prompt,
            "seed": seed,
            "options": options
            | {"seed": seed, "steps": self.pipe.num_inference_steps, "guidance_scale": self.pipe.guidance_scale},
            "transformer": type(self.pipe.transformer).__name__,
            "field_of_view": self.field_of_view(source),
            "device": self.device,
            "dtype": str(self.dtype).removeprefix("torch."),
            "versions": {"python": platform.python_version()}
            | {library.__name__: library.__version__ for library in (mf_diffusers, torch, diffusers, transformers)},
        }
        if isinstance(source, InputFile):
            facts["input"] = {"path": source.path.resolve(), "sha256": sha256(source.path)}
        return facts


def progress_bar(quiet: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=quiet or not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),  # into a file or pipe, the paths go there
        transient=True,
        speed_estimate_period=600,
    )


def name_of(source: str | InputFile) -> str:
    """The name of the result of a prompt or an input file."""
    if isinstance(source, InputFile):
        return source.name
    return re.sub(r"[\W_]+", "-", source.lower())[:48].strip("-") or "untitled"
