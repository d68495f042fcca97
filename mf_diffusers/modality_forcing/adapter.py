"""What training adds to a base, as one file: depth modules, perhaps a LoRA on the trunk, and settings."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from peft.utils import get_peft_model_state_dict

from .backbones import backbone_of
from .conversion import StateDict, load_safetensors, read_metadata, save_safetensors, shorten
from .depth_processor import DepthProcessor
from .lora import ModalityForcingLoraMixin, convert_lora, put_lora


# Arguments that a result depends on besides the weights and the pipeline's own; an adapter file carries them all.
SETTINGS = {
    "graft": ("num_depth_decoder_layers", "depth_timestep_mixing", "own_depth_modulation"),
    "depth_processor": ("patch_size", "near", "far", "infinite_depth"),
}
# Of these, what belongs to the base that an adapter is on rather than to the one that it was trained on.
SETTINGS_OF_BASE = ("default_num_inference_steps", "default_guidance_scale")


@dataclass
class Adapter:
    """
    An adapter file's content.

    Args:
        base: name of the base that it was trained on, for people.
        base_sha256: `base_hash` of that base.
        settings: arguments by the groups of `SETTINGS`, and those of "pipeline".
        depth: the weights of the depth modules, by name.
        lora: the LoRA, in diffusers' names; {} where there is none.
    """

    base: str
    base_sha256: str
    settings: dict[str, dict]
    depth: StateDict
    lora: StateDict


class ModalityForcingAdapterMixin(ModalityForcingLoraMixin):
    """The adapter methods of `ModalityForcingPipeline`: what training in "lora" mode wrote, and back in."""

    _adapter_name = None  # of the LoRA of the adapter that is loaded and not merged
    _before_adapter = None  # what `unload_adapter` brings back

    def save_adapter(self, path: str | Path, base: str) -> None:
        """
        Writes what training added, see [`save_adapter`], with the settings of this pipeline.

        Args:
            base: name of the base that was trained: a Hub repository or folder.
        """
        configs = {"graft": self.transformer.config, "depth_processor": self.depth_processor.config}
        settings = {
            group: {name: configs[group][name] for name in names if name in configs[group]}
            for group, names in SETTINGS.items()
        }
        settings["pipeline"] = pipeline_settings(self)
        save_adapter(self.transformer, path, base, settings)

    def load_adapter(
        self,
        path: str | Path,
        adapter_name: str = "modality_forcing",
        weight: float = 1.0,
        merge: bool = False,
        any_base: bool = False,
    ) -> None:
        r"""
        Loads an adapter that training in "lora" mode wrote, in place of one that is loaded: its depth modules replace
        the transformer's, its LoRA goes on the trunk beside those that are in use, and its settings become the
        pipeline's. Load it before offloading is switched on.

        Args:
            path: The file, `pipeline.adapter.safetensors`.
            adapter_name: To call the LoRA by in `set_adapters`, which switches off what it does not name.
            weight: Of the LoRA; the depth modules are as they were trained.
            merge: Fold the LoRA into the weights. That is faster, and cannot be unloaded; without it, the depth modules
                that were there stay in main memory for `unload_adapter`.
            any_base: Take an adapter that was trained on another base of the same sizes, as on Z-Image for
                Z-Image-Turbo, its distilled twin. Steps and guidance of images stay those of this pipeline.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no adapter, or one of another base or other depth modules; nothing is loaded then.

        Example:
            >>> from mf_diffusers import ModalityForcingPipeline
            >>> from mf_diffusers.embedded import EMBEDDED_MODEL
            >>> pipe = ModalityForcingPipeline.from_pretrained(EMBEDDED_MODEL)
            >>> pipe.save_adapter("adapter.safetensors", base="mine/base")  # as training does; here without a LoRA
            >>> pipe.load_adapter("adapter.safetensors")
            >>> pipe.unload_adapter()
        """
        adapter = read_adapter(path)
        check_adapter(adapter, self.transformer, path, any_base)
        unknown = sorted(adapter.settings.get("pipeline", {}).keys() - pipeline_settings(self).keys())
        if unknown:
            raise ValueError(f"{path} has settings that this version does not know: {shorten(unknown)}.")
        self.unload_adapter()
        in_use = self.get_active_adapters()
        if merge and in_use:
            raise ValueError(f"The LoRAs {in_use} are in use: merge the adapter first, and load them again afterwards.")
        before = {
            "settings": pipeline_settings(self),
            "depth_processor": self.depth_processor,
            "depth": {} if merge else {name: w.cpu().clone() for name, w in depth_weights(self.transformer).items()},
        }
        put_adapter(adapter, self.transformer, adapter_name, weight, merge)
        kept = SETTINGS_OF_BASE if any_base else ()
        settings = adapter.settings.get("pipeline", {})
        self.register_to_config(**{name: value for name, value in settings.items() if name not in kept})
        if "depth_processor" in adapter.settings:
            self.register_modules(depth_processor=DepthProcessor(**adapter.settings["depth_processor"]))
        if adapter.lora and in_use:
            self.transformer.set_adapter([adapter_name, *in_use])
        if not merge:
            self._adapter_name, self._before_adapter = adapter_name if adapter.lora else None, before

    def unload_adapter(self) -> None:
        """Brings back the depth modules and settings of before `load_adapter`, and removes the adapter's LoRA. Without
        an adapter, or with one that is merged, nothing happens."""
        if self._adapter_name is not None:
            self._delete_loras([self._adapter_name])
        if self._before_adapter is not None:
            copy_weights(self._before_adapter["depth"], self.transformer)
            self.register_to_config(**self._before_adapter["settings"])
            self.register_modules(depth_processor=self._before_adapter["depth_processor"])
        self._adapter_name = self._before_adapter = None

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: str | Path | StateDict, adapter_name: str | None = None, **kwargs
    ) -> None:
        super().load_lora_weights(pretrained_model_name_or_path_or_dict, adapter_name, **kwargs)
        if self._adapter_name is not None:
            self.transformer.set_adapter([self._adapter_name, *self.get_active_adapters()])

    load_lora_weights.__doc__ = ModalityForcingLoraMixin.load_lora_weights.__doc__

    def unload_lora_weights(self) -> None:
        """Removes all LoRAs, but for what is merged, and for that of an adapter: see `unload_adapter`."""
        if self._adapter_name is None:
            super().unload_lora_weights()
        else:
            self._delete_loras([name for name in self.transformer.peft_config if name != self._adapter_name])

    def _delete_loras(self, names):
        kept = [name for name in self.transformer.peft_config if name not in names]
        if not kept:
            super().unload_lora_weights()
            return
        in_use = [name for name in self.get_active_adapters() if name in kept]
        self.delete_adapters(names)
        self.transformer.set_adapter(in_use)


def pipeline_settings(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The arguments of a pipeline that are no components."""
    return {k: v for k, v in pipe.config.items() if k not in pipe.components and not k.startswith("_")}


def base_hash(transformer: ModelMixin) -> str:
    """A hash of the base, whatever its dtype: its part of the config, and the first and last weight that a LoRA adapts,
    which tell it from its distilled twin and from what was trained on it."""
    config = {k: v for k, v in transformer.config.items() if not k.startswith("_") and "depth" not in k}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=list).encode())
    targets = backbone_of(transformer).lora_targets
    layers = [module for name, module in transformer.named_modules() if re.fullmatch(targets, name)]
    for layer in (layers[0], layers[-1]):
        weight = getattr(layer, "base_layer", layer).weight
        digest.update(weight.detach().cpu().bfloat16().contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def depth_weights(transformer: ModelMixin) -> StateDict:
    """The weights of the depth modules, by name."""
    return {name: tensor for name, tensor in transformer.state_dict().items() if transformer.is_depth_parameter(name)}


def save_adapter(transformer: ModelMixin, path: str | Path, base: str, settings: dict | None = None) -> None:
    """
    Writes the depth modules and the LoRA named "default", if any, to one safetensors file. Its alpha is its rank.

    Args:
        base: name of the base, for people: a Hub repository or folder.
        settings: see [`Adapter`].

    Raises:
        ValueError: the LoRA's alpha is not its rank, or it adapts the depth modules too.
    """
    tensors = depth_weights(transformer)
    adapted = [name for name in tensors if "lora_" in name]
    if adapted:
        raise ValueError(
            f"A LoRA goes on the trunk (`Backbone.lora_targets`), but there is {adapted[0]}: depth modules train whole."
        )
    metadata = {"base": base, "base_sha256": base_hash(transformer), "settings": json.dumps(settings or {})}
    if getattr(transformer, "peft_config", None):
        lora = get_peft_model_state_dict(transformer)
        tensors |= {f"transformer.{name}": tensor for name, tensor in lora.items()}
        lora_config = transformer.peft_config["default"]
        if lora_config.lora_alpha != lora_config.r:
            raise ValueError(
                f"An adapter file has lora_alpha = r, but they are {lora_config.lora_alpha}, {lora_config.r}."
            )
    save_safetensors({name: tensor.detach().cpu() for name, tensor in tensors.items()}, path, metadata)


def read_adapter_metadata(path: str | Path) -> dict[str, Any]:
    """
    The "base", "base_sha256" and "settings" of an adapter file, which [`Adapter`] describes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a safetensors file, or not an adapter.
    """
    metadata = read_metadata(path)
    if not {"base", "base_sha256"} <= metadata.keys():
        raise ValueError(
            f"{path} is no adapter, for it does not name the base that it was trained on: a LoRA of another program "
            "goes to `load_lora_weights`."
        )
    settings = json.loads(metadata.get("settings", "{}"))
    unknown = [
        f"{group}.{name}" for group in SETTINGS for name in settings.get(group, ()) if name not in SETTINGS[group]
    ]
    if unknown:
        raise ValueError(f"{path} has settings that this version does not know: {shorten(unknown)}.")
    return {"base": metadata["base"], "base_sha256": metadata["base_sha256"], "settings": settings}


def read_adapter(path: str | Path) -> Adapter:
    """An adapter file's content; errors as of `read_adapter_metadata`."""
    metadata, tensors = read_adapter_metadata(path), load_safetensors(path)
    depth = {name: tensor for name, tensor in tensors.items() if not name.startswith("transformer.")}
    lora = {name.removeprefix("transformer."): tensors[name] for name in tensors.keys() - depth.keys()}
    return Adapter(**metadata, depth=depth, lora=lora)


def load_adapter(transformer: ModelMixin, path: str | Path, weight: float = 1.0, merge: bool = False) -> None:
    """
    Loads what [`save_adapter`] wrote onto a freshly grafted base.

    Args:
        weight: of the LoRA.
        merge: fold the LoRA into the weights, so that nothing but a plain transformer remains.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not an adapter, or not one of this base and these depth modules; the message names both.
    """
    adapter = read_adapter(path)
    check_adapter(adapter, transformer, path)
    put_adapter(adapter, transformer, weight=weight, merge=merge)


def check_adapter(
    adapter: Adapter, transformer: ModelMixin, path: str | Path = "The adapter", any_base: bool = False
) -> None:
    """Raises ValueError where an adapter is not for this transformer; the message names the bases or the modules."""
    if backbone_of(transformer).lora_targets is None:
        raise ValueError(f"{path} is an adapter, and there are none for a {type(transformer).__name__}.")
    if not any_base and adapter.base_sha256 != base_hash(transformer):
        raise ValueError(
            f"{path} was trained on {adapter.base}, which is not the base of this transformer: graft onto "
            f"{adapter.base}, or say any_base=True for a base of the same sizes, a distilled twin."
        )
    own = depth_weights(transformer)
    other = sorted(
        name
        for name in own.keys() | adapter.depth.keys()
        if name not in own or name not in adapter.depth or own[name].shape != adapter.depth[name].shape
    )
    if other:
        raise ValueError(
            f"{path} and this transformer have different depth modules, for one {other[0]}: graft with the number of "
            "decoder layers that it was trained with."
        )
    convert_lora(adapter.lora, transformer, source=path)


def copy_weights(weights: StateDict, transformer: ModelMixin) -> None:
    """Into the transformer's, in its dtype."""
    parameters = dict(transformer.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)


def put_adapter(
    adapter: Adapter,
    transformer: ModelMixin,
    adapter_name: str = "modality_forcing",
    weight: float = 1.0,
    merge: bool = False,
) -> None:
    """Puts an adapter into the transformer that `check_adapter` found to be its own; see `load_adapter`."""
    if adapter.lora:
        put_lora(adapter.lora, transformer, adapter_name=adapter_name)
        transformer.set_adapters([adapter_name], [weight])
    copy_weights(adapter.depth, transformer)
    if adapter.lora and merge:
        transformer.fuse_lora()
        transformer.unload_lora()
