"""Training samples encoded once by the frozen VAE and text encoder and kept on disk."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from finetune.data.batches import LoaderConfig, fit, thin_as_asked
from finetune.data.encoding import EncodedBatch, Encoder, LiveSamples
from finetune.data.source_check import raise_together
from finetune.data.sources import (
    FolderSource,
    ReadReport,
    Source,
    WebDatasetSource,
    build_source,
    is_local,
    permutation,
)
from mf_diffusers.datasets.folder import METADATA
from mf_diffusers.files import atomic_write
from mf_diffusers.modality_forcing.image_processor import processing_size


SHARD = 256


@dataclass
class CacheConfig:
    """
    Args:
        folder: where caches lie, each in a folder named by what went into it; null: there is no cache, samples are read
            and encoded in the training loop.
        samples: how many samples of the source to encode; without a cache there are as many as the steps take.
        pixels: of the square that `size_rule` is about; samples keep their own aspect ratio.
        size_rule: "area": they are worked on near the area of that square; "long_side": their longer side is as long as
            the square's, as in the paper.
        text: whether to keep text features too (not when the text encoder is in training).
        depth_density: share of the pixels whose depth is kept, thinned as `depth_pattern` (sparsify.py) says; a range
            [0.01, 1.0] for samples that each draw their own, as in a mixture of dense and sparse data sets.
            A source's own settings of these names go before.
    """

    folder: str | None = "outputs/cache"
    samples: int = 1000
    pixels: int = 512 * 512
    size_rule: str = "area"
    text: bool = True
    depth_density: Any = 1.0
    depth_pattern: str = "random"

    def size_of(self, height: int, width: int, token_size: int) -> tuple[int, int]:
        """The size at which a sample of `height` x `width` is worked on."""
        return processing_size(height, width, self.pixels, token_size, self.size_rule)


class Shard:
    """A file of encoded samples: tensors `NAME.PLACE`, and in the metadata captions and what could not be read."""

    def __init__(self, path: Path):
        self.file = safe_open(path, "pt")
        metadata = self.file.metadata()
        self.captions = json.loads(metadata["captions"])
        self.failures = json.loads(metadata.get("failures", "[]"))
        self.names = sorted({key.split(".")[0] for key in self.file.keys()})  # noqa: SIM118

    def size(self, place: int) -> tuple[int, int]:
        """(height, width), without reading the sample."""
        return tuple(self.file.get_slice(f"depth.{place}").get_shape()[-2:])


class EncodedSamples(Dataset):
    """
    Encoded samples on disk, in shards that are written whole or not at all. An item is an `EncodedBatch` on the CPU; it
    is asked for by the indices of its samples, which must have one size, and their positions in the batch of a step.
    """

    def __init__(self, folder: Path, samples: int):
        self.folder, self.samples = folder, samples
        self.open_shards: dict[int, Shard] = {}

    def locate(self, index: int) -> tuple[Shard, int]:
        """The shard of a sample and its place there."""
        number, place = divmod(index, SHARD)
        if number not in self.open_shards:
            self.open_shards[number] = Shard(shard_path(self.folder, number))
        return self.open_shards[number], place

    def __getitem__(self, request: tuple[list[int], list[int]]) -> EncodedBatch:
        indices, positions = request
        tensors, captions = defaultdict(list), []
        for index in indices:
            shard, place = self.locate(index)
            for name in shard.names:
                tensors[name].append(shard.file.get_tensor(f"{name}.{place}"))
            captions.append(shard.captions[place])
        stacked = {"prompt_embeds": None} | {name: torch.stack(parts) for name, parts in tensors.items()}
        stacked["latents"] = stacked["latents"].float()
        return EncodedBatch(**stacked, captions=captions, positions=positions)

    def captions(self, count: int) -> list[str]:
        """The captions of the first samples."""
        places = (self.locate(index) for index in range(count))
        return [shard.captions[place] for shard, place in places]

    @property
    def report(self) -> ReadReport:
        """What could not be read while the samples were encoded."""
        shards = [self.locate(first)[0] for first in range(0, self.samples, SHARD)]
        failures = [failure for shard in shards for failure in shard.failures]
        return ReadReport(self.samples + len(failures), failures)

    def plan(self, trainer) -> Iterator[tuple[list[int], list[int]]]:
        """Indices and positions of the micro batches of this process from `trainer.step` on.

        Every epoch is a new shuffle. The samples of a step are sorted by size into micro batches, so that some of these
        are smaller than `micro_batch_size` where sizes are mixed. All processes have as many: those of a sharded model
        gather its weights together.
        """
        rank, world_size = trainer.accelerator.process_index, trainer.accelerator.num_processes
        for step in range(trainer.step, trainer.config.steps):
            batches = [self.micro_batches(trainer.config, step, other, world_size) for other in range(world_size)]
            mine = batches[rank]
            while len(mine) < max(map(len, batches)):
                longest = mine.pop(max(range(len(mine)), key=lambda i: len(mine[i])))
                mine += [longest[: len(longest) // 2], longest[len(longest) // 2 :]]
            for batch in mine:
                indices, positions = zip(*batch)
                yield list(indices), list(positions)

    def micro_batches(self, config, step: int, rank: int, world_size: int) -> list[list[tuple[int, int]]]:
        """The (index, position) of a process's samples of a step, in micro batches of one size each."""
        size, groups = config.micro_batch_size, defaultdict(list)
        for position in range(config.batch_size):
            if position // size % world_size == rank:
                epoch, offset = divmod(step * config.batch_size + position, self.samples)
                index = int(permutation(self.samples, config.seed, epoch)[offset])
                shard, place = self.locate(index)
                groups[shard.size(place)].append((index, position))
        return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]

    def stream(self, trainer) -> Iterator[EncodedBatch]:
        """The micro batches of this process from `trainer.step` on."""
        return iter(
            DataLoader(
                self,
                batch_size=None,  # the sampler makes batches
                sampler=self.plan(trainer),
                num_workers=trainer.config.num_workers,
                pin_memory=torch.cuda.is_available(),
            )
        )


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.safetensors"


def prepare_samples(config, pipe_config: dict, encoder: Encoder) -> EncodedSamples | LiveSamples:
    """The training samples of a script's settings: encoded now, or live where they say that there is no cache."""
    cache, trainer = config.cache, config.trainer
    if cache.folder is not None:
        if config.flip:
            raise SystemExit("error: flip=true needs cache.folder=null: a cache holds its samples as they are")
        return encode_samples(cache, config.data, pipe_config, encoder)
    loading = LoaderConfig(
        batch_size=trainer.batch_size,
        pixels=cache.pixels,
        size_rule=cache.size_rule,
        multiple=encoder.token_size,
        flip=config.flip,
        seed=trainer.seed,
        workers=trainer.num_workers,
        depth_density=cache.depth_density,
        depth_pattern=cache.depth_pattern,
    )
    return LiveSamples(build_source(config.data), loading, encoder)


def encode_samples(config: CacheConfig, source_config, pipe_config: dict, encoder: Encoder) -> EncodedSamples:
    """
    Encodes the first `config.samples` of a source, or goes on with a build that was interrupted. Processes share the
    work.

    Args:
        source_config: settings of the source (sources.py).
        pipe_config: what else the encoded samples depend on, of the text features for example. The cache is named by
            both, by the weights of the VAE and by the files of the source.

    Raises:
        TooManyUnreadableError: more than 1% of the samples could not be read. Fewer are replaced, and listed.
        ValueError: in all processes, if the folder of one of them lacks what others encoded.
    """
    if config.text != (encoder.encode_text is not None):
        raise SystemExit("error: cache.text must be true where the text encoder is frozen, false where it trains")
    source = build_source(source_config)
    content = [source_config, asdict(config) | {"folder": ""}, pipe_config, weights_hash(encoder.vae)]
    content += files_hash(source)
    content = json.dumps(content, sort_keys=True, default=str)
    folder = Path(config.folder) / hashlib.sha256(content.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "content.json").write_text(content)

    processes, report = PartialState(), ReadReport()
    starts = range(0, config.samples, SHARD)
    # Dealt by number, not by what is missing: that changes while other processes encode.
    mine = absent_shards(folder, starts[processes.process_index :: processes.num_processes])
    for start in tqdm(mine, desc="encoding samples", unit="shard", disable=not mine):
        encode_shard(config, source, range(start, min(start + SHARD, config.samples)), encoder, report, folder)
    processes.wait_for_everyone()
    absent = absent_shards(folder, starts)
    fault = f"{len(absent)} of {len(starts)} shards are not in {folder}: cache.folder must be shared between nodes"
    raise_together(fault if absent else None)
    samples = EncodedSamples(folder, config.samples)
    samples.report.check(at_least=1)
    if processes.is_main_process and samples.report.failures:
        print(samples.report)
    return samples


def absent_shards(folder: Path, starts: range) -> list[int]:
    """Those shards, named by their first sample, that are not in the folder."""
    return [start for start in starts if not shard_path(folder, start // SHARD).is_file()]


def encode_shard(config: CacheConfig, source: Source, indices: range, encoder, report: ReadReport, folder: Path):
    """Encodes samples one by one and writes them as a file."""
    tensors, captions, known = {}, [], len(report.failures)
    for place, (index, sample) in enumerate(zip(indices, source.read(list(indices), report))):
        size = config.size_of(*sample["image"].shape[-2:], encoder.token_size)
        sample = thin_as_asked(fit(sample, size), source, index, config)
        encoded = encoder(sample["image"][None], sample["depth"][None], [sample["caption"]])
        for name in ("latents", "depth", "valid", *(["prompt_embeds"] if config.text else [])):
            tensors[f"{name}.{place}"] = getattr(encoded, name)[0].cpu().contiguous()
        captions.append(sample["caption"])
    metadata = {"captions": json.dumps(captions), "failures": json.dumps(report.failures[known:])}
    with atomic_write(shard_path(folder, indices[0] // SHARD)) as temporary:
        save_file(tensors, temporary, metadata)


def weights_hash(module: torch.nn.Module) -> str:
    """A hash of all weights of a module."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def files_hash(source: Source) -> list[str]:
    """A hash of names, sizes and times of change of the files that a source reads; none for scenes, which have none."""
    paths = []
    for leaf in source.leaves():
        if isinstance(leaf, FolderSource):
            names = (name for row in leaf.rows for name in (row.image, row.depth) if name)
            paths += [leaf.folder / name for name in (METADATA, *names)]
        elif isinstance(leaf, WebDatasetSource):
            paths += [Path(shard) for shard in leaf.shards if is_local(shard)]
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return [hashlib.sha256(json.dumps(stats).encode()).hexdigest()] if stats else []
