"""`evaluate` and `compare`: depth on benchmarks, and two runs side by side."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mf_diffusers.alignment import ALIGNMENTS
from mf_diffusers.commands.options import (
    FLAGS,
    Adapter,
    AnyBase,
    Device,
    Dtype,
    Lora,
    LoraWeight,
    Offline,
    Offload,
    Quiet,
    Size,
    Steps,
    TextEncoder,
    choice,
    option,
)
from mf_diffusers.errors import with_options
from mf_diffusers.evaluation.comparison import compare as compare_reports
from mf_diffusers.evaluation.metrics import NEGATIVE
from mf_diffusers.evaluation.protocol import BENCHMARKS, METHODS, TASKS, Protocol


def evaluate(
    dataset: Annotated[str, option(**choice(*BENCHMARKS) | {"metavar": "NAME"}, help=f"{', '.join(BENCHMARKS)}.")],
    data: Annotated[Path, option(help="Folder of the benchmark's files.")],
    model: Annotated[
        str | None, option("--model", "-m", envvar="MF_DIFFUSERS_MODEL", help="Folder or Hub id of the model.")
    ] = None,
    predictions: Annotated[
        Path | None,
        option(help="Score the files of any method instead: NAME.npy, .exr, ..., or where their programs put them."),
    ] = None,
    zero_is_value: Annotated[
        bool, option("--zero-is-value", help="Level 0 of predicted PNGs is a value (Marigold's, Depth Anything's).")
    ] = False,
    task: Annotated[
        str, option(**choice(*TASKS), help="Depth of a picture, or the rest of depth given in part.")
    ] = "depth",
    points: Annotated[int | None, option(min=1, help="Completion: so many known pixels are given, at random.")] = None,
    density: Annotated[float | None, option(min=0, max=1, help="Completion: such a share of them is given.")] = None,
    method: Annotated[
        str, option(**choice(*METHODS), help="Completion: the model's, its image -> depth scaled, or without a model.")
    ] = "model",
    ensemble: Annotated[int, option(min=1, help="Samples to take the median of; 10 in the paper.")] = 1,
    steps: Steps = None,
    size: Size = None,
    seed: Annotated[int, option(min=0, max=2**32, help="Frame number i, from 0, has the seed SEED + i.")] = 0,
    limit: Annotated[int | None, option(min=1, help="Only the first so many frames.")] = None,
    alignment: Annotated[
        str | None, option(**choice(*ALIGNMENTS), help="Of the predictions to the truth; default: robust.")
    ] = None,
    negative: Annotated[
        str, option(**choice(*NEGATIVE), help="Aligned depth below 0: clip as Marigold's code, hit as MoGe's.")
    ] = "error",
    center_crop: Annotated[int | None, option(min=1, help="Evaluate centred squares of this side.")] = None,
    geometry: Annotated[bool, option("--geometry", help="Boundary F1 and point-cloud distances too.")] = False,
    lora: Lora = None,
    lora_weight: LoraWeight = 1.0,
    adapter: Adapter = None,
    any_base: AnyBase = False,
    text_encoder: TextEncoder = None,
    output: Annotated[Path, option("--output", "-o", panel="Result", help="Folder; a run in it goes on.")] = Path(
        "outputs/evaluation"
    ),
    save_predictions: Annotated[
        bool, option("--save-predictions", panel="Result", help="Keep them, for --predictions.")
    ] = False,
    save_views: Annotated[
        Path | None, option(panel="Result", help="Folder for the pictures to predict on, SCENE--12.png; then stop.")
    ] = None,
    overwrite: Annotated[bool, option("--overwrite", panel="Result", help="Begin anew.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offload: Offload = "none",
    offline: Offline = False,
    quiet: Quiet = False,
) -> None:
    """Score depth on a benchmark: a model's, or depth files made by any method.

    Stopped runs go on with the same command. Several processes share the frames: torchrun --no-python
    --nproc-per-node 4 mf-diffusers evaluate ...

    mf-diffusers evaluate --model MODEL --dataset moge-nyuv2 --data data/NYUv2 --ensemble 10 --output outputs/nyuv2

    mf-diffusers evaluate --model MODEL --dataset nyuv2 --data data/NYUv2 --task completion --points 500
    """
    from mf_diffusers.checkpoints import load_pipeline
    from mf_diffusers.commands.machine import device_and_dtype, hush_libraries
    from mf_diffusers.evaluation.predictors import FolderPredictor, InterpolationPredictor, ModelPredictor
    from mf_diffusers.evaluation.run import evaluate as run_evaluation
    from mf_diffusers.evaluation.run import processes
    from mf_diffusers.evaluation.views import save_views as write_views

    alignment = alignment or ("robust" if task == "depth" else "none")
    protocol = Protocol(dataset, alignment, negative, center_crop, geometry, task, points, density)
    if task == "depth" and method != "model":
        raise ValueError(f"`method` {method} is of depth completion: give `task` completion too.")
    frames = BENCHMARKS[dataset].open(data)
    total = len(frames)  # what cannot be listed is found out before the model is loaded
    if save_views:
        failed = write_views(frames, protocol, save_views, limit)
        for line in failed:
            typer.echo(f"error: {line}", err=True)
        raise typer.Exit(1 if failed else 0)
    if predictions:
        predictor = FolderPredictor(predictions, zero_is_value, disparity=alignment == "disparity")
    elif method == "interpolation":
        predictor = InterpolationPredictor()
    elif model is None:
        raise ValueError("nothing to score: give a `model`, or a folder of `predictions`.")
    else:
        hush_libraries(errors_alone=quiet)
        device = str(processes().device) if device == "auto" else device
        device, dtype = device_and_dtype(device, dtype, offload)
        pipe = load_pipeline(
            model, device, dtype, text_encoder, lora, offload, offline, adapter, lora_weight, size, any_base
        )
        pipe.set_progress_bar_config(disable=True)
        facts = {
            "model": str(Path(model).resolve()) if Path(model).exists() else model,
            "lora": lora,
            "lora_weight": lora_weight if lora else None,
            "adapter": str(adapter.resolve()) if adapter else None,
            "size": pipe.config.default_sample_size,
        }
        is_disparity, is_fitted = alignment == "disparity", method == "fitted"
        predictor = ModelPredictor(pipe, facts, steps, ensemble, seed, is_disparity, is_fitted)
    report = run_evaluation(frames, protocol, predictor, output, limit, save_predictions, overwrite, quiet)
    if report is not None:  # the main process speaks
        show(report, total, output, quiet)


def show(report: dict, total: int, output: Path, quiet: bool) -> None:
    """Print the means of a run over a data set of `total` frames, and what was left out of them.

    Raises typer.Exit when frames failed or none is scored.
    """
    from mf_diffusers.evaluation.report import FAILED, NO_TRUTH, headline, title

    mean = report["mean"]
    if mean and not quiet:
        values = headline(report["protocol"]["task"], mean)
        table = Table("frames", *values, title=title(report["protocol"]))
        table.add_row(f"{mean['images']} of {total}", *values.values())
        Console().print(table)
        print(output / "report.md")
    failed = [frame["reason"] for frame in report["left_out"] if frame["status"] == FAILED]
    without = [frame["reason"] for frame in report["left_out"] if frame["status"] == NO_TRUTH]
    for kind, lines in (("warning", [*without, *report["warnings"]]), ("error", failed)):
        for line in lines[:10]:
            typer.echo(f"{kind}: {with_options(line, FLAGS)}", err=True)
        if len(lines) > 10:
            typer.echo(f"{kind}: and {len(lines) - 10} more, in {output / 'report.json'}", err=True)
    if failed or not mean:
        scored, frames = mean.get("images", 0), report["counts"]["frames"]
        typer.echo(f"{len(failed)} of {frames} frames failed, {scored} are scored.", err=True)
        raise typer.Exit(1)


def compare(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="report.json of a run.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="report.json of another, over the same frames.")],
    seed: Annotated[int, option(min=0, help="Of the resampling.")] = 0,
) -> None:
    """Compare two evaluations of the same frames, with 95 % intervals of the differences.

    mf-diffusers compare outputs/a/report.json outputs/b/report.json
    """
    table = Table("metric", "A", "B", "B - A", "95 % interval", "frames")
    for metric, row in compare_reports(first, second, seed=seed).items():
        values = [f"{row[name]:.4f}" for name in ("first", "second")]
        interval = f"{row['low']:+.4f} .. {row['high']:+.4f}"
        table.add_row(metric, *values, f"{row['difference']:+.4f}", interval, str(row["frames"]))
    Console().print(table)
