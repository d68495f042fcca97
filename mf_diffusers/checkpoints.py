"""Checkpoints: what one is, opening one as a pipeline, and turning one layout into the other."""

import json
import math
from collections import Counter
from pathlib import Path

import torch
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import HfFileSystem, constants, errors, hf_hub_download, snapshot_download, try_to_load_from_cache
from transformers import AutoTokenizer, Qwen3ForCausalLM

from mf_diffusers import ModalityForcingFlux2Transformer2DModel, ModalityForcingPipeline
from mf_diffusers.files import save_whole
from mf_diffusers.modality_forcing.conversion import convert_published_transformer
from mf_diffusers.modality_forcing.loaders import PUBLISHED_SHIFT_MU, TEXT_ENCODERS


# Names of dtypes in the headers of safetensors files; others are counted, not computed with.
SAFETENSORS_DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "I64": "int64",
}


def load_pipeline(model, device, dtype, text_encoder=None, lora=None, offload="none", offline=False):
    """The pipeline of a diffusers folder, a published folder or a Hub repository of either kind, ready to run.

    Args:
        model: folder or Hub id.
        device, dtype: where it runs, and in which type.
        text_encoder: folder or Hub id. None: the model's own, or the one that fits.
        lora: file, folder or Hub id.
        offload: "none", "model" (one component at a time on the device) or "group" (one layer at a time).
        offline: ask no server.

    Raises FileNotFoundError when there is no such model, ValueError when it is none of ours.
    """
    hub = {"local_files_only": offline}
    index = Path(model, "model_index.json")
    if not Path(model).is_dir():
        if Path(model).exists():
            raise ValueError(f"model={model} is a file: give the folder that holds it and the autoencoder.")
        try:
            index = Path(hf_hub_download(model, "model_index.json", **hub))
        except errors.RemoteEntryNotFoundError:
            pass  # a repository in the published layout
        except errors.GatedRepoError as error:
            raise PermissionError(
                f"model={model} is gated: accept its terms on the Hub and log in ({error})"
            ) from error
        except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
            raise FileNotFoundError(f"model={model}: no such folder, nor such a repository on the Hub") from error
        except errors.LocalEntryNotFoundError as error:
            if not isinstance(try_to_load_from_cache(model, "model.safetensors"), str):
                raise FileNotFoundError(
                    f"model={model}: no such folder, and no copy of a repository of that name; the Hub is not reached"
                ) from error
    elif not index.is_file() and not Path(model, "model.safetensors").is_file():
        raise FileNotFoundError(
            f"model={model} has neither model_index.json (a diffusers pipeline) nor model.safetensors (the published "
            "layout)."
        )

    if not index.is_file():
        pipe = ModalityForcingPipeline.from_published(model, text_encoder=text_encoder or "auto", dtype=dtype, **hub)
    else:
        name = json.loads(index.read_text())["_class_name"]
        if name != ModalityForcingPipeline.__name__:
            raise ValueError(f"model={model} is a {name}; a {ModalityForcingPipeline.__name__} is needed.")
        absent = {"text_encoder": None, "tokenizer": None} if text_encoder else {}
        pipe = ModalityForcingPipeline.from_pretrained(model, dtype=dtype, **absent, **hub)
        if not pipe.has_depth:
            raise ValueError(f"model={model} is a text-to-image base without depth: post-train it (finetune/).")
        if pipe.text_encoder is None:
            text_encoder = text_encoder or TEXT_ENCODERS.get(pipe.transformer.config.joint_attention_dim)
            if text_encoder is None:
                raise ValueError(f"model={model} has no text encoder, and none is known to fit: give `text_encoder`.")
            pipe.register_modules(
                text_encoder=Qwen3ForCausalLM.from_pretrained(text_encoder, dtype=dtype, **hub),
                tokenizer=AutoTokenizer.from_pretrained(text_encoder, **hub),
            )
    if lora:
        pipe.load_lora_weights(lora, **hub)
    if offload == "none":
        return pipe.to(device)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(torch.device(device), offload_type="leaf_level", use_stream=device.startswith("cuda"))
    return pipe


def convert_checkpoint(src, dst, text_encoder=None, prefix="", dtype="auto", overwrite=False, offline=False):
    """Write a published checkpoint as a diffusers folder, or a diffusers folder as one published file.

    Args:
        src: published layout (folder or .safetensors file), or a diffusers folder; or a Hub id.
        dst: path of the new folder, or of the new file, which ends in .safetensors.
        text_encoder: folder or Hub id of the text encoder to save in a pipeline. None: the pipeline has none.
        prefix: of the keys in a published file.
        dtype: of the weights, "auto" as they are stored.
        overwrite: replace an earlier conversion.

    Returns what was written, and the number of the transformer's parameters.

    Raises ValueError when `src` has that layout already, FileExistsError when `dst` is there and not to be replaced.
    """
    kind, _, parts, _ = read_checkpoint(src, offline)
    to_file = dst.suffix == ".safetensors"
    if not to_file and kind != "published layout":
        raise ValueError(f"{src} is a diffusers folder already: give a `dst` that ends in .safetensors.")
    if dst.exists():
        ours = dst.is_file() if to_file else (dst / "model_index.json").is_file() or (dst / "config.json").is_file()
        if not (overwrite and ours) or dst.resolve() in (Path(src).resolve(), *Path(src).resolve().parents):
            raise FileExistsError(
                f"{dst} exists: choose another name, or replace an earlier conversion by overwrite=True."
            )
    stored = Counter(tensor.dtype for tensor in parts["transformer"].values()).most_common(1)[0][0]
    torch_dtype = stored if dtype == "auto" else getattr(torch, dtype)
    what = "transformer"
    if not to_file and "vae" in parts:
        what = "pipeline" if text_encoder else "pipeline without a text encoder"
        result = ModalityForcingPipeline.from_published(
            src, text_encoder=text_encoder, dtype=torch_dtype, local_files_only=offline
        )
    elif kind == "published layout":
        result = ModalityForcingFlux2Transformer2DModel.from_published(src, dtype=torch_dtype)
    else:
        subfolder = "transformer" if kind == "diffusers pipeline" else None
        result = ModalityForcingFlux2Transformer2DModel.from_pretrained(
            src, subfolder=subfolder, dtype=torch_dtype, local_files_only=offline
        )

    if to_file:
        dst.parent.mkdir(parents=True, exist_ok=True)
        result.save_published(dst, prefix=prefix)
    else:
        save_whole(result, dst)
    return what, sum(tensor.numel() for tensor in parts["transformer"].values())


def read_checkpoint(model, offline):
    """What a checkpoint is, from its configs and the headers of its safetensors files, here or on the Hub.

    Returns its kind; the transformer's config; the weights of each part as tensors without memory, the transformer's
    under diffusers' names; and facts beyond.
    """
    root, system = model, LocalFileSystem()
    if not Path(root).exists():
        if offline or constants.HF_HUB_OFFLINE:
            root = snapshot_download(root, local_files_only=True)
        else:
            system = HfFileSystem()
    root = system._strip_protocol(root)
    found = system.find(root, maxdepth=2, detail=True)
    files = {path[len(root) + 1 :] or "model.safetensors": (path, entry["size"]) for path, entry in found.items()}

    def config_of(name):
        return json.loads(system.cat_file(files[name][0]))

    def weights_of(start):
        tensors = {}
        for path, size in [files[name] for name in files if name.startswith(start) and name.endswith(".safetensors")]:
            with system.open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= size - 8:
                    raise ValueError(f"{path} is not a complete safetensors file: download it again.")
                header = json.loads(file.read(length))
            for key in header.keys() - {"__metadata__"}:
                dtype = getattr(torch, SAFETENSORS_DTYPES.get(header[key]["dtype"], "uint8"))
                tensors[key] = torch.empty(header[key]["shape"], dtype=dtype, device="meta")
        return tensors

    facts = {"bytes_on_disk": sum(size for _, size in files.values())}
    if "model_index.json" in files:
        kind, config = "diffusers pipeline", config_of("transformer/config.json")
        parts = {part: weights_of(f"{part}/") for part in ("transformer", "vae", "text_encoder")}
        facts["text_encoder"] = config_of("model_index.json")["text_encoder"][1]
        for name in ("scheduler", "depth_scheduler"):
            if f"{name}/scheduler_config.json" in files:  # a text-to-image base has the first alone
                facts[f"{name}_shift"] = config_of(f"{name}/scheduler_config.json")["shift"]
    elif "model.safetensors" in files:
        kind = "published layout"
        config, transformer = convert_published_transformer(weights_of("model."))
        parts = {"transformer": transformer, "vae": weights_of("ae_")}
        facts["scheduler_shift"] = facts["depth_scheduler_shift"] = math.exp(PUBLISHED_SHIFT_MU)
    elif "config.json" in files:
        kind, config, parts = "diffusers transformer", config_of("config.json"), {"transformer": weights_of("")}
    else:
        raise FileNotFoundError(f"{model}: no model_index.json, config.json or model.safetensors is there.")
    return kind, config, {part: tensors for part, tensors in parts.items() if tensors}, facts
