"""Writes procedural scenes as a folder of RGB-D frames, as the data sources and `mf-diffusers evaluate` read it.

    python finetune/write_scenes.py FOLDER [--split validation] [--count 500] [--height 64] [--width 64]

Pictures are 8-bit PNG, depth is float32 npy in metres with inf in the sky; metadata.jsonl has captions, and says of inf
that it is infinitely far.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from rich.progress import track


sys.path.append(str(Path(__file__).parents[1]))  # as the other scripts, which the launcher starts

from finetune.data.sources import ReadReport, build_source
from mf_diffusers.errors import errors_as_lines
from mf_diffusers.files import place_folder, temporary_folder


BATCH = 50


def main(
    folder: Annotated[Path, typer.Argument(help="The new folder.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "validation",
    count: Annotated[int, typer.Option(min=1)] = 500,
    height: Annotated[int, typer.Option(min=1)] = 64,
    width: Annotated[int, typer.Option(min=1)] = 64,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write the first COUNT scenes of a split as RGB-D frames."""
    if folder.exists():
        raise SystemExit(f"error: {folder} is there already: name a new folder")
    source = build_source({"kind": "scenes", "split": split, "seed": seed, "height": height, "width": width})
    lines = []
    with temporary_folder(folder.parent) as temporary:
        for start in track(range(0, count, BATCH), "rendering"):
            indices = range(start, min(start + BATCH, count))
            for index, sample in zip(indices, source.read(indices, ReadReport())):
                levels = (255 * sample["image"]).round().byte().permute(1, 2, 0)
                Image.fromarray(levels.numpy()).save(temporary / f"{index:05}.png")
                np.save(temporary / f"{index:05}.npy", sample["depth"][0].numpy())
                names = {"file_name": f"{index:05}.png", "depth_file_name": f"{index:05}.npy"}
                lines.append(json.dumps(names | {"text": sample["caption"], "depth_infinite": "inf"}) + "\n")
        (temporary / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
        place_folder(temporary, folder)


if __name__ == "__main__":
    with errors_as_lines():
        typer.run(main)
