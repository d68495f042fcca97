"""Training samples: where they come from, in which order, and in which batches.

A sample is a dict: `image` float32 (3, H, W) in [0, 1]; `depth` float32 (1, H, W) in any unit, 0 where missing (all of
it when the sample has no depth) and inf where it is known to be infinite; `caption`, "" when there is none; and `key`,
which names it in logs and reports.

Everything hangs on the global sample index 0, 1, 2, ...: a source has a sample for every one of them, in an order that
its seed alone decides, and the batches of all processes together use each index once. So a run resumes from its step
number, and another number of processes or workers trains on the same batches. Tar shards are the exception: they are
streams, see `WebDatasetSource`.
"""

import io
import json
import random
import re
import tempfile
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from finetune.scenes import SPLITS, render_scenes
from mf_diffusers.datasets.folder import (
    METADATA,
    Caption,
    DepthFormat,
    captions_of,
    fit_depth,
    read_pair,
    read_rows,
)
from mf_diffusers.depth_io import DEPTH_SUFFIXES
from mf_diffusers.modality_forcing.image_processor import image_to_tensor
from mf_diffusers.pictures import read_oriented, turned_along, upright_size


SHARD_IMAGES = ("jpg", "jpeg", "png", "webp")
MIXTURE_BLOCK = 1000  # samples after which the shares of a mixture are exact


@dataclass
class DepthThinning:
    """How a source's depth is thinned (sparsify.py), dense as the rendered and sparse as the measured ones of
    a mixture; what is None is as the settings of all sources say, `cache.depth_density` and `cache.depth_pattern`."""

    depth_density: Any = None
    depth_pattern: str | None = None


@dataclass
class ScenesConfig(DepthThinning):
    """Procedural scenes (`finetune.scenes`), without end. `height` and `width` are rendered."""

    kind: str = "scenes"
    split: str = "train"  # train, validation or test
    seed: int = 0
    height: int = 128
    width: int = 128
    supersample: int = 2


@dataclass
class FolderConfig(DepthThinning):
    """A folder with `metadata.jsonl`, see `FolderSource`."""

    kind: str = "folder"
    path: str = ""
    shuffle: bool = True  # anew in every epoch; False: as in the file
    seed: int = 0
    caption_weights: dict[str, float] = field(default_factory=dict)  # see `CaptionDraw`


@dataclass
class WebDatasetConfig(DepthThinning):
    """Tar shards, see `WebDatasetSource`."""

    kind: str = "webdataset"
    shards: str = ""  # paths or URLs with braces, e.g. data/train-{0000..0127}.tar; several joined by "::"
    height: int = 512  # all samples are brought to this size: it is not known before they are read
    width: int = 512
    shuffle_buffer: int = 1000  # samples held undecoded; 0: as in the shards
    seed: int = 0
    caption_weights: dict[str, float] = field(default_factory=dict)  # see `CaptionDraw`


@dataclass
class MixtureConfig:
    """`sources` (configs of any kind, or mappings with their fields) drawn in proportion to `weights`."""

    kind: str = "mixture"
    sources: list[Any] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    seed: int = 0


class TooManyUnreadableError(ValueError):
    """More samples than `ReadReport` lets pass could not be read."""


@dataclass
class ReadReport:
    """How many samples a run tried to read, and why which of them were replaced."""

    tried: int = 0
    failures: list[str] = field(default_factory=list)

    def check(self, at_least: int = 100) -> None:
        """Raises TooManyUnreadableError if more than 1 % of `at_least` samples or more were unreadable."""
        if self.tried >= at_least and len(self.failures) > 0.01 * self.tried:
            raise TooManyUnreadableError(f"more than 1 % of the samples are unreadable, mend or remove them: {self}")

    def __str__(self) -> str:
        counts = Counter(self.failures).most_common(100)
        listed = [f"{reason} ({times} times)" if times > 1 else reason for reason, times in counts]
        return "\n  ".join([f"{len(self.failures)} of {self.tried} samples could not be read", *listed])


def make_sample(image: Image.Image, depth: np.ndarray | None, caption: str, key: str) -> dict:
    """A sample from a picture and its depth (H, W), None for no depth."""
    if depth is None:
        depth = np.zeros((image.height, image.width), dtype=np.float32)
    depth = torch.from_numpy(np.ascontiguousarray(depth))[None]
    return {"image": image_to_tensor(image)[0], "depth": depth, "caption": caption, "key": key}


class Source:
    """Samples by index, without end.

    `source[index]` reads one sample and raises ValueError or OSError if that fails. `size(index)` is its (height,
    width), known without reading it. `step` leads to the index that replaces an unreadable one. `thinning` is asked for
    by a source, and done by what fits samples to their size.
    """

    step = 1
    thinning = DepthThinning()

    def locate(self, index: int) -> tuple["Source", int]:
        """The source that reads sample `index`, and the index that the sample has there."""
        return self, index

    def leaves(self) -> list["Source"]:
        """The sources that `locate` can name."""
        return [self]

    def read(self, indices: list[int], report: ReadReport) -> list[dict]:
        """Samples `indices`; each unreadable one is noted in `report` and replaced by the next that can be read.

        Raises TooManyUnreadableError, see `ReadReport.check`.
        """
        return [self._read_or_replace(index, report) for index in indices]

    def _read_or_replace(self, index, report):
        while True:
            report.tried += 1
            try:
                return self[index]
            except TooManyUnreadableError:
                raise
            except (ValueError, OSError) as error:
                report.failures.append(str(error))
                report.check()
                index += self.step


class ScenesSource(Source):
    """Scene `index` of `finetune.scenes`, depth in metres, inf in the sky. Index 2**32 is index 0 again.

    Raises ValueError for a split of another name.
    """

    def __init__(self, config: ScenesConfig):
        if config.split not in SPLITS:
            raise ValueError(f"split {config.split!r} is none of {', '.join(SPLITS)}")
        self.config = self.thinning = config

    def size(self, index: int) -> tuple[int, int]:
        return self.config.height, self.config.width

    def __getitem__(self, index):
        return self.read([index], ReadReport())[0]

    def read(self, indices: list[int], report: ReadReport) -> list[dict[str, Any]]:
        """The samples of these indices, rendered together."""
        c = self.config
        numbers = [index % 2**32 for index in indices]
        batch = render_scenes(numbers, c.seed, c.height, c.width, supersample=c.supersample, split=c.split)
        report.tried += len(indices)
        return [
            {"image": image, "depth": depth, "caption": caption, "key": f"scenes:{c.split}:{number}"}
            for image, depth, caption, number in zip(batch.image, batch.depth, batch.captions, numbers)
        ]


class CaptionDraw:
    """Draws one of a sample's captions, by (seed, index).

    Captions without a kind weigh the same, as all do without `weights`. Otherwise every kind needs a weight; where a
    sample lacks a kind, the others keep their proportions, and what weighs 0 is never drawn.

    Raises ValueError for weights that are no numbers from 0 on, or all 0.
    """

    def __init__(self, weights: Mapping[str, float], seed: int):
        values = np.array(list(weights.values()), dtype=np.float64)
        if len(values) and not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
            raise ValueError(f"caption_weights {dict(weights)} must be 0 or above, and not all 0")
        self.weights, self.seed = dict(weights), seed

    def __call__(self, captions: list[Caption], index: int) -> str:
        """The caption of sample `index`, "" where there is none. Raises ValueError for a kind without a weight."""
        unknown = sorted({caption.kind for caption in captions if caption.kind is not None} - self.weights.keys())
        if self.weights and unknown:
            raise ValueError(f"captions of the kinds {unknown} have no weight in caption_weights {self.weights}")
        weights = [self.weights.get(caption.kind, 1) for caption in captions]
        if not any(weights):
            return ""
        return random.Random(f"caption {self.seed} {index}").choices(captions, weights)[0].text


class FolderSource(Source):
    """A folder with `metadata.jsonl`, see `mf_diffusers.datasets.folder` for its keys.

    Index i is sample i % len of epoch i // len; with `shuffle`, every epoch has an order of its own. Of several
    captions `CaptionDraw` takes one, anew in every epoch.

    Raises FileNotFoundError for a missing folder, metadata or listed file, ValueError for a bad line (with its number)
    or caption weights of other kinds than the lines have. Warns once of keys that it does not know.
    """

    def __init__(self, config: FolderConfig):
        self.config = self.thinning = config
        self.folder = Path(config.path)
        self.rows, self._sizes = read_rows(self.folder), {}
        listed = [name for row in self.rows for name in (row.image, row.depth) if name]
        absent = [name for name in listed if not (self.folder / name).is_file()]
        where = self.folder / METADATA
        if absent or not listed:
            raise FileNotFoundError(f"{where}: {len(absent)} of {len(listed)} files are absent: {absent[:5]}")
        self._draw_caption = CaptionDraw(config.caption_weights, config.seed)
        kinds = {caption.kind for row in self.rows for caption in row.captions} - {None}
        weighted = self._draw_caption.weights.keys()
        if weighted and weighted != kinds:
            raise ValueError(f"{where}: kinds of captions are {sorted(kinds)}, of caption_weights {sorted(weighted)}")

    def __len__(self):
        return len(self.rows)

    def _row(self, index):
        epoch, position = divmod(index, len(self))
        return int(permutation(len(self), self.config.seed, epoch)[position]) if self.config.shuffle else position

    def size(self, index: int) -> tuple[int, int]:
        row = self._row(index)
        if row not in self._sizes:
            try:
                self._sizes[row] = upright_size(self.folder / self.rows[row].image)
            except Exception:  # decoders meet damaged files with errors of many types; reading it will report this one
                self._sizes[row] = (1, 1)
        return self._sizes[row]

    def __getitem__(self, index):
        number = self._row(index)
        row = self.rows[number]
        caption, key = self._draw_caption(row.captions, index), f"{self.folder.name}:{number:05d}"
        return make_sample(*read_pair(self.folder, row, key), caption, key)


def is_local(shard: str) -> bool:
    """Whether a shard is a file, and neither a URL nor the output of a command."""
    return not re.match(r"\w+://|pipe:", shard)


class WebDatasetSource(Source):
    """Tar shards as the library webdataset writes them: of a sample `name`, the picture is `name.jpg` (png, webp), the
    depth, if any, `name.depth.png` (npy, exr, ...), the caption `name.txt` or "text" in `name.json`, which also takes
    the `depth_*` keys of a folder's metadata.

    Shards are read as streams, so this source is split into `lanes`, each with shards of its own: index i is sample
    i // lanes in lane i % lanes. The loader makes as many lanes as there are workers in all processes, and each worker
    reads one: the order depends on their number. In each epoch of a lane the shards are dealt and shuffled anew by
    (seed, epoch), and samples pass a shuffle buffer. Going to a position, as a resumed run does, means reading the
    lane up to it: nothing is decoded, but every byte before it is read, about a second per gigabyte from a local disk.

    Raises FileNotFoundError for missing shards, ValueError when there are fewer shards than lanes, or for bad weights.
    """

    def __init__(self, config: WebDatasetConfig):
        from webdataset.shardlists import expand_urls

        self.config = self.thinning = config
        self.shards = expand_urls(config.shards) if config.shards else []
        absent = [s for s in self.shards if is_local(s) and not Path(s).is_file()]
        if absent or not self.shards:
            raise FileNotFoundError(f"shards {config.shards!r}: {len(absent)} are absent: {absent[:5]}")
        self._draw_caption = CaptionDraw(config.caption_weights, config.seed)
        self.split(1)

    def split(self, lanes: int) -> None:
        """Deal the shards to `lanes` streams."""
        if lanes > len(self.shards):
            raise ValueError(f"{len(self.shards)} shards are too few for {lanes} workers of all processes: use fewer")
        self.step = lanes
        self._cursors = {}  # lane: its stream, the number of samples taken from it, and the last few of them

    def size(self, index: int) -> tuple[int, int]:
        return self.config.height, self.config.width

    def __getitem__(self, index):
        raw = self._raw(index)
        key = f"{Path(raw['__url__']).stem}/{raw['__key__']}"
        try:
            return self._decode(raw, key, index)
        except Exception as error:  # decoders meet damaged files with errors of many types
            raise ValueError(f"{key}: {error}") from error

    def _raw(self, index):
        position, lane = divmod(index, self.step)
        stream, taken, last = self._cursors.get(lane, (None, 0, ()))
        if stream is None or position < taken - len(last):
            stream, taken, last = self._stream(lane), 0, deque(maxlen=8)
        while taken <= position:
            last.append(next(stream))
            taken += 1
        self._cursors[lane] = stream, taken, last
        return last[position - taken]

    def _stream(self, lane) -> Iterator[dict]:
        import webdataset

        buffer = self.config.shuffle_buffer
        for epoch in count():
            order = permutation(len(self.shards), self.config.seed, epoch) if buffer else range(len(self.shards))
            shards = [self.shards[k] for k in order[lane :: self.step]]
            rng = random.Random(f"{self.config.seed} {epoch} {lane} {self.step}")
            samples = webdataset.shuffle(max(1, buffer), initial=buffer, rng=rng)(self._samples(shards))
            first = next(samples, None)
            if first is None:
                raise TooManyUnreadableError(f"no samples in the shards {shards[:5]}")
            yield from chain([first], samples)

    @staticmethod
    def _samples(shards):
        from webdataset.tariterators import tarfile_samples

        for shard in shards:
            try:
                yield from tarfile_samples([{"url": shard}])
            except Exception as error:  # the rest of the shard is lost, and counts as one unreadable sample
                yield {"__url__": shard, "__key__": "(damaged shard)", "error": error}

    def _decode(self, raw, key, index):
        if "error" in raw:
            raise raw["error"]
        image = next((raw[name] for name in SHARD_IMAGES if name in raw), None)
        if image is None:
            raise ValueError(f"no picture ({', '.join(SHARD_IMAGES)}) among {sorted(raw)}")
        entry = json.loads(raw.get("json", "{}"))
        captions = captions_of(raw["txt"].decode() if "txt" in raw else entry.get("text"))
        picture, orientation = read_oriented(io.BytesIO(image))
        depth = None
        suffix = next((suffix for suffix in DEPTH_SUFFIXES if f"depth{suffix}" in raw), None)
        if suffix is not None:
            with tempfile.NamedTemporaryFile(suffix=suffix) as file:
                file.write(raw[f"depth{suffix}"])
                file.flush()
                depth = DepthFormat.from_metadata(entry).read(file.name)
            depth = fit_depth(turned_along(depth, picture, orientation), (picture.height, picture.width), key)
        return make_sample(picture, depth, self._draw_caption(captions, index), key)


class MixtureSource(Source):
    """Several sources: each block of 1000 indices has their exact shares (rounded to 1/1000), in an order drawn from
    the seed. Within a source the samples follow one another without a gap.

    Raises ValueError for weights that do not fit the sources or are too small to be drawn.
    """

    def __init__(self, config: MixtureConfig):
        weights = np.array(config.weights, dtype=np.float64)
        if not len(config.sources) or len(weights) != len(config.sources):
            raise ValueError(f"a mixture of {len(config.sources)} sources cannot have {len(weights)} weights")
        if not (np.isfinite(weights).all() and (weights > 0).all()):
            raise ValueError(f"weights {weights.tolist()} must be positive numbers; leave out what is not wanted")
        edges = np.round(MIXTURE_BLOCK * np.cumsum(weights) / weights.sum()).astype(int)
        self.counts = tuple(np.diff(edges, prepend=0).tolist())
        if min(self.counts) == 0:
            raise ValueError(f"a weight in {weights.tolist()} is below 1/{MIXTURE_BLOCK} of their sum")
        self.seed = config.seed
        self.sources = [build_source(source) for source in config.sources]

    def locate(self, index: int) -> tuple[Source, int]:
        block, position = divmod(index, MIXTURE_BLOCK)
        choice = np.repeat(range(len(self.counts)), self.counts)[permutation(MIXTURE_BLOCK, self.seed, block)]
        k = int(choice[position])
        return self.sources[k].locate(block * self.counts[k] + int((choice[:position] == k).sum()))

    def leaves(self) -> list[Source]:
        return [leaf for source in self.sources for leaf in source.leaves()]

    def size(self, index: int) -> tuple[int, int]:
        leaf, index = self.locate(index)
        return leaf.size(index)

    def __getitem__(self, index):
        leaf, index = self.locate(index)
        return leaf[index]


KINDS = {
    "scenes": (ScenesConfig, ScenesSource),
    "folder": (FolderConfig, FolderSource),
    "webdataset": (WebDatasetConfig, WebDatasetSource),
    "mixture": (MixtureConfig, MixtureSource),
}


def build_source(config) -> Source:
    """The source of a config, or of a mapping with the fields of one, `kind` among them.

    Raises ValueError for an unknown kind or field, and what the source raises.
    """
    if isinstance(config, Mapping):
        kind = config.get("kind")
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} of a source is none of {', '.join(KINDS)}")
        try:
            config = KINDS[kind][0](**config)
        except TypeError as error:
            raise ValueError(f"source of kind {kind!r}: {error}") from error
    return KINDS[config.kind][1](config)


@lru_cache(maxsize=64)
def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)
