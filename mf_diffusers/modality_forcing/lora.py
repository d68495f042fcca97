"""LoRAs of the transformer, in the names of whatever program wrote them: found, checked, loaded whole or not at all."""

import json
import math
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from diffusers.loaders import Flux2LoraLoaderMixin
from diffusers.models.modeling_utils import ModelMixin
from peft.utils.other import get_pattern_key
from torch import nn

from ..hub import list_repository, repository_file
from .backbones import Backbone, backbone_of
from .conversion import StateDict, load_safetensors, read_metadata, shorten, swap_halves


# What programs put before the name of a layer; several may stand one after another.
PREFIXES = (
    *("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "pipe.dit.", "dit."),
    *("lora_unet_", "lora_transformer_", "lycoris_"),
)
KEY = re.compile(
    r"(?P<layer>.+)\."
    r"(?:(?P<down>lora_A|lora_down|lora\.down)(?:\.\w+)?\.weight"
    r"|(?P<up>lora_B|lora_up|lora\.up)(?:\.\w+)?\.weight"
    r"|(?P<alpha>alpha))"
)
FUSED_LAYERS = {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}


class ModalityForcingLoraMixin(Flux2LoraLoaderMixin):
    """The LoRA methods of `ModalityForcingPipeline`: diffusers' own, but nothing is left out in silence."""

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | StateDict,
        adapter_name: str | None = None,
        hotswap: bool = False,
        weight_name: str | None = None,
        low_cpu_mem_usage: bool = False,
        **hub,
    ) -> None:
        r"""
        Loads a LoRA of the transformer's base, FLUX.2 [klein] or Z-Image, into the transformer.

        It is understood in diffusers' names, with `transformer.` or another prefix in front or none, in PEFT's, and in
        the base's original names, as ComfyUI, ai-toolkit and kohya's scripts write them. The scale that its file gives
        it (alpha / rank) is kept. From here on it is the only LoRA in use, as everywhere in diffusers: `set_adapters`
        brings others back and weighs them, `fuse_lora` merges, `unload_lora_weights` removes.

        Args:
            pretrained_model_name_or_path_or_dict: A safetensors file; a folder or Hub repository that holds one;
                "owner/repository/file.safetensors"; or the weights by name.
            adapter_name: To call it by in `set_adapters`. Default: a number.
            hotswap, low_cpu_mem_usage: As in diffusers.
            weight_name: The file of the folder or repository, where it holds several.
            hub: `subfolder`, and `revision`, `cache_dir`, `token`, `local_files_only` for the Hub.

        Raises:
            FileNotFoundError: There is no such file or repository.
            ValueError: A key has no place in the transformer, a width differs, or it changes nothing; nothing is
                loaded then.

        Example:
            >>> import torch
            >>> from mf_diffusers import ModalityForcingPipeline
            >>> from mf_diffusers.embedded import EMBEDDED_MODEL
            >>> pipe = ModalityForcingPipeline.from_pretrained(EMBEDDED_MODEL)
            >>> layer = "transformer.single_transformer_blocks.0.attn.to_out"
            >>> rows, columns = pipe.transformer.single_transformer_blocks[0].attn.to_out.weight.shape
            >>> lora = {f"{layer}.lora_A.weight": torch.ones(4, columns), f"{layer}.lora_B.weight": torch.ones(rows, 4)}
            >>> pipe.load_lora_weights(lora, adapter_name="style")
            >>> pipe.set_adapters("style", 0.7)
            >>> pipe.unload_lora_weights()
        """
        source, config = "The LoRA", {}
        if isinstance(pretrained_model_name_or_path_or_dict, dict):
            weights = pretrained_model_name_or_path_or_dict
        else:
            source = find_lora(pretrained_model_name_or_path_or_dict, weight_name, **hub)
            if "base_sha256" in read_metadata(source):
                raise ValueError(f"{source} is an adapter that training wrote: `load_adapter` loads it.")
            weights, config = load_safetensors(source), read_lora_config(source)
        lora = convert_lora(weights, self.transformer, config, source)
        if not lora:
            raise ValueError(f"{source} holds no LoRA: it is empty.")
        idle = {_layer(key) for key, tensor in lora.items() if not tensor.any()}
        if idle == {_layer(key) for key in lora}:
            raise ValueError(f"{source} is not loaded, for it changes nothing: a factor of each layer's is zero.")
        put_lora(
            lora,
            self.transformer,
            adapter_name=adapter_name,
            _pipeline=self,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
        )

    def unload_lora_weights(self) -> None:
        """Removes all LoRAs, but for what is merged."""
        super().unload_lora_weights()
        self.transformer.unfuse_qkv_projections()  # which a LoKr may have fused


def find_lora(name: str | Path, weight_name: str | None = None, subfolder: str | None = None, **hub) -> Path:
    """The safetensors file that `name` means, see `load_lora_weights`; from the Hub it is downloaded."""
    path, subfolder = Path(name), subfolder or ""
    if path.is_file():
        return path
    if path.is_dir():
        files = [file.name for file in sorted((path / subfolder).iterdir())]
        return path / subfolder / _only_weights(path / subfolder, files, weight_name)
    owner, _, rest = str(name).partition("/")
    repository, _, file = rest.partition("/")
    if path.is_absolute() or not repository or (name.endswith(".safetensors") and not file):
        raise FileNotFoundError(f"{name}: no such file or folder.")
    name = f"{owner}/{repository}"
    if file:
        return repository_file(name, file, **hub)
    folder = f"{subfolder}/" if subfolder else ""
    files = [file.removeprefix(folder) for file in list_repository(name, **hub) if file.startswith(folder)]
    return repository_file(name, folder + _only_weights(name, files, weight_name), **hub)


def _only_weights(where: str | Path, files: list[str], weight_name: str | None) -> str:
    found = [file for file in files if file.endswith(".safetensors") and "/" not in file]
    if weight_name is not None:
        found = [weight_name] if weight_name in files else []
    if not found:
        raise FileNotFoundError(
            f"{where} has no {weight_name or 'file that ends in .safetensors, and other formats are not read'}; "
            f"it has {shorten(files)}."
        )
    if len(found) > 1:
        raise ValueError(f"{where} has several files, {shorten(found)}: which one? Give the path of the file.")
    return found[0]


def read_lora_config(path: Path) -> dict:
    """What a LoRA's file, or PEFT's adapter_config.json beside it, says of its scale; {} where they say nothing."""
    metadata = _settings(f"{path}: its lora_adapter_metadata", read_metadata(path).get("lora_adapter_metadata", "{}"))
    peft_config = path.with_name("adapter_config.json")
    if metadata or not peft_config.is_file():
        return {name.removeprefix("transformer."): value for name, value in metadata.items()}
    return _settings(peft_config, peft_config.read_bytes())


def _settings(source, text):
    """The JSON object in a text or bytes. Raises ValueError, which names the source, when there is none."""
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source} is no JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{source} is no JSON object.")
    return settings


def lora_scale(layer: str, rank: int, config: dict | None) -> float:
    """The scale of a layer by PEFT's LoraConfig: alpha / rank, 1 where it gives no alpha."""
    if not config or "lora_alpha" not in config:
        return 1.0
    alphas = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(alphas, layer), config["lora_alpha"])
    if not isinstance(alpha, int | float):
        raise ValueError(f"The alpha of a LoRA is a number, but that of {layer} is {alpha!r}.")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def convert_lora(
    weights: StateDict, transformer: ModelMixin, config: dict | None = None, source: str | Path = "The LoRA"
) -> StateDict:
    """
    A LoRA in diffusers' names, without a prefix: of each layer `LAYER.lora_A.weight` (rank, in) and
    `LAYER.lora_B.weight` (out, rank), its scale multiplied in; or the factors of a LoKr.

    Args:
        weights: in any of the spellings that `load_lora_weights` understands.
        transformer: that it is for.
        config: see `read_lora_config`; an alpha among the weights precedes it.
        source: to name in errors.

    Raises:
        ValueError: see `load_lora_weights`; the message names the keys.
    """
    layers, backbone = linear_layers(transformer), backbone_of(transformer)
    if any(".lokr_" in key for key in weights):
        lora = _convert_lokr(weights, layers, backbone, source)
    else:
        lora = {}
        for layer, places, parts in _sort_keys(weights, spellings(layers, backbone), source):
            down, up = parts["down"], parts["up"]
            width_in, width_out = layers[places[0]]
            _check_factors(source, layer, width_in, width_out * len(places), down, up)
            up = swap_halves(up) if f"{layer}.weight" in backbone.swapped_halves else up
            for place, part in zip(places, up.chunk(len(places))):
                if f"{place}.lora_A.weight" in lora:
                    raise ValueError(f"{source} has two LoRAs of {place}, one of them as {layer}: give a file of one.")
                scale = float(parts["alpha"]) / len(down) if "alpha" in parts else lora_scale(place, len(down), config)
                lora[f"{place}.lora_A.weight"] = down.clone()
                lora[f"{place}.lora_B.weight"] = part.clone() if scale == 1 else part.float() * scale
    broken = [key for key, tensor in lora.items() if not tensor.float().isfinite().all()]
    if broken:
        raise ValueError(f"{source} holds NaN or infinite values, in {shorten(broken, 3)}: get the file anew.")
    return lora


def put_lora(lora: StateDict, transformer: ModelMixin, **options) -> None:
    """Puts what `convert_lora` returned on its layers; `options` of diffusers' `load_lora_adapter`."""
    with warnings.catch_warnings():
        # PEFT warns of other LoRAs, and of layers whose names end alike; it is told exactly which are meant.
        warnings.simplefilter("ignore")
        transformer.load_lora_adapter({f"transformer.{name}": w for name, w in lora.items()}, **options)


def linear_layers(transformer: ModelMixin) -> dict[str, tuple[int, int]]:
    """The layers that a LoRA can change, by name: their width in and out. Other LoRAs may be loaded already."""
    unused = {  # where a LoKr has fused them
        f"{name}.{layer}"
        for name, module in transformer.named_modules()
        if getattr(module, "fused_projections", False)
        for layer in (*FUSED_LAYERS["to_qkv"], *FUSED_LAYERS["to_added_qkv"])
    }
    layers = {
        name.removesuffix(".base_layer"): (module.in_features, module.out_features)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }
    return {name: widths for name, widths in layers.items() if name not in unused}


def spellings(layers: Iterable[str], backbone: Backbone) -> dict[str, tuple[str, tuple[str, ...]]]:
    """
    Every name that programs have for a layer, without their prefixes: diffusers' and the base's original one, each with
    dots or underscores.

    Returns:
        The name with dots, and the layers of diffusers that it means: three where queries, keys and values are one.
    """
    names = {layer: (layer,) for layer in layers}
    for original, parts in backbone.original_names(f"{layer}.weight" for layer in layers).items():
        names[original.removesuffix(".weight")] = tuple(part.removesuffix(".weight") for part in parts)
    spelled = {name: (name, places) for name, places in names.items()}
    return spelled | {name.replace(".", "_"): (name, places) for name, places in names.items()}


def _sort_keys(weights, spelled, source):
    """Of each layer its name, its places in the transformer, and the tensors "down", "up" and, if given, "alpha"."""
    layers, unplaced = {}, []
    for key, tensor in weights.items():
        match = KEY.fullmatch(key)
        place = match and spelled.get(_without_prefixes(match["layer"]))
        if place is None:
            unplaced.append(key)
            continue
        parts = layers.setdefault(place, {})
        if match.lastgroup in parts:
            raise ValueError(f"{source} has two LoRAs of {place[0]}, one of them as {key}: give a file of one.")
        parts[match.lastgroup] = tensor
    if unplaced:
        raise _unplaced(source, unplaced, weights)
    halved = [name for (name, _), parts in layers.items() if not {"down", "up"} <= parts.keys()]
    if halved:
        raise ValueError(f"{source} has one half alone of the LoRA of {shorten(halved, 3)}: get the whole file.")
    return [(name, places, parts) for (name, places), parts in layers.items()]


def _without_prefixes(layer):
    prefix = next((prefix for prefix in PREFIXES if layer.startswith(prefix)), None)
    return layer if prefix is None else _without_prefixes(layer.removeprefix(prefix))


def _check_factors(source, layer, width_in, width_out, down, up):
    rank = up.shape[-1] if up.ndim else 0
    if not rank or (down.shape, up.shape) != ((rank, width_in), (width_out, rank)):
        raise ValueError(
            f"{source} does not fit this transformer: {layer} leads from {width_in} values to {width_out}, but the "
            f"factors are of shape {tuple(down.shape)} and {tuple(up.shape)}. It is for a model of another size."
        )
    if not (down.is_floating_point() and up.is_floating_point()):
        raise ValueError(f"{source}: the factors of {layer} are {down.dtype} and {up.dtype}, no fractions.")


def _convert_lokr(weights, layers, backbone, source):
    """By diffusers' converters. Its loader fuses queries, keys and values where a LoKr has them in one."""
    weights = {key.removeprefix("transformer.").removeprefix("diffusion_model."): w for key, w in weights.items()}
    if any(key.startswith(("double_blocks.", "single_blocks.")) for key in weights):
        weights = {f"diffusion_model.{key}": tensor for key, tensor in weights.items()}
    try:
        lokr = backbone.lora_loader.lora_state_dict(weights)
    except ValueError as error:
        raise ValueError(f"{source} is not loaded: {error}") from error
    lokr = {key.removeprefix("transformer."): tensor for key, tensor in lokr.items()}
    attentions = {layer.rpartition(".")[0] for layer in layers}
    places = set(layers) | {f"{attention}.{fused}" for attention in attentions for fused in FUSED_LAYERS}
    unplaced = [key for key in lokr if _layer(key) not in places]
    if unplaced:
        raise _unplaced(source, unplaced, lokr)
    return lokr


def _layer(key):
    return re.split(r"\.lo(?:ra|kr)_", key)[0]


def _unplaced(source, keys, weights):
    return ValueError(
        f"{source} is not loaded, for {len(keys)} of its {len(weights)} keys have no place in this transformer: "
        f"{shorten(keys, 3)}. It is for another model, or in names that are not known."
    )
