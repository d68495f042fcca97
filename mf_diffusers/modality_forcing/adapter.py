"""What training adds to a FLUX.2 base, as one file: the depth modules, and the LoRA on the trunk if there is one."""

import hashlib
import json
from pathlib import Path

import torch
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open

from .conversion import load_safetensors, save_safetensors
from .transformer_flux2 import ModalityForcingFlux2Transformer2DModel


# The trunk that a LoRA adapts, as PEFT's target_modules; the depth modules train whole.
LORA_TARGET_MODULES = (
    r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
)


def base_hash(transformer: ModalityForcingFlux2Transformer2DModel) -> str:
    """A hash of the base: its part of the config and one of its weights, which tells it from its distilled twin."""
    config = {k: v for k, v in transformer.config.items() if not k.startswith("_") and "depth" not in k}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=list).encode())
    to_q = transformer.transformer_blocks[0].attn.to_q
    weight = getattr(to_q, "base_layer", to_q).weight
    digest.update(weight.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_adapter(transformer: ModalityForcingFlux2Transformer2DModel, path: str | Path, base: str) -> None:
    """
    Writes the depth modules and the LoRA named "default", if any, to one safetensors file. Its alpha is its rank.

    Args:
        base: name of the base, for people: a Hub repository or folder.

    Raises:
        ValueError: the LoRA's alpha is not its rank, or it adapts the depth modules too.
    """
    tensors = {name: tensor for name, tensor in transformer.state_dict().items() if "depth" in name}
    adapted = [name for name in tensors if "lora_" in name]
    if adapted:
        raise ValueError(
            f"A LoRA goes on the trunk (LORA_TARGET_MODULES), but there is {adapted[0]}: depth modules train whole."
        )
    metadata = {"base": base, "base_sha256": base_hash(transformer)}
    if getattr(transformer, "peft_config", None):
        lora = get_peft_model_state_dict(transformer)
        tensors |= {f"transformer.{name}": tensor for name, tensor in lora.items()}
        lora_config = transformer.peft_config["default"]
        if lora_config.lora_alpha != lora_config.r:
            raise ValueError(
                f"An adapter file has lora_alpha = r, but they are {lora_config.lora_alpha}, {lora_config.r}."
            )
    save_safetensors({name: tensor.detach().cpu() for name, tensor in tensors.items()}, path, metadata)


def load_adapter(transformer: ModalityForcingFlux2Transformer2DModel, path: str | Path, merge: bool = False) -> None:
    """
    Loads what [`save_adapter`] wrote onto a freshly grafted base.

    Args:
        merge: fold the LoRA into the weights, so that nothing but a plain transformer remains.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a safetensors file, not an adapter, or one of another base; the message names both.
    """
    tensors = load_safetensors(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if "base_sha256" not in metadata:
        raise ValueError(f"{path} is no adapter: it does not name the base that it was trained on.")
    if metadata["base_sha256"] != base_hash(transformer):
        raise ValueError(
            f"{path} was trained on {metadata['base']}, which is not the base of this transformer: graft onto "
            f"{metadata['base']}."
        )
    lora = {name: tensor for name, tensor in tensors.items() if name.startswith("transformer.")}
    depth = {name: tensor for name, tensor in tensors.items() if name not in lora}
    own = {name for name in transformer.state_dict() if "depth" in name}
    if set(depth) != own:
        raise ValueError(
            f"{path} and this transformer have different depth modules, for one "
            f"{sorted(set(depth) ^ own)[0]}: graft with the number of decoder layers that it was trained with."
        )
    with torch.no_grad():
        parameters = dict(transformer.named_parameters())
        for name, tensor in depth.items():
            parameters[name].copy_(tensor)
    if lora:
        transformer.load_lora_adapter(lora)
        if merge:
            transformer.fuse_lora()
            transformer.unload_lora()
