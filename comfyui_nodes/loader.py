"""A Modality Forcing pipeline in diffusers' layout as ComfyUI's MODEL, CLIP and VAE."""

import contextlib
import logging
import math
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import torch
import torch.nn as nn
import torch.nn.functional as F
from comfy.sd1_clip import SDClipModel
from comfy.text_encoders.flux import Flux2TEModel
from comfy.text_encoders.llama import BaseLlama, Llama2_, Qwen3_4BConfig
from diffusers import AutoencoderKLFlux2
from transformers import PreTrainedTokenizerBase

from mf_diffusers import DepthProcessor, ModalityForcingFlux2Transformer2DModel, ModalityForcingPipeline
from mf_diffusers.checkpoint_files import CheckpointFiles
from mf_diffusers.modality_forcing.adapter import check_adapter, read_adapter
from mf_diffusers.modality_forcing.conversion import (
    convert_published_transformer,
    export_published_transformer,
    load_safetensors,
)
from mf_diffusers.modality_forcing.latent_tokens import decode_latents, image_to_tokens, tokens_to_latents
from mf_diffusers.modality_forcing.pipeline_files import Part, open_tokenizer, read_pipeline


TEXT_ENCODER = "qwen3"
# Geometry of FLUX.2's own autoencoder, which ComfyUI has a class for.
FLUX2_AUTOENCODER = {"block_out_channels": [128, 256, 512, 512], "norm_num_groups": 32, "mid_block_add_attention": True}


def load_pipeline(folder: Path):
    """
    Args:
        folder: what `ModalityForcingPipeline.save_pretrained` wrote.

    Returns:
        ModelPatcher; CLIP, or `None` where the pipeline has no text encoder; VAE.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: a file is damaged or does not hold what it should, which costs no memory; or the model is none that
            ComfyUI can sample.
    """
    parts = read_pipeline(CheckpointFiles(folder), ModalityForcingPipeline)
    if parts["transformer"].cls is not ModalityForcingFlux2Transformer2DModel:
        raise ValueError(
            f"{folder} holds a {parts['transformer'].cls.__name__}, and this node opens those on FLUX.2's transformer. "
            "One on Z-Image's runs from one file: `mf-diffusers convert FOLDER FILE.safetensors`, 'Load Diffusion "
            "Model', and Z-Image's own text encoder and VAE."
        )
    settings = parts[""].config
    model = load_model(folder)
    model.model.sample_size, model.model.size_rule = settings["default_sample_size"], settings["default_size_rule"]
    model.model.log2_alpha = settings["default_log2_alpha"]
    model.model.diffusion_model.depth_processor = DepthProcessor(**parts["depth_processor"].config)
    clip = load_clip(folder, parts) if "text_encoder" in parts else None
    vae = load_vae(folder / "vae")
    if isinstance(vae.first_stage_model, DiffusersAutoencoder):
        latent_format = model.model.latent_format
        latent_format.image_factors, latent_format.image_bias = preview_colours(vae.first_stage_model)
    return model, clip, vae


def load_model(folder: Path, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    weights = export_published_transformer(_load_weights(folder / "transformer"), prefix="")
    model = comfy.sd.load_diffusion_model_state_dict(weights, disable_dynamic=disable_dynamic)
    files = CheckpointFiles(folder)
    shift, depth_shift = (
        files.read_json(f"{name}/scheduler_config.json")["shift"] for name in ("scheduler", "depth_scheduler")
    )
    if shift != depth_shift:
        raise ValueError(
            f"{folder}: ComfyUI walks one schedule, but image and depth have shifts {shift}, {depth_shift}."
        )
    model.model.model_sampling.set_parameters(shift=math.log(shift))
    model.cached_patcher_init = (load_model, (folder,))
    return model


def load_adapter(base: Path, path: Path, strength: float = 1.0) -> comfy.model_patcher.ModelPatcher:
    """
    Args:
        base: a FLUX.2 without depth, a single file of ComfyUI.
        path: what LoRA training wrote, `pipeline.adapter.safetensors`: depth modules, a LoRA and settings.
        strength: of the LoRA.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no adapter, or one of another base.
    """
    adapter, base_weights = read_adapter(path), _base_weights(base)
    if "img_in.weight" not in base_weights:
        raise ValueError(
            f"{base} is no FLUX.2, on which this node puts adapters. Put one of Z-Image onto its base in a script, and "
            "make one file of both: ModalityForcingPipeline.from_base(base, adapter=...), `mf-diffusers convert`."
        )
    weights = base_weights | export_published_transformer(adapter.depth, prefix="")
    config, converted = convert_published_transformer(weights)
    with torch.device("meta"):
        transformer = ModalityForcingFlux2Transformer2DModel(**config)
    transformer.load_state_dict(converted, assign=True)
    check_adapter(adapter, transformer, path)
    model = comfy.sd.load_diffusion_model_state_dict(weights)
    settings = adapter.settings.get("pipeline", {})
    for name in ("sample_size", "size_rule", "log2_alpha"):
        setattr(model.model, name, settings.get(f"default_{name}", getattr(model.model, name)))
    if "depth_processor" in adapter.settings:
        model.model.diffusion_model.depth_processor = DepthProcessor(**adapter.settings["depth_processor"])
    model.cached_patcher_init = (load_adapter, (base, path))
    if not adapter.lora:
        return model
    lora = {f"transformer.{name}": tensor for name, tensor in adapter.lora.items()}
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)[0]


def _base_weights(path: Path) -> dict[str, torch.Tensor]:
    """In the published names. What ComfyUI saved has a prefix, and its own name for the weights of norms."""
    return {
        key.removeprefix("model.diffusion_model.").replace("_norm.weight", "_norm.scale"): tensor
        for key, tensor in load_safetensors(path).items()
    }


# The text encoder: Qwen3 of any size, on ComfyUI's own layers


class Qwen3(BaseLlama, nn.Module):
    """Qwen3 as `config.json` describes it."""

    def __init__(self, config_dict, dtype, device, operations):
        super().__init__()
        config = Qwen3_4BConfig(
            **{key: config_dict[key] for key in Qwen3_4BConfig.__annotations__ if key in config_dict}
        )
        config.head_dim = config_dict["head_dim"]
        if "rope_parameters" in config_dict:  # where transformers writes it since its version 5
            config.rope_theta = config_dict["rope_parameters"]["rope_theta"]
        self.num_layers = config.num_hidden_layers
        self.model = Llama2_(config, device=device, dtype=dtype, ops=operations)
        self.dtype = dtype


class ChatTokenizer:
    """Prompts as chat turns, padded to one length: what `mf_diffusers` does to them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int):
        self.tokenizer, self.length = tokenizer, length

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs) -> dict:
        turn = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        tokens = self.tokenizer(turn)["input_ids"]
        if len(tokens) > self.length:
            logging.warning(
                f"The prompt has {len(tokens)} tokens, the text encoder takes {self.length}: the rest is cut off."
            )
        tokens = (tokens + [self.tokenizer.pad_token_id] * self.length)[: self.length]
        return {TEXT_ENCODER: [[(token, 1.0, 0) if return_word_ids else (token, 1.0) for token in tokens]]}

    def untokenize(self, token_weight_pair):
        return [(pair, self.tokenizer.convert_ids_to_tokens(pair[0])) for pair in token_weight_pair]

    def decode(self, token_ids, skip_special_tokens=True):
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def state_dict(self):
        return {}


def load_clip(folder: Path, parts: dict[str, Part]) -> comfy.sd.CLIP:
    config, settings = parts["text_encoder"].config, parts[""].config
    weights = _load_weights(folder / "text_encoder")
    tokenizer = open_tokenizer(parts["tokenizer"].cls, folder / "tokenizer", parts["text_encoder"])
    tokenizer = ChatTokenizer(tokenizer, settings["max_sequence_length"])

    def clip_model(device="cpu", dtype=None, model_options={}):  # noqa: B006
        return SDClipModel(
            device=device,
            dtype=dtype,
            layer=list(settings["text_encoder_out_layers"]),
            textmodel_json_config=dict(config),
            special_tokens={"pad": tokenizer.tokenizer.pad_token_id},
            layer_norm_hidden_state=False,
            model_class=Qwen3,
            enable_attention_masks=True,
            return_attention_masks=True,
            model_options=model_options,
        )

    def text_encoder(device="cpu", dtype=None, model_options={}):  # noqa: B006
        return Flux2TEModel(device, dtype, model_options, name=TEXT_ENCODER, clip_model=clip_model)

    target = comfy.supported_models_base.ClipTarget(lambda **kwargs: tokenizer, text_encoder)
    return comfy.sd.CLIP(
        target,
        parameters=sum(tensor.numel() for tensor in weights.values()),
        state_dict=[weights],
        model_options={"dtype": weights["model.embed_tokens.weight"].dtype},
    )


# The autoencoder: ComfyUI's where it has one of that geometry, otherwise diffusers'


class DiffusersAutoencoder(nn.Module):
    """An `AutoencoderKLFlux2` of any geometry behind the interface that ComfyUI's VAE expects."""

    def __init__(self, autoencoder):
        super().__init__()
        self.autoencoder = autoencoder

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] -> whitened latents (B, C, h, w)."""
        token = self.token_size
        return image_to_tokens(self.autoencoder, images).transpose(1, 2).unflatten(2, (images.shape[-2] // token, -1))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Whitened latents (B, C, h, w) -> (B, 3, H, W) in [-1, 1]."""
        tokens = latents.flatten(2).transpose(1, 2)
        return decode_latents(self.autoencoder, tokens_to_latents(self.autoencoder, tokens, *latents.shape[-2:]))

    @property
    def token_size(self) -> int:
        return 2 ** len(self.autoencoder.config.block_out_channels)

    @property
    def channels(self) -> int:
        return 4 * self.autoencoder.config.latent_channels


def load_vae(folder: Path) -> comfy.sd.VAE:
    config = CheckpointFiles(folder).read_json("config.json")
    if all(config[key] == value for key, value in FLUX2_AUTOENCODER.items()):
        return comfy.sd.VAE(sd=_load_weights(folder))
    module = DiffusersAutoencoder(AutoencoderKLFlux2.from_pretrained(folder, local_files_only=True)).eval()
    with _quiet():  # it warns that it has no weights: they come with the module
        vae = comfy.sd.VAE(sd={})
    vae.first_stage_model = module
    vae.downscale_ratio = vae.upscale_ratio = module.token_size
    vae.latent_channels = module.channels
    vae.process_input = lambda image: image
    vae.device, vae.output_device = comfy.model_management.vae_device(), comfy.model_management.intermediate_device()
    vae.vae_dtype = torch.float32
    vae.disable_offload = True  # its layers are torch's own, which cannot be loaded in part
    vae.patcher = comfy.model_patcher.ModelPatcher(
        module, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device()
    )
    vae.model_size()
    return vae


@torch.no_grad()
def preview_colours(autoencoder: DiffusersAutoencoder, side: int = 8) -> tuple[list, list]:
    """
    The linear map from a latent cell to its colour in -1..1 that fits random latents best, for previews.

    Returns:
        Factors (C / 4, 3) and bias (3,).
    """
    latents = torch.randn(8, autoencoder.channels, side, side, generator=torch.Generator().manual_seed(0))
    colours = F.adaptive_avg_pool2d(autoencoder.decode(latents), 2 * side).movedim(1, -1).reshape(-1, 3)
    cells = F.pixel_shuffle(latents, 2).movedim(1, -1).reshape(len(colours), -1)
    cells = torch.cat([cells, torch.ones(len(cells), 1)], dim=1)
    solution = torch.linalg.lstsq(cells, colours).solution
    return solution[:-1].tolist(), solution[-1].tolist()


def _load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder's safetensors files: one, or several shards."""
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_safetensors(file)
    return weights


@contextlib.contextmanager
def _quiet():
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
