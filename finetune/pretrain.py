"""Text-to-image pre-training of a base from nothing: a small one of FLUX.2's architecture, or the from-scratch family.

    accelerate launch finetune/pretrain.py --config finetune/configs/embedded_base.yaml [--dry-run] [key=value ...]

`--dry-run` prints parameters, memory, data and the size of the cache, and stops.

The transformer trains on captioned images, and with it the text encoder unless a pretrained one is given, which stays
frozen; the VAE is given and frozen. The result is a pipeline folder, onto which finetune/post_train.py grafts depth: a
`Flux2KleinPipeline`, or a `ModalityForcingPipeline` without depth.
"""

import math
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast


sys.path.append(str(Path(__file__).parents[1]))  # the launcher puts this folder on the path, not the repository

from finetune.config import arguments_of, check_names, load_config, save_config, take_flag
from finetune.data.cache import CacheConfig, prepare_samples, weights_hash
from finetune.data.encoding import EncodedBatch, Encoder
from finetune.data.source_check import open_data
from finetune.data.sources import ReadReport, Source
from finetune.preflight.dry_run import report_pretraining
from finetune.preflight.memory import memory_verdict, pretraining_memory
from finetune.preflight.start_check import check_start
from finetune.training.models import live_text_encoder, read_token_size
from finetune.training.tokenizers import TOKENIZERS
from finetune.training.trainer import Trainer, TrainerConfig, join_processes, load_result
from finetune.training.validation import level_losses, log_validation, read_batches
from mf_diffusers import DepthProcessor, ModalityForcingPipeline
from mf_diffusers.errors import errors_as_lines
from mf_diffusers.files import save_whole
from mf_diffusers.modality_forcing.backbones import BACKBONES
from mf_diffusers.modality_forcing.latent_tokens import position_ids
from mf_diffusers.modality_forcing.noise import add_noise, sample_logit_normal
from mf_diffusers.precision import DTYPES
from mf_diffusers.visualization import contact_sheet


@dataclass
class PretrainConfig:
    """
    Args:
        architecture: "flux2" or "z_image", with a Qwen3 text encoder, or "dit", the from-scratch family, with a UMT5
            encoder.
        vae: folder of a trained `AutoencoderKLFlux2`; or a pipeline, folder or Hub repository, that has one. "z_image"
            has an `AutoencoderKL`, which is made of one, see `plain_autoencoder`.
        transformer: constructor arguments of the architecture's transformer in diffusers, or of
            `ModalityForcingDiTTransformer2DModel`.
        text_encoder: arguments of `Qwen3Config` or `UMT5Config`, of a text encoder that trains along; or null. It has
            no dropout unless `dropout_rate` (UMT5) or `attention_dropout` (Qwen3) asks for it; then a resumed run does
            not end as one left alone.
        pretrained_text_encoder: folder or Hub repository of one that is frozen, with its tokenizer, in place of that.
            Only safetensors are read; in the dtype that is computed in.
        text_encoder_out_layers, max_sequence_length: which hidden layers of Qwen3 are the text features (of UMT5 it is
            the last), and their length.
        vocabulary_size: of a new tokenizer, trained on the captions of the first `cache.samples` samples, 5000 at most.
        mu, sigma: of the logit-normal noise levels.
        caption_dropout: share of empty prompts, which guidance needs.
        validation_data: held-out samples; without them, validation takes the first of `data`.
        validation_samples: how many of them a validation takes.
        flip: mirror half of the samples, but none whose caption says left or right; needs `cache.folder: null`.
    """

    architecture: str = "flux2"
    vae: str = "mf_diffusers/embedded/model"
    transformer: dict[str, Any] = field(default_factory=dict)
    text_encoder: dict[str, Any] | None = field(default_factory=dict)
    pretrained_text_encoder: str | None = None
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


def check(config: PretrainConfig) -> None:
    """Stops at settings that do not go together."""
    if config.architecture not in BACKBONES:
        raise SystemExit(f"error: architecture {config.architecture!r} is none of {', '.join(BACKBONES)}")
    if config.text_encoder and config.pretrained_text_encoder:
        raise SystemExit("error: text_encoder is one that trains along, pretrained_text_encoder a frozen one: give one")
    check_names("transformer", config.transformer, arguments_of(BACKBONES[config.architecture].base_class))
    config_class = BACKBONES[config.architecture].text_config_class
    known = arguments_of(config_class) - {"vocab_size"} | config_class.attribute_map.keys()  # it takes any name
    check_names("text_encoder", config.text_encoder or {}, known)


def plain_autoencoder(vae: AutoencoderKLFlux2) -> AutoencoderKL:
    """The same layers with one mean and one standard deviation of all latents, as Z-Image's autoencoder has them, in
    place of those of each channel of a cell."""
    mean, variance = vae.bn.running_mean, vae.bn.running_var + vae.config.batch_norm_eps
    shift = mean.mean()
    known = arguments_of(AutoencoderKL) - {"scaling_factor", "shift_factor"}
    plain = AutoencoderKL(
        **{name: value for name, value in vae.config.items() if name in known},
        shift_factor=shift.item(),
        scaling_factor=(variance + (mean - shift) ** 2).mean().rsqrt().item(),
    )
    plain.load_state_dict({name: w for name, w in vae.state_dict().items() if not name.startswith("bn.")})
    return plain


def open_vae(config: PretrainConfig) -> AutoencoderKLFlux2 | AutoencoderKL:
    """The frozen autoencoder that `PretrainConfig.vae` names."""
    path, cls = config.vae, BACKBONES[config.architecture].autoencoder_class
    subfolder = None if (Path(path) / "config.json").is_file() else "vae"
    try:
        found = cls.load_config(path, subfolder=subfolder)["_class_name"]
        if (found, cls) == (AutoencoderKLFlux2.__name__, AutoencoderKL):
            vae = plain_autoencoder(AutoencoderKLFlux2.from_pretrained(path, subfolder=subfolder))
        elif found == cls.__name__:
            vae = cls.from_pretrained(path, subfolder=subfolder)
        else:
            raise SystemExit(f"error: the VAE at {path} is a {found}: architecture={config.architecture} has another")
    except OSError as error:
        raise SystemExit(f"error: no VAE at {path}: {error}") from error
    return vae.requires_grad_(False).eval()


def open_text_encoder(config: PretrainConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The frozen text encoder and its tokenizer, from a folder, or the two folders of a pipeline."""
    path, model_class = config.pretrained_text_encoder, BACKBONES[config.architecture].text_encoder_class
    is_pipeline = (Path(path) / "text_encoder").is_dir()
    folders = ({"subfolder": "text_encoder"}, {"subfolder": "tokenizer"}) if is_pipeline else ({}, {})
    try:
        text_encoder = model_class.from_pretrained(
            path, dtype=DTYPES[config.trainer.mixed_precision], use_safetensors=True, **folders[0]
        )
        tokenizer = AutoTokenizer.from_pretrained(path, **folders[1])
    except OSError as error:
        raise SystemExit(f"error: no text encoder with its tokenizer at {path}: {error}") from error
    return text_encoder.requires_grad_(False).eval(), tokenizer


class TextToImage(torch.nn.Module):
    """
    What trains, as one module: the transformer, and the text encoder unless it is a pretrained one. Noisy latents
    and text in, velocity out.

    Args:
        tokenizer: of the text encoder that trains; None where the text comes as features.
    """

    def __init__(self, config: PretrainConfig, tokenizer: PreTrainedTokenizerFast | None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        backbone = BACKBONES[config.architecture]
        self.transformer = backbone.base_class(**config.transformer)
        if tokenizer is not None:
            known = arguments_of(backbone.text_config_class)
            no_dropout = {name: 0.0 for name in ("dropout_rate", "attention_dropout") if name in known}
            text_config = backbone.text_config_class(vocab_size=len(tokenizer), **no_dropout | config.text_encoder)
            self.text_encoder = backbone.text_encoder_class(text_config)

    def forward(
        self, noisy: torch.Tensor, timestep: torch.Tensor, img_ids: torch.Tensor, text: list[str] | torch.Tensor
    ) -> torch.Tensor:
        prompt_embeds = text
        if self.tokenizer is not None:
            layers, length = self.config.text_encoder_out_layers, self.config.max_sequence_length
            encode_text = BACKBONES[self.config.architecture].encode_text
            prompt_embeds = encode_text(self.text_encoder, self.tokenizer, text, layers, length, noisy.device)
        return BACKBONES[self.config.architecture].call_base(
            self.transformer,
            hidden_states=noisy,
            encoder_hidden_states=prompt_embeds,
            timestep=timestep,
            img_ids=img_ids,
            txt_ids=position_ids(length=prompt_embeds.shape[1]).to(noisy.device),
            return_dict=False,
        )[0]


def squared_error(model, batch: EncodedBatch, timestep, noise, text, token_size: int) -> torch.Tensor:
    """Squared error of the velocity (B, N, C), at levels (B,), for RGB noise (B, N, C) and B prompts or features."""
    latents, height, width = batch.latents.to(noise.device), *batch.depth.shape[-2:]
    img_ids = position_ids(rows=height // token_size, columns=width // token_size).to(noise.device)
    velocity = model(add_noise(latents, noise, timestep), timestep, img_ids, text)
    return (velocity.float() - (noise - latents)).square()


def draw_noise(batch: EncodedBatch, generators: list[torch.Generator], device: torch.device) -> torch.Tensor:
    return torch.stack([torch.randn(batch.latents.shape[1:], generator=g) for g in generators]).to(device)


def micro_batch_losses(config: PretrainConfig, trainer, batch: EncodedBatch, generators, empty_embeds, token_size):
    """Velocity loss of a micro batch, and what of it to log; what is random about a sample comes from its generator."""
    timestep = torch.stack([sample_logit_normal((), config.mu, config.sigma, g) for g in generators]).to(trainer.device)
    noise = draw_noise(batch, generators, trainer.device)
    dropped = [bool(torch.rand((), generator=g) < config.caption_dropout) for g in generators]
    if batch.prompt_embeds is None:
        text = ["" if drop else caption for drop, caption in zip(dropped, batch.captions)]
    else:
        drop = torch.tensor(dropped, device=trainer.device)[:, None, None]
        text = torch.where(drop, empty_embeds, batch.prompt_embeds.to(trainer.device))
    loss = squared_error(trainer.prepared, batch, timestep, noise, text, token_size).mean()
    return loss, {"loss": loss}


def make_pipeline(
    config: PretrainConfig, model: TextToImage, vae: AutoencoderKLFlux2 | AutoencoderKL, text_encoder, tokenizer
) -> DiffusionPipeline:
    """The text-to-image pipeline of the model's family, or a `ModalityForcingPipeline` without depth."""
    components = {
        "transformer": model.transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=math.exp(config.mu)),
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
    }
    pipeline_class = BACKBONES[config.architecture].base_pipeline_class
    if pipeline_class is not None:
        pipe = pipeline_class(**components)
    else:
        pipe = ModalityForcingPipeline(
            **components,
            depth_scheduler=None,
            depth_processor=None,
            max_sequence_length=config.max_sequence_length,
            default_sample_size=round(config.cache.pixels**0.5),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def consolidate(config: PretrainConfig, checkpoint: Path, folder: Path) -> None:
    """Writes the pipeline of a checkpoint of a run with these settings."""
    if config.pretrained_text_encoder is None:
        tokenizer = AutoTokenizer.from_pretrained(Path(config.trainer.output) / "tokenizer")
        model = TextToImage(config, tokenizer)
        text_encoder = model.text_encoder
    else:
        model = TextToImage(config, None)
        text_encoder, tokenizer = open_text_encoder(config)
    load_result(model, checkpoint)
    save_whole(make_pipeline(config, model, open_vae(config), text_encoder, tokenizer), folder)


def picture_grid(config: PretrainConfig, pipe, captions: list[str], token_size: int):
    """Square pictures of captions, in two rows."""
    side = round(config.cache.pixels**0.5 / token_size) * token_size
    text = {
        "max_sequence_length": config.max_sequence_length,
        "text_encoder_out_layers": config.text_encoder_out_layers,
    }
    images = pipe(
        prompt=list(captions),  # which diffusers may write into
        height=side,
        width=side,
        num_inference_steps=30,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(i) for i in range(len(captions))],
        **{name: text[name] for name in text.keys() & arguments_of(type(pipe).__call__)},  # the others know them
    ).images
    half = len(images) // 2
    return contact_sheet([images[:half], images[half:]], cell=max(side, 96))


def validate(config: PretrainConfig, trainer: Trainer, pipe, model: TextToImage, encoder: Encoder, source: Source):
    """Logs losses of held-out samples by level, and writes pictures of the captions of some."""
    if not trainer.validates:
        return

    def losses_at(batch, generators, level):
        noise = draw_noise(batch, generators, trainer.device)
        timestep = torch.full((len(generators),), level, device=trainer.device)
        text = batch.captions if batch.prompt_embeds is None else batch.prompt_embeds.to(trainer.device)
        error = squared_error(model, batch, timestep, noise, text, encoder.token_size)
        return {"rgb": error.mean(dim=(1, 2))}

    model.eval()
    report, losses = ReadReport(), defaultdict(list)
    for batch in read_batches(source, config.validation_samples, trainer.config.micro_batch_size, report):
        for key, values in level_losses(losses_at, encoder, config.cache, *batch).items():
            losses[key] += values
    log_validation(trainer, losses, {})
    captions = [sample["caption"] for sample in source.read(list(range(12)), report)]
    sheet = picture_grid(config, pipe, captions, encoder.token_size)
    if trainer.accelerator.is_main_process:
        sheet.save(trainer.folder / f"samples-{trainer.step:08}.png")
    model.train()


def main() -> None:
    is_dry_run = take_flag("--dry-run")
    config = load_config(PretrainConfig)
    check(config)
    is_frozen = config.pretrained_text_encoder is not None
    processes = join_processes()
    check_start(config.trainer)
    token_size = read_token_size(config.vae, config.transformer)
    with torch.device("meta"):  # of a tokenizer, its length is what counts
        model = TextToImage(config, None if is_frozen else range(config.vocabulary_size))
    live = live_text_encoder(config, config.pretrained_text_encoder)
    fits, verdict = memory_verdict(config, lambda c, launch: pretraining_memory(c, model, token_size, live, launch))
    if is_dry_run:
        processes.print(f"{report_pretraining(config, model, token_size)}\n{verdict}")
        return
    if not fits:
        raise SystemExit(f"error: {verdict}" if processes.is_main_process else 1)
    processes.print(verdict)
    *_, held_out = open_data(config.data, *([config.validation_data] if config.validation_data else []))
    torch.manual_seed(config.trainer.seed)
    device = processes.device
    vae = open_vae(config).to(device)
    text = {"out_layers": config.text_encoder_out_layers, "max_sequence_length": config.max_sequence_length}
    encode = None
    if is_frozen:
        text_encoder, tokenizer = open_text_encoder(config)
        text_encoder.to(device)

        def encode(prompts: list[str]) -> torch.Tensor:
            return BACKBONES[config.architecture].encode_text(text_encoder, tokenizer, prompts, **text)

    encoder = Encoder(vae, DepthProcessor(patch_size=2 ** len(vae.config.block_out_channels)), encode)
    encoders = text | {"text_encoder": weights_hash(text_encoder)} if is_frozen else {}
    samples = prepare_samples(config, encoders, encoder)
    if is_frozen:
        model = TextToImage(config, None)
        with torch.no_grad():
            empty_embeds = encode([""])
    else:
        captions = samples.captions(min(config.cache.samples, 5000))
        tokenizer = TOKENIZERS[BACKBONES[config.architecture].text_encoder_class](captions, config.vocabulary_size)
        model = TextToImage(config, tokenizer)
        text_encoder, empty_embeds = model.text_encoder, None
    pipe = make_pipeline(config, model, vae, text_encoder, tokenizer)
    is_text_cached = is_frozen and config.cache.folder is not None
    if is_text_cached:
        text_encoder.to("cpu")  # needed again in validation only
    if config.trainer.gradient_checkpointing:
        model.transformer.enable_gradient_checkpointing()
    trainer = Trainer(config.trainer, model)
    if trainer.accelerator.is_main_process:
        save_config(config, trainer.folder / "config.yaml")
        tokenizer.save_pretrained(trainer.folder / "tokenizer")

    def losses_of(batch: EncodedBatch, generators: list[torch.Generator]):
        return micro_batch_losses(config, trainer, batch, generators, empty_embeds, encoder.token_size)

    stream = samples.stream(trainer)
    while trainer.step < config.trainer.steps:
        trainer.train_step(stream, losses_of)
        if trainer.is_time_to_validate:
            text_encoder.to(trainer.device)
            with trainer.averaged_weights():
                validate(config, trainer, pipe, model, encoder, held_out)
            if is_text_cached:
                text_encoder.to("cpu")

    if trainer.is_sharded:
        if trainer.accelerator.is_main_process:
            consolidate(config, trainer.last_checkpoint, trainer.folder / "pipeline")
    else:
        with trainer.averaged_weights():
            if trainer.accelerator.is_main_process:
                save_whole(pipe, trainer.folder / "pipeline")
    trainer.finish(samples.report)


if __name__ == "__main__":
    with errors_as_lines():
        main()
