"""Samples as the model sees them: what the frozen VAE and the frozen text encoder make of images and captions."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from accelerate.utils import gather_object

from finetune.data.batches import BatchLoader, LoaderConfig
from finetune.data.sources import ReadReport, Source
from mf_diffusers import DepthProcessor
from mf_diffusers.modality_forcing.latent_tokens import image_to_tokens


class EncodedBatch(NamedTuple):
    """
    B samples of one size.

    Args:
        latents: RGB tokens (B, N, C), float32.
        depth: contracted depth (B, 1, H, W), 0 where missing.
        valid: its validity (B, 1, H, W), bool.
        prompt_embeds: text features (B, L, D); None where the text encoder is in training.
        captions: B texts.
        positions: of the samples in the batch of their step, which all processes share.
    """

    latents: torch.Tensor
    depth: torch.Tensor
    valid: torch.Tensor
    prompt_embeds: torch.Tensor | None
    captions: list[str]
    positions: list[int]


class Encoder:
    """
    Args:
        vae: frozen; its device is where images are encoded.
        depth_processor: normalises and contracts depth.
        encode_text: prompts -> features (B, L, D); None where the text encoder is in training.
    """

    def __init__(self, vae, depth_processor: DepthProcessor, encode_text: Callable | None = None):
        self.vae, self.depth_processor, self.encode_text = vae, depth_processor, encode_text

    @property
    def token_size(self) -> int:
        """Pixels along a token's side."""
        return self.depth_processor.config.patch_size

    @torch.no_grad()
    def __call__(self, image: torch.Tensor, depth: torch.Tensor, captions: list[str], positions=()) -> EncodedBatch:
        """Encodes images (B, 3, H, W) in [0, 1] and depth (B, 1, H, W) in any unit, 0 where missing."""
        depth, valid, _ = self.depth_processor.normalize(depth)
        latents = image_to_tokens(self.vae, image.to(self.vae.device))
        prompt_embeds = self.encode_text(captions) if self.encode_text else None
        return EncodedBatch(latents, depth, valid, prompt_embeds, captions, list(positions))


class LiveSamples:
    """Samples that are read and encoded in the training loop, anew in every epoch."""

    def __init__(self, source: Source, loading: LoaderConfig, encoder: Encoder):
        self.source, self.loading, self.encoder = source, loading, encoder
        self.own_report = ReadReport()

    @property
    def report(self) -> ReadReport:
        """What the processes could not read so far; all of them must ask at once."""
        reports = gather_object([self.own_report])
        return ReadReport(sum(r.tried for r in reports), [failure for r in reports for failure in r.failures])

    def captions(self, count: int) -> list[str]:
        """The captions of the first samples."""
        starts = range(0, count, 64)
        chunks = (self.source.read(list(range(s, min(s + 64, count))), self.own_report) for s in starts)
        return [sample["caption"] for chunk in chunks for sample in chunk]

    def stream(self, trainer) -> Iterator[EncodedBatch]:
        """The micro batches of this process from `trainer.step` on, without end. A step has samples of one size."""
        rank, world_size = trainer.accelerator.process_index, trainer.accelerator.num_processes
        loader = BatchLoader(self.source, self.loading, rank, world_size, trainer.step)
        self.own_report = loader.report
        positions, size = range(rank, self.loading.batch_size, world_size), trainer.config.micro_batch_size
        for batch in loader:
            for start in range(0, len(positions), size):
                part = slice(start, start + size)
                yield self.encoder(batch["image"][part], batch["depth"][part], batch["caption"][part], positions[part])
