"""Text-to-image pre-training of a small FLUX.2-architecture base, from nothing.

    accelerate launch finetune/pretrain.py --config finetune/configs/embedded_base.yaml [--dry-run] [key=value ...]

`--dry-run` prints parameters, memory, data and the size of the cache, and stops.

Transformer and text encoder train together on captioned images; the VAE is given and frozen. The result is a
`Flux2KleinPipeline` folder, onto which finetune/post_train.py grafts depth.
"""

import math
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM


sys.path.append(str(Path(__file__).parents[1]))  # the launcher puts this folder on the path, not the repository

from finetune.cache import CacheConfig, prepare_samples
from finetune.config import load_config, save_config, take_flag
from finetune.data import ReadReport, Source, build_source
from finetune.dry_run import report_pretraining
from finetune.encoding import EncodedBatch, Encoder
from finetune.trainer import Trainer, TrainerConfig, join_processes
from finetune.validation import level_losses, log_validation, read_batches
from mf_diffusers import DepthProcessor
from mf_diffusers.modality_forcing.latent_tokens import position_ids
from mf_diffusers.modality_forcing.noise import add_noise, sample_logit_normal
from mf_diffusers.modality_forcing.text_features import encode_text
from mf_diffusers.visualization import contact_sheet


CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}<|im_end|>"
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@dataclass
class PretrainConfig:
    """
    Args:
        vae: folder of a trained `AutoencoderKLFlux2`.
        transformer: constructor arguments of `Flux2Transformer2DModel`.
        text_encoder: arguments of `Qwen3Config`.
        text_encoder_out_layers, max_sequence_length: which hidden layers are the text features, and their length.
        vocabulary_size: of the tokenizer, trained on the captions of the first `cache.samples` samples, 5000 at most.
        mu, sigma: of the logit-normal noise levels.
        caption_dropout: share of empty prompts, which guidance needs.
        validation_data: held-out samples; without them, validation takes the first of `data`.
        validation_samples: how many of them a validation takes.
        flip: mirror half of the samples, but none whose caption says left or right; needs `cache.folder: null`.
    """

    vae: str = "outputs/embedded/vae"
    transformer: dict[str, Any] = field(default_factory=dict)
    text_encoder: dict[str, Any] = field(default_factory=dict)
    text_encoder_out_layers: list[int] = field(default_factory=lambda: [1, 2, 3])
    max_sequence_length: int = 40
    vocabulary_size: int = 400
    mu: float = 1.1
    sigma: float = 1.0
    caption_dropout: float = 0.1
    data: dict[str, Any] = field(default_factory=dict)
    validation_data: dict[str, Any] = field(default_factory=dict)
    validation_samples: int = 64
    flip: bool = False
    cache: CacheConfig = field(default_factory=CacheConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


def train_tokenizer(captions: list[str], vocabulary_size: int) -> Qwen2TokenizerFast:
    """A byte-level BPE tokenizer of Qwen's kind, trained on `captions`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=vocabulary_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return Qwen2TokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token=None,
        chat_template=CHAT_TEMPLATE,
    )


class TextToImage(torch.nn.Module):
    """Transformer and text encoder as the one module that trains: noisy latents and prompts in, velocity out."""

    def __init__(self, config: PretrainConfig, tokenizer: Qwen2TokenizerFast):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.transformer = Flux2Transformer2DModel(**config.transformer)
        self.text_encoder = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **config.text_encoder))

    def forward(
        self, noisy: torch.Tensor, timestep: torch.Tensor, img_ids: torch.Tensor, prompts: list[str]
    ) -> torch.Tensor:
        prompt_embeds = encode_text(
            self.text_encoder,
            self.tokenizer,
            prompts,
            self.config.text_encoder_out_layers,
            self.config.max_sequence_length,
            noisy.device,
        )
        return self.transformer(
            hidden_states=noisy,
            encoder_hidden_states=prompt_embeds,
            timestep=timestep,
            img_ids=img_ids,
            txt_ids=position_ids(length=prompt_embeds.shape[1]).to(noisy.device),
            return_dict=False,
        )[0]


def squared_error(model, batch: EncodedBatch, timestep, noise, prompts: list[str], token_size: int) -> torch.Tensor:
    """Of the velocity (B, N, C), at noise levels (B,), for RGB noise (B, N, C)."""
    latents, height, width = batch.latents.to(noise.device), *batch.depth.shape[-2:]
    img_ids = position_ids(rows=height // token_size, columns=width // token_size).to(noise.device)
    velocity = model(add_noise(latents, noise, timestep), timestep, img_ids, prompts)
    return (velocity.float() - (noise - latents)).square()


def draw_noise(batch: EncodedBatch, generators: list[torch.Generator], device) -> torch.Tensor:
    return torch.stack([torch.randn(batch.latents.shape[1:], generator=g) for g in generators]).to(device)


def micro_batch_loss(config: PretrainConfig, model, batch: EncodedBatch, generators, token_size: int, device):
    """Velocity loss of a micro batch; what is random about a sample comes from its generator."""
    timestep = torch.stack([sample_logit_normal((), config.mu, config.sigma, g) for g in generators]).to(device)
    noise = draw_noise(batch, generators, device)
    prompts = [
        "" if torch.rand((), generator=g) < config.caption_dropout else caption
        for g, caption in zip(generators, batch.captions)
    ]
    return squared_error(model, batch, timestep, noise, prompts, token_size).mean()


def make_pipeline(config: PretrainConfig, model: TextToImage, vae: AutoencoderKLFlux2) -> Flux2KleinPipeline:
    pipe = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=math.exp(config.mu)),
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        transformer=model.transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture_grid(config: PretrainConfig, pipe: Flux2KleinPipeline, captions: list[str], token_size: int):
    """Square pictures of captions, in two rows."""
    side = round(config.cache.pixels**0.5 / token_size) * token_size
    images = pipe(
        prompt=captions,
        height=side,
        width=side,
        num_inference_steps=30,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(i) for i in range(len(captions))],
        max_sequence_length=config.max_sequence_length,
        text_encoder_out_layers=config.text_encoder_out_layers,
    ).images
    half = len(images) // 2
    return contact_sheet([images[:half], images[half:]], cell=max(side, 96))


def validate(config: PretrainConfig, trainer: Trainer, pipe, model: TextToImage, encoder: Encoder, source: Source):
    """Logs losses of held-out samples by level, and writes pictures of the captions of some."""
    if not trainer.accelerator.is_main_process:
        return

    def losses_at(batch, generators, level):
        noise = draw_noise(batch, generators, trainer.device)
        timestep = torch.full((len(generators),), level, device=trainer.device)
        error = squared_error(model, batch, timestep, noise, batch.captions, encoder.token_size)
        return {"rgb": error.mean(dim=(1, 2))}

    report, losses = ReadReport(), defaultdict(list)
    for batch in read_batches(source, config.validation_samples, trainer.config.micro_batch_size, report):
        for key, values in level_losses(losses_at, encoder, config.cache.pixels, *batch).items():
            losses[key] += values
    log_validation(trainer, losses, {})
    captions = [sample["caption"] for sample in source.read(list(range(12)), report)]
    sheet = picture_grid(config, pipe, captions, encoder.token_size)
    sheet.save(trainer.folder / f"samples-{trainer.step:08}.png")


def main():
    is_dry_run = take_flag("--dry-run")
    config = load_config(PretrainConfig)
    if is_dry_run:
        try:
            token_size = 2 ** len(AutoencoderKLFlux2.load_config(config.vae)["block_out_channels"])
        except OSError as error:
            raise SystemExit(f"error: no VAE at {config.vae}: {error}") from error
        with torch.device("meta"):
            model = TextToImage(config, range(config.vocabulary_size))  # of a tokenizer, its length is what counts
        print(report_pretraining(config, model, token_size))
        return
    torch.manual_seed(config.trainer.seed)
    vae = AutoencoderKLFlux2.from_pretrained(config.vae).requires_grad_(False).eval().to(join_processes().device)
    encoder = Encoder(vae, DepthProcessor(patch_size=2 ** len(vae.config.block_out_channels)))
    samples = prepare_samples(config, {}, encoder)
    captions = samples.captions(min(config.cache.samples, 5000))
    model = TextToImage(config, train_tokenizer(captions, config.vocabulary_size))
    trainer = Trainer(config.trainer, model)
    save_config(config, trainer.folder / "config.yaml")
    pipe = make_pipeline(config, model, vae)
    held_out = build_source(config.validation_data or config.data)

    stream = samples.stream(trainer)
    while trainer.step < config.trainer.steps:
        total = 0.0
        for batch, generators, weight in trainer.micro_batches(stream):
            loss = micro_batch_loss(config, trainer.prepared, batch, generators, encoder.token_size, trainer.device)
            trainer.accelerator.backward(loss * weight)
            total += loss.detach() * weight
        trainer.update({"loss": total})
        if trainer.is_time_to_validate:
            with trainer.averaged_weights():
                validate(config, trainer, pipe, model, encoder, held_out)

    with trainer.averaged_weights():
        if trainer.accelerator.is_main_process:
            pipe.save_pretrained(trainer.folder / "pipeline")
    trainer.finish(samples.report)


if __name__ == "__main__":
    main()
