"""The report of a run, from the records of its frames: JSON, a table of the frames, and a page to read."""

import csv
import math
import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import scipy
import torch
import transformers

import mf_diffusers
from mf_diffusers.evaluation.metrics import mean_metrics
from mf_diffusers.evaluation.protocol import BENCHMARKS, LEFT_OUT
from mf_diffusers.files import ESCAPED, atomic_write


SCORED, NO_TRUTH, FAILED = "scored", "no ground truth", "failed"
"""What became of a frame."""

HEADLINES = {
    "depth": {"AbsRel, %": ("abs_rel", 100, 2), "delta1, %": ("delta1", 100, 2)},
    "completion": {
        "RMSE, m": ("rmse", 1, 3),
        "MAE, m": ("mae", 1, 3),
        "iRMSE, 1/km": ("irmse", 1, 2),
        "REL, %": ("abs_rel", 100, 2),
    },
}
"""By task the metrics that a run is known by: name, factor and digits."""

REPORT_FILES = ("report.json", "report.md", "frames.csv")
PICTURES = "worst"
WORST = 10

PUBLISHED = {
    #                          NYUv2         KITTI          ETH3D         ScanNet       DIODE
    "MoGe-2":                 ((2.89, 98.6), (3.75, 98.1),  (2.80, 99.1), None,         (3.14, 97.4)),
    "Pixel-Perfect Depth":    ((3.82, 97.7), (6.57, 95.1),  (4.02, 98.3), (4.04, 97.8), (4.97, 95.6)),
    "Marigold":               ((4.88, 96.8), (9.05, 90.3),  (4.90, 97.2), (5.89, 95.2), (6.13, 94.5)),
    "JointDiT (joint model)": ((5.12, 96.9), (10.90, 88.4), (5.32, 97.0), (5.76, 96.3), (10.22, 93.9)),
    "Modality Forcing":       ((2.52, 98.9), (5.37, 96.6),  (2.37, 99.3), (2.32, 98.9), (3.35, 97.7)),
}  # fmt: skip
"""AbsRel and delta1 in percent by method and `Benchmark.published`, as Duisterhof et al. 2026 print them: robust affine
alignment on the subsample, metrics at full resolution, on MoGe's evaluation data. The paper does not say which frames
of ScanNet these are."""

PUBLISHED_COLUMNS = ("NYUv2", "KITTI", "ETH3D", "ScanNet", "DIODE")


def make_report(
    settings: dict[str, Any], records: list[dict[str, Any]], frames: int, environment: dict[str, Any]
) -> dict[str, Any]:
    """All that there is to say of a run, as plain data.

    Args:
        settings: of the run.
        records: of its frames.
        frames: how many the data set has; a run may have been limited to fewer.
        environment: where the data lie and the predictions were made.

    Returns a dict: what was run and with what; `counts` of frames by what became of them and of pixels left out by
    reason; `left_out`, the frames without a score and why; `warnings`; `mean`, the metrics averaged over the scored
    frames (`mean_metrics`); `worst`, the frames of largest abs_rel; `frames`, the metrics of each.
    """
    scored = [record for record in records if record["status"] == SCORED]
    metrics = [{name: math.nan if v is None else v for name, v in record["metrics"].items()} for record in scored]
    seen = [record["left_out"] for record in records if "left_out" in record]
    worst = sorted(scored, key=lambda record: -record["metrics"]["abs_rel"])[:WORST]
    versions = {library.__name__: library.__version__ for library in (mf_diffusers, torch, diffusers, transformers)}
    return settings | {
        "environment": {"python": platform.python_version(), "platform": platform.platform()}
        | versions
        | {"numpy": np.__version__, "scipy": scipy.__version__}
        | environment,
        "counts": {
            "frames_of_the_data_set": frames,
            "frames": len(records),
            "frames_by_status": dict(Counter(record["status"] for record in records)),
            "pixels_left_out": {reason: sum(counts[reason] for counts in seen) for reason in LEFT_OUT},
        },
        "left_out": [
            {name: record[name] for name in ("name", "status", "reason")}
            for record in records
            if record["status"] != SCORED
        ],
        "warnings": [warning for record in records for warning in record["warnings"]],
        "mean": mean_metrics(metrics) if metrics else {},
        "worst": [
            {
                "number": record["number"],
                "name": record["name"],
                "abs_rel": record["metrics"]["abs_rel"],
                "picture": f"{PICTURES}/{record['number']:06}.png",
            }
            for record in worst
        ],
        "frames": [
            {name: value for name, value in record.items() if name not in ("reason", "warnings")} for record in scored
        ],
    }


def write_report(output: Path, report: dict[str, Any]) -> None:
    """Write `frames.csv`, one row a frame, and `report.md`."""
    columns = list(report["frames"][0]["metrics"]) if report["frames"] else []
    with atomic_write(output / "frames.csv") as temporary, temporary.open("w", newline="", **ESCAPED) as file:
        writer = csv.writer(file)
        writer.writerow(["name", "status", "reason", *columns, *LEFT_OUT])
        for frame in report["frames"]:
            writer.writerow([frame["name"], SCORED, "", *frame["metrics"].values(), *frame["left_out"].values()])
        for frame in report["left_out"]:
            writer.writerow([frame["name"], frame["status"], frame["reason"]])
    with atomic_write(output / "report.md") as temporary:
        temporary.write_text(markdown(report), **ESCAPED)


def markdown(report: dict[str, Any]) -> str:
    """The page to read: the result, beside published ones where the protocol is the same, and all that was left out."""
    protocol, mean, counts = report["protocol"], report["mean"], report["counts"]
    status = counts["frames_by_status"]
    scored = f"{status.get(SCORED, 0)} of {counts['frames']}"
    heads = headline(protocol["task"], mean)
    rows = [("**this run**", *heads.values(), scored)] if mean else []
    why_not, column = comparable(report)
    if not why_not:
        results = {name: row[PUBLISHED_COLUMNS.index(column)] for name, row in PUBLISHED.items()}
        rows += [(name, f"{result[0]:.2f}", f"{result[1]:.1f}", "") for name, result in results.items() if result]
    lines = [
        f"# {title(protocol)}",
        "",
        table(("", *heads, "frames"), rows),
        "",
        f"Published results stand beside it only under the same protocol; here {why_not}."
        if why_not
        else "The other rows are as Duisterhof et al. 2026 print them, for the same protocol on the data set as it is "
        f"distributed; here it lists {counts['frames_of_the_data_set']} frames."
        + (" Which frames of ScanNet they took they do not say." if column == "ScanNet" else ""),
        "",
        "## Protocol",
        "",
        table(("", ""), [(name, "" if value is None else value) for name, value in protocol.items()]),
        "",
        "## Predictions",
        "",
        table(("", ""), [*report["predictor"].items(), *report["environment"].items()]),
        "",
        "## Metrics, mean over frames",
        "",
        table(
            ("", ""), [(name, f"{value:.6g}" if isinstance(value, float) else value) for name, value in mean.items()]
        ),
        "",
        "## Left out",
        "",
        f"Frames: {', '.join(f'{number} {name}' for name, number in status.items())}; "
        f"the data set has {counts['frames_of_the_data_set']}.",
        f"Pixels: {', '.join(f'{number} {reason}' for reason, number in counts['pixels_left_out'].items())}.",
        "",
        *(f"- {frame['status']}: {frame['reason']}" for frame in report["left_out"]),
        *(f"- warning: {warning}" for warning in report["warnings"]),
        "",
        "## Worst",
        "",
        *(f"- {entry['abs_rel']:.2%} [{entry['name']}]({entry['picture']})" for entry in report["worst"]),
    ]
    return "\n".join(lines) + "\n"


def headline(task: str, mean: dict[str, float] | None) -> dict[str, str]:
    """The metrics that a run of a task is known by, as strings by their names; empty strings where there is no mean."""
    return {
        name: f"{factor * mean[metric]:.{digits}f}" if mean else ""
        for name, (metric, factor, digits) in HEADLINES[task].items()
    }


def title(protocol: dict[str, Any]) -> str:
    """What a run is called."""
    if protocol["task"] == "depth":
        return f"{protocol['benchmark']}, {protocol['alignment']} alignment"
    of = {"points": protocol["points"], "density": protocol["density"]}
    given = [f"{name} {value:g}" for name, value in of.items() if value is not None] or ["its sparse depth"]
    return f"{protocol['benchmark']}, completion, {given[0]}"


def comparable(report: dict[str, Any]) -> tuple[str, str | None]:
    """Why published results may not stand beside this run, "" when they may; and their column."""
    protocol, counts = report["protocol"], report["counts"]
    if protocol["task"] == "completion":
        return "none are known; those for NYUv2, for one, are of pictures of 304x228 pixels", None
    column = BENCHMARKS[protocol["benchmark"]].published
    if column is None:
        return "none are known for this benchmark as it was read", None
    if protocol["alignment"] != "robust":
        return f"theirs are aligned robustly, not by {protocol['alignment']}", column
    if protocol["center_crop"] is not None:
        return "theirs are not of centre crops", column
    if counts["frames_by_status"] != {SCORED: counts["frames_of_the_data_set"]}:
        return "not all frames of the data set are scored", column
    return "", column


def table(head: Sequence, rows: Sequence[Sequence]) -> str:
    """A Markdown table."""
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells)
