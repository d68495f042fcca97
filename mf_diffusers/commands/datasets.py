"""`prepare`: data sets as shards for training."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mf_diffusers.commands.options import Quiet, option
from mf_diffusers.datasets import DATASETS


def prepare(
    name: Annotated[str, typer.Argument(help=f"{', '.join(DATASETS)}.", metavar="NAME")],
    src: Annotated[Path, typer.Argument(help="Folder into which the data set was unpacked.")],
    dst: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    split: Annotated[str | None, option(help="Part of the data set, as it calls them itself; default: all.")] = None,
    max_pixels: Annotated[int | None, option(min=1, help="Make larger frames smaller; default: as they are.")] = None,
    workers: Annotated[int, option(min=1, panel="Machine", help="Processes.")] = 1,
    quiet: Quiet = False,
) -> None:
    """Write a data set as the webdataset shards that training reads, with a summary and a contact sheet.

    After an interruption the same command goes on. The licence of the data set holds for its shards too.

    mf-diffusers prepare hypersim data/hypersim shards/hypersim --max-pixels 262144 --workers 8
    """
    from mf_diffusers.datasets.prepare import SHEET, SUMMARY, prepare_dataset

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
