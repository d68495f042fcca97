"""The command line: text, images and depth maps in, result folders out; checkpoints converted and described."""

import hashlib
import json
import os
import platform
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

import diffusers
import numpy as np
import torch
import transformers
import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperGroup

import mf_diffusers
from mf_diffusers.checkpoints import convert_checkpoint, load_pipeline, read_checkpoint
from mf_diffusers.datasets import DATASETS
from mf_diffusers.datasets.prepare import SHEET, SUMMARY, prepare_dataset
from mf_diffusers.demo import run_demo
from mf_diffusers.depth_io import DEPTH_SUFFIXES, IMAGE_SUFFIXES, as_depth_map, read_depth, read_image
from mf_diffusers.evaluation.alignment import ALIGNMENTS
from mf_diffusers.evaluation.comparison import compare as compare_reports
from mf_diffusers.evaluation.metrics import NEGATIVE
from mf_diffusers.evaluation.predictors import FolderPredictor, ModelPredictor
from mf_diffusers.evaluation.protocol import BENCHMARKS, Protocol
from mf_diffusers.evaluation.report import FAILED, NO_TRUTH
from mf_diffusers.evaluation.run import evaluate as run_evaluation
from mf_diffusers.evaluation.run import processes
from mf_diffusers.modality_forcing.loaders import TEXT_ENCODERS
from mf_diffusers.results import place_result, temporary_folder, write_result


LICENCE_NOTE = "The authors' published weights are licensed CC BY-NC 4.0 (not for commercial use), converted or not."


class Commands(TyperGroup):
    """Commands whose expected errors are one line on stderr; MF_DIFFUSERS_DEBUG=1 shows where they come from."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except Exception as error:
            expected = isinstance(error, (ValueError, OSError)) or is_network_error(error)
            expected = expected and not isinstance(error, BrokenPipeError)  # which click ends quietly
            if not expected or os.environ.get("MF_DIFFUSERS_DEBUG"):
                raise
            typer.echo(f"error: {reason(error)}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=Commands,
    help="Modality Forcing: images and depth from one diffusion transformer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def choice(*values):
    def check(value: str) -> str:
        if value in ("float16", "fp16", "half"):
            raise typer.BadParameter(f"{value}: the model overflows in float16; take bfloat16 (same size) or float32.")
        if value not in values:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(values)}.")
        return value

    return {"callback": check, "metavar": "|".join(values)}


def option(*names, panel="Options", **settings):
    return typer.Option(*names, rich_help_panel=panel, **settings)


DTYPES = choice("auto", "bfloat16", "float32")
TEXT_ENCODER_HELP = (
    "Qwen3 text encoder and tokenizer, folder or Hub repository; default: the model's, or one that fits."
)

Model = Annotated[
    str, option("--model", "-m", envvar="MF_DIFFUSERS_MODEL", help="Folder or Hub id: diffusers or published layout.")
]
TextEncoder = Annotated[str | None, option(help=TEXT_ENCODER_HELP)]
Lora = Annotated[str | None, option(help="LoRA: file, folder or Hub id.")]
Steps = Annotated[int, option(min=1, help="Euler steps; for the depth of an image 1 to 4 already do well.")]
GuidanceScale = Annotated[float | None, option(min=0, help="Pull towards the prompt; default 4, for depth 1 (off).")]
Seed = Annotated[int, option(min=0, max=2**32, help="Result number i, from 0, has the seed SEED + i.")]
Height = Annotated[int | None, option(min=1, help="To work at, a multiple of 16; default: fits the input.")]
Width = Annotated[int | None, option(min=1, help="To work at, a multiple of 16; default: fits the input.")]
Output = Annotated[Path, option("--output", "-o", panel="Result", help="Folder for the result folders.")]
Overwrite = Annotated[bool, option("--overwrite", panel="Result", help="Replace; default: write NAME-002 beside NAME.")]
Fov = Annotated[float, option(min=1, max=179, panel="Result", help="Degrees that the longer side of the points spans.")]
Exr = Annotated[bool, option("--exr", panel="Result", help="Write depth.exr too.")]
Points = Annotated[bool, option("--points/--no-points", panel="Result", help="Write points.ply and points.glb.")]
Device = Annotated[str, option(panel="Machine", help="auto (cuda, else mps, else cpu) or a torch device.")]
Dtype = Annotated[str, option(panel="Machine", **DTYPES, help="auto: bfloat16 on cuda, else float32.")]
Offload = Annotated[
    str, option(panel="Machine", **choice("none", "model", "group"), help="Weights in main memory; group: least VRAM.")
]
Offline = Annotated[bool, option("--offline", panel="Machine", help="Ask no server; only what is on disk.")]
Quiet = Annotated[bool, option("--quiet", "-q", panel="Machine", help="Print errors alone.")]


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="What to show; each gives a result folder.")],
    model: Model,
    num: Annotated[int, option("--num", "-n", min=1, help="Results for each prompt.")] = 1,
    log2_alpha: Annotated[
        float | None, option(min=-30, max=30, help="Above 0 the image settles first, below 0 depth; default: 5.")
    ] = None,
    refine: Annotated[int, option(min=0, help="Steps of a second pass, image to depth, for sharper depth.")] = 0,
    steps: Steps = 50,
    guidance_scale: GuidanceScale = None,
    seed: Seed = 0,
    height: Height = None,
    width: Width = None,
    lora: Lora = None,
    text_encoder: TextEncoder = None,
    output: Output = Path("outputs"),
    overwrite: Overwrite = False,
    fov: Fov = 55.0,
    exr: Exr = False,
    points: Points = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offload: Offload = "none",
    offline: Offline = False,
    quiet: Quiet = False,
):
    """Make images and their depth from text.

    mf-diffusers generate "a lighthouse at dusk" "a tiled kitchen" --model MODEL --num 2
    """
    settings = locals()
    sources = [prompt for prompt in settings.pop("prompts") for _ in range(num)]

    def given(prompt):
        return {"prompt": prompt, "log2_alpha": log2_alpha, "num_refinement_steps": refine}

    run("generate", settings, sources, given)


@app.command()
def depth(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Pictures, or folders of pictures.")],
    model: Model,
    prompt: Annotated[str | None, option("--prompt", "-p", help="What the picture shows; can be left out.")] = None,
    ensemble: Annotated[int, option(min=1, help="Samples to take the median of; also gives uncertainty.")] = 1,
    steps: Steps = 50,
    guidance_scale: GuidanceScale = None,
    seed: Seed = 0,
    height: Height = None,
    width: Width = None,
    lora: Lora = None,
    text_encoder: TextEncoder = None,
    output: Output = Path("outputs"),
    overwrite: Overwrite = False,
    fov: Fov = 55.0,
    exr: Exr = False,
    points: Points = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offload: Offload = "none",
    offline: Offline = False,
    quiet: Quiet = False,
):
    """Make the depth of images.

    mf-diffusers depth photo.jpg holiday/ --model MODEL --steps 4 --ensemble 5
    """
    settings = locals()

    sources = files_among(settings.pop("images"), IMAGE_SUFFIXES)

    def given(path):
        return {"image": read_image(path), "prompt": prompt, "ensemble_size": ensemble}

    run("depth", settings, sources, given)


@app.command()
def image(
    depths: Annotated[
        list[Path], typer.Argument(metavar="DEPTH", help="Depth maps (png, npy, npz, exr, tif, pfm), or folders.")
    ],
    prompt: Annotated[str, option("--prompt", "-p", help="What to show.")],
    model: Model,
    log2_alpha: Annotated[
        float | None, option(min=-30, max=30, help="From -5, a loose hold of depth, to -14, tight; default: rigid.")
    ] = None,
    depth_scale: Annotated[
        float | None, option(help="Factor of stored values, 0.001 for millimetres; default: the one in the file.")
    ] = None,
    depth_key: Annotated[str | None, option(help="Array of an npz, channel of an EXR.")] = None,
    inverse: Annotated[
        bool, option("--inverse", help="Files hold inverse depth (bright is near), as artists' maps do.")
    ] = False,
    steps: Steps = 50,
    guidance_scale: GuidanceScale = None,
    seed: Seed = 0,
    height: Height = None,
    width: Width = None,
    lora: Lora = None,
    text_encoder: TextEncoder = None,
    output: Output = Path("outputs"),
    overwrite: Overwrite = False,
    fov: Fov = 55.0,
    exr: Exr = False,
    points: Points = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offload: Offload = "none",
    offline: Offline = False,
    quiet: Quiet = False,
):
    """Make images of depth maps: larger is farther (unless --inverse), 0 is missing.

    mf-diffusers image outputs/photo/depth.png --prompt "the same street in snow" --model MODEL
    """
    settings = locals()

    sources = files_among(settings.pop("depths"), DEPTH_SUFFIXES)

    def given(path):
        values = read_depth(path, scale=depth_scale, key=depth_key)
        if inverse:
            with np.errstate(divide="ignore", over="ignore"):
                values = as_depth_map(1 / values)
        return {"depth": values, "prompt": prompt, "log2_alpha": log2_alpha}

    run("image", settings, sources, given)


@app.command()
def demo(
    model: Annotated[
        str | None, option("--model", "-m", help="Folder or Hub id; default: the embedded model, where there is one.")
    ] = None,
    steps: Annotated[int, option(min=1, help="Euler steps for images; the depth of an image takes one.")] = 50,
    seed: Annotated[
        int, option(min=0, max=2**32, help="Result number i of a task, from 0, has the seed SEED + i.")
    ] = 0,
    lora: Lora = None,
    text_encoder: TextEncoder = None,
    output: Annotated[Path, option("--output", "-o", panel="Result", help="The folder to write.")] = Path(
        "outputs/demo"
    ),
    overwrite: Overwrite = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offload: Offload = "none",
    offline: Offline = False,
    quiet: Quiet = False,
):
    """Show all three tasks on a few prompts and on six scenes of this package, and make a sheet of them.

    mf-diffusers demo --model MODEL --output outputs/demo
    """
    settings = locals()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # the demo has its own
        if quiet:
            library.utils.logging.set_verbosity_error()
    settings["device"], settings["dtype"] = device_and_dtype(device, dtype, offload)
    if model is None:
        torch.set_num_threads(1)  # its tensors are small: beside other work, threads would only wait for one another
    run_demo(**settings)


@app.command()
def convert(
    src: Annotated[str, typer.Argument(help="Published layout (folder or .safetensors), or a diffusers folder.")],
    dst: Annotated[Path, typer.Argument(help="A folder for diffusers, or NAME.safetensors in the published layout.")],
    text_encoder: Annotated[
        str | None, option(help="To save in the pipeline, folder or Hub id; default: none.")
    ] = None,
    prefix: Annotated[str, option(help='Of the keys in NAME.safetensors; in the authors\' file "dit.".')] = "",
    dtype: Annotated[str, option(**DTYPES, help="auto: as stored.")] = "auto",
    overwrite: Annotated[bool, option("--overwrite", help="Replace DST.")] = False,
    offline: Offline = False,
):
    """Convert weights between the published layout and diffusers, both ways.

    A published folder with the autoencoder becomes a pipeline, one without it or a file a transformer.

    mf-diffusers convert modality_forcing/ klein-depth/

    mf-diffusers convert klein-depth/ klein-depth.safetensors
    """
    what, parameters = convert_checkpoint(src, dst, text_encoder, prefix, dtype, overwrite, offline)
    size = sum(file.stat().st_size for file in (dst.rglob("*") if dst.is_dir() else [dst]) if file.is_file())
    typer.echo(f"{dst}: {what}, {parameters:,} parameters in the transformer, {decimal(size)} on disk")
    typer.echo(LICENCE_NOTE)


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="Folder, .safetensors file or Hub id.")],
    as_json: Annotated[bool, option("--json", help="For machines.")] = False,
    offline: Offline = False,
):
    """Describe a checkpoint without loading its weights.

    mf-diffusers info klein-depth/ --json
    """

    kind, config, parts, facts = read_checkpoint(model, offline)
    parameters = {part: sum(tensor.numel() for tensor in tensors.values()) for part, tensors in parts.items()}
    named = {test: [t for name, t in parts["transformer"].items() if test in name] for test in ("depth", "depth_head.")}
    added, head = (sum(tensor.numel() for tensor in tensors) for tensors in named.values())
    report = {
        "model": model,
        "kind": kind,
        "transformer": {name: value for name, value in config.items() if not name.startswith("_")},
        "width": config["num_attention_heads"] * config["attention_head_dim"],
        "parameters": parameters,
        "parameters_added_by_depth": added,
        "dtypes": {part: sorted({str(t.dtype)[6:] for t in tensors.values()}) for part, tensors in parts.items()},
        "fitting_text_encoder": TEXT_ENCODERS.get(config["joint_attention_dim"]),
        **facts,
        "bytes_of_bfloat16_weights": 2 * (sum(parameters.values()) + head),  # the depth head stays float32
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for name, value in report.items():
        for label, entry in value.items() if isinstance(value, dict) else [("", value)]:
            if name.startswith("bytes"):
                entry = decimal(entry)
            elif type(entry) in (int, float):
                entry = f"{entry:,.10g}"
            typer.echo(f"{f'{name} {label}'.replace('_', ' '):44}{entry}")
    uncounted = "activations are" if "text_encoder" in parts else "activations and the text encoder are"
    typer.echo(f"Inference takes more memory than these weights: {uncounted} not counted.")


@app.command()
def evaluate(
    dataset: Annotated[str, option(**choice(*BENCHMARKS) | {"metavar": "NAME"}, help=f"{', '.join(BENCHMARKS)}.")],
    data: Annotated[Path, option(help="Folder of the benchmark's files.")],
    model: Annotated[
        str | None, option("--model", "-m", envvar="MF_DIFFUSERS_MODEL", help="Folder or Hub id of the model.")
    ] = None,
    predictions: Annotated[
        Path | None, option(help="Score depth files of any method instead: NAME.npy, .exr, .png, ... for each frame.")
    ] = None,
    ensemble: Annotated[int, option(min=1, help="Samples to take the median of; 10 in the paper.")] = 1,
    steps: Steps = 50,
    seed: Annotated[int, option(min=0, max=2**32, help="Frame number i, from 0, has the seed SEED + i.")] = 0,
    limit: Annotated[int | None, option(min=1, help="Only the first so many frames.")] = None,
    alignment: Annotated[str, option(**choice(*ALIGNMENTS), help="Of the predictions to the truth.")] = "robust",
    negative: Annotated[
        str, option(**choice(*NEGATIVE), help="Aligned depth below 0: clip as Marigold's code, hit as MoGe's.")
    ] = "error",
    center_crop: Annotated[int | None, option(min=1, help="Evaluate centred squares of this side.")] = None,
    geometry: Annotated[bool, option("--geometry", help="Boundary F1 and point-cloud distances too.")] = False,
    lora: Lora = None,
    text_encoder: TextEncoder = None,
    output: Annotated[Path, option("--output", "-o", panel="Result", help="Folder; a run in it goes on.")] = Path(
        "outputs/evaluation"
    ),
    save_predictions: Annotated[
        bool, option("--save-predictions", panel="Result", help="Keep them, for --predictions.")
    ] = False,
    overwrite: Annotated[bool, option("--overwrite", panel="Result", help="Begin anew.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offload: Offload = "none",
    offline: Offline = False,
    quiet: Quiet = False,
):
    """Score depth on a benchmark: a model's, or depth files made by any method.

    Stopped runs go on with the same command. Several processes share the frames: torchrun --no-python
    --nproc-per-node 4 mf-diffusers evaluate ...

    mf-diffusers evaluate --model MODEL --dataset moge-nyuv2 --data data/NYUv2 --ensemble 10 --output outputs/nyuv2
    """
    protocol = Protocol(dataset, alignment, negative, center_crop, geometry)
    frames = BENCHMARKS[dataset].open(data)
    total = len(frames)  # what cannot be listed is found out before the model is loaded
    if predictions:
        predictor = FolderPredictor(predictions)
    elif model is None:
        raise ValueError("nothing to score: give a --model, or a folder of --predictions.")
    else:
        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
            if quiet:
                library.utils.logging.set_verbosity_error()
        device = str(processes().device) if device == "auto" else device
        device, dtype = device_and_dtype(device, dtype, offload)
        pipe = load_pipeline(model, device, dtype, text_encoder, lora, offload, offline)
        pipe.set_progress_bar_config(disable=True)
        facts = {"model": str(Path(model).resolve()) if Path(model).exists() else model, "lora": lora}
        predictor = ModelPredictor(pipe, facts, steps, ensemble, seed, disparity=alignment == "disparity")
    report = run_evaluation(frames, protocol, predictor, output, limit, save_predictions, overwrite, quiet)
    if report is None:  # the main process speaks
        return
    mean = report["mean"]
    if mean and not quiet:
        table = Table("frames", "AbsRel", "delta1", title=f"{dataset}, {alignment} alignment")
        table.add_row(f"{mean['images']} of {total}", f"{mean['abs_rel']:.4f}", f"{mean['delta1']:.4f}")
        Console().print(table)
        print(output / "report.md")
    failed = [frame["reason"] for frame in report["left_out"] if frame["status"] == FAILED]
    without = [frame["reason"] for frame in report["left_out"] if frame["status"] == NO_TRUTH]
    for kind, lines in (("warning", [*without, *report["warnings"]]), ("error", failed)):
        for line in lines[:10]:
            typer.echo(f"{kind}: {line}", err=True)
        if len(lines) > 10:
            typer.echo(f"{kind}: and {len(lines) - 10} more, in {output / 'report.json'}", err=True)
    if failed or not mean:
        scored, frames = mean.get("images", 0), report["counts"]["frames"]
        typer.echo(f"{len(failed)} of {frames} frames failed, {scored} are scored.", err=True)
        raise typer.Exit(1)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="report.json of a run.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="report.json of another, over the same frames.")],
    seed: Annotated[int, option(min=0, help="Of the resampling.")] = 0,
):
    """Compare two evaluations of the same frames, with 95 % intervals of the differences.

    mf-diffusers compare outputs/a/report.json outputs/b/report.json
    """
    table = Table("metric", "A", "B", "B - A", "95 % interval", "frames")
    for metric, row in compare_reports(first, second, seed=seed).items():
        values = [f"{row[name]:.4f}" for name in ("first", "second")]
        interval = f"{row['low']:+.4f} .. {row['high']:+.4f}"
        table.add_row(metric, *values, f"{row['difference']:+.4f}", interval, str(row["frames"]))
    Console().print(table)


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help=f"{', '.join(DATASETS)}.", metavar="NAME")],
    src: Annotated[Path, typer.Argument(help="Folder into which the data set was unpacked.")],
    dst: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    split: Annotated[str | None, option(help="Part of the data set, as it calls them itself; default: all.")] = None,
    max_pixels: Annotated[int | None, option(min=1, help="Make larger frames smaller; default: as they are.")] = None,
    workers: Annotated[int, option(min=1, panel="Machine", help="Processes.")] = 1,
    quiet: Quiet = False,
):
    """Write a data set as the webdataset shards that training reads, with a summary and a contact sheet.

    After an interruption the same command goes on. The licence of the data set holds for its shards too.

    mf-diffusers prepare hypersim data/hypersim shards/hypersim --max-pixels 262144 --workers 8
    """
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as progress:
        task = progress.add_task("frames", total=None)

        def on_shard(record, total):
            done = sum(record[key] for key in ("frames", "frames_unreadable", "frames_without_depth"))
            progress.update(task, advance=done, total=total)

        summary = prepare_dataset(name, src, dst, split, max_pixels, workers, on_shard=on_shard)
    if quiet:
        return
    typer.echo(f"{dst}: {summary['frames']:,} frames in {len(summary['shards'])} shards, {decimal(summary['bytes'])}")
    for what in ("unreadable", "without_depth"):
        if count := summary[f"frames_{what}"]:
            typer.echo(f"{count:,} frames {what.replace('_', ' ')} were left out, listed in {dst / SUMMARY}")
    typer.echo(f"Look at {dst / SHEET} before training.")


def run(command, settings, sources, given):
    """Load the model, make the result of every source and write it; what failed is reported when all are through.

    Args:
        settings: the options of the command by name, as metadata.json repeats them.
        sources: prompts, or paths of input files.
        given: makes the pipeline's arguments of a source.
    """

    output, quiet = settings["output"], settings["quiet"]
    with temporary_folder(output):  # what cannot be written is found out before the model is loaded
        pass
    files = [source for source in sources if isinstance(source, Path)]
    if files and not any(file.is_file() for file in files):
        raise FileNotFoundError(f"{', '.join(map(str, files))}: no such file")
    lora = settings["lora"] or ""
    if lora.endswith(".safetensors") and not Path(lora).is_file():
        raise FileNotFoundError(f"--lora {lora}: no such file")
    device, dtype = device_and_dtype(settings["device"], settings["dtype"], settings["offload"])
    if quiet:
        for library in (diffusers, transformers):
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
    pipe = load_pipeline(
        settings["model"],
        device,
        dtype,
        text_encoder=settings["text_encoder"],
        lora=settings["lora"],
        offload=settings["offload"],
        offline=settings["offline"],
    )
    pipe.set_progress_bar_config(disable=True)  # its steps are the second line of the display below
    if Path(settings["model"]).exists():
        settings["model"] = Path(settings["model"]).resolve()

    console = Console(stderr=True)
    progress = Progress(
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
    all_results = progress.add_task(command, total=len(sources), visible=len(sources) > 1)
    this_result = progress.add_task("", total=None)

    def after_step(pipe, step, timestep, tensors):
        progress.update(this_result, total=pipe.num_timesteps, advance=1)
        progress.advance(all_results, 1 / pipe.num_timesteps)
        return {}

    failures, written = [], []
    with progress, warnings.catch_warnings():
        warnings.showwarning = lambda message, category, *_: (
            None if quiet or category is not UserWarning else print(f"warning: {message}", file=sys.stderr)
        )
        for number, source in enumerate(sources):
            name = source.stem if isinstance(source, Path) else slug(source)
            progress.reset(this_result, total=None, description=name)
            started = time.perf_counter()
            seed = settings["seed"] + number
            try:
                inputs = given(source)
                made = pipe(
                    **inputs,
                    height=settings["height"],
                    width=settings["width"],
                    num_inference_steps=settings["steps"],
                    guidance_scale=settings["guidance_scale"],
                    generator=torch.Generator().manual_seed(seed),
                    callback_on_step_end=after_step,
                    callback_on_step_end_tensor_inputs=[],
                )
                picture = inputs["image"] if made.images is None else made.images[0]
                depth_map = inputs["depth"] if made.depth is None else made.depth[0]
                metadata = {
                    "command": command,
                    "prompt": inputs["prompt"],
                    "seed": seed,
                    "options": settings | {"seed": seed, "guidance_scale": pipe.guidance_scale},
                    "transformer": type(pipe.transformer).__name__,
                    "size": {"width": picture.width, "height": picture.height},
                    "device": device,
                    "dtype": str(dtype).removeprefix("torch."),
                    "versions": {
                        "python": platform.python_version(),
                        "mf_diffusers": mf_diffusers.__version__,
                        "torch": torch.__version__,
                        "diffusers": diffusers.__version__,
                        "transformers": transformers.__version__,
                    },
                    "seconds": round(time.perf_counter() - started, 3),
                }
                if isinstance(source, Path):
                    digest = hashlib.sha256(source.read_bytes()).hexdigest()
                    metadata["input"] = {"path": source.resolve(), "sha256": digest}
                with temporary_folder(output) as folder:
                    write_result(
                        folder,
                        picture,
                        depth_map,
                        metadata,
                        mask=None if made.depth_mask is None else made.depth_mask[0],
                        uncertainty=None if made.depth_uncertainty is None else made.depth_uncertainty[0],
                        fov_degrees=settings["fov"],
                        exr=settings["exr"],
                        points=settings["points"],
                    )
                    written.append(place_result(folder, output, name, settings["overwrite"], written))
                if not quiet:
                    print(written[-1], flush=True)  # not typer.echo, which would write past the live display
            except (ValueError, OSError, torch.OutOfMemoryError) as error:
                if os.environ.get("MF_DIFFUSERS_DEBUG"):
                    raise
                failures.append(reason(error, source))
            progress.update(all_results, completed=number + 1)

    for failure in failures:
        typer.echo(f"error: {failure}", err=True)
    if failures and len(sources) > 1:
        typer.echo(f"{len(failures)} of {len(sources)} failed, {len(written)} are written.", err=True)
    if failures:
        raise typer.Exit(1)


def device_and_dtype(device, dtype, offload):
    """The torch device and dtype of an answer that may be "auto"."""

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    usable = [name for name in there if there[name]]
    if device == "auto":
        device = usable[0]
    elif device.split(":")[0] not in usable:
        raise ValueError(f"--device {device}: torch sees {', '.join(usable)} on this machine; choose among these.")
    if device == "cpu" and offload != "none":
        raise ValueError(f"--offload {offload} needs a GPU, but the device is the CPU: leave it out.")
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return device, getattr(torch, dtype)


def files_among(paths, suffixes):
    """The files among `paths` and, of the folders among them, the files that end in one of `suffixes`, sorted."""
    files = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))
        if not found:
            raise FileNotFoundError(f"{path}: no file in this folder ends in {', '.join(suffixes)}")
        files += found
    return files


def slug(text):
    return re.sub(r"[\W_]+", "-", text.lower())[:48].strip("-") or "untitled"


def reason(error, source=None):
    """The message of an error in one line, which names the source."""
    text = " ".join(str(error).split())
    if is_network_error(error):
        text = f"the Hub cannot be reached, and there is no such file or folder here ({text})"
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    elif type(error).__name__ == "OutOfMemoryError":
        text = f"out of GPU memory: try --offload model, or a smaller --height and --width ({text})"
    return text if source is None or text.startswith(str(source)) else f"{source}: {text}"


def is_network_error(error):
    """Whether it comes from below huggingface_hub, whose HTTP client's errors are no OSError."""
    return type(error).__module__.startswith("httpx")
