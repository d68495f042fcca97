"""A data set as the tar shards that training reads.

Of a frame there are three members in a shard, named after its number: `00000012.jpg`, the picture (quality 95, colour
not subsampled); `00000012.depth.exr`, the depth as one channel "Z" of 16-bit floats, infinity included; and
`00000012.json` with "name", "dataset", "metric" (whether depth is in metres), and where there are any "intrinsics"
(3x3, in pixels, the centre of the top left pixel at (0, 0)) and "text", the caption; "depth_infinite" tells training
what infinity in the depth means.

A 16-bit float has 11 significant bits: depth is rounded by at most 1/2048 of itself (0.05 %), near and far alike,
between 0.0001 and 65,000. Frames with depth beyond that cannot be stored and count as unreadable.
"""

import hashlib
import io
import json
import signal
import sys
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

import numpy as np
import OpenEXR
from PIL import Image

from mf_diffusers.datasets import DATASETS, Frame
from mf_diffusers.datasets.dataset import Dataset
from mf_diffusers.files import ESCAPED, atomic_write, sha256
from mf_diffusers.visualization import colorize_depth, contact_sheet


FRAMES_PER_SHARD = 1000
UNREADABLE_SHARE = 0.01
ROUNDING = 2.0**-11
MANIFEST, SUMMARY, SHEET = "manifest.jsonl", "summary.json", "contact_sheet.jpg"
SHEET_FRAMES, SHEET_CELL = 8, 256
COUNTS = ("frames", "pixels", "valid_pixels", "infinite_pixels", "with_intrinsics", "with_caption", "bytes")
LISTS = ("unreadable", "without_depth")


class TooManyUnreadableError(ValueError):
    """More frames than 1 % could not be read."""


def prepare_dataset(
    name: str,
    source: str | Path,
    destination: str | Path,
    split: str | None = None,
    max_pixels: int | None = None,
    workers: int = 1,
    frames_per_shard: int = FRAMES_PER_SHARD,
    on_shard: Callable[[dict[str, Any], int], object] | None = None,
) -> dict[str, Any]:
    """Write a data set as shards `NAME-000000.tar`, ... with a manifest, a summary and a contact sheet beside them.

    A shard appears whole or not at all, is read back before it counts, and comes out the same in every byte, whatever
    the number of workers. After an interruption the same call goes on: shards whose checksum is that of the manifest
    stay, those with unreadable frames are tried again. Where frames lie in files of their own, they are put in an order
    drawn once, so that a shard is a sample of the whole.

    Args:
        name: a key of `DATASETS`.
        source, split: where it lies, and which part of it, see `Dataset`.
        destination: folder of the shards.
        max_pixels: larger frames are made smaller, see `Frame.within`.
        workers: processes.
        on_shard: called with the manifest's record of every finished shard, and the number of frames of the data set.

    Returns the summary. Frames without any valid depth are left out and counted.

    Raises ValueError for an unknown name, or shards in `destination` that were made in another way;
    TooManyUnreadableError as soon as more than 1 % of the frames are unreadable; FileNotFoundError for no frames.
    """
    if name not in DATASETS:
        raise ValueError(f"data set {name!r} is none of {', '.join(DATASETS)}")
    dataset, destination = DATASETS[name](source, split), Path(destination)
    names = dataset.names
    if dataset.files_per_frame:
        names = [names[k] for k in np.random.default_rng(0).permutation(len(names))]
    settings = {"dataset": name, "split": split, "max_pixels": max_pixels, "frames_per_shard": frames_per_shard}
    settings |= {"frames": len(names), "names_sha256": hashlib.sha256("\n".join(names).encode(**ESCAPED)).hexdigest()}

    destination.mkdir(parents=True, exist_ok=True)
    for leftover in destination.glob(".*.tar"):
        leftover.unlink()
    records = read_manifest(destination / MANIFEST, settings)
    shards = (
        (name, source, split, destination / f"{name}-{number:06d}.tar", start, names[start : start + frames_per_shard])
        for number, start in enumerate(range(0, len(names), frames_per_shard))
    )
    tasks = ((*shard, max_pixels, records.get(shard[3].name)) for shard in shards)
    unreadable = []
    with (destination / MANIFEST).open("a", encoding="utf-8") as manifest:
        for record in run_tasks(write_shard, tasks, workers):
            if records.get(record["shard"]) != record:
                records[record["shard"]] = record
                manifest.write(json.dumps(record) + "\n")
                manifest.flush()
            unreadable += record["unreadable"]
            if len(unreadable) > UNREADABLE_SHARE * len(names):
                raise TooManyUnreadableError(
                    f"{len(unreadable)} of {len(names)} frames are unreadable so far, more than "
                    f"{UNREADABLE_SHARE:.0%}; mend or remove them, then run this again: " + "; ".join(unreadable[:5])
                )
            if on_shard:
                on_shard(record, len(names))

    if not any(record["frames"] for record in records.values()):
        raise ValueError(f"{source}: none of {len(names)} frames has a valid pixel of depth")
    summary = summarize(settings, dataset, [records[shard] for shard in sorted(records)])
    with atomic_write(destination / SUMMARY) as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    with atomic_write(destination / SHEET) as temporary:
        sheet_of(destination, summary).save(temporary, quality=92)
    return summary


def read_manifest(path: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The records of finished shards by file name. The first line holds the settings; it is written where missing.

    Raises ValueError when they are others.
    """
    lines = []
    if path.is_file():
        # The line that an interruption cut short has no end, and is cut off.
        text = path.read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    if lines and lines[0] != settings:
        changed = [f"{key} was {lines[0].get(key)!r}" for key in settings if lines[0].get(key) != settings[key]]
        raise ValueError(f"{path.parent}: holds shards made in another way ({', '.join(changed)}); take another folder")
    with atomic_write(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines or [settings]), encoding="utf-8")
    return {record["shard"]: record for record in lines[1:]}


def run_tasks(function: Callable, tasks: Iterable[tuple], workers: int) -> Iterator[Any]:
    """Results of `function(*task)` as they are finished, from as many processes."""
    if workers == 1:
        yield from (function(*task) for task in tasks)
        return
    tasks = iter(tasks)
    # Not forked from here: the libraries that read the files may have threads, whose locks a copy would inherit.
    context = get_context("spawn")
    if "forkserver" in get_all_start_methods():
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])  # imported once, not by every worker
    with ProcessPoolExecutor(workers, context, initializer=end_quietly_when_interrupted) as pool:
        try:
            running = {pool.submit(function, *task) for task in islice(tasks, 2 * workers)}
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(function, *task) for task in islice(tasks, len(done))}
                yield from (future.result() for future in done)
        finally:
            pool.shutdown(cancel_futures=True)


def end_quietly_when_interrupted() -> None:
    """Lets a worker end without a word: the process that waits for it speaks of an interruption."""
    signal.signal(signal.SIGINT, lambda *_: sys.exit())


def write_shard(
    name: str,
    source: str | Path,
    split: str | None,
    path: Path,
    start: int,
    names: list[str],
    max_pixels: int | None,
    record: dict[str, Any] | None,
) -> dict[str, Any]:
    """Write the shard of frames `names`, of which the first has the number `start`; returns its line of the manifest.

    A finished shard, described by `record`, stays if its checksum is right and all its frames were readable.
    """
    if record and not record["unreadable"] and path.is_file() and sha256(path) == record["sha256"]:
        return record
    dataset = DATASETS[name](source, split)
    counts, sizes, nearest, farthest = Counter(), Counter(), np.inf, 0.0
    unreadable, without_depth, checksums = [], [], {}
    with atomic_write(path) as temporary:
        with tarfile.open(temporary, "w") as tar:
            for number, frame_name in enumerate(names, start):
                try:
                    frame = dataset.read(frame_name)
                    frame = frame if max_pixels is None else frame.within(max_pixels)
                    valid = frame.depth[frame.mask]
                    stored = as_half(frame) if valid.size else None
                except ValueError as error:
                    unreadable.append(str(error))
                    continue
                if stored is None:
                    without_depth.append(frame_name)
                    continue
                key = f"{number:08d}"
                entry = {"dataset": name, "metric": dataset.metric, "depth_infinite": "inf"}
                add_frame(tar, key, frame, stored, entry)
                checksums[key] = zlib.crc32(stored)
                counts.update(frames=1, pixels=frame.depth.size, valid_pixels=valid.size)
                counts.update(infinite_pixels=int(np.isinf(frame.depth).sum()))
                counts.update(with_intrinsics=frame.intrinsics is not None, with_caption=bool(frame.caption))
                sizes.update([f"{frame.depth.shape[1]}x{frame.depth.shape[0]}"])
                nearest, farthest = min(nearest, float(valid.min())), max(farthest, float(valid.max()))
        verify(temporary, checksums)
        counts.update(bytes=temporary.stat().st_size)
        checksum = sha256(temporary)
    return {
        "shard": path.name,
        "sha256": checksum,
        **{key: int(counts[key]) for key in COUNTS},
        "nearest": nearest if checksums else None,
        "farthest": farthest if checksums else None,
        "sizes": dict(sorted(sizes.items())),
        "frames_unreadable": len(unreadable),
        "frames_without_depth": len(without_depth),
        "unreadable": unreadable,
        "without_depth": without_depth,
    }


def as_half(frame: Frame) -> np.ndarray:
    """The depth as float16 (H, W). Raises ValueError when it is rounded by more than the format's 1/2048."""
    with np.errstate(over="ignore"):
        stored = frame.depth.astype(np.float16)
    depth, rounded = frame.depth[frame.mask], stored[frame.mask].astype(np.float32)
    if not (np.abs(rounded - depth) <= ROUNDING * depth).all():
        raise ValueError(f"{frame.name}: depth {depth.min():.3g} to {depth.max():.3g} does not fit 16-bit floats")
    return stored


def add_frame(tar: tarfile.TarFile, key: str, frame: Frame, stored: np.ndarray, entry: dict[str, Any]) -> None:
    entry = {"name": frame.name, **entry}
    if frame.intrinsics is not None:
        entry["intrinsics"] = frame.intrinsics.astype(float).round(4).tolist()
    if frame.caption:
        entry["text"] = frame.caption
    jpeg = io.BytesIO()
    Image.fromarray(frame.image).save(jpeg, "JPEG", quality=95, subsampling=0)
    with tempfile.TemporaryDirectory() as folder:
        header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
        OpenEXR.File(header, {"Z": stored}).write(f"{folder}/depth.exr")
        exr = Path(folder, "depth.exr").read_bytes()
    text = json.dumps(entry, ensure_ascii=False).encode(**ESCAPED)
    for suffix, content in ((".jpg", jpeg.getvalue()), (".depth.exr", exr), (".json", text)):
        member = tarfile.TarInfo(key + suffix)  # without a time or an owner: the same bytes in every run
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def read_frame(tar: tarfile.TarFile, key: str) -> tuple[Image.Image, np.ndarray, dict[str, Any]]:
    """The picture, the depth (H, W) float16 and the JSON of a frame in an open shard."""
    with Image.open(tar.extractfile(f"{key}.jpg")) as picture:
        picture.load()
    with tempfile.NamedTemporaryFile(suffix=".exr") as file:
        file.write(tar.extractfile(f"{key}.depth.exr").read())
        file.flush()
        with OpenEXR.File(file.name) as exr:
            depth = exr.channels()["Z"].pixels
    return picture, depth, json.load(tar.extractfile(f"{key}.json"))


def verify(path: Path, checksums: dict[str, int]) -> None:
    """Raises ValueError unless a shard has the frames whose depth has these CRC-32, by key, and can be read."""
    with tarfile.open(path) as tar:
        if tar.getnames() != [key + suffix for key in checksums for suffix in (".jpg", ".depth.exr", ".json")]:
            raise ValueError(f"{path}: other members than were written; is the disk full or failing?")
        for key, checksum in checksums.items():
            picture, depth, _ = read_frame(tar, key)
            if zlib.crc32(np.ascontiguousarray(depth)) != checksum or picture.size != depth.shape[::-1]:
                raise ValueError(f"{path}: frame {key} was not read back as written; is the disk full or failing?")


def summarize(settings: dict[str, Any], dataset: Dataset, records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the shards hold together, for people and for `sheet_of`."""
    total = {key: sum(record[key] for record in records) for key in (*COUNTS, *(f"frames_{key}" for key in LISTS))}
    return {
        **settings,
        "frames_found": settings["frames"],
        **total,
        "metric": dataset.metric,
        "shuffled": dataset.files_per_frame,
        "nearest": min((record["nearest"] for record in records if record["frames"]), default=None),
        "farthest": max((record["farthest"] for record in records if record["frames"]), default=None),
        "sizes": dict(sum((Counter(record["sizes"]) for record in records), Counter()).most_common()),
        "shards": {record["shard"]: record["frames"] for record in records},
        **{key: [entry for record in records for entry in record[key]] for key in LISTS},
    }


def sheet_of(folder: Path, summary: dict[str, Any]) -> Image.Image:
    """A contact sheet of frames spread evenly over the shards, as they are on disk."""
    rows, labels = [], []
    numbers = np.linspace(0, summary["frames"], SHEET_FRAMES, endpoint=False).astype(int)
    ends = np.cumsum(list(summary["shards"].values()))
    for number in dict.fromkeys(numbers.tolist()):
        shard = int(np.searchsorted(ends, number, side="right"))
        with tarfile.open(folder / list(summary["shards"])[shard]) as tar:
            keys = [name.removesuffix(".json") for name in tar.getnames() if name.endswith(".json")]
            picture, depth, entry = read_frame(tar, keys[number - int(ends[shard])])
        frame = Frame(entry["name"], np.asarray(picture), depth.astype(np.float32)).within(SHEET_CELL**2)
        known = frame.depth[frame.mask]
        unit = " m" if summary["metric"] else ""
        rows.append([Image.fromarray(frame.image), Image.fromarray(colorize_depth(frame.depth))])
        labels.append(f"{frame.name.replace('/', ' / ')}\n{known.min():.3g} to {known.max():.3g}{unit}")
    columns = ["picture", "depth: near red, far blue, missing or infinite gray"]
    title = f"{summary['dataset']}: {summary['frames']:,} frames, shards: {len(summary['shards'])}"
    return contact_sheet(rows, labels, columns, SHEET_CELL, title)
