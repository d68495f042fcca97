"""What a run would need, before anything is encoded or trained: `--dry-run` of finetune/post_train.py and pretrain.py.

The formulas of the memory, and what they leave out, are in finetune/preflight/memory.py.
"""

from collections import Counter

import torch

from finetune.data.cache import CacheConfig
from finetune.data.source_check import open_sources
from finetune.preflight.memory import Launch, post_training_memory, pretraining_memory
from finetune.training.models import live_text_encoder, live_text_encoder_of_base
from mf_diffusers.modality_forcing.backbones import BACKBONES
from mf_diffusers.modality_forcing.depth_stream import TransformerShape
from mf_diffusers.precision import DTYPES


def cache_bytes(config: CacheConfig, token_size: int, token_channels: int, text_bytes: int) -> int:
    """Encoded samples on disk: float32 latents and depth, its mask, and text features of `text_bytes` a sample."""
    tokens = config.pixels // token_size**2
    return config.samples * (4 * tokens * token_channels + 5 * config.pixels + text_bytes * config.text)


def describe_source(name: str, settings: dict, cache: CacheConfig, token_size: int) -> list[str]:
    """What a source holds, its first sample and the sizes it is worked on at; or why it cannot be read."""
    lines = []
    try:
        (source,) = open_sources(settings)
        for leaf in source.leaves():
            counts = f"{len(leaf)} samples" if hasattr(leaf, "__len__") else "samples without end"
            if hasattr(leaf, "rows"):
                counts += f", {sum(bool(row.depth) for row in leaf.rows)} of them with depth"
            lines.append(f"{name}: {leaf.config.kind}, {counts}")
        sample = source[0]
        looked_at = range(min(cache.samples, 256))
        sizes = Counter(cache.size_of(*source.size(i), token_size) for i in looked_at)
    except (ValueError, OSError) as error:
        return [f"{name}: CANNOT BE READ: {error}"]
    height, width = sample["image"].shape[-2:]
    valid = (sample["depth"] > 0).float().mean()
    found = ", ".join(f"{h}x{w} ({count})" for (h, w), count in sizes.most_common(5))
    return [
        *lines,
        f"  first sample {sample['key']}: {height}x{width}, depth on {valid:.0%} of the pixels, {sample['caption']!r}",
        f"  worked on at (height x width) {found}{', ...' if len(sizes) > 5 else ''}: the first {len(looked_at)}",
    ]


def report(config, model, needs: dict[str, int], token_size: int, shape: TransformerShape, dtype: torch.dtype) -> str:
    """The whole answer of a dry run but for the verdict, as text; `dtype` is that of cached text features."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    lines = [
        f"parameters: {total:,}, trainable {trained:,}, frozen {total - trained:,}",
        f"memory of one process, a micro batch of {config.trainer.micro_batch_size} at {config.cache.pixels} pixels:",
        *(f"  {size / 2**30:8.2f} GiB  {name}" for name, size in needs.items()),
        f"  {sum(needs.values()) / 2**30:8.2f} GiB  in all; finetune/preflight/memory.py says what is left out",
    ]
    for name in ("data", "validation_data"):
        if getattr(config, name, None):
            lines += describe_source(name, getattr(config, name), config.cache, token_size)
    text_bytes = config.max_sequence_length * shape.text_channels * dtype.itemsize
    size = cache_bytes(config.cache, token_size, shape.token_channels, text_bytes)
    found = f"{config.cache.samples} samples, {size / 2**30:.2f} GiB under {config.cache.folder}"
    lines.append(f"cache: {'none, samples are encoded in the loop' if config.cache.folder is None else found}")
    return "\n".join(lines)


def report_post_training(config, model) -> str:
    """Report of a `PostTrainConfig`; what of the `empty_transformer` trains is chosen already."""
    needs = post_training_memory(config, model, live_text_encoder_of_base(config), Launch.current())
    token_size = round(model.config.depth_channels**0.5)
    return report(config, model, needs, token_size, model.shape, DTYPES[config.base_dtype])


def report_pretraining(config, model, token_size: int) -> str:
    """Report of a `PretrainConfig` and its model on the meta device."""
    text_encoder = live_text_encoder(config, config.pretrained_text_encoder)
    needs = pretraining_memory(config, model, token_size, text_encoder, Launch.current())
    shape = BACKBONES[config.architecture].transformer_class.shape_of(model.transformer.config)
    return report(config, model, needs, token_size, shape, DTYPES[config.trainer.mixed_precision])
