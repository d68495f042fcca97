"""The families of transformers that depth is grafted onto: what the pipeline and the training must know of each."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline, Flux2Transformer2DModel
from transformers import Qwen3Config, Qwen3ForCausalLM, UMT5Config, UMT5EncoderModel

from .text_features import encode_qwen3, encode_t5
from .transformer_dit import ModalityForcingDiTTransformer2DModel
from .transformer_flux2 import ModalityForcingFlux2Transformer2DModel


@dataclass(frozen=True)
class Backbone:
    """
    A family of transformers. How positions, noise levels and predictions are meant is the same for all of them, as
    `ModalityForcingFlux2Transformer2DModel.forward` says; a transformer translates what its base means by them.

    Args:
        transformer_class: the transformer with depth; its `from_base` grafts depth onto a base.
        base_class: the text-to-image transformer.
        base_pipeline_class: the text-to-image pipeline; None: a `ModalityForcingPipeline` without depth.
        text_encoder_class, text_config_class: of the text encoder.
        text_mlp_width: the attribute of the text encoder's config that is the width of its MLPs.
        encode_text: texts to features, as `encode_qwen3`.
        training_modes: ways to post-train it, the `mode` of finetune/post_train.py.
        frozen_in_full: start of the names of the base's parameters that mode "full" freezes.
        lora_targets: the trunk that a LoRA adapts, as PEFT's target_modules; the depth modules train whole.
    """

    transformer_class: type[torch.nn.Module]
    base_class: type[torch.nn.Module]
    base_pipeline_class: type[DiffusionPipeline] | None
    text_encoder_class: type[torch.nn.Module]
    text_config_class: type
    text_mlp_width: str
    encode_text: Callable[..., torch.Tensor]
    training_modes: tuple[str, ...]
    frozen_in_full: str | None = None
    lora_targets: str | None = None


BACKBONES = {
    "flux2": Backbone(
        transformer_class=ModalityForcingFlux2Transformer2DModel,
        base_class=Flux2Transformer2DModel,
        base_pipeline_class=Flux2KleinPipeline,
        text_encoder_class=Qwen3ForCausalLM,
        text_config_class=Qwen3Config,
        text_mlp_width="intermediate_size",
        encode_text=encode_qwen3,
        training_modes=("full", "all", "lora"),
        frozen_in_full="transformer_blocks.",
        lora_targets=(
            r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
            r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
        ),
    ),
    "dit": Backbone(
        transformer_class=ModalityForcingDiTTransformer2DModel,
        base_class=ModalityForcingDiTTransformer2DModel,
        base_pipeline_class=None,
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
