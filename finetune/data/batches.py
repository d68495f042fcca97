"""Batches of one size from samples of many: which samples a step trains on, in each process, by global sample index."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from finetune.data.sources import ReadReport, Source, WebDatasetSource
from finetune.data.sparsify import thin
from mf_diffusers.modality_forcing.image_processor import processing_size, resize


SIDED = re.compile(r"\b(left|right)", re.IGNORECASE)  # in a caption: the image cannot be mirrored


@dataclass
class LoaderConfig:
    """
    Args:
        batch_size: samples of one step, over all processes.
        pixels, size_rule: the size at which images are worked on, see `processing_size`.
        multiple: of the height and the width, in pixels; the size of a token.
        flip: mirror half of the samples, but none whose caption says left or right.
        seed: of the flips.
        workers: DataLoader workers of each process; 0 reads in the process itself.
        window: steps over which samples are sorted into batches of one size.
        depth_density, depth_pattern: share of the pixels whose depth is kept, or a range of shares, and how it is
            thinned (sparsify.py); a source's own go before.
    """

    batch_size: int = 8
    pixels: int = 512 * 512
    size_rule: str = "area"
    multiple: int = 16
    flip: bool = False
    seed: int = 0
    workers: int = 4
    window: int = 128
    depth_density: Any = 1.0
    depth_pattern: str = "random"

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """The size at which an image of `height` x `width` is worked on."""
        return processing_size(height, width, self.pixels, self.multiple, self.size_rule)


def fit(sample: dict, size: tuple[int, int]) -> dict:
    """A sample at `size` (height, width): scaled to cover it (image bicubic, depth nearest) and cropped to its centre,
    so that shapes keep their proportions."""
    image, depth = sample["image"][None], sample["depth"][None]
    scale = max(wanted / side for wanted, side in zip(size, image.shape[-2:]))
    scaled = tuple(max(wanted, round(scale * side)) for wanted, side in zip(size, image.shape[-2:]))
    image = resize(image, scaled)
    depth = F.interpolate(depth, scaled, mode="nearest-exact")
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    crop = (0, slice(None), slice(top, top + size[0]), slice(left, left + size[1]))
    return sample | {"image": image[crop], "depth": depth[crop]}


def thin_as_asked(sample: dict, source: Source, index: int, config) -> dict:
    """A sample with the part of its depth that its source asks for, or where that does not say, `config` with
    `depth_density` and `depth_pattern`."""
    own = source.locate(index)[0].thinning
    density = config.depth_density if own.depth_density is None else own.depth_density
    return thin(sample, density, own.depth_pattern or config.depth_pattern, index)


class Request(NamedTuple):
    """A sample of a batch: its global index, its index in the source that reads it, and the (height, width) wanted."""

    index: int
    source_index: int
    size: tuple[int, int]


class BucketBatchSampler:
    """The requests of one process, step after step without end, from `start_step`.

    Each batch has one size: samples are sorted by `processing_size`, window by window of `config.window` batches. What
    fills no batch of its own size by the end of the window is batched there with its neighbours in aspect ratio, at
    the size of the middle one. So every batch is full and each sample comes once. A process takes every
    `world_size`-th sample of a batch.

    Raises ValueError if the batch cannot be shared equally.
    """

    def __init__(self, source: Source, config: LoaderConfig, rank: int = 0, world_size: int = 1, start_step: int = 0):
        if config.batch_size < 1 or config.batch_size % world_size:
            raise ValueError(f"batch_size {config.batch_size} cannot be shared equally by {world_size} processes")
        self.source, self.config, self.start_step = source, config, start_step
        self.rank, self.world_size = rank, world_size
        self.workers = max(1, config.workers)
        self.streams = [leaf for leaf in source.leaves() if isinstance(leaf, WebDatasetSource)]
        for stream in self.streams:
            stream.split(self.workers * world_size)

    def plan(self, window: int) -> list[tuple[tuple[int, int], list[int]]]:
        """The batches of a window: size (height, width) and global sample indices."""
        batch_size, length = self.config.batch_size, self.config.batch_size * self.config.window
        batches, buckets = [], defaultdict(list)
        for index in range(window * length, (window + 1) * length):
            size = self.config.size_of(*self.source.size(index))
            buckets[size].append(index)
            if len(buckets[size]) == batch_size:
                batches.append((size, buckets.pop(size)))
        rest = sorted((width / height, index, (height, width)) for (height, width), b in buckets.items() for index in b)
        for start in range(0, len(rest), batch_size):
            part = rest[start : start + batch_size]
            batches.append((part[batch_size // 2][2], [index for _, index, _ in part]))
        return batches

    def __iter__(self) -> Iterator[list[Request]]:
        # A stream goes on where the batches before left it, so these are planned again, though not read.
        first = 0 if self.streams else self.start_step // self.config.window
        taken = Counter()
        for window in count(first):
            for step, (size, batch) in enumerate(self.plan(window), start=window * self.config.window):
                lane = self.rank * self.workers + step % self.workers
                requests = []
                for index in batch[self.rank :: self.world_size]:
                    leaf, source_index = self.source.locate(index)
                    if leaf in self.streams:
                        source_index = taken[leaf, lane] * leaf.step + lane
                        taken[leaf, lane] += 1
                    requests.append(Request(index, source_index, size))
                if step >= self.start_step:
                    yield requests


class _BatchReader:
    """What the DataLoader's workers run: requests to a batch."""

    def __init__(self, source, config):
        self.source, self.config = source, config

    @staticmethod
    def collate(batch):
        return batch  # made by __getitems__

    def __getitems__(self, requests):
        report, samples = ReadReport(), [None] * len(requests)
        positions = defaultdict(list)
        for position, request in enumerate(requests):
            positions[self.source.locate(request.index)[0]].append(position)
        for leaf, places in positions.items():
            for place, sample in zip(places, leaf.read([requests[p].source_index for p in places], report)):
                samples[place] = self._augment(sample, requests[place])
        tensors = {name: torch.stack([sample[name] for sample in samples]) for name in ("image", "depth")}
        return tensors | {name: [sample[name] for sample in samples] for name in ("caption", "key")}, report

    def _augment(self, sample, request):
        sample = fit(sample, request.size)
        sample = thin_as_asked(sample, self.source, request.index, self.config)
        coin = random.Random(f"{self.config.seed} {request.index}").random()
        if self.config.flip and coin < 0.5 and not SIDED.search(sample["caption"]):
            sample |= {name: sample[name].flip(-1) for name in ("image", "depth")}
        return sample


class BatchLoader:
    """The batches of one process, without end: `image` (B, 3, H, W), `depth` (B, 1, H, W), lists `caption` and `key`.

    Batch s of a loader with `start_step` s0 is batch s0 + s of one that starts at 0. `report` counts what was read and
    lists what could not be. Iterating raises TooManyUnreadableError when that is too much.
    """

    def __init__(self, source: Source, config: LoaderConfig, rank: int = 0, world_size: int = 1, start_step: int = 0):
        self.report = ReadReport()
        self._loader = DataLoader(
            _BatchReader(source, config),
            batch_sampler=BucketBatchSampler(source, config, rank, world_size, start_step),
            num_workers=config.workers,
            collate_fn=_BatchReader.collate,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[dict]:
        for batch, report in self._loader:
            self.report.tried += report.tried
            self.report.failures += report.failures
            self.report.check()
            yield batch
