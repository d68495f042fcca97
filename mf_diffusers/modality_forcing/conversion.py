"""The published checkpoint's layout and diffusers' names, both ways, from one table of keys.

The published weights (`bartduis/modality_forcing`) are licensed CC BY-NC 4.0; this code is Apache-2.0.
"""

import math
import re
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import atomic_write


PUBLISHED_SHIFT_MU = 1.1
"""Of the published model's schedules: both modalities are shifted by its exponential."""

PUBLISHED_SETTINGS = {"default_sample_size": 512, "default_size_rule": "long_side", "default_log2_alpha": 5.0}
"""Of the published model's pipeline."""

# Published key -> diffusers key, N counting blocks. A tuple: the published tensor stacks these along its rows.
TRANSFORMER_KEYS: dict[str, str | tuple[str, ...]] = {
    "img_in.weight": "x_embedder.weight",
    "txt_in.weight": "context_embedder.weight",
    "depth_in.weight": "depth_embedder.weight",
    "time_in.in_layer.weight": "time_guidance_embed.timestep_embedder.linear_1.weight",
    "time_in.out_layer.weight": "time_guidance_embed.timestep_embedder.linear_2.weight",
    "guidance_in.in_layer.weight": "time_guidance_embed.guidance_embedder.linear_1.weight",
    "guidance_in.out_layer.weight": "time_guidance_embed.guidance_embedder.linear_2.weight",
    "time_in_depth.in_layer.weight": "depth_time_embed.timestep_embedder.linear_1.weight",
    "time_in_depth.out_layer.weight": "depth_time_embed.timestep_embedder.linear_2.weight",
    "time_in_depth_to_img.in_layer.weight": "depth_time_embed.depth_to_rgb.linear_1.weight",
    "time_in_depth_to_img.out_layer.weight": "depth_time_embed.depth_to_rgb.linear_2.weight",
    "time_in_rgb_to_depth.in_layer.weight": "depth_time_embed.rgb_to_depth.linear_1.weight",
    "time_in_rgb_to_depth.out_layer.weight": "depth_time_embed.rgb_to_depth.linear_2.weight",
    "cross_alpha_img": "depth_time_embed.alpha_rgb",
    "cross_alpha_depth": "depth_time_embed.alpha_depth",
    "double_stream_modulation_img.lin.weight": "double_stream_modulation_img.linear.weight",
    "double_stream_modulation_txt.lin.weight": "double_stream_modulation_txt.linear.weight",
    "double_stream_modulation_depth.lin.weight": "double_stream_modulation_depth.linear.weight",
    "single_stream_modulation.lin.weight": "single_stream_modulation.linear.weight",
    "single_stream_modulation_depth.lin.weight": "single_stream_modulation_depth.linear.weight",
    "depth_decoder_modulation.lin.weight": "depth_decoder_modulation.linear.weight",
    "final_layer.linear.weight": "proj_out.weight",
    "final_layer.adaLN_modulation.1.weight": "norm_out.linear.weight",
    "depth_final_layer.linear.weight": "depth_head.proj_out.weight",
    "depth_final_layer.adaLN_modulation.1.weight": "depth_head.norm_out.linear.weight",
    "double_blocks.N.img_attn.qkv.weight": tuple(f"transformer_blocks.N.attn.to_{x}.weight" for x in "qkv"),
    "double_blocks.N.img_attn.norm.query_norm.scale": "transformer_blocks.N.attn.norm_q.weight",
    "double_blocks.N.img_attn.norm.key_norm.scale": "transformer_blocks.N.attn.norm_k.weight",
    "double_blocks.N.img_attn.proj.weight": "transformer_blocks.N.attn.to_out.0.weight",
    "double_blocks.N.img_mlp.0.weight": "transformer_blocks.N.ff.linear_in.weight",
    "double_blocks.N.img_mlp.2.weight": "transformer_blocks.N.ff.linear_out.weight",
    "double_blocks.N.txt_attn.qkv.weight": tuple(f"transformer_blocks.N.attn.add_{x}_proj.weight" for x in "qkv"),
    "double_blocks.N.txt_attn.norm.query_norm.scale": "transformer_blocks.N.attn.norm_added_q.weight",
    "double_blocks.N.txt_attn.norm.key_norm.scale": "transformer_blocks.N.attn.norm_added_k.weight",
    "double_blocks.N.txt_attn.proj.weight": "transformer_blocks.N.attn.to_add_out.weight",
    "double_blocks.N.txt_mlp.0.weight": "transformer_blocks.N.ff_context.linear_in.weight",
    "double_blocks.N.txt_mlp.2.weight": "transformer_blocks.N.ff_context.linear_out.weight",
    "double_blocks.N.depth_attn.qkv.weight": tuple(f"transformer_blocks.N.attn.depth_{x}_proj.weight" for x in "qkv"),
    "double_blocks.N.depth_attn.norm.query_norm.scale": "transformer_blocks.N.attn.norm_depth_q.weight",
    "double_blocks.N.depth_attn.norm.key_norm.scale": "transformer_blocks.N.attn.norm_depth_k.weight",
    "double_blocks.N.depth_attn.proj.weight": "transformer_blocks.N.attn.to_depth_out.weight",
    "double_blocks.N.depth_mlp.0.weight": "transformer_blocks.N.ff_depth.linear_in.weight",
    "double_blocks.N.depth_mlp.2.weight": "transformer_blocks.N.ff_depth.linear_out.weight",
    "single_blocks.N.linear1.weight": "single_transformer_blocks.N.attn.to_qkv_mlp_proj.weight",
    "single_blocks.N.linear2.weight": "single_transformer_blocks.N.attn.to_out.weight",
    "single_blocks.N.norm.query_norm.scale": "single_transformer_blocks.N.attn.norm_q.weight",
    "single_blocks.N.norm.key_norm.scale": "single_transformer_blocks.N.attn.norm_k.weight",
    "depth_decoder_blocks.N.linear1.weight": "depth_decoder_blocks.N.attn.to_qkv_mlp_proj.weight",
    "depth_decoder_blocks.N.linear2.weight": "depth_decoder_blocks.N.attn.to_out.weight",
    "depth_decoder_blocks.N.norm.query_norm.scale": "depth_decoder_blocks.N.attn.norm_q.weight",
    "depth_decoder_blocks.N.norm.key_norm.scale": "depth_decoder_blocks.N.attn.norm_k.weight",
}
# The published heads store (shift, scale), diffusers' AdaLayerNormContinuous (scale, shift).
SWAPPED_HALVES = {"final_layer.adaLN_modulation.1.weight", "depth_final_layer.adaLN_modulation.1.weight"}
# Present together or not at all: timestep mixing, and the guidance embedder of distilled bases.
OPTIONAL_GROUPS = (("cross_alpha_", "time_in_depth_to_img.", "time_in_rgb_to_depth."), ("guidance_in.",))

AUTOENCODER_KEYS: dict[str, str] = {
    "down.N.block.M.": "down_blocks.N.resnets.M.",
    "down.N.downsample.conv.": "down_blocks.N.downsamplers.0.conv.",
    "up.N.block.M.": "up_blocks.N.resnets.M.",
    "up.N.upsample.conv.": "up_blocks.N.upsamplers.0.conv.",
    "mid.block_1.": "mid_block.resnets.0.",
    "mid.block_2.": "mid_block.resnets.1.",
    "mid.attn_1.norm.": "mid_block.attentions.0.group_norm.",
    "mid.attn_1.q.": "mid_block.attentions.0.to_q.",
    "mid.attn_1.k.": "mid_block.attentions.0.to_k.",
    "mid.attn_1.v.": "mid_block.attentions.0.to_v.",
    "mid.attn_1.proj_out.": "mid_block.attentions.0.to_out.0.",
    "norm_out.": "conv_norm_out.",
}

StateDict = dict[str, torch.Tensor]


def load_safetensors(path: str | Path) -> StateDict:
    """Reads a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, or not a safetensors file.
    """
    with _open_safetensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file; errors as of `load_safetensors`."""
    with _open_safetensors(path) as file:
        return file.metadata() or {}


@contextmanager
def _open_safetensors(path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"No weights at {path}: check the path, or download the file first.")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}): download it again. Other formats are not read."
        ) from error


def save_safetensors(state_dict: StateDict, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all."""
    tensors = {key: tensor.contiguous() for key, tensor in state_dict.items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, {"format": "pt", **(metadata or {})})


def convert_published_transformer(state_dict: StateDict) -> tuple[dict, StateDict]:
    """
    Published transformer weights to diffusers' names.

    Args:
        state_dict: published keys, with or without the prefix `dit.`.

    Returns:
        Constructor arguments of `ModalityForcingFlux2Transformer2DModel`, every dimension read off the shapes, and its
        state dict.

    Raises:
        ValueError: keys are missing or unexpected; the message names them.
    """
    published = {key.removeprefix("dit."): tensor for key, tensor in state_dict.items()}
    blocks = {
        stack: _count_blocks(published, stack) for stack in ("double_blocks", "single_blocks", "depth_decoder_blocks")
    }
    missing = [key for key in _expected_keys(published, blocks) if key not in published]
    converted, unexpected = {}, []
    for key, tensor in published.items():
        template, numbers = _split_numbers(key)
        names = TRANSFORMER_KEYS.get(template)
        if names is None:
            unexpected.append(key)
        elif isinstance(names, tuple):
            converted |= zip((_fill(name, numbers) for name in names), (part.clone() for part in tensor.chunk(3)))
        else:
            converted[_fill(names, numbers)] = swap_halves(tensor) if template in SWAPPED_HALVES else tensor
    if missing or unexpected:
        raise ValueError(
            "These are not the weights of a Modality Forcing transformer in the published layout. "
            f"Missing keys: {shorten(missing)}. Unexpected keys: {shorten(unexpected)}."
        )

    _check_dimensions(
        published,
        {
            "img_in.weight": 2,
            "txt_in.weight": 2,
            "depth_in.weight": 2,
            "time_in.in_layer.weight": 2,
            "double_blocks.0.img_mlp.2.weight": 2,
            "single_blocks.0.norm.query_norm.scale": 1,
        },
    )
    hidden_size, in_channels = published["img_in.weight"].shape
    head_dim = published["single_blocks.0.norm.query_norm.scale"].shape[0]
    config = {
        "in_channels": in_channels,
        "num_layers": blocks["double_blocks"],
        "num_single_layers": blocks["single_blocks"],
        "attention_head_dim": head_dim,
        "num_attention_heads": hidden_size // head_dim,
        "joint_attention_dim": published["txt_in.weight"].shape[1],
        "timestep_guidance_channels": published["time_in.in_layer.weight"].shape[1],
        "mlp_ratio": published["double_blocks.0.img_mlp.2.weight"].shape[1] / hidden_size,
        "axes_dims_rope": (head_dim // 4,) * 4,
        "guidance_embeds": "guidance_in.in_layer.weight" in published,
        "depth_channels": published["depth_in.weight"].shape[1],
        "num_depth_decoder_layers": blocks["depth_decoder_blocks"],
        "depth_timestep_mixing": "cross_alpha_img" in published,
    }
    return config, converted


def export_published_transformer(state_dict: StateDict, prefix: str = "dit.") -> StateDict:
    """
    The inverse of [`convert_published_transformer`].

    Args:
        state_dict: of a `ModalityForcingFlux2Transformer2DModel`.
        prefix: put before every key; "dit." is the published file's, "" what single-file loaders look for.

    Raises:
        ValueError: a key that the published layout has no name for (an adapter that is not merged, say).
    """
    places = published_names(state_dict)
    placed = {name for names in places.values() for name in names}
    unexpected = [name for name in state_dict if name not in placed]
    if unexpected:
        raise ValueError(
            f"The published layout has no place for {shorten(unexpected)}: merge adapters before exporting."
        )
    exported = {}
    for published, names in places.items():
        tensor = torch.cat([state_dict[name] for name in names]) if len(names) > 1 else state_dict[names[0]]
        exported[prefix + published] = swap_halves(tensor) if published in SWAPPED_HALVES else tensor
    return exported


def published_names(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The published name of each weight of `names`, in their order; of the weights that it stacks along its rows, all
    are named. Weights that the published layout does not know are left out."""
    published_keys = {
        part: published
        for published, parts in TRANSFORMER_KEYS.items()
        for part in (parts if isinstance(parts, tuple) else (parts,))
    }
    found = {}
    for name in names:
        template, numbers = _split_numbers(name)
        if template in published_keys:
            published = published_keys[template]
            parts = TRANSFORMER_KEYS[published]
            parts = parts if isinstance(parts, tuple) else (parts,)
            found[_fill(published, numbers)] = tuple(_fill(part, numbers) for part in parts)
    return found


def convert_published_autoencoder(encoder: StateDict, decoder: StateDict) -> tuple[dict, StateDict]:
    """
    The two published autoencoder files to one `AutoencoderKLFlux2`.

    Returns:
        Constructor arguments, read off the shapes, and the state dict.

    Raises:
        ValueError: a file without the keys of its half; the message names what is missing.
    """
    for half, weights, key in (("encoder", encoder, "down.0."), ("decoder", decoder, "up.0.")):
        if not any(name.startswith(key) for name in weights) or "bn.running_mean" not in weights:
            raise ValueError(
                f"No keys '{key}*' and 'bn.running_mean' among the {half}'s weights: they are not the published "
                f"ae_{half}.safetensors."
            )
    depth = _count_blocks(encoder, "down")
    blocks = [f"{half}.{i}.block.0.conv1.weight" for half in ("down", "up") for i in range(depth)]
    _check_dimensions(encoder, dict.fromkeys(["conv_in.weight", *blocks[:depth]], 4) | {"bn.running_mean": 1})
    _check_dimensions(decoder, dict.fromkeys(["conv_in.weight", "conv_out.weight", *blocks[depth:]], 4))
    latent_channels = decoder["conv_in.weight"].shape[1]
    config = {
        "in_channels": encoder["conv_in.weight"].shape[1],
        "out_channels": decoder["conv_out.weight"].shape[0],
        "block_out_channels": tuple(encoder[f"down.{i}.block.0.conv1.weight"].shape[0] for i in range(depth)),
        "decoder_block_out_channels": tuple(decoder[f"up.{i}.block.0.conv1.weight"].shape[0] for i in range(depth)),
        "down_block_types": ("DownEncoderBlock2D",) * depth,
        "up_block_types": ("UpDecoderBlock2D",) * depth,
        "layers_per_block": _count_blocks(encoder, "down.0.block"),
        "latent_channels": latent_channels,
        "use_quant_conv": "quant_conv.weight" in encoder,
        "use_post_quant_conv": "post_quant_conv.weight" in decoder,
        "patch_size": (math.isqrt(encoder["bn.running_mean"].shape[0] // latent_channels),) * 2,
    }
    return config, _rename_autoencoder(encoder, "encoder", depth) | _rename_autoencoder(decoder, "decoder", depth)


def _check_dimensions(weights: StateDict, dimensions: dict[str, int]) -> None:
    """Raises ValueError where a weight is missing, is not of that many axes, or is empty."""
    for name, number in dimensions.items():
        if name not in weights:
            raise ValueError(f"These are not the published weights: {name} is missing.")
        if weights[name].ndim != number or not weights[name].numel():
            raise ValueError(f"{name} must have {number} axes, but its shape is {tuple(weights[name].shape)}.")


def _rename_autoencoder(weights: StateDict, half: str, depth: int) -> StateDict:
    renamed = {}
    for key, tensor in weights.items():
        if key.startswith(("bn.", "quant_conv.", "post_quant_conv.")):
            renamed[key] = tensor
            continue
        template, numbers = _split_numbers(key)
        for old, new in AUTOENCODER_KEYS.items():
            if template.startswith(old):
                template = new + template.removeprefix(old)
        if key.startswith("up."):  # counted from the finest level there, from the coarsest in diffusers
            numbers[0] = depth - 1 - numbers[0]
        if ".attentions." in template and tensor.ndim == 4:  # 1x1 convolutions there, linear layers in diffusers
            tensor = tensor[:, :, 0, 0]
        renamed[f"{half}.{_fill(template, numbers).replace('nin_shortcut', 'conv_shortcut')}"] = tensor
    return renamed


def _split_numbers(key: str) -> tuple[str, list[int]]:
    """'double_blocks.3.img_attn' -> ('double_blocks.N.img_attn', [3]). Indices inside a block stay as they are."""
    match = re.match(r"((?:\w*blocks|down|up)\.)(\d+)(?:(\.block\.)(\d+))?", key)
    if match is None:
        return key, []
    blocks, block, layer, layer_index = match.groups()
    template = f"{blocks}N{layer}M" if layer else f"{blocks}N"
    return template + key[match.end() :], [int(number) for number in (block, layer_index) if number is not None]


def _fill(template: str, numbers: list[int]) -> str:
    for letter, number in zip("NM", numbers):
        template = re.sub(rf"(?<=\.){letter}(?=\.)", str(number), template, count=1)
    return template


def _count_blocks(state_dict: StateDict, stack: str) -> int:
    return len({key[len(stack) + 1 :].split(".")[0] for key in state_dict if key.startswith(stack + ".")})


def _expected_keys(published: StateDict, blocks: dict[str, int]) -> list[str]:
    absent = [group for group in OPTIONAL_GROUPS if not any(key.startswith(group) for key in published)]
    expected = []
    for template in TRANSFORMER_KEYS:
        if ".N." in template:
            # Of a stack that is absent altogether, the first block is missing.
            expected += [_fill(template, [i]) for i in range(max(blocks[template.split(".")[0]], 1))]
        elif not any(template.startswith(group) for group in absent):
            expected.append(template)
    return expected


def swap_halves(tensor: torch.Tensor) -> torch.Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def shorten(names: list[str], most: int = 8) -> str:
    """The first names, for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"
