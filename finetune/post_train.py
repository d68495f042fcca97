"""Modality-forcing post-training: a text-to-image base becomes a model of images and depth.

    accelerate launch finetune/post_train.py --config finetune/configs/NAME.yaml [--dry-run] [key=value ...]

The base is a `Flux2KleinPipeline` or `ZImagePipeline`, folder or Hub repository, or a `ModalityForcingPipeline`, whose
training goes on. The
result is OUTPUT/pipeline, a `ModalityForcingPipeline` folder, and in "lora" mode OUTPUT/pipeline.adapter.safetensors
besides. `--dry-run` prints parameters, memory, data and the size of the cache, and stops.
"""

import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig


sys.path.append(str(Path(__file__).parents[1]))  # the launcher puts this folder on the path, not the repository

from finetune.config import arguments_of, check_names, load_config, save_config, take_flag
from finetune.data.cache import CacheConfig, prepare_samples, weights_hash
from finetune.data.encoding import EncodedBatch, Encoder
from finetune.data.source_check import open_data
from finetune.preflight.dry_run import report_post_training
from finetune.preflight.memory import Launch, memory_verdict, post_training_memory
from finetune.preflight.start_check import check_start
from finetune.training.models import (
    check_architecture,
    empty_transformer,
    live_text_encoder_of_base,
    with_text_of_base,
)
from finetune.training.trainer import Trainer, TrainerConfig, join_processes, load_result
from finetune.training.validation import validate
from mf_diffusers import DepthProcessor, ModalityForcingPipeline
from mf_diffusers.errors import errors_as_lines
from mf_diffusers.files import save_whole
from mf_diffusers.modality_forcing.backbones import BACKBONES
from mf_diffusers.modality_forcing.objective import ObjectiveConfig, draw_noise, modality_forcing_loss
from mf_diffusers.precision import DTYPES


@dataclass
class PostTrainConfig:
    """
    Args:
        base: pipeline folder or Hub repository. A `ModalityForcingPipeline` keeps its text settings, and where it has
            depth its depth modules and depth processor, whatever is said of them here.
        architecture: of the base's transformer, "flux2", "z_image" or "dit", the from-scratch family.
        base_config: constructor arguments of the transformer, for a dry run without the base; its tokens are taken to
            be of 16x16 pixels, as FLUX.2's and Z-Image's.
        base_settings: settings file of its pre-training, which serves a dry run before that is done.
        base_dtype: "fp32" or "bf16": of the weights that stay frozen, the teacher and the text encoder. Weights in
            training are float32 either way.
        mode: "full", as the paper with FLUX.2: everything trains but the base's weights of the double-stream blocks;
            "all": these too, as with the paper's from-scratch models, for which there is no other; or "lora": a LoRA on
            the trunk, and the new depth modules.
        lora_rank: rank (and alpha) of the LoRA.
        num_depth_decoder_layers: blocks of the depth decoder.
        graft: other arguments of the transformer's `from_base`.
        extra_depth_decoder_layers: blocks added to the depth decoder of a base that has depth already, where its
            architecture can ("flux2"); they start as the identity.
        depth_processor: arguments of the `DepthProcessor` besides the patch size, `infinite_depth` for example.
        text_encoder_out_layers, max_sequence_length, sample_size: of the pipeline that is written.
        validation_samples: how many of the held-out samples a validation takes.
        flip: mirror half of the samples, but none whose caption says left or right; needs `cache.folder: null`.
    """

    base: str = "black-forest-labs/FLUX.2-klein-base-4B"
    architecture: str = "flux2"
    base_config: dict[str, Any] | None = None
    base_settings: str | None = None
    base_dtype: str = "fp32"
    mode: str = "full"
    lora_rank: int = 64
    num_depth_decoder_layers: int = 4
    graft: dict[str, Any] = field(default_factory=dict)
    extra_depth_decoder_layers: int = 0
    depth_processor: dict[str, Any] = field(default_factory=dict)
    text_encoder_out_layers: list[int] = field(default_factory=lambda: [9, 18, 27])
    max_sequence_length: int = 512
    sample_size: int = 512
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: dict[str, Any] = field(default_factory=dict)
    validation_data: dict[str, Any] = field(default_factory=dict)
    validation_samples: int = 64
    flip: bool = False
    cache: CacheConfig = field(default_factory=CacheConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    @property
    def distils(self) -> bool:
        return self.objective.distillation_high > 0 or self.objective.distillation_low > 0


def check(config: PostTrainConfig) -> None:
    """Stops at settings that do not go together."""
    if config.mode not in ("full", "all", "lora"):
        raise SystemExit(f"error: mode {config.mode!r} is none of full, all, lora")
    if config.architecture not in BACKBONES:
        raise SystemExit(f"error: architecture {config.architecture!r} is none of {', '.join(BACKBONES)}")
    backbone = BACKBONES[config.architecture]
    if config.mode not in backbone.training_modes:
        modes = " or ".join(backbone.training_modes)
        raise SystemExit(f"error: architecture={config.architecture} trains with mode={modes}, not {config.mode}")
    if config.extra_depth_decoder_layers and not hasattr(backbone.transformer_class, "deepen_depth_decoder"):
        raise SystemExit(f"error: architecture={config.architecture} takes no extra_depth_decoder_layers")
    if config.base_dtype not in DTYPES:
        raise SystemExit(f"error: base_dtype {config.base_dtype!r} is neither fp32 nor bf16")
    if config.base_dtype == "bf16" and config.trainer.mixed_precision != "bf16":
        raise SystemExit("error: base_dtype=bf16 needs trainer.mixed_precision=bf16, which computes in bfloat16")
    check_names("base_config", config.base_config or {}, arguments_of(backbone.transformer_class))
    own = {"base", "depth_channels", "num_depth_decoder_layers"}
    check_names("graft", config.graft, arguments_of(backbone.transformer_class.from_base) - own)
    check_names("depth_processor", config.depth_processor, arguments_of(DepthProcessor) - {"patch_size"})


def choose_trainable(transformer: torch.nn.Module, config: PostTrainConfig) -> None:
    """Freezes what `PostTrainConfig.mode` says is frozen; the rest is float32 from here on."""
    backbone = BACKBONES[config.architecture]
    if config.mode == "lora":
        transformer.requires_grad_(False)
        transformer.add_adapter(
            LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=backbone.lora_targets)
        )
    for name, parameter in transformer.named_parameters():
        if transformer.is_depth_parameter(name):
            parameter.requires_grad_(True)
        elif config.mode == "full":
            parameter.requires_grad_(not name.startswith(backbone.frozen_in_full))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def check_memory(config: PostTrainConfig) -> tuple[bool, str]:
    """Whether the run fits into memory, and the verdict as text; see `memory_verdict`."""

    @cache
    def transformer_of(mode: str, base_dtype: str) -> torch.nn.Module:
        settings = replace(config, mode=mode, base_dtype=base_dtype)
        transformer = empty_transformer(settings)
        choose_trainable(transformer, settings)
        return transformer

    def memory_of(settings: PostTrainConfig, launch: Launch) -> dict[str, int]:
        return post_training_memory(settings, transformer_of(settings.mode, settings.base_dtype), text_encoder, launch)

    text_encoder = live_text_encoder_of_base(config)
    levers = {
        "base_dtype": ["bf16"] * (config.base_dtype == "fp32" and config.trainer.mixed_precision == "bf16"),
        "mode": ["lora"] * ("lora" in BACKBONES[config.architecture].training_modes and config.mode != "lora"),
    }
    return memory_verdict(config, memory_of, levers)


def open_base(config: PostTrainConfig) -> tuple[ModalityForcingPipeline, torch.nn.Module]:
    """The pipeline to train, and the transformer that it starts from."""
    dtype = DTYPES[config.base_dtype]
    has_frozen = config.mode != "all" or config.distils  # else there are no weights to round, nor a teacher's
    dtypes = {"transformer": dtype if has_frozen else torch.float32, "text_encoder": dtype, "default": torch.float32}
    base = DiffusionPipeline.from_pretrained(config.base, dtype=dtypes)
    check_architecture(config, type(base.transformer).__name__)
    if isinstance(base, ModalityForcingPipeline) and base.has_depth:
        base.register_to_config(default_sample_size=config.sample_size, default_size_rule=config.cache.size_rule)
        has_copy_to_teach = config.distils and config.mode != "lora"  # see `make_teacher`
        teacher = deepcopy(base.transformer) if has_copy_to_teach else base.transformer
        if config.extra_depth_decoder_layers:
            base.transformer.deepen_depth_decoder(config.extra_depth_decoder_layers)
        return base, teacher
    pipe = ModalityForcingPipeline.from_base(
        base,
        num_depth_decoder_layers=config.num_depth_decoder_layers,
        graft_config=config.graft,
        depth_processor_config=config.depth_processor,
        text_encoder_out_layers=config.text_encoder_out_layers,
        max_sequence_length=config.max_sequence_length,
        default_sample_size=config.sample_size,
        default_size_rule=config.cache.size_rule,
    )
    return pipe, base.transformer


def make_teacher(config: PostTrainConfig, transformer, base: torch.nn.Module, device) -> Callable | None:
    """The frozen base as a function, for self-distillation; None without it. With a LoRA, the base is there already."""
    if not config.distils:
        return None
    if config.mode == "lora":

        def without_lora(**inputs):
            transformer.disable_adapters()
            try:
                return transformer(**inputs)
            finally:
                transformer.enable_adapters()

        return without_lora
    family, teacher = BACKBONES[config.architecture], base.requires_grad_(False).eval().to(device)
    if not isinstance(base, family.transformer_class):  # else it has depth already, and is called as the model is
        teacher = partial(family.call_base, teacher)
    return torch.autocast(device.type, torch.bfloat16)(teacher) if base.dtype == torch.bfloat16 else teacher


def micro_batch_losses(config, trainer, batch: EncodedBatch, generators, empty_embeds, depth_processor, teacher):
    """The loss of a micro batch, and its parts; what is random about a sample comes from its generator."""
    has_depth = batch.valid.flatten(1).any(dim=1).tolist()
    draw = draw_noise(config.objective, batch.latents.shape[1:], batch.depth.shape[1:], has_depth, generators)
    draw = draw.to(trainer.device)
    latents, depth, valid, prompt_embeds = (x.to(trainer.device, non_blocking=True) for x in batch[:4])
    prompt_embeds = torch.where(draw.drop_caption[:, None, None], empty_embeds, prompt_embeds)
    losses = modality_forcing_loss(
        trainer.prepared, latents, depth, valid, prompt_embeds, draw, config.objective, depth_processor, teacher
    )
    return losses.total, {name: getattr(losses, name).mean() for name in ("rgb", "depth", "distillation")}


def save_result(config: PostTrainConfig, pipe: ModalityForcingPipeline, folder: Path) -> None:
    """Writes the pipeline into `folder`, and in "lora" mode the adapter beside it, as FOLDER.adapter.safetensors;
    afterwards the LoRA is merged."""
    if config.mode == "lora":
        pipe.save_adapter(folder.with_name(f"{folder.name}.adapter.safetensors"), config.base)
        pipe.transformer.fuse_lora()
        pipe.transformer.unload_lora()
    save_whole(pipe, folder)


def consolidate(config: PostTrainConfig, checkpoint: Path, folder: Path) -> None:
    """Writes the pipeline of a checkpoint of a run with these settings."""
    pipe, _ = open_base(config)
    choose_trainable(pipe.transformer, config)
    load_result(pipe.transformer, checkpoint)
    save_result(config, pipe, folder)


def main() -> None:
    is_dry_run = take_flag("--dry-run")
    config = load_config(PostTrainConfig)
    check(config)
    processes = join_processes()
    check_start(config.trainer)
    config = with_text_of_base(config)
    fits, verdict = check_memory(config)
    if is_dry_run:
        transformer = empty_transformer(config)
        choose_trainable(transformer, config)
        processes.print(f"{report_post_training(config, transformer)}\n{verdict}")
        return
    if not fits:
        raise SystemExit(f"error: {verdict}" if processes.is_main_process else 1)
    processes.print(verdict)
    _, held_out = open_data(config.data, config.validation_data)
    torch.manual_seed(config.trainer.seed)
    pipe, base = open_base(config)
    pipe.set_progress_bar_config(disable=True)
    choose_trainable(pipe.transformer, config)

    text = {
        "out_layers": pipe.config.text_encoder_out_layers,
        "max_sequence_length": pipe.config.max_sequence_length,
    }

    def encode(prompts: list[str]) -> torch.Tensor:
        return BACKBONES[config.architecture].encode_text(pipe.text_encoder, pipe.tokenizer, prompts, **text)

    device = processes.device
    pipe.vae.to(device)
    pipe.text_encoder.to(device)
    encoder = Encoder(pipe.vae, pipe.depth_processor, encode)
    encoders = text | {"text_encoder": weights_hash(pipe.text_encoder)}
    if pipe.depth_processor.config.infinite_depth:
        encoders["infinite_depth"] = True
    samples = prepare_samples(config, encoders, encoder)
    with torch.no_grad():
        empty_embeds = encode([""])
    is_cached = config.cache.folder is not None
    if is_cached:
        pipe.text_encoder.to("cpu")  # needed again in validation only

    if config.trainer.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    teacher = make_teacher(config, pipe.transformer, base, device)
    del base  # frees it, where it is not the teacher
    trainer = Trainer(config.trainer, pipe.transformer)
    if trainer.accelerator.is_main_process:
        save_config(config, trainer.folder / "config.yaml")

    def losses_of(batch: EncodedBatch, generators: list[torch.Generator]):
        return micro_batch_losses(config, trainer, batch, generators, empty_embeds, pipe.depth_processor, teacher)

    stream = samples.stream(trainer)
    while trainer.step < config.trainer.steps:
        trainer.train_step(stream, losses_of)
        if trainer.is_time_to_validate:
            pipe.to(trainer.device)
            with trainer.averaged_weights():
                validate(pipe, held_out, trainer, encoder, config)
            if is_cached:
                pipe.text_encoder.to("cpu")

    if trainer.accelerator.is_main_process:
        if trainer.is_sharded:
            consolidate(config, trainer.last_checkpoint, trainer.folder / "pipeline")
        else:
            with trainer.averaged_weights():
                save_result(config, pipe, trainer.folder / "pipeline")
    trainer.finish(samples.report)


if __name__ == "__main__":
    with errors_as_lines():
        main()
