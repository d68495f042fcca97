"""What the studies share: numbers that are kept, runs that are made once, means and spreads over seeds."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from finetune.data.sources import Source
from finetune.training.validation import image_to_depth_metrics
from mf_diffusers import ModalityForcingPipeline
from mf_diffusers.files import atomic_write
from mf_diffusers.precision import choose_dtype


class Measurements:
    """Numbers by name in a JSON file; what is there is not measured again."""

    def __init__(self, path: Path):
        self.path = path
        self.numbers = json.loads(path.read_text()) if path.is_file() else {}

    def __call__(self, name: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        if name not in self.numbers:
            self.numbers[name] = measure()
            with atomic_write(self.path) as temporary:
                temporary.write_text(json.dumps(self.numbers, indent=2) + "\n")
            print(name, {key: round(value, 4) for key, value in self.numbers[name].items()}, flush=True)
        return self.numbers[name]


def run_script(name: str, *arguments: str | Path) -> None:
    """A script of finetune/, in a process of its own; it goes on where it was stopped.

    Raises SystemExit when it fails: it has said why.
    """
    done = subprocess.run([sys.executable, Path(__file__).parents[1] / name, *arguments])
    if done.returncode:
        raise SystemExit(done.returncode)


def load_pipeline(folder: str | Path) -> ModalityForcingPipeline:
    """A pipeline to measure on the CPU, in bfloat16 as the published model is used, unless the CPU emulates that."""
    pipe = ModalityForcingPipeline.from_pretrained(folder, dtype=choose_dtype("cpu"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_to_depth(pipe: ModalityForcingPipeline, source: Source, count: int, **kwargs) -> dict[str, float]:
    """AbsRel and delta1 over the first samples of a source, see `image_to_depth_metrics`."""
    metrics = image_to_depth_metrics(pipe, source, count, **kwargs)
    return {name: metrics[name] for name in ("abs_rel", "delta1")}


def in_one_and_four_steps(pipe: ModalityForcingPipeline, source: Source, count: int) -> dict[str, float]:
    """`image_to_depth` in four steps, and in one under names that say so."""
    one_step = image_to_depth(pipe, source, count, steps=1)
    return image_to_depth(pipe, source, count) | {f"{name}_one_step": value for name, value in one_step.items()}


def over_seeds(numbers: dict[str, dict[str, float]], name: str, metric: str, seeds: list[int]) -> list[float]:
    """A metric of every seed, or of the one measurement of that name; none where it was not measured."""
    rows = [numbers[key] for key in (name, *(f"{name}, seed {seed}" for seed in seeds)) if key in numbers]
    return [row[metric] for row in rows if metric in row]


def table_cell(values: list[float]) -> str:
    """Mean ± half the range, in percent; empty for no values."""
    if not values:
        return ""
    spread = f" ± {100 * (max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.2f}{spread}"


def publish(path: Path, tables: str, figure: Figure) -> None:
    """Prints the tables of a study, and writes them and its figure as `path` with the suffixes .md and .png."""
    with atomic_write(path.with_suffix(".md")) as temporary:
        temporary.write_text(tables, encoding="utf-8")
    with atomic_write(path.with_suffix(".png")) as temporary:
        figure.savefig(temporary, dpi=110)
    print(tables)
