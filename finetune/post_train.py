"""Modality-forcing post-training: a text-to-image base becomes a model of images and depth.

    accelerate launch finetune/post_train.py --config finetune/configs/NAME.yaml [--dry-run] [key=value ...]

The base is a `Flux2KleinPipeline` folder or Hub repository. The result is a `ModalityForcingPipeline` folder, and in
"lora" mode an adapter file besides. `--dry-run` prints parameters, memory, data and the size of the cache, and stops.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import Flux2KleinPipeline
from peft import LoraConfig


sys.path.append(str(Path(__file__).parents[1]))  # the launcher puts this folder on the path, not the repository

from finetune.cache import CacheConfig, encode_samples
from finetune.config import load_config, save_config, take_flag
from finetune.data import build_source
from finetune.dry_run import DTYPES, empty_transformer, report_post_training
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
        base_config: constructor arguments of its `Flux2Transformer2DModel`, for a dry run without the base; its tokens
            are taken to be FLUX.2's, of 16x16 pixels.
        base_dtype: "fp32" or "bf16": of the weights that stay frozen, the teacher and the text encoder. Weights in
            training are float32 either way.
        mode: "full", as the paper with FLUX.2: everything trains but the base's weights of the double-stream blocks;
            "all": these too, as with the paper's from-scratch models; or "lora": a LoRA on the trunk, and the new depth
            modules.
        lora_rank: rank (and alpha) of the LoRA.
        num_depth_decoder_layers: blocks of the depth decoder.
        text_encoder_out_layers, max_sequence_length, sample_size: of the pipeline that is written.
    """

    base: str = "black-forest-labs/FLUX.2-klein-base-4B"
    base_config: dict[str, Any] | None = None
    base_dtype: str = "fp32"
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

    @property
    def distils(self) -> bool:
        return self.objective.distillation_high > 0 or self.objective.distillation_low > 0


def check(config: PostTrainConfig) -> None:
    """Stops at settings that do not go together."""
    if config.mode not in ("full", "all", "lora"):
        raise SystemExit(f"error: mode {config.mode!r} is none of full, all, lora")
    if config.base_dtype not in DTYPES:
        raise SystemExit(f"error: base_dtype {config.base_dtype!r} is neither fp32 nor bf16")
    if config.base_dtype == "bf16" and config.trainer.mixed_precision != "bf16":
        raise SystemExit("error: base_dtype=bf16 needs trainer.mixed_precision=bf16, which computes in bfloat16")


def choose_trainable(transformer: ModalityForcingFlux2Transformer2DModel, config: PostTrainConfig) -> None:
    """Freezes what `PostTrainConfig.mode` says is frozen; the rest is float32 from here on."""
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
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def check_one_size(sizes, what: str, remedy: str) -> None:
    """Stops unless all of some (height, width) are the same."""
    found = sorted(set(sizes))
    if len(found) > 1:
        (height, width), (other_height, other_width) = found[:2]
        raise SystemExit(
            f"error: {what} of {height}x{width} and {other_height}x{other_width} (height x width) cannot be batched: "
            f"crop the pictures to one size{remedy}"
        )


def micro_batch_losses(config, trainer, batch, generators, empty_embeds, depth_processor, teacher):
    """The losses of a micro batch; what is random about a sample comes from its generator."""
    sizes = [tuple(sample["depth"].shape[-2:]) for sample in batch]
    check_one_size(sizes, "encoded samples", ", or set trainer.micro_batch_size=1")
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
    is_dry_run = take_flag("--dry-run")
    config = load_config(PostTrainConfig)
    check(config)
    if is_dry_run:
        transformer = empty_transformer(config)
        choose_trainable(transformer, config)
        print(report_post_training(config, transformer))
        return
    torch.manual_seed(config.trainer.seed)
    dtype = DTYPES[config.base_dtype]
    base = Flux2KleinPipeline.from_pretrained(
        config.base, dtype={"transformer": dtype, "text_encoder": dtype, "default": torch.float32}
    )
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

    held_out = build_source(config.validation_data)
    check_one_size([held_out.size(i) for i in range(64)], "validation pictures", "")
    device = PartialState().device
    pipe.vae.to(device)
    pipe.text_encoder.to(device)
    encoders = text | {"base": config.base} | ({} if dtype == torch.float32 else {"dtype": config.base_dtype})
    samples = encode_samples(config.cache, config.data, encoders, pipe.vae, pipe.depth_processor, encode)
    with torch.no_grad():
        empty_embeds = encode([""]).to(samples[0]["prompt_embeds"])
    pipe.text_encoder.to("cpu")  # needed again in validation only
    teacher = base.transformer.requires_grad_(False).eval() if config.distils else None
    if teacher is not None and dtype == torch.bfloat16:
        teacher.forward = torch.autocast(device.type, dtype)(teacher.forward)

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
            pipe.to(trainer.device)
            with trainer.averaged_weights():
                validate(pipe, held_out, trainer)
            pipe.text_encoder.to("cpu")

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
