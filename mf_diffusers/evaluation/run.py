"""A run: every frame of a data set predicted and scored.

Each frame leaves a record, `records/000012.json`, which appears whole or not at all. So a run that is stopped goes on
where it was, processes share one without speaking to each other, and the report, which is made of the records alone,
is the same however the run went.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mf_diffusers.datasets.frame import Frames
from mf_diffusers.evaluation.predictors import Predictor, save_prediction
from mf_diffusers.evaluation.protocol import FAR_AWAY, Protocol
from mf_diffusers.evaluation.report import FAILED, NO_TRUTH, PICTURES, REPORT_FILES, SCORED, make_report, write_report
from mf_diffusers.files import ESCAPED, atomic_write
from mf_diffusers.visualization import BRIGHTEST_ERROR, PERCENTILES, colorize_depth, colorize_error, contact_sheet


RUN = "run.json"
RECORDS, PREDICTIONS = "records", "predictions"
CELL = 320
PATIENCE = timedelta(days=7)
"""How long a process waits for the others at the end."""


def evaluate(
    dataset: Frames,
    protocol: Protocol,
    predictor: Predictor,
    output: str | Path,
    limit: int | None = None,
    save_predictions: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any] | None:
    """Score predictions of a data set, and write the report.

    Started in several processes, by torchrun or accelerate, they share the frames.

    Args:
        dataset: the frames to score.
        protocol: what counts, and how predictions are aligned.
        predictor: a `ModelPredictor` or another `Predictor`.
        output: the folder of the run. A run that is there already goes on; frames that failed are tried again.
        limit: only the first so many frames.
        save_predictions: keep them too, in `output/predictions`, where `FolderPredictor` finds them.
        overwrite: begin anew.
        quiet: no progress bar.

    Returns the report (see `make_report`) in the main process, None in the others.

    Raises ValueError when the run that is there has other settings, another model or other predictions.
    """
    output, state = Path(output), processes()
    settings = {
        "protocol": protocol.describe(),
        "predictor": predictor.facts,
        "frames_sha256": hashlib.sha256("\n".join(dataset.names).encode(**ESCAPED)).hexdigest(),
        "save_predictions": save_predictions,
    }
    if state.is_main_process:
        open_run(output, settings, overwrite)
    state.wait_for_everyone()
    check_run(output, settings)
    numbers = range(len(dataset) if limit is None else min(limit, len(dataset)))
    records = read_records(output, numbers)
    todo = [number for number in numbers if number not in records or records[number]["status"] == FAILED]
    done = len(numbers) - len(todo)
    state.wait_for_everyone()  # until all have read the same records

    with state.split_between_processes(todo) as mine, progress_bar(quiet or not state.is_main_process) as progress:
        task = progress.add_task("evaluate", total=len(numbers), completed=done)
        for position, number in enumerate(mine, start=1):
            record, maps = evaluate_frame(dataset, number, protocol, predictor)
            if save_predictions and maps:
                save_prediction(output / PREDICTIONS, record["name"], maps["prediction"])
            write_json(output / RECORDS / f"{number:06}.json", record)
            progress.update(task, completed=done + min(len(todo), position * state.num_processes))
    state.wait_for_everyone()
    if not state.is_main_process:
        return None

    records = list(read_records(output, numbers).values())
    environment = {"data": str(dataset.root.resolve())} | predictor.environment
    report = make_report(settings, records, len(dataset), environment)
    for entry in report["worst"]:
        if not (output / entry["picture"]).is_file():
            draw(output / entry["picture"], *evaluate_frame(dataset, entry["number"], protocol, predictor))
    kept = {output / entry["picture"] for entry in report["worst"]}
    for picture in set((output / PICTURES).iterdir()) - kept:
        picture.unlink()
    write_json(output / "report.json", report)
    write_report(output, report)
    return report


def processes() -> PartialState:
    """The processes that share the run, as accelerate or torchrun started them."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, timeout=PATIENCE)


def evaluate_frame(
    dataset: Frames, number: int, protocol: Protocol, predictor: Predictor
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A frame's record, and the maps it was scored by (None when it was not)."""
    name = dataset.names[number]
    record = {"number": number, "name": name, "status": SCORED, "reason": "", "warnings": []}
    try:
        frame = dataset[number]
        known = frame.depth[frame.mask]
        if known.size and known.min() > FAR_AWAY:
            record["warnings"].append(
                f"{name}: all true depth is above {FAR_AWAY:g} m, from {known.min():.6g} to {known.max():.6g}: "
                "is it in millimetres? Check the scale of the files."
            )
        view, left_out = protocol.view(frame)
        record["left_out"] = left_out
        if not view.depth.any():
            why = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
            reason = f"{name}: no pixel has true depth that counts ({why})"
            return record | {"status": NO_TRUTH, "reason": reason}, None
        prediction, note = predictor(view, number)
    except (ValueError, OSError) as error:
        return record | {"status": FAILED, "reason": f"{name}: {' '.join(str(error).split())}"}, None
    aligned, complaint = protocol.align(prediction, view.depth)
    metrics = protocol.score(aligned, view.depth, view.intrinsics)
    finite = prediction[np.isfinite(prediction) & (view.depth > 0)]
    if complaint:
        record["warnings"].append(f"{name}: {complaint}")
    elif metrics["nonfinite"]:
        count = f"{metrics['nonfinite']} of {metrics['pixels']} predictions"
        record["warnings"].append(f"{name}: {count} are NaN or infinite; they count as errors")
    if protocol.alignment == "none" and finite.size and finite.min() > FAR_AWAY:
        record["warnings"].append(f"{name}: all predicted depth is above {FAR_AWAY:g} m: is it in millimetres?")
    return record | note | {"metrics": metrics}, {"view": view, "prediction": prediction, "aligned": aligned}


def open_run(output: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make the folder of a run, and empty it of an earlier one that is not to go on."""
    output.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for name in (RECORDS, PREDICTIONS, PICTURES):
            shutil.rmtree(output / name, ignore_errors=True)
        for name in (RUN, *REPORT_FILES):
            (output / name).unlink(missing_ok=True)
    for name in (RECORDS, PICTURES):
        (output / name).mkdir(exist_ok=True)
    if not (output / RUN).exists():
        write_json(output / RUN, settings)


def check_run(output: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError when the run that was begun in this folder is another one."""
    begun = flat(json.loads((output / RUN).read_text(encoding="utf-8")))
    now = flat(json.loads(json.dumps(settings)))
    other = [
        f"{name} {begun.get(name)!r}, now {now.get(name)!r}" for name in begun | now if begun.get(name) != now.get(name)
    ]
    if other:
        raise ValueError(
            f"{output} holds a run with other settings ({'; '.join(other)}): choose another `output`, or begin anew by "
            "overwrite=True"
        )


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, its keys joined by dots."""
    entries = {}
    for name, value in settings.items():
        entries |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return entries


def read_records(output: Path, numbers: Iterable[int]) -> dict[int, dict[str, Any]]:
    """The records that are there, by number."""
    records = {}
    for number in numbers:
        path = output / RECORDS / f"{number:06}.json"
        if path.is_file():
            records[number] = json.loads(path.read_text(encoding="utf-8"))
    return records


def write_json(path: Path, content: Any) -> None:
    """NaN, which JSON does not have, is written as null."""
    with atomic_write(path) as temporary:
        text = json.dumps(without_nan(content), indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", **ESCAPED)


def without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: without_nan(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


def draw(path: Path, record: dict[str, Any], maps: dict[str, Any]) -> None:
    """Input, truth, prediction and error of a frame."""
    view, aligned = maps["view"], maps["aligned"]
    stride = max(1, max(aligned.shape) // (2 * CELL))
    image, truth, aligned = (array[::stride, ::stride] for array in (view.image, view.depth, aligned))
    known = truth > 0
    near, far = np.percentile(truth[known], PERCENTILES) if known.any() else (None, None)
    error = np.abs(aligned - truth) / np.where(known, truth, 1)
    metrics = record["metrics"]
    sheet = contact_sheet(
        [
            [
                Image.fromarray(image),
                Image.fromarray(colorize_depth(truth, near=near, far=far)),
                Image.fromarray(colorize_depth(aligned, near=near, far=far)),
                Image.fromarray(colorize_error(error, known, max=BRIGHTEST_ERROR)),
            ]
        ],
        column_labels=("input", "truth", "prediction, aligned", f"error, yellow from {BRIGHTEST_ERROR:.0%}"),
        cell=CELL,
        title=f"{record['name']}: AbsRel {metrics['abs_rel']:.2%}, delta1 {metrics['delta1']:.2%}",
    )
    with atomic_write(path) as temporary:
        sheet.save(temporary)


def progress_bar(hidden: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=hidden or not console.is_terminal,
        transient=True,
        speed_estimate_period=600,
    )
