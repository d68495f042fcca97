"""Ways to a pipeline besides `from_pretrained`: the published checkpoint, and a graft onto a text-to-image base."""

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from transformers import AutoTokenizer, Qwen2TokenizerFast, Qwen3ForCausalLM
from typing_extensions import Self

from ..checkpoint_files import CheckpointFiles
from ..hub import repository_folder
from .adapter import pipeline_settings, read_adapter_metadata
from .backbones import backbone_of
from .conversion import (
    PUBLISHED_SETTINGS,
    PUBLISHED_SHIFT_MU,
    convert_published_autoencoder,
    load_safetensors,
)
from .depth_processor import DepthProcessor
from .model_files import build_empty, check_weights, read_model
from .pipeline_files import (
    PARTS,
    PIPELINE_FILES,
    TEXT_FILES,
    Part,
    check_text_encoder,
    open_tokenizer,
    read_pipeline,
)
from .transformer_flux2 import ModalityForcingFlux2Transformer2DModel


PUBLISHED_FILES = ["model.safetensors", "ae_encoder.safetensors", "ae_decoder.safetensors"]


class ModalityForcingLoaderMixin:
    """The loading methods of `ModalityForcingPipeline`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> Self:
        r"""
        Opens a diffusers folder or Hub repository, as `DiffusionPipeline.from_pretrained` does, once its configs are
        found to fit its weights: what is damaged, missing or impossible costs no memory.

        Args:
            kwargs: as of `DiffusionPipeline.from_pretrained`; only safetensors is read.

        Raises:
            FileNotFoundError: there is no such folder or repository, or a file of it is missing.
            ValueError: a part is damaged or impossible, or does not fit the others; the message names it.

        Example:
            >>> from mf_diffusers import ModalityForcingPipeline
            >>> from mf_diffusers.embedded import EMBEDDED_MODEL
            >>> pipe = ModalityForcingPipeline.from_pretrained(EMBEDDED_MODEL)
            >>> pipe.config.default_sample_size
            64
        """
        hub = {name: kwargs[name] for name in ("revision", "cache_dir", "token", "local_files_only") if name in kwargs}
        folder = repository_folder(pretrained_model_name_or_path, PIPELINE_FILES, **hub)
        parts = read_pipeline(CheckpointFiles(folder), cls, besides=[part for part in PARTS if part in kwargs])
        if "tokenizer" in parts and "text_encoder" in parts:
            tokenizer = open_tokenizer(parts["tokenizer"].cls, folder / "tokenizer", parts["text_encoder"])
            kwargs["tokenizer"] = tokenizer
        return super().from_pretrained(folder, **kwargs | {"use_safetensors": True})

    @classmethod
    def from_published(
        cls,
        pretrained_model_name_or_path: str | Path = "bartduis/modality_forcing",
        text_encoder: str | Path | Qwen3ForCausalLM | None = "auto",
        tokenizer: Qwen2TokenizerFast | None = None,
        dtype: torch.dtype = torch.bfloat16,
        size: int = 512,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Self:
        r"""
        Assembles the pipeline from a checkpoint in the published layout. The published weights are licensed
        CC BY-NC 4.0 (not for commercial use).

        Args:
            pretrained_model_name_or_path: Folder or Hub repository with `model.safetensors`, `ae_encoder.safetensors`
                and `ae_decoder.safetensors`.
            text_encoder: Folder, Hub repository or instance of the Qwen3 model; "auto": the one that fits the width of
                the transformer's text features; `None`: none, the caller gives `prompt_embeds`.
            tokenizer: Default: the tokenizer that lies with the text encoder.
            dtype: dtype of the weights of the transformer and the text encoder. The depth head and the autoencoder stay
                float32, as in the published code.
            size: pixels of the longer side that the checkpoint was trained at.
            revision: of the Hub repository of the weights.
            cache_dir, token, local_files_only: as everywhere on the Hub; for the text encoder too.

        Raises:
            FileNotFoundError: a file or folder is missing, or there is no such repository.
            ValueError: a file is not what its name says; the message names the file or the keys.
        """
        hub = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        folder = repository_folder(pretrained_model_name_or_path, PUBLISHED_FILES, revision=revision, **hub)
        transformer = ModalityForcingFlux2Transformer2DModel.from_published(folder, dtype=dtype)
        vae_config, vae_weights = convert_published_autoencoder(
            load_safetensors(folder / "ae_encoder.safetensors"), load_safetensors(folder / "ae_decoder.safetensors")
        )
        vae = build_empty(AutoencoderKLFlux2, vae_config, vae_weights, f"{folder}/ae_encoder.safetensors")
        check_weights(vae, vae_weights, folder)
        vae_weights = {name: w.float() if w.is_floating_point() else w for name, w in vae_weights.items()}
        vae.load_state_dict(vae_weights, assign=True)

        is_loaded = not isinstance(text_encoder, str | Path)
        pipe = cls(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=math.exp(PUBLISHED_SHIFT_MU)),
            depth_scheduler=FlowMatchEulerDiscreteScheduler(shift=math.exp(PUBLISHED_SHIFT_MU)),
            vae=vae.eval(),
            text_encoder=text_encoder if is_loaded else None,
            tokenizer=tokenizer,
            depth_processor=DepthProcessor(patch_size=math.isqrt(transformer.config.depth_channels)),
            **PUBLISHED_SETTINGS | {"default_sample_size": size},
        )
        if not is_loaded:
            pipe.load_text_encoder(text_encoder, dtype, **hub)
        return pipe

    def load_text_encoder(self, text_encoder: str | Path = "auto", dtype: torch.dtype = torch.bfloat16, **hub) -> None:
        r"""
        Gives the pipeline a text encoder, and the tokenizer that lies with it unless it has one.

        Args:
            text_encoder: Folder or Hub repository; "auto": the one that fits the width of the transformer's text
                features.
            hub: `cache_dir`, `token` and `local_files_only`.

        Raises:
            FileNotFoundError: There is no such folder or repository, or a file is missing.
            ValueError: It is damaged or does not fit the transformer, or "auto" knows none that does.

        Example:
            >>> import torch
            >>> from mf_diffusers import ModalityForcingPipeline
            >>> from mf_diffusers.embedded import EMBEDDED_MODEL
            >>> pipe = ModalityForcingPipeline.from_pretrained(EMBEDDED_MODEL, text_encoder=None)
            >>> pipe.load_text_encoder(EMBEDDED_MODEL / "text_encoder", dtype=torch.float32)
            >>> len(pipe("a red ball", num_inference_steps=2).images)
            1
        """
        backbone, width = backbone_of(self.transformer), self.transformer.shape.text_channels
        name = backbone.text_encoders.get(width) if text_encoder == "auto" else text_encoder
        if name is None:
            raise ValueError(f"No known text encoder makes features of width {width}: give `text_encoder`.")
        folder = repository_folder(name, TEXT_FILES, **hub)
        cls = backbone.text_encoder_class
        part = Part(cls, *read_model(CheckpointFiles(folder), "", cls))
        check_text_encoder(part, self.config.text_encoder_out_layers, width, name)
        self.register_modules(
            tokenizer=self.tokenizer or open_tokenizer(AutoTokenizer, folder, part),
            text_encoder=cls.from_pretrained(folder, dtype=dtype, use_safetensors=True),
        )

    @classmethod
    def from_base(
        cls,
        base: DiffusionPipeline,
        num_depth_decoder_layers: int = 4,
        shift_mu: float = PUBLISHED_SHIFT_MU,
        graft_config: dict[str, Any] | None = None,
        depth_processor_config: dict[str, Any] | None = None,
        adapter: str | Path | None = None,
        any_base: bool = False,
        **pipeline_config,
    ) -> Self:
        r"""
        Grafts depth onto a text-to-image pipeline (see the transformer's `from_base`): the start of post-training, or,
        with `adapter`, the result of one.

        Args:
            base (`Flux2KleinPipeline`, `ZImagePipeline` or [`ModalityForcingPipeline`]): FLUX.2 [klein], Z-Image, or a
                base of the from-scratch family. Its VAE, text encoder and tokenizer are shared, its transformer is
                copied.
            num_depth_decoder_layers (`int`): Blocks of the depth decoder.
            shift_mu (`float`): Time shift of both schedules, the depth's alone where Z-Image has its own for images.
            graft_config (`dict`, *optional*): Other arguments of the transformer's `from_base`.
            depth_processor_config (`dict`, *optional*): Arguments of the [`DepthProcessor`] besides the patch size.
            adapter (*optional*): File that training in "lora" mode wrote on this base. Its settings precede those given
                here, and its LoRA is merged; to keep it apart, graft first and call `load_adapter`.
            any_base (`bool`): Take an adapter of another base of the same sizes, see `load_adapter`.
            pipeline_config: `text_encoder_out_layers`, `max_sequence_length`, `default_sample_size`, ... Default: those
                of a base of the from-scratch family.

        Raises:
            ValueError: the base has depth already, or the adapter is of another base.

        Example:
            >>> from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
            >>> from mf_diffusers import ModalityForcingPipeline
            >>> from mf_diffusers.embedded import EMBEDDED_MODEL
            >>> pipe = ModalityForcingPipeline.from_pretrained(EMBEDDED_MODEL)
            >>> own = pipe.transformer.config
            >>> transformer = Flux2Transformer2DModel(
            ...     **{name: own[name] for name in own if name[0] != "_" and "depth" not in name}
            ... )
            >>> base = Flux2KleinPipeline(pipe.scheduler, pipe.vae, pipe.text_encoder, pipe.tokenizer, transformer)
            >>> grafted = ModalityForcingPipeline.from_base(base, text_encoder_out_layers=(1, 2, 3))
            >>> grafted.has_depth, grafted.transformer.config.num_depth_decoder_layers
            (True, 4)
        """
        patch_size = 2 * base.vae_scale_factor
        graft = {"num_depth_decoder_layers": num_depth_decoder_layers} | (graft_config or {})
        if adapter is not None:
            graft |= read_adapter_metadata(adapter)["settings"].get("graft", {})
        backbone = backbone_of(base.transformer)
        pipeline_config = (
            pipeline_settings(base) if isinstance(base, cls) else backbone.pipeline_settings
        ) | pipeline_config
        transformer = backbone.transformer_class.from_base(base.transformer, depth_channels=patch_size**2, **graft)
        own_shift = base.scheduler.config.shift if backbone.keeps_shift else math.exp(shift_mu)
        pipe = cls(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=own_shift),
            depth_scheduler=FlowMatchEulerDiscreteScheduler(shift=math.exp(shift_mu)),
            vae=base.vae,
            text_encoder=base.text_encoder,
            tokenizer=base.tokenizer,
            depth_processor=DepthProcessor(patch_size=patch_size, **(depth_processor_config or {})),
            **pipeline_config,
        )
        if adapter is not None:
            pipe.load_adapter(adapter, merge=True, any_base=any_base)
        return pipe
