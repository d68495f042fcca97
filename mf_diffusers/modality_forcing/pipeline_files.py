"""A pipeline's files in either layout: what its parts are, and whether they fit, before anything is loaded."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler
from transformers import PreTrainedTokenizerBase, Qwen3Config, T5EncoderModel

from ..checkpoint_files import CheckpointFiles, EmptyWeights
from .backbones import BACKBONES, Backbone, family_of
from .conversion import convert_published_autoencoder, convert_published_transformer
from .depth_processor import DepthProcessor
from .model_files import build_empty, check_weights, read_arguments, read_model, short
from .transformer_flux2 import ModalityForcingFlux2Transformer2DModel


MODELS = {  # parts with weights: the classes that each can be of
    "transformer": tuple(backbone.transformer_class for backbone in BACKBONES.values()),
    "vae": tuple(dict.fromkeys(backbone.autoencoder_class for backbone in BACKBONES.values())),
    "text_encoder": (*(backbone.text_encoder_class for backbone in BACKBONES.values()), T5EncoderModel),
}
SETTINGS = {  # parts with a config alone, and its file
    "scheduler": (FlowMatchEulerDiscreteScheduler, "scheduler_config.json"),
    "depth_scheduler": (FlowMatchEulerDiscreteScheduler, "scheduler_config.json"),
    "depth_processor": (DepthProcessor, DepthProcessor.config_name),
}
TEXT_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
PIPELINE_FILES = ["model_index.json", *(f"*/{pattern}" for pattern in TEXT_FILES)]
"""What is downloaded of a text encoder's repository, and of a pipeline's."""
PARTS = (*MODELS, *SETTINGS, "tokenizer")
OPTIONAL_PARTS = ("text_encoder", "tokenizer", "depth_scheduler", "depth_processor")


@dataclass
class Part:
    """
    A part of a pipeline, or a transformer alone.

    Args:
        cls: its class.
        config: of a model of transformers as its file has it, otherwise the constructor's arguments.
        weights: by the headers of their files, without memory; {} where it has none.
    """

    cls: type
    config: dict[str, Any]
    weights: EmptyWeights


def read_pipeline(files: CheckpointFiles, pipeline_class: type, besides: Collection[str] = ()) -> dict[str, Part]:
    """
    The parts of a diffusers folder, and under "" the pipeline's own settings.

    Args:
        pipeline_class: `ModalityForcingPipeline`.
        besides: parts that the caller has.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the folder is another pipeline's, or a part is damaged, impossible, or does not fit the others; the
            message names the file and what is wrong.
    """
    index, where = files.read_json("model_index.json"), files.path("model_index.json")
    parts = {"": Part(pipeline_class, read_arguments(index, pipeline_class, where, besides=PARTS), {})}
    for name in PARTS:
        if name in besides:
            continue
        cls = _class_of(index, name, where)
        if cls is None:
            continue
        if name == "tokenizer":
            parts[name] = Part(cls, {}, {})
        elif name in MODELS:
            parts[name] = Part(cls, *read_model(files, name, cls))
        else:
            file = f"{name}/{SETTINGS[name][1]}"
            config = read_arguments(files.read_json(file), cls, files.path(file))
            _construct(cls, config, files.path(file))
            parts[name] = Part(cls, config, {})
    _check_fit(parts, files)
    return parts


def open_tokenizer(cls: type, folder: str | Path, text_encoder: Part) -> PreTrainedTokenizerBase:
    """
    Args:
        cls: of the tokenizer, or AutoTokenizer.

    Raises:
        ValueError: there is no tokenizer in `folder`, it is damaged, or has more tokens than the text encoder.
    """
    try:
        tokenizer = cls.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers of transformers raise Exception itself
        raise ValueError(f"{folder} holds no tokenizer that can be read: {error}") from error
    if len(tokenizer) > text_encoder.config["vocab_size"]:
        raise ValueError(
            f"The tokenizer in {folder} has {len(tokenizer)} tokens, but the text encoder knows "
            f"{text_encoder.config['vocab_size']}: they do not belong together."
        )
    return tokenizer


def read_published(files: CheckpointFiles) -> dict[str, Part]:
    """The parts of a checkpoint in the published layout, under diffusers' names; errors as of `read_pipeline`."""
    where = files.path("model.safetensors")
    transformer = _converted(convert_published_transformer, where, files.read_weights("model.safetensors"))
    parts = {"transformer": _fitting(ModalityForcingFlux2Transformer2DModel, *transformer, where)}
    halves = [f"ae_{half}.safetensors" for half in ("encoder", "decoder")]
    if any(half in files for half in halves):
        for half in halves:
            if half not in files:
                raise FileNotFoundError(f"{files.path(half)} is missing.")
        where = f"{files.path(halves[0])} and {halves[1]}"
        autoencoder = _converted(convert_published_autoencoder, where, *map(files.read_weights, halves))
        parts["vae"] = _fitting(AutoencoderKLFlux2, *autoencoder, where)
    return parts


def read_base(files: CheckpointFiles, backbone: Backbone, besides: Collection[str] = ()) -> None:
    """Raises, as `read_pipeline`, where the models in a folder of a text-to-image base, FLUX.2 [klein], are damaged."""
    models = {
        "transformer": backbone.base_class,
        "vae": backbone.autoencoder_class,
        "text_encoder": backbone.text_encoder_class,
    }
    for name, cls in models.items():
        if name not in besides:
            read_model(files, name, cls)


def _converted(convert, where, *weights):
    try:
        return convert(*weights)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _fitting(cls, config, weights, where):
    check_weights(build_empty(cls, config, weights, where), weights, where)
    return Part(cls, config, weights)


def _class_of(index, name, where):
    """The class of a part by model_index.json, None where it is absent and may be."""
    entry = index.get(name)
    if name in OPTIONAL_PARTS and (entry is None or entry == [None, None]):
        return None
    if name not in index:
        raise ValueError(f"{where} names no {name}.")
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(one, str) for one in entry)):
        raise ValueError(f"{where}: {name} must be a library and a class, but it is {short(entry)}.")
    library, class_name = entry
    if name == "tokenizer":
        cls = getattr(transformers, class_name, None)
        if library == "transformers" and isinstance(cls, type) and issubclass(cls, PreTrainedTokenizerBase):
            return cls
        raise ValueError(f"{where}: {name} must be a tokenizer of transformers, but it is {short(entry)}.")
    classes = MODELS[name] if name in MODELS else SETTINGS[name][:1]
    for cls in classes:
        home = cls.__module__.partition(".")[0].replace("mf_diffusers", "modality_forcing")
        if [home, cls.__name__] == entry:
            return cls
    names = " or ".join(cls.__name__ for cls in classes)
    raise ValueError(f"{where}: {name} must be of class {names}, but it is {short(entry)}.")


def _construct(cls, config, where):
    try:
        return cls(**config)
    except Exception as error:  # a config is anybody's, and so is what comes of it
        raise ValueError(f"{where}: {error}") from error


def _check_fit(parts, files):
    """Raises ValueError where parts of a pipeline do not fit one another."""
    transformer = parts["transformer"].config if "transformer" in parts else {}
    if transformer.get("depth_channels") is not None:
        for name in ("depth_scheduler", "depth_processor"):
            if name not in parts:
                raise ValueError(f"{files.path('model_index.json')} names no {name}, but the transformer has depth.")
        side = parts["depth_processor"].config["patch_size"]
        if side**2 != transformer["depth_channels"]:
            raise ValueError(
                f"{files.path('depth_processor')}: patch_size is {side}, but the transformer takes depth tokens of "
                f"{transformer['depth_channels']} values: it must be {math.isqrt(transformer['depth_channels'])}."
            )
    if "vae" in parts and "transformer" in parts:
        backbone = BACKBONES[family_of(parts["transformer"].cls.__name__)]
        if parts["vae"].cls is not backbone.autoencoder_class:
            raise ValueError(
                f"{files.path('model_index.json')}: the vae is a {parts['vae'].cls.__name__}, but a "
                f"{parts['transformer'].cls.__name__} was made for a {backbone.autoencoder_class.__name__}."
            )
    if "text_encoder" in parts and "transformer" in parts:
        check_text_encoder(
            parts["text_encoder"],
            parts[""].config["text_encoder_out_layers"],
            parts["transformer"].cls.shape_of(transformer).text_channels,
            files.path("text_encoder"),
        )
        if "tokenizer" not in parts:
            raise ValueError(f"{files.path('model_index.json')} names a text_encoder, but no tokenizer.")


def check_text_encoder(text_encoder: Part, out_layers: list[int], width: int, where: str) -> None:
    """
    Args:
        out_layers: whose hidden states of Qwen3 become the features; of no concern to a T5 encoder.
        width: of the features that the transformer takes.
        where: the text encoder is from, for messages.

    Raises:
        ValueError: it has no such layers, or its features are of another width.
    """
    config = text_encoder.cls.config_class.from_dict(text_encoder.config)
    features = config.hidden_size
    if isinstance(config, Qwen3Config):
        outside = [layer for layer in out_layers if not 0 <= layer <= config.num_hidden_layers]
        if outside or not out_layers:
            raise ValueError(
                f"text_encoder_out_layers is {list(out_layers)}, but the text encoder {where} has layers 0 to "
                f"{config.num_hidden_layers}."
            )
        features *= len(out_layers)
    if features != width:
        raise ValueError(
            f"The text encoder {where} makes features of width {features}, but the transformer takes {width}: it is "
            "the text encoder of another model."
        )
