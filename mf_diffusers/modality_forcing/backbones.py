"""The families of transformers that depth is grafted onto: what the pipeline and the training must know of each."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DiffusionPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.loaders import Flux2LoraLoaderMixin, ZImageLoraLoaderMixin
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model, UMT5Config, UMT5EncoderModel

from .conversion import SWAPPED_HALVES, published_names
from .text_features import encode_qwen3, encode_qwen3_without_padding, encode_t5
from .transformer_dit import ModalityForcingDiTTransformer2DModel
from .transformer_flux2 import ModalityForcingFlux2Transformer2DModel
from .transformer_z_image import ModalityForcingZImageTransformer2DModel, call_z_image, original_names


def call_directly(base: torch.nn.Module, **inputs) -> tuple[torch.Tensor, ...]:
    return base(**inputs)


@dataclass(frozen=True)
class Backbone:
    """
    A family of transformers. How positions, noise levels and predictions are meant is the same for all of them, as
    `ModalityForcingFlux2Transformer2DModel.forward` says; a transformer translates what its base means by them.

    Args:
        transformer_class: the transformer with depth; its `from_base` grafts depth onto a base.
        base_class: the text-to-image transformer.
        base_pipeline_class: the pipeline that the base comes in; `None`: `ModalityForcingPipeline`, without depth.
        autoencoder_class: of its images.
        text_encoder_class, text_config_class: of the text encoder.
        text_mlp_width: the attribute of the text encoder's config that is the width of its MLPs.
        encode_text: texts to features, as `encode_qwen3`.
        text_encoders: text encoders on the Hub by the width of the features that are made of them.
        pipeline_settings: arguments of a pipeline that is grafted onto a base, where they are not the usual ones.
        keeps_shift: whether the base's own time shift of images stays, as it differs between a base and its distilled
            twin.
        training_modes: ways to post-train it, the `mode` of finetune/post_train.py.
        call_base: calls a base as the transformer with depth is called without depth, and returns what that does as a
            tuple: `call_base(base, **inputs)`.
        frozen_in_full: start, or starts, of the names of the base's parameters that mode "full" freezes.
        lora_targets: the trunk that a LoRA adapts, as PEFT's target_modules; the depth modules train whole.
        original_names: other names that programs have for weights, as `published_names` gives them.
        swapped_halves: weights by these names whose two halves are the other way round there.
        lora_loader: diffusers' loader of LoRAs, whose converter reads LoKrs.
    """

    transformer_class: type[torch.nn.Module]
    base_class: type[torch.nn.Module]
    base_pipeline_class: type[DiffusionPipeline] | None
    autoencoder_class: type[torch.nn.Module]
    text_encoder_class: type[torch.nn.Module]
    text_config_class: type
    text_mlp_width: str
    encode_text: Callable[..., torch.Tensor]
    training_modes: tuple[str, ...]
    text_encoders: dict[int, str] = field(default_factory=dict)
    pipeline_settings: dict[str, Any] = field(default_factory=dict)
    keeps_shift: bool = False
    call_base: Callable[..., tuple[torch.Tensor, ...]] = call_directly
    frozen_in_full: str | tuple[str, ...] | None = None
    lora_targets: str | None = None
    original_names: Callable[[Iterable[str]], dict[str, tuple[str, ...]]] = lambda names: {}
    swapped_halves: frozenset[str] = frozenset()
    lora_loader: type = Flux2LoraLoaderMixin


BACKBONES = {
    "flux2": Backbone(
        transformer_class=ModalityForcingFlux2Transformer2DModel,
        base_class=Flux2Transformer2DModel,
        base_pipeline_class=Flux2KleinPipeline,
        autoencoder_class=AutoencoderKLFlux2,
        text_encoder_class=Qwen3ForCausalLM,
        text_config_class=Qwen3Config,
        text_mlp_width="intermediate_size",
        encode_text=encode_qwen3,
        text_encoders={7680: "Qwen/Qwen3-4B", 12288: "Qwen/Qwen3-8B"},  # three hidden layers side by side
        training_modes=("full", "all", "lora"),
        frozen_in_full="transformer_blocks.",
        lora_targets=(
            r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
            r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
        ),
        original_names=published_names,
        swapped_halves=frozenset(SWAPPED_HALVES),
    ),
    "z_image": Backbone(
        transformer_class=ModalityForcingZImageTransformer2DModel,
        base_class=ZImageTransformer2DModel,
        base_pipeline_class=ZImagePipeline,
        autoencoder_class=AutoencoderKL,
        text_encoder_class=Qwen3Model,
        text_config_class=Qwen3Config,
        text_mlp_width="intermediate_size",
        encode_text=encode_qwen3_without_padding,
        text_encoders={2560: "Qwen/Qwen3-4B"},
        # The layer before the last of 36; guidance as ZImagePipeline's 4, which counts from the prompt's own output.
        pipeline_settings={"text_encoder_out_layers": [35], "default_guidance_scale": 5.0},
        keeps_shift=True,
        training_modes=("full", "all", "lora"),
        call_base=call_z_image,
        frozen_in_full=("noise_refiner.", "context_refiner."),  # as what is RGB's and the text's alone in FLUX.2
        lora_targets=r"layers\.\d+\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])",
        original_names=original_names,
        lora_loader=ZImageLoraLoaderMixin,
    ),
    "dit": Backbone(
        transformer_class=ModalityForcingDiTTransformer2DModel,
        base_class=ModalityForcingDiTTransformer2DModel,
        base_pipeline_class=None,
        autoencoder_class=AutoencoderKLFlux2,
        text_encoder_class=UMT5EncoderModel,
        text_config_class=UMT5Config,
        text_mlp_width="d_ff",
        encode_text=encode_t5,
        training_modes=("all",),
    ),
}


def family_of(transformer: torch.nn.Module | str) -> str:
    """
    The name in [`BACKBONES`] of the family of a transformer, with depth or without, or of the name of its class.

    Raises:
        ValueError: it is of none of them.
    """
    for name, backbone in BACKBONES.items():
        classes = (backbone.transformer_class, backbone.base_class)
        if transformer in [cls.__name__ for cls in classes] or isinstance(transformer, classes):
            return name
    found = transformer if isinstance(transformer, str) else type(transformer).__name__
    raise ValueError(f"{found} is no transformer of a known family: {', '.join(BACKBONES)}.")


def backbone_of(transformer: torch.nn.Module) -> Backbone:
    """The family of a transformer; see [`family_of`]."""
    return BACKBONES[family_of(transformer)]
