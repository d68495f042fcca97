"""Reads which objects a picture of a scene shows, to check pictures that were made from prompts.

    python finetune/scene_reader.py FILE.safetensors [--size 64] [--scenes 500]

Two small networks, trained on rendered scenes: one says of every place whether an object is there, and in which colour;
connected places of one colour are an object, and the other says of what kind it is. The command trains them and
prints how often the check is right on the scenes of the split "validation": how many real pictures are accepted with
their own captions, and how many are rejected with those of other scenes, and with one word of their own changed.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import typer
from safetensors.torch import load_file, save_file
from scipy import ndimage
from tqdm import trange


sys.path.append(str(Path(__file__).parents[1]))  # as the other scripts, which the launcher starts

from finetune.scenes import render_scenes
from finetune.scenes.scene import COLOURS, FIRST_OBJECT, SHAPES, sample_scene
from mf_diffusers.errors import errors_as_lines
from mf_diffusers.files import atomic_write
from mf_diffusers.precision import computes_in_bfloat16


KIND_OF = {word: kind for kind, words in SHAPES.items() for word in words} | {"cube": "box"}
KIND_OF |= {word + ("es" if word == "box" else "s"): kind for word, kind in KIND_OF.items()}
KINDS, COLOUR_NAMES = list(SHAPES), list(COLOURS)
NO_OBJECT = len(COLOUR_NAMES)  # the last class of the places
STRIDE = 4  # pixels of a place
CROP = 32  # pixels of the side to which an object is brought, with a margin around it
MARGIN = 0.25  # of its longer side
MIN_SHARE = 0.005  # of the picture, below which captions do not mention an object either
BATCH = 64
SCENES, STEPS, LEARNING_RATE = 6144, 1000, 2e-3  # of training; each scene is rendered once


class Object(NamedTuple):
    """What a prompt names, or a picture shows."""

    kind: str
    colour: str


def named_objects(prompt: str) -> list[Object]:
    """The objects that a caption in the words of finetune/scenes names, each once."""
    objects, colour = {}, None
    for word in re.findall(r"[a-z]+", prompt.lower()):
        if word in COLOURS:
            colour = word
        elif word in KIND_OF and colour:
            objects[Object(KIND_OF[word], colour)] = None
        elif word in ("wall", "floor", "sky"):
            colour = None  # it was theirs
    return list(objects)


class Places(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] -> logits of the colours and of no object (B, 13, H/4, W/4)."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 4, stride=2, padding=1), nn.GELU())
        self.middle = block(width, 2 * width, stride=2)
        self.deep = nn.Sequential(block(2 * width, 3 * width, stride=2), block(3 * width, 3 * width))
        self.last = block(5 * width, 2 * width)
        self.head = nn.Conv2d(2 * width, NO_OBJECT + 1, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        middle = self.middle(self.stem(2 * images - 1))
        deep = F.interpolate(self.deep(middle), middle.shape[-2:], mode="bilinear")
        return self.head(self.last(torch.cat([deep, middle], dim=1)))


class Kinds(nn.Module):
    """Crops (B, 3, 32, 32) around objects -> logits of their kinds (B, 4)."""

    def __init__(self, width: int = 32):
        super().__init__()
        blocks = [block(3, width, stride=2), block(width, 2 * width, stride=2), block(2 * width, 4 * width, stride=2)]
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(4 * width, len(KINDS))

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(2 * crops - 1).mean(dim=(2, 3)))


def block(channels: int, width: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride=stride, padding=1),
        nn.GroupNorm(8, width),
        nn.GELU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.GroupNorm(8, width),
        nn.GELU(),
    )


class SceneReader(nn.Module):
    """Pictures -> the objects in them."""

    def __init__(self):
        super().__init__()
        self.places, self.kinds = Places(), Kinds()

    @torch.inference_mode()
    def read(self, images: torch.Tensor) -> list[set[Object]]:
        """The objects in each of the pictures (B, 3, H, W) with values in [0, 1]."""
        found = []
        for image, places in zip(images, self.places(images).argmax(dim=1).numpy()):
            boxes, colours = regions(places)
            crops = [crop(image, box) for box in boxes]
            kinds = self.kinds(torch.stack(crops)).argmax(dim=1).tolist() if crops else []
            found.append({Object(KINDS[kind], colour) for kind, colour in zip(kinds, colours)})
        return found


def regions(places: np.ndarray) -> tuple[list[tuple[int, ...]], list[str]]:
    """Boxes (top, left, bottom, right) in pixels of connected places (H/4, W/4) of one colour, and these colours."""
    boxes, colours = [], []
    for number, colour in enumerate(COLOUR_NAMES):
        labels, _ = ndimage.label(places == number)
        for region, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            if (labels == region).mean() > MIN_SHARE:
                boxes.append(tuple(STRIDE * side for side in (rows.start, columns.start, rows.stop, columns.stop)))
                colours.append(colour)
    return boxes, colours


def crop(image: torch.Tensor, box: tuple[float, ...]) -> torch.Tensor:
    """The square around a box of a picture (3, H, W), with its margin, at 32 x 32; grey beyond the picture."""
    top, left, bottom, right = box
    side = (1 + 2 * MARGIN) * max(bottom - top, right - left)
    steps = (torch.arange(CROP) + 0.5) / CROP - 0.5
    y, x = (((start + end) / 2 + side * steps) for start, end in ((top, bottom), (left, right)))
    grid = torch.stack(torch.meshgrid(2 * x / image.shape[-1] - 1, 2 * y / image.shape[-2] - 1, indexing="xy"), dim=-1)
    return F.grid_sample(image[None] - 0.5, grid[None], align_corners=False)[0] + 0.5


class Rendered(NamedTuple):
    """Scenes: pictures (B, 3, H, W), the colour of every fourth pixel or NO_OBJECT (B, H/4, W/4), captions; and of the
    objects that captions may mention the pictures' numbers, their boxes in pixels and their kinds."""

    images: torch.Tensor
    places: torch.Tensor
    captions: list[str]
    owners: list[int]
    boxes: list[tuple[int, ...]]
    kinds: list[int]


def rendered(indices: Iterable[int], split: str, size: int) -> Rendered:
    """Scenes of a split, `size` pixels high and wide."""
    batch = render_scenes(indices, height=size, width=size, split=split)
    places = torch.full(batch.surfaces.shape, NO_OBJECT)
    owners, boxes, kinds = [], [], []
    for owner, index in enumerate(indices):
        for number, solid in enumerate(sample_scene(index, split=split).objects, start=FIRST_OBJECT):
            mask = batch.surfaces[owner] == number
            places[owner][mask] = COLOUR_NAMES.index(solid.material.colour)
            if mask.float().mean() > MIN_SHARE:
                rows, columns = (mask.any(dim=dim).nonzero() for dim in (1, 0))
                owners.append(owner)
                boxes.append((rows.min().item(), columns.min().item(), rows.max().item() + 1, columns.max().item() + 1))
                kinds.append(KINDS.index(solid.shape))
    offset = STRIDE // 2
    return Rendered(batch.image, places[:, offset::STRIDE, offset::STRIDE], batch.captions, owners, boxes, kinds)


def train(size: int) -> SceneReader:
    """A reader of pictures of `size` x `size` pixels, a multiple of 8."""
    torch.manual_seed(0)
    reader, generator = SceneReader(), torch.Generator().manual_seed(0)
    batches = [rendered(range(start, start + BATCH), "train", size) for start in trange(0, SCENES, BATCH)]
    images, places = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "places"))
    crops = [
        crop(batch.images[owner], shaken(box, generator))
        for batch in batches
        for owner, box in zip(batch.owners, batch.boxes)
    ]
    kinds = torch.tensor([kind for batch in batches for kind in batch.kinds])
    fit_classes(reader.places, images, places, generator)
    fit_classes(reader.kinds, torch.stack(crops), kinds, generator)
    return reader.eval()


def shaken(box: tuple[int, ...], generator: torch.Generator) -> tuple[float, ...]:
    """A box as inexact as those of the places are."""
    return tuple((torch.tensor(box) + STRIDE * (torch.rand(4, generator=generator) - 0.5)).tolist())


def fit_classes(model: nn.Module, images: torch.Tensor, classes: torch.Tensor, generator: torch.Generator) -> None:
    """Trains a model to say the classes of images, or of the places in them, half of them mirrored."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    progress = trange(STEPS, desc=f"training {type(model).__name__}")
    for step in progress:
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        batch, wanted = images[chosen], classes[chosen]
        if step % 2:
            batch, wanted = batch.flip(-1), wanted.flip(-1) if wanted.ndim > 1 else wanted
        with torch.autocast("cpu", torch.bfloat16, enabled=computes_in_bfloat16("cpu")):
            logits = model(batch)
        loss = F.cross_entropy(logits.float(), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def changed(named: list[Object], rng: np.random.Generator, what: str) -> list[Object]:
    """What was named, with another word for the "kind" or the "colour" of one object."""
    number = rng.integers(len(named))
    words = {"kind": KINDS, "colour": COLOUR_NAMES}[what]
    other = rng.choice([word for word in words if word != getattr(named[number], what)])
    return [*named[:number], named[number]._replace(**{what: str(other)}), *named[number + 1 :]]


def check_on_scenes(reader: SceneReader, size: int, count: int) -> dict[str, float]:
    """How often the check is right on the first scenes of "validation", as shares of the captions that name an object.
    A changed or foreign caption counts where it is wrong: where it names what the scene does not have."""
    rng, scenes = np.random.default_rng(0), []  # what is seen, what is there, what the caption names
    for start in range(0, count, BATCH):
        indices = range(start, min(start + BATCH, count))
        batch = rendered(indices, "validation", size)
        for index, seen, caption in zip(indices, reader.read(batch.images), batch.captions):
            solids = sample_scene(index, split="validation").objects
            there = {Object(solid.shape, solid.material.colour) for solid in solids}
            scenes += [(seen, there, named_objects(caption))] if named_objects(caption) else []
    wrong = {
        "those of another scene": [named for _, _, named in scenes[-1:] + scenes[:-1]],
        "one kind changed": [changed(named, rng, "kind") for _, _, named in scenes],
        "one colour changed": [changed(named, rng, "colour") for _, _, named in scenes],
    }
    shares = {"accepted, with their own captions": np.mean([seen.issuperset(named) for seen, _, named in scenes])}
    for name, captions in wrong.items():
        rejected = [
            not seen.issuperset(named)
            for (seen, there, _), named in zip(scenes, captions)
            if not there.issuperset(named)
        ]
        shares[f"rejected, with {name}"] = np.mean(rejected)
    return {name: float(share) for name, share in shares.items()}


def reader_at(path: Path, size: int) -> SceneReader:
    """The reader in a file, trained unless it is there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            save_file(train(size).state_dict(), temporary)
    reader = SceneReader()
    reader.load_state_dict(load_file(path))
    return reader.eval()


def main(
    file: Annotated[Path, typer.Argument(help="Of the trained reader; what is there already is checked only.")],
    size: Annotated[int, typer.Option(min=16, help="Of the pictures, in pixels; a multiple of 8.")] = 64,
    scenes: Annotated[int, typer.Option(min=2, help="On which it is checked.")] = 500,
) -> None:
    """Train the reader of pictures, and say how often it is right."""
    for name, share in check_on_scenes(reader_at(file, size), size, scenes).items():
        print(f"{name}: {share:.1%}")


if __name__ == "__main__":
    with errors_as_lines():
        typer.run(main)
