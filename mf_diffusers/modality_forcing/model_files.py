"""A model's config against the header of its weights: what does not fit is found before any memory is taken."""

import inspect
import math
import re
import threading
import types
from collections import defaultdict
from collections.abc import Collection
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PretrainedConfig, PreTrainedModel

from ..checkpoint_files import CheckpointFiles, EmptyWeights
from .conversion import shorten


# A model that is built without memory may have this many times the values that its weights have: some are drawn twice.
SLACK = 2
# A config whose counts make lists before a layer is there to be counted.
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "num_decoder_layers")
# What a number in a config can be; those of widths and depths show in the weights.
RANGES = {
    "shift": (1e-6, 1e6),
    "num_train_timesteps": (1, 100_000),
    "eps": (0, 1),
    "batch_norm_eps": (0, 1),
    "rope_theta": (1, 1e12),
    "max_sequence_length": (1, 32_768),
    "default_sample_size": (1, 16_384),
    "default_num_inference_steps": (1, 10_000),
    "default_depth_steps": (1, 10_000),
    "default_guidance_scale": (0, 1000),
    "default_depth_guidance_scale": (0, 1000),
    "default_log2_alpha": (-30, 30),
}


def read_model(files: CheckpointFiles, part: str, cls: type) -> tuple[dict[str, Any], EmptyWeights]:
    """
    The config of a model, with the defaults of what it leaves out, and its weights by their headers.

    Args:
        part: folder of the checkpoint, "" where the model is all of it.
        cls: a model class of diffusers or transformers.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, a value is impossible, or config and weights do not fit; the message names the
            file and the value or the weights.
    """
    prefix = f"{part}/" if part else ""
    where = files.path(f"{prefix}config.json")
    raw = files.read_json(f"{prefix}config.json")
    weights = read_weights(files, part, issubclass(cls, PreTrainedModel))
    if issubclass(cls, PreTrainedModel):
        config = raw
        arguments = {"config": read_transformers_config(raw, cls, len(weights), where)}
    else:
        config = arguments = read_arguments(raw, cls, where)
    model = build_empty(cls, arguments, weights, where, quantized="quantization_config" in raw)
    if isinstance(model, PreTrainedModel) and model.base_model is model:  # its file may have been a head's
        weights = {name.removeprefix(f"{cls.base_model_prefix}."): tensor for name, tensor in weights.items()}
    if "quantization_config" not in raw:
        check_weights(model, weights, files.path(part) if part else files.name)
    return config, weights


def read_weights(files: CheckpointFiles, part: str, of_transformers: bool) -> EmptyWeights:
    """The weights in a folder, in one safetensors file or in several; errors as of `read_model`."""
    prefix, names = f"{part}/" if part else "", files.folder(part)
    single = "model.safetensors" if of_transformers else "diffusion_pytorch_model.safetensors"
    index = f"{single}.index.json"
    order = [single, index] if of_transformers else [index, single]  # in which the libraries look for them
    found = next((name for name in order if name in names), None)
    if found is None:
        raise FileNotFoundError(
            f"{files.path(prefix + single)} is missing; only safetensors is read. There is {shorten(names)}."
        )
    if found == single:
        return files.read_weights(prefix + single)
    places = files.read_json(prefix + index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise ValueError(f"{files.path(prefix + index)} must have a weight_map, the file of each weight.")
    absent = sorted(set(places.values()) - set(names))
    if absent:
        raise FileNotFoundError(f"{files.path(prefix + absent[0])} is missing, which {index} names.")
    weights = {}
    for shard in sorted(set(places.values())):
        weights |= files.read_weights(prefix + shard)
    if weights.keys() != places.keys():
        other = shorten(sorted(weights.keys() ^ places.keys()))
        raise ValueError(f"{files.path(prefix + index)} and the files that it names differ in the weights {other}.")
    return weights


def read_arguments(raw: dict[str, Any], cls: type, where: str, besides: Collection[str] = ()) -> dict[str, Any]:
    """
    The constructor's arguments of a class by a config: with its defaults, and checked by its annotations and `RANGES`.

    Args:
        where: the config's path, for messages.
        besides: names in the config that are not of concern here.

    Raises:
        ValueError: it is of another class, or a value is of the wrong type or impossible, or, in a class of this
            package, unknown; the message names it.
    """
    if raw.get("_class_name", cls.__name__) != cls.__name__:
        raise ValueError(f"{where} is of a {raw['_class_name']}; a {cls.__name__} is needed.")
    hints, arguments = get_type_hints(cls.__init__), {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name == "self" or name in besides or parameter.kind is parameter.VAR_KEYWORD:
            continue
        if name not in raw:
            arguments[name] = parameter.default
            continue
        value, hint = raw[name], hints.get(name, Any)
        if not (fits(value, hint) or (value is None and parameter.default is None)):
            kind = str(hint).removeprefix("<class '").removesuffix("'>")
            raise ValueError(f"{where}: {name} must be of type {kind}, but it is {short(value)}.")
        low, high = RANGES.get(name, (-math.inf, math.inf))
        if isinstance(value, int | float) and not low <= value <= high:
            raise ValueError(f"{where}: {name} must be from {low:g} to {high:g}, but it is {short(value)}.")
        arguments[name] = value
    known = {*arguments, *besides, "quantization_config"}
    unknown = [name for name in raw if name not in known and not name.startswith("_")]
    if unknown and cls.__module__.startswith("mf_diffusers."):
        raise ValueError(f"{where}: this version knows no {shorten(unknown)}; is a name misspelt, or the file newer?")
    return arguments


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of an annotated type; a list does for a tuple, a whole number for a finite float."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(fits(one, inner[0] if inner else Any) for one in value)
    if hint is Any:
        return True
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is (origin or hint) or (hint is tuple and type(value) is list)


def read_transformers_config(
    raw: dict[str, Any], cls: type[PreTrainedModel], num_weights: int, where: str
) -> PretrainedConfig:
    """The config of a model of transformers, which checks types itself; errors as of `read_model`."""
    config_class = cls.config_class
    if raw.get("model_type") != config_class.model_type:
        raise ValueError(f"{where} is of model type {raw.get('model_type')!r}; {config_class.model_type!r} is needed.")
    for name in LAYER_COUNTS:
        if type(raw.get(name)) is int and raw[name] > num_weights:
            raise ValueError(f"{where}: {name} is {raw[name]:,}, but the weights are {num_weights} tensors.")
    try:
        return config_class.from_dict(raw)
    except Exception as error:  # a config is anybody's, and so is what comes of it
        raise ValueError(f"{where}: {_one_line(error)}") from error


def build_empty(
    cls: type, arguments: dict[str, Any], weights: EmptyWeights, where: str, quantized: bool = False
) -> torch.nn.Module:
    """
    A model on the meta device, as far as it is about as large as its weights.

    Args:
        weights: on any device.
        where: the config that the arguments are from, for messages.
        quantized: the weights are packed, at most eight in a value.

    Raises:
        ValueError: it is larger, or the arguments make no model.
    """
    size = sum(tensor.numel() for tensor in weights.values())
    most_values, most_tensors = SLACK * size * (8 if quantized else 1), SLACK * len(weights)
    values = tensors = 0
    thread = threading.get_ident()

    def count(module, name, parameter):
        nonlocal values, tensors
        if threading.get_ident() == thread and parameter is not None:
            values, tensors = values + parameter.numel(), tensors + 1
            if values > most_values or tensors > most_tensors:
                raise OverflowError

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            model = cls(**arguments)
        if isinstance(model, PreTrainedModel):
            model.tie_weights()  # transformers 5.0 does so on real devices only
        return model
    except OverflowError as error:
        raise ValueError(
            f"{where} describes a model of more than {values:,} values, but its weights are {size:,} in "
            f"{len(weights)} tensors: they do not belong together."
        ) from error
    except Exception as error:  # a config is anybody's, and so is what comes of it
        raise ValueError(f"{where} makes no {cls.__name__}: {_one_line(error)}") from error
    finally:
        hook.remove()


def check_weights(model: torch.nn.Module, weights: EmptyWeights, where: str) -> None:
    """
    Args:
        model: on the meta device.
        weights: on any device.
        where: they are from, for messages.

    Raises:
        ValueError: weights are missing, unknown to the model, or of other shapes; the message names them.
    """
    expected = model.state_dict()
    shared = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared[id(parameter)].add(name)
    tied = {name: names for names in shared.values() for name in names}
    missing = [name for name in expected if name not in weights and not tied.get(name, set()) & weights.keys()]
    unknown = [
        name
        for name in weights
        if name not in expected
        and not any(re.search(p, name) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    ]
    if missing:
        raise ValueError(f"The weights in {where} lack {shorten(missing, 3)}.")
    if unknown:
        raise ValueError(f"The weights in {where} hold what the config does not describe: {shorten(unknown, 3)}.")
    for name, tensor in weights.items():
        if name in expected and tensor.shape != expected[name].shape:
            raise ValueError(
                f"{where}: {name} has shape {tuple(tensor.shape)} in the weights, but by the config "
                f"{tuple(expected[name].shape)}."
            )
        if name in expected and tensor.is_floating_point() != expected[name].is_floating_point():
            raise ValueError(f"{where}: {name} is stored as {tensor.dtype}, which is no type of weights.")


def check_loaded(**models: torch.nn.Module | None) -> None:
    """Raises ValueError where a model was opened without some of its weights, which diffusers leaves empty."""
    for part, model in models.items():
        empty = [name for name, parameter in model.named_parameters() if parameter.is_meta] if model else []
        if empty:
            raise ValueError(f"The weights of the {part} lack {shorten(empty, 3)}.")


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _one_line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split()).partition(" Exception raised from ")[0]
    return text if len(text) <= 300 else f"{text[:297]}..."
