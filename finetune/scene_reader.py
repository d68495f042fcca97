"""Reads which objects a picture of a scene shows, to check pictures that were made from prompts.

    python finetune/scene_reader.py FILE.safetensors [--size 64] [--scenes 500]

A small network, trained on rendered scenes, says of every place whether an object is there, of which kind and in which
colour. Connected places of one colour are an object, of the kind that most of them speak for. The command trains it and
prints how often the check is right on the scenes of the split "validation": how many real pictures are accepted with
their own captions, and how many are rejected with those of other scenes, and with one word of their own changed.
"""

import re
import sys
from itertools import pairwise
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
from mf_diffusers.files import atomic_write


KIND_OF = {word: kind for kind, words in SHAPES.items() for word in words} | {"cube": "box"}
KIND_OF |= {word + ("es" if word == "box" else "s"): kind for word, kind in KIND_OF.items()}
KINDS, COLOUR_NAMES = list(SHAPES), list(COLOURS)
NO_OBJECT = len(KINDS)  # the last class of the kinds
MIN_SHARE = 0.005  # of the pixels, below which captions do not mention an object either
BATCH = 64
SCENES, STEPS, LEARNING_RATE = 6144, 1500, 2e-3  # of training; each scene is rendered once


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


class SceneReader(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] -> logits of kinds (B, 5, H/4, W/4) and of colours (B, 12, H/4, W/4)."""

    def __init__(self, width: int = 32):
        super().__init__()
        widths = [width, 2 * width, 3 * width, 3 * width]
        self.stem = nn.Sequential(nn.Conv2d(3, width, 4, stride=2, padding=1), nn.GELU())
        self.down = nn.ModuleList(self.block(a, b, stride=2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(self.block(a + b, b) for a, b in zip(widths[:1:-1], widths[-2:0:-1]))
        self.head = nn.Conv2d(2 * width, len(KINDS) + 1 + len(COLOUR_NAMES), 1)

    @staticmethod
    def block(channels: int, width: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=stride, padding=1),
            nn.GroupNorm(8, width),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.GELU(),
        )

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = [self.stem(2 * images - 1)]
        for block in self.down:
            features.append(block(features[-1]))
        x = features.pop()
        for block, skipped in zip(self.up, reversed(features)):
            x = block(torch.cat([F.interpolate(x, skipped.shape[-2:], mode="bilinear"), skipped], dim=1))
        return self.head(x).split([len(KINDS) + 1, len(COLOUR_NAMES)], dim=1)

    @torch.inference_mode()
    def read(self, images: torch.Tensor) -> list[set[Object]]:
        """The objects in each of the pictures (B, 3, H, W)."""
        kinds, colours = (logits.softmax(dim=1).numpy() for logits in self(images))
        return [objects_in(*probabilities) for probabilities in zip(kinds, colours)]

    @classmethod
    def load(cls, path: Path) -> "SceneReader":
        reader = cls()
        reader.load_state_dict(load_file(path))
        return reader.eval()


def objects_in(kinds: np.ndarray, colours: np.ndarray) -> set[Object]:
    """What is seen in a picture, from the probabilities of kinds (5, H, W) and of colours (12, H, W)."""
    found, is_object, colour_of = set(), kinds[NO_OBJECT] < 0.5, colours.argmax(axis=0)
    for number, colour in enumerate(COLOUR_NAMES):
        regions, count = ndimage.label(is_object & (colour_of == number))
        for region in range(1, count + 1):
            inside = regions == region
            if inside.mean() > MIN_SHARE:
                found.add(Object(KINDS[kinds[:NO_OBJECT, inside].sum(axis=1).argmax()], colour))
    return found


def rendered(indices, split: str, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """Scenes: pictures (B, 3, H, W), kind and colour of every fourth pixel (B, H/4, W/4), and captions. Where there is
    no object the colour is -100, which losses leave out."""
    batch = render_scenes(indices, height=size, width=size, split=split)
    kinds = torch.full(batch.surfaces.shape, NO_OBJECT)
    colours = torch.full(batch.surfaces.shape, -100)
    for place, index in enumerate(indices):
        for number, solid in enumerate(sample_scene(index, split=split).objects, start=FIRST_OBJECT):
            mask = batch.surfaces[place] == number
            kinds[place][mask] = KINDS.index(solid.shape)
            colours[place][mask] = COLOUR_NAMES.index(solid.material.colour)
    return batch.image, kinds[:, 2::4, 2::4], colours[:, 2::4, 2::4], batch.captions


def blurred(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures as soft as made ones may be: shrunk by a factor drawn for the batch, and enlarged again."""
    side = int(images.shape[-1] * (0.4 + 0.6 * torch.rand((), generator=generator).item()))
    small = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    return F.interpolate(small, images.shape[-2:], mode="bicubic").clamp(0, 1)


def train(size: int) -> SceneReader:
    """A reader of pictures of `size` x `size` pixels, a multiple of 16."""
    torch.manual_seed(0)
    reader, generator = SceneReader(), torch.Generator().manual_seed(0)
    batches = [rendered(range(start, start + BATCH), "train", size)[:3] for start in trange(0, SCENES, BATCH)]
    images, kinds, colours = (torch.cat(parts) for parts in zip(*batches))
    optimizer = torch.optim.AdamW(reader.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    progress = trange(STEPS, desc="training the reader")
    for step in progress:
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        batch = [tensor[chosen].flip(-1) if step % 2 else tensor[chosen] for tensor in (images, kinds, colours)]
        with torch.autocast("cpu", torch.bfloat16):
            kind_logits, colour_logits = (logits.float() for logits in reader(blurred(batch[0], generator)))
        loss = F.cross_entropy(kind_logits, batch[1]) + F.cross_entropy(colour_logits, batch[2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return reader.eval()


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
        images, _, _, captions = rendered(indices, "validation", size)
        for index, seen, caption in zip(indices, reader.read(images), captions):
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
    return SceneReader.load(path)


def main(
    file: Annotated[Path, typer.Argument(help="Of the trained reader; what is there already is checked only.")],
    size: Annotated[int, typer.Option(min=16, help="Of the pictures, in pixels; a multiple of 16.")] = 64,
    scenes: Annotated[int, typer.Option(min=2, help="On which it is checked.")] = 500,
):
    """Train the reader of pictures, and say how often it is right."""
    for name, share in check_on_scenes(reader_at(file, size), size, scenes).items():
        print(f"{name}: {share:.1%}")


if __name__ == "__main__":
    typer.run(main)
