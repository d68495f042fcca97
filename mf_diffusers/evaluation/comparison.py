"""Two runs over the same frames: how their metrics differ, and how sure that is."""

import json
import math
import warnings
from pathlib import Path

import numpy as np

from mf_diffusers.evaluation.metrics import COUNTS
from mf_diffusers.input_warning import InputWarning


RESAMPLES = 10_000
CHUNK = 500
"""Resamples drawn at a time."""


def compare(
    first: str | Path, second: str | Path, confidence: float = 0.95, seed: int = 0
) -> dict[str, dict[str, float]]:
    """The metrics of two reports, and bootstrap intervals of their differences over the frames, paired.

    The frames are resampled `RESAMPLES` times, the same for both runs, and the interval is that of the percentiles
    (Efron 1979). It speaks of other frames like these; noise in the predictions of a model enters as far as it differs
    from frame to frame.

    Disparity that was aligned as such may be compared with depth, since the metrics are those of the depth that it
    gives; an InputWarning names the two alignments.

    Args:
        first, second: paths of `report.json`.

    Returns a dict by metric: the means `first` and `second`, their `difference`, second minus first, its bounds `low`
    and `high`, and the number of `frames`, those where both have the metric.

    Raises ValueError when the runs have other protocols or other frames, or the files are no reports.
    """
    reports = [_read(path) for path in (first, second)]
    protocols = [report["protocol"] for report in reports]
    alignments = [protocol["alignment"] for protocol in protocols]
    if alignments.count("disparity") == 1:
        protocols = [protocol | {"alignment": "disparity"} for protocol in protocols]
        warnings.warn(
            f"the predictions of {first} are aligned by {alignments[0]}, those of {second} by {alignments[1]}",
            InputWarning,
            stacklevel=2,
        )
    other = [name for name in protocols[0] if protocols[0][name] != protocols[1].get(name)]
    if other:
        pairs = [f"{name} {protocols[0][name]!r} and {protocols[1].get(name)!r}" for name in other]
        raise ValueError(f"{first} and {second} have other protocols and cannot be compared: {'; '.join(pairs)}")
    scores = [{frame["name"]: frame["metrics"] for frame in report["frames"]} for report in reports]
    if reports[0]["frames_sha256"] != reports[1]["frames_sha256"] or scores[0].keys() != scores[1].keys():
        alone = [sorted(scores[k].keys() - scores[1 - k].keys()) for k in (0, 1)]
        raise ValueError(
            f"{first} and {second} are of other frames and cannot be compared: {len(alone[0])} are scored in the first "
            f"only {alone[0][:3]}, {len(alone[1])} in the second only {alone[1][:3]}"
        )
    if not scores[0]:
        raise ValueError(f"{first} and {second} have no scored frames")
    return {
        metric: _compare([[s[name][metric] for name in scores[0]] for s in scores], confidence, seed)
        for metric in next(iter(scores[0].values()))
        if metric not in COUNTS
    }


def _read(path):
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        report["protocol"], report["frames"], report["frames_sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no report.json of `mf-diffusers evaluate`: {error}") from error
    return report


def _compare(values, confidence, seed):
    values = np.array([[math.nan if value is None else value for value in run] for run in values])
    first, second = values[:, np.isfinite(values).all(axis=0)]
    if first.size == 0:
        return dict.fromkeys(("first", "second", "difference", "low", "high"), math.nan) | {"frames": 0}
    rng = np.random.default_rng(seed)
    differences = second - first
    resampled = np.concatenate(
        [
            differences[rng.integers(differences.size, size=(CHUNK, differences.size))].mean(axis=1)
            for _ in range(RESAMPLES // CHUNK)
        ]
    )
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {
        "first": float(first.mean()),
        "second": float(second.mean()),
        "difference": float(differences.mean()),
        "low": float(low),
        "high": float(high),
        "frames": first.size,
    }
