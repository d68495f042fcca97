"""What a run would need, before anything is encoded or trained: `--dry-run` of finetune/post_train.py and pretrain.py.

The model is built on the meta device, so neither its weights nor memory for them are needed. The estimate is for one
process and counts what lives through a step. It leaves out: the VAE (it stays on the device) and the text encoder
(there while samples are encoded and in validation, and all the time where there is no cache); what validation needs;
the copy of the gradients that several processes exchange; the CUDA context, workspaces of kernels and fragmentation.
Allow a fifth more than it says.

Activations are what autograd keeps of a block of width D and MLP ratio m for each token: its input, the normalised
and the modulated input (3 D), queries and keys before their norm (2 D), the four tensors of attention (4 D), what the
gates multiply, the second norm or the fused projection (3 D), and five times m D in the gated MLP: (12 + 5 m) D values.
With gradient checkpointing it is D values for each block, and one block in full. The formula counts every product's
input, though frozen weights do not need theirs, every value in the compute dtype, though norms keep float32, and
grouped keys and values as wide as the queries that share them.
"""

from collections import Counter
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2
from omegaconf import OmegaConf

from finetune.cache import CacheConfig
from finetune.data import build_source
from finetune.trainer import TrainerConfig
from mf_diffusers import ModalityForcingDiTTransformer2DModel, ModalityForcingFlux2Transformer2DModel
from mf_diffusers.modality_forcing.image_processor import processing_size


TRANSFORMERS = {"flux2": ModalityForcingFlux2Transformer2DModel, "dit": ModalityForcingDiTTransformer2DModel}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLUX2_TOKEN_SIZE = 16  # pixels along a token's side: 8 of the VAE's, in cells of 2x2
FLUX2_CHANNELS = 128  # values of such a token
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2}
Stack = tuple[int, int, int, float]  # blocks of one kind: their number, tokens, width and MLP ratio


def read_base(config) -> tuple[dict, int]:
    """Constructor arguments of the transformer that a `PostTrainConfig` begins with, and the size of its tokens."""
    if config.base_config is not None:
        return config.base_config, FLUX2_TOKEN_SIZE
    base = config.base
    try:
        transformer = TRANSFORMERS[config.architecture].load_config(base, subfolder="transformer")
        return {k: v for k, v in transformer.items() if k[0] != "_"}, read_token_size(base, transformer)
    except OSError as error:
        if config.base_settings is None:
            raise SystemExit(
                f"error: no base at {base}: give its folder, or its sizes as base_config\n{error}"
            ) from error
    try:
        settings = OmegaConf.to_object(OmegaConf.load(config.base_settings))
        return settings["transformer"], read_token_size(settings["vae"], settings["transformer"])
    except (OSError, KeyError) as error:
        raise SystemExit(
            f"error: base_settings {config.base_settings} is no settings file of a pre-training: {error!r}"
        ) from error


def read_token_size(vae: str, transformer: dict) -> int:
    """Pixels along a token's side, of the VAE of a `PretrainConfig`; FLUX.2's is known without its files."""
    if not Path(vae).is_dir() and transformer.get("in_channels") == FLUX2_CHANNELS:
        return FLUX2_TOKEN_SIZE
    subfolder = None if (Path(vae) / "config.json").is_file() else "vae"
    try:
        return 2 ** len(AutoencoderKLFlux2.load_config(vae, subfolder=subfolder)["block_out_channels"])
    except OSError as error:
        raise SystemExit(f"error: no VAE at {vae}: {error}") from error


def empty_transformer(config) -> ModalityForcingFlux2Transformer2DModel | ModalityForcingDiTTransformer2DModel:
    """The grafted transformer of a `PostTrainConfig` on the meta device, in the dtype of the base."""
    base, token_size = read_base(config)
    depth = {"depth_channels": token_size**2, "num_depth_decoder_layers": config.num_depth_decoder_layers}
    with torch.device("meta"):
        has_depth = base.get("depth_channels") is not None  # such a base keeps its own
        model = TRANSFORMERS[config.architecture](**(base if has_depth else base | depth))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[config.base_dtype])
    return model


def size_in_bytes(parameters) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def activation_bytes(stacks: list[Stack], config: TrainerConfig) -> int:
    """What autograd keeps of a micro batch; see above."""
    inputs = [blocks * tokens * width for blocks, tokens, width, _ in stacks]
    per_block = [(12 + 5 * ratio) * tokens * width for _, tokens, width, ratio in stacks]
    if config.gradient_checkpointing:
        values = sum(inputs) + max(per_block)
    else:
        values = sum(blocks * whole for (blocks, *_), whole in zip(stacks, per_block))
    return int(values) * config.micro_batch_size * DTYPES[config.mixed_precision].itemsize


def memory(model, config: TrainerConfig, stacks: list[Stack], teacher_bytes: int = 0) -> dict[str, int]:
    """Bytes on the device in a training step, by what they are for."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    in_float32 = sum(p.numel() for p in frozen if p.dtype == torch.float32) + trained
    return {
        f"frozen weights, {' and '.join(sorted({str(p.dtype)[6:] for p in frozen})) or 'none'}": size_in_bytes(frozen),
        "trainable weights, float32": 4 * trained,
        "their gradients, float32": 4 * trained,
        f"optimizer, {config.optimizer}": OPTIMIZER_BYTES[config.optimizer] * trained,
        "averaged weights (EMA), float32": 4 * trained if config.ema_decay else 0,
        "bf16 copies of the float32 weights": 2 * in_float32 if config.mixed_precision == "bf16" else 0,
        "teacher (self-distillation)": teacher_bytes,
        f"activations, {'with' if config.gradient_checkpointing else 'without'} gradient checkpointing": (
            activation_bytes(stacks, config)
        ),
    }


def cache_bytes(config: CacheConfig, token_size: int, token_channels: int, text_bytes: int) -> int:
    """Encoded samples on disk: float32 latents and depth, its mask, and text features of `text_bytes` a sample."""
    tokens = config.pixels // token_size**2
    return config.samples * (4 * tokens * token_channels + 5 * config.pixels + text_bytes * config.text)


def describe_source(name: str, settings: dict, cache: CacheConfig, token_size: int) -> list[str]:
    """What a source holds, its first sample and the sizes it is worked on at; or why it cannot be read."""
    lines = []
    try:
        source = build_source(settings)
        for leaf in source.leaves():
            counts = f"{len(leaf)} samples" if hasattr(leaf, "__len__") else "samples without end"
            if hasattr(leaf, "rows"):
                counts += f", {sum(bool(row.depth) for row in leaf.rows)} of them with depth"
            lines.append(f"{name}: {leaf.config.kind}, {counts}")
        sample = source[0]
        looked_at = range(min(cache.samples, 256))
        sizes = Counter(processing_size(*source.size(i), cache.pixels, token_size) for i in looked_at)
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


def report(config, model, stacks: list[Stack], token_size: int, text_bytes: int, teacher_bytes: int = 0) -> str:
    """The whole answer of a dry run, as text."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    needs = memory(model, config.trainer, stacks, teacher_bytes)
    lines = [
        f"parameters: {total:,}, trainable {trained:,}, frozen {total - trained:,}",
        f"memory of one process, a micro batch of {config.trainer.micro_batch_size} at {config.cache.pixels} pixels:",
        *(f"  {size / 2**30:8.2f} GiB  {name}" for name, size in needs.items()),
        f"  {sum(needs.values()) / 2**30:8.2f} GiB  in all; finetune/dry_run.py says what is left out",
    ]
    for name in ("data", "validation_data"):
        if getattr(config, name, None):
            lines += describe_source(name, getattr(config, name), config.cache, token_size)
    channels = getattr(model, "transformer", model).config.in_channels
    size = cache_bytes(config.cache, token_size, channels, text_bytes)
    found = f"{config.cache.samples} samples, {size / 2**30:.2f} GiB under {config.cache.folder}"
    lines.append(f"cache: {'none, samples are encoded in the loop' if config.cache.folder is None else found}")
    return "\n".join(lines)


def trunk_blocks(transformer) -> int:
    """Blocks over all tokens, of either architecture."""
    return transformer.config.num_layers + transformer.config.get("num_single_layers", 0)


def report_post_training(config, model) -> str:
    """Report of a `PostTrainConfig`; what of the `empty_transformer` trains is chosen already."""
    c, token_size = model.config, round(model.config.depth_channels**0.5)
    images, width = config.cache.pixels // token_size**2, model.inner_dim
    tokens = config.max_sequence_length + 2 * images
    stacks = [
        (trunk_blocks(model), tokens, width, c.mlp_ratio),
        (c.num_depth_decoder_layers, images, width, c.mlp_ratio),
    ]
    dtype = DTYPES[config.base_dtype]
    base = sum(p.numel() for name, p in model.named_parameters() if "depth" not in name and "lora_" not in name)
    teacher = base * dtype.itemsize if config.distils and config.mode != "lora" else 0
    text_bytes = config.max_sequence_length * c.joint_attention_dim * dtype.itemsize
    return report(config, model, stacks, token_size, text_bytes, teacher)


def report_pretraining(config, model, token_size: int) -> str:
    """Report of a `PretrainConfig` and its model on the meta device."""
    transformer, length = model.transformer, config.max_sequence_length
    tokens = length + config.cache.pixels // token_size**2
    stacks = [(trunk_blocks(transformer), tokens, transformer.inner_dim, transformer.config.mlp_ratio)]
    text_bytes = length * transformer.config.joint_attention_dim * DTYPES[config.trainer.mixed_precision].itemsize
    if model.tokenizer is not None:
        text = model.text_encoder.config
        mlp_width = text.d_ff if config.architecture == "dit" else text.intermediate_size
        stacks.append((text.num_hidden_layers, length, text.hidden_size, mlp_width / text.hidden_size))
    return report(config, model, stacks, token_size, text_bytes)
