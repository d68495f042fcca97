"""Checkpoints: what one is, opening one as a pipeline, and turning one layout into the other."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mf_diffusers import ModalityForcingPipeline
from mf_diffusers.checkpoint_files import CheckpointFiles
from mf_diffusers.files import save_whole
from mf_diffusers.hub import repository_folder
from mf_diffusers.modality_forcing.adapter import read_adapter_metadata
from mf_diffusers.modality_forcing.backbones import BACKBONES
from mf_diffusers.modality_forcing.conversion import PUBLISHED_SHIFT_MU
from mf_diffusers.modality_forcing.inputs import check_components
from mf_diffusers.modality_forcing.loaders import PUBLISHED_FILES
from mf_diffusers.modality_forcing.lora import find_lora
from mf_diffusers.modality_forcing.model_files import read_model
from mf_diffusers.modality_forcing.pipeline_files import (
    MODELS,
    PIPELINE_FILES,
    Part,
    read_base,
    read_pipeline,
    read_published,
)


@dataclass
class Checkpoint:
    """
    Args:
        kind: "diffusers pipeline", "diffusers transformer" or "published layout".
        parts: by name; see [`Part`].
        facts: beyond the parts, by name.
    """

    kind: str
    parts: dict[str, Part]
    facts: dict[str, Any]


def load_pipeline(
    model: str | Path,
    device: str | torch.device,
    dtype: torch.dtype,
    text_encoder: str | Path | None = None,
    lora: str | Path | None = None,
    offload: str = "none",
    offline: bool = False,
    adapter: str | Path | None = None,
    lora_weight: float = 1.0,
    size: int | None = None,
    any_base: bool = False,
) -> ModalityForcingPipeline:
    """The pipeline of a diffusers folder, a published folder or a Hub repository of either kind, ready to run.

    Args:
        model: folder or Hub id; with `adapter` also its base, FLUX.2 [klein] or Z-Image.
        device, dtype: where it runs, and in which type; the autoencoder computes in float32.
        text_encoder: folder or Hub id. None: the model's own, or the one that fits.
        lora: file, folder or Hub id.
        offload: "none", "model" (one component at a time on the device) or "group" (one layer at a time).
        offline: ask no server.
        adapter: file that training in "lora" mode wrote; it is merged.
        lora_weight: of `lora`.
        size: in place of the checkpoint's `default_sample_size`.
        any_base: take an `adapter` of another base of the same sizes, of which `model` is the distilled twin.

    Raises FileNotFoundError when there is no such model or a file of it is missing; ValueError when it is none of ours,
    damaged, or its parts do not fit: this is found out before memory is taken.
    """
    hub = {"local_files_only": offline}
    if not math.isfinite(lora_weight):
        raise ValueError(f"lora_weight={lora_weight} must be a finite number.")
    if lora:
        lora = find_lora(lora, **hub)  # what is not there is found out before the model is loaded
    if adapter:
        read_adapter_metadata(adapter)
    pipe = _open_pipeline(model, dtype, text_encoder is None, adapter, any_base, hub)
    if not pipe.has_depth:
        raise ValueError(f"model={model} is a text-to-image base without depth: post-train it (finetune/).")
    if pipe.text_encoder is None:
        pipe.load_text_encoder(text_encoder or "auto", dtype, **hub)
    check_components(pipe)
    if size is not None:
        pipe.register_to_config(default_sample_size=size)
    if lora:
        pipe.load_lora_weights(lora, adapter_name="lora")
        pipe.set_adapters("lora", lora_weight)
    if offload == "none":
        return pipe.to(device)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(torch.device(device), offload_type="leaf_level", use_stream=device.startswith("cuda"))
    return pipe


def _open_pipeline(model, dtype, own_text, adapter, any_base, hub):
    """Of a checkpoint of any kind, with the adapter merged; without a text encoder, unless it has one of its own."""
    if Path(model).is_file():
        raise ValueError(f"model={model} is a file: give the folder that holds it and the autoencoder.")
    folder = repository_folder(model, [*PIPELINE_FILES, *PUBLISHED_FILES], **hub)
    files = CheckpointFiles(folder)
    absent = {} if own_text else {"text_encoder": None, "tokenizer": None}
    if "model_index.json" in files:
        backbone = _backbone_of_base(files.read_json("model_index.json").get("_class_name"))
        if adapter and backbone is not None:
            read_base(files, backbone, besides=absent)
            base = backbone.base_pipeline_class.from_pretrained(folder, dtype=dtype, use_safetensors=True, **absent)
            return ModalityForcingPipeline.from_base(base, adapter=adapter, any_base=any_base)
        pipe = ModalityForcingPipeline.from_pretrained(folder, dtype={"vae": torch.float32, "default": dtype}, **absent)
    elif "model.safetensors" in files:
        if "vae" not in read_published(files):
            raise FileNotFoundError(f"model={model} has no autoencoder: ae_encoder.safetensors is missing.")
        pipe = ModalityForcingPipeline.from_published(folder, text_encoder=None, dtype=dtype)
    else:
        raise FileNotFoundError(
            f"model={model} has neither model_index.json (a diffusers pipeline) nor model.safetensors (the published "
            "layout)."
        )
    if adapter:
        pipe.load_adapter(adapter, merge=True, any_base=any_base)
    return pipe


def _backbone_of_base(class_name):
    """Of the pipeline class of a text-to-image base; `None` where it is no such class."""
    bases = (one for one in BACKBONES.values() if one.base_pipeline_class is not None)
    return next((one for one in bases if one.base_pipeline_class.__name__ == class_name), None)


def convert_checkpoint(
    src: str | Path,
    dst: Path,
    text_encoder: str | Path | None = None,
    prefix: str = "",
    dtype: str = "auto",
    overwrite: bool = False,
    offline: bool = False,
) -> tuple[str, int]:
    """Write a published checkpoint as a diffusers folder, or a diffusers folder as one published file.

    Args:
        src: published layout (folder or .safetensors file), or a diffusers folder; or a Hub id.
        dst: path of the new folder, or of the new file, which ends in .safetensors.
        text_encoder: folder or Hub id of the text encoder to save in a pipeline. None: the pipeline has none.
        prefix: of the keys in a published file.
        dtype: of the weights, "auto" as they are stored.
        overwrite: replace an earlier conversion.

    Returns what was written, and the number of the transformer's parameters.

    Raises ValueError when `src` has that layout already, or its family has no other; FileExistsError when `dst` is
    there and not to be replaced.
    """
    checkpoint = read_checkpoint(src, offline)
    kind, transformer = checkpoint.kind, checkpoint.parts["transformer"]
    to_file = dst.suffix == ".safetensors"
    if not hasattr(transformer.cls, "save_published"):
        raise ValueError(f"{src} is a {transformer.cls.__name__}: the from-scratch family has no published layout.")
    if not to_file and kind != "published layout":
        raise ValueError(f"{src} is a diffusers folder already: give a `dst` that ends in .safetensors.")
    if dst.exists():
        ours = dst.is_file() if to_file else (dst / "model_index.json").is_file() or (dst / "config.json").is_file()
        if not (overwrite and ours) or dst.resolve() in (Path(src).resolve(), *Path(src).resolve().parents):
            raise FileExistsError(
                f"{dst} exists: choose another name, or replace an earlier conversion by overwrite=True."
            )
    stored = Counter(tensor.dtype for tensor in transformer.weights.values()).most_common(1)[0][0]
    torch_dtype = stored if dtype == "auto" else getattr(torch, dtype)
    what = "transformer"
    if not to_file and "vae" in checkpoint.parts:
        what = "pipeline" if text_encoder else "pipeline without a text encoder"
        result = ModalityForcingPipeline.from_published(
            src, text_encoder=text_encoder, dtype=torch_dtype, local_files_only=offline
        )
    elif kind == "published layout":
        result = transformer.cls.from_published(src, dtype=torch_dtype)
    else:
        subfolder = "transformer" if kind == "diffusers pipeline" else None
        result = transformer.cls.from_pretrained(src, subfolder=subfolder, dtype=torch_dtype, local_files_only=offline)

    if to_file:
        dst.parent.mkdir(parents=True, exist_ok=True)
        result.save_published(dst, prefix=prefix)
    else:
        save_whole(result, dst)
    return what, sum(tensor.numel() for tensor in transformer.weights.values())


def read_checkpoint(model: str | Path, offline: bool) -> Checkpoint:
    """What a checkpoint is, from its configs and the headers of its safetensors files, here or on the Hub.

    Raises FileNotFoundError when there is no such checkpoint or a file of it is missing; ValueError when it is none of
    ours, or damaged, or its configs, weights and parts do not fit.
    """
    files = CheckpointFiles(model, offline)
    facts = {"bytes_on_disk": sum(files.sizes.values())}
    if "model_index.json" in files:
        kind, parts = "diffusers pipeline", read_pipeline(files, ModalityForcingPipeline)
        facts["text_encoder"] = parts["text_encoder"].cls.__name__ if "text_encoder" in parts else None
        for name in ("scheduler", "depth_scheduler"):
            if name in parts:  # a text-to-image base has the first alone
                facts[f"{name}_shift"] = parts[name].config["shift"]
    elif "model.safetensors" in files:
        kind, parts = "published layout", read_published(files)
        facts["scheduler_shift"] = facts["depth_scheduler_shift"] = math.exp(PUBLISHED_SHIFT_MU)
    elif "config.json" in files:
        name = files.read_json("config.json").get("_class_name")
        cls = next((cls for cls in MODELS["transformer"] if cls.__name__ == name), None)
        if cls is None:
            raise ValueError(f"{files.path('config.json')} is of a {name}, which is no transformer of this package.")
        kind, parts = "diffusers transformer", {"transformer": Part(cls, *read_model(files, "", cls))}
    else:
        raise FileNotFoundError(f"{model}: no model_index.json, config.json or model.safetensors is there.")
    return Checkpoint(kind, parts, facts)
