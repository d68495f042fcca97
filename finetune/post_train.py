"""Modality-forcing post-training: a text-to-image base becomes a model of images and depth.

    accelerate launch finetune/post_train.py --config finetune/configs/NAME.yaml [key=value ...]

The base is a `Flux2KleinPipeline` folder or Hub repository. The result is a `ModalityForcingPipeline` folder, and in
"lora" mode an adapter file besides.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from peft import LoraConfig


sys.path.append(str(Path(__file__).parents[1]))  # the launcher puts this folder on the path, not the repository

from finetune.cache import CacheConfig, encode_samples
from finetune.config import load_config, save_config
from finetune.data import build_source
from finetune.trainer import Trainer, TrainerConfig
from finetune.validation import validate
from mf_diffusers import ModalityForcingFlux2Transformer2DModel, ModalityForcingPipeline
from mf_diffusers.modality_forcing.adapter import LORA_TARGET_MODULES, save_adapter
from mf_diffusers.modality_forcing.objective import ObjectiveConfig, draw_noise, modality_forcing_loss
from mf_diffusers.modality_forcing.text_features import encode_text


@dataclass
class PostTrainConfig:
    """
    Args:
        base: `Flux2KleinPipeline` folder or Hub repository.
        mode: "full", as the paper: everything trains but the base's weights of the double-stream blocks; or "lora":
            a LoRA on the trunk, and the new depth modules.
        lora_rank: rank (and alpha) of the LoRA.
        num_depth_decoder_layers: blocks of the depth decoder.
        text_encoder_out_layers, max_sequence_length, sample_size: of the pipeline that is written.
    """

    base: str = "black-forest-labs/FLUX.2-klein-base-4B"
    mode: str = "full"
    lora_rank: int = 64
    num_depth_decoder_layers: int = 4
    text_encoder_out_layers: list[int] = field(default_factory=lambda: [9, 18, 27])
    max_sequence_length: int = 512
    sample_size: int = 512
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: dict[str, Any] = field(default_factory=dict)
    validation_data: dict[str, Any] = field(default_factory=dict)
    cache: CacheConfig = field(default_factory=CacheConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


def choose_trainable(transformer: ModalityForcingFlux2Transformer2DModel, config: PostTrainConfig) -> None:
    """Freezes what `PostTrainConfig.mode` says is frozen."""
    if config.mode not in ("full", "lora"):
        raise SystemExit(f"error: mode {config.mode!r} is neither full nor lora")
    if config.mode == "lora":
        transformer.requires_grad_(False)
        transformer.add_adapter(
            LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=LORA_TARGET_MODULES)
        )
    for name, parameter in transformer.named_parameters():
        if "depth" in name:
            parameter.requires_grad_(True)
        elif config.mode == "full":
            parameter.requires_grad_(not name.startswith("transformer_blocks."))


def micro_batch_losses(config, trainer, batch, generators, empty_embeds, depth_processor, teacher):
    """The losses of a micro batch; what is random about a sample comes from its generator."""
    latents, depth, valid, prompt_embeds = (
        torch.stack([sample[name] for sample in batch]) for name in ("latents", "depth", "valid", "prompt_embeds")
    )
    has_depth = valid.flatten(1).any(dim=1).tolist()
    draw = draw_noise(config.objective, latents.shape[1:], depth.shape[1:], has_depth, generators)
    prompt_embeds = torch.where(draw.drop_caption[:, None, None], empty_embeds, prompt_embeds)
    return modality_forcing_loss(
        trainer.prepared,
        *(x.to(trainer.device) for x in (latents, depth, valid, prompt_embeds, draw)),
        config.objective,
        depth_processor,
        teacher,
    )


def main():
    config = load_config(PostTrainConfig)
    torch.manual_seed(config.trainer.seed)
    base = Flux2KleinPipeline.from_pretrained(config.base)
    pipe = ModalityForcingPipeline.from_base(
        base,
        num_depth_decoder_layers=config.num_depth_decoder_layers,
        text_encoder_out_layers=config.text_encoder_out_layers,
        max_sequence_length=config.max_sequence_length,
        default_sample_size=config.sample_size,
    )
    pipe.set_progress_bar_config(disable=True)
    choose_trainable(pipe.transformer, config)

    text = {"out_layers": config.text_encoder_out_layers, "max_sequence_length": config.max_sequence_length}

    def encode(prompts: list[str]) -> torch.Tensor:
        return encode_text(pipe.text_encoder, pipe.tokenizer, prompts, **text)

    samples = encode_samples(
        config.cache, config.data, text | {"base": config.base}, pipe.vae, pipe.depth_processor, encode
    )
    with torch.no_grad():
        empty_embeds = encode([""]).to(samples[0]["prompt_embeds"])
    held_out = build_source(config.validation_data)
    distils = config.objective.distillation_high > 0 or config.objective.distillation_low > 0
    teacher = base.transformer.requires_grad_(False).eval() if distils else None

    if config.trainer.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    trainer = Trainer(config.trainer, pipe.transformer)
    if teacher is not None:
        teacher.to(trainer.device)
    save_config(config, trainer.folder / "config.yaml")

    while trainer.step < config.trainer.steps:
        sums = {}
        for batch, generators in trainer.micro_batches(samples):
            losses = micro_batch_losses(config, trainer, batch, generators, empty_embeds, pipe.depth_processor, teacher)
            trainer.backward(losses.total)
            for name in ("rgb", "depth", "distillation"):
                sums[name] = sums.get(name, 0) + getattr(losses, name).mean() / trainer.accumulation
        trainer.update(sums)
        if trainer.is_time_to_validate:
            with trainer.averaged_weights():
                validate(pipe, held_out, trainer)

    if trainer.accelerator.is_main_process:
        with trainer.averaged_weights():
            if config.mode == "lora":
                save_adapter(pipe.transformer, trainer.folder / "adapter.safetensors", config.base)
                pipe.transformer.fuse_lora()
                pipe.transformer.unload_lora()
            pipe.save_pretrained(trainer.folder / "pipeline")
    trainer.finish()


if __name__ == "__main__":
    main()
