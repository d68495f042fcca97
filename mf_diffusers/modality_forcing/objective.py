"""The training loss of one batch: which task each sample trains, at which noise levels, and what the model pays."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from .depth_processor import DepthProcessor
from .latent_tokens import position_ids
from .noise import add_noise, sample_logit_normal, sample_plateau_logit_normal, velocity_from_clean


@dataclass
class ObjectiveConfig:
    """
    P: published by the paper. D: not published, decided here.

    Args:
        p_image_to_depth: share of the samples whose image is clean (P).
        p_depth_to_image: share of the samples whose depth is clean (P).
        rgb_mu, depth_mu: shift of the two noise level distributions (P).
        sigma: spread of both (D; the published inference schedules use 1).
        depth_weight: weight of the depth loss against the RGB loss (D).
        distillation_high, distillation_low: weight of self-distillation at t_depth = 1 and at t_depth = 0. The paper
            says high > low (P), because clean depth must be allowed to change the image; the values are D.
        caption_dropout: share of the samples that train with the empty prompt, which guidance needs (D; as usual).
    """

    p_image_to_depth: float = 0.2
    p_depth_to_image: float = 0.2
    rgb_mu: float = 1.1
    depth_mu: float = 1.1
    sigma: float = 1.0
    depth_weight: float = 1.0
    distillation_high: float = 0.0
    distillation_low: float = 0.0
    caption_dropout: float = 0.1


@dataclass
class NoiseDraw:
    """
    All that is random about a batch of B samples.

    Args:
        timestep, depth_timestep: noise levels (B,), 0 where that modality is clean.
        noise: RGB noise (B, N, C).
        depth_noise: depth noise (B, 1, H, W), which also fills the missing pixels.
        drop_caption: (B,), bool.
    """

    timestep: torch.Tensor
    depth_timestep: torch.Tensor
    noise: torch.Tensor
    depth_noise: torch.Tensor
    drop_caption: torch.Tensor

    def to(self, device: torch.device) -> "NoiseDraw":
        return NoiseDraw(*(getattr(self, field.name).to(device) for field in fields(self)))


def draw_noise(
    config: ObjectiveConfig,
    latents_shape: tuple[int, int],
    depth_shape: tuple[int, int, int],
    has_depth: list[bool],
    generators: list[torch.Generator],
) -> NoiseDraw:
    """
    Draws task, noise levels, noise and caption dropout of each sample (paper, training).

    Args:
        latents_shape: (N, C) of a sample.
        depth_shape: (1, H, W) of a sample.
        has_depth: B values; a sample without any depth has no task but to train RGB.
        generators: B of them, on the CPU: a sample's draw does not depend on the batch or the process that it is in.
    """
    samples = []
    for generator, depth in zip(generators, has_depth, strict=True):
        task = torch.rand((), generator=generator)
        timestep = sample_logit_normal((), config.rgb_mu, config.sigma, generator)
        depth_timestep = sample_plateau_logit_normal((), config.depth_mu, config.sigma, generator)
        if depth and task < config.p_image_to_depth:
            timestep = torch.zeros(())
        if depth and task >= 1 - config.p_depth_to_image:
            depth_timestep = torch.zeros(())
        noise = torch.randn(latents_shape, generator=generator)
        depth_noise = torch.randn(depth_shape, generator=generator)
        drop_caption = torch.rand((), generator=generator) < config.caption_dropout
        samples.append((timestep, depth_timestep, noise, depth_noise, drop_caption))
    return NoiseDraw(*(torch.stack(values) for values in zip(*samples)))


@dataclass
class Losses:
    """Per-sample losses (B,), 0 where a sample has none of that kind; and their weighted mean, which is trained."""

    total: torch.Tensor
    rgb: torch.Tensor
    depth: torch.Tensor
    distillation: torch.Tensor


def modality_forcing_loss(
    transformer: Callable,
    latents: torch.Tensor,
    depth: torch.Tensor,
    valid: torch.Tensor,
    prompt_embeds: torch.Tensor,
    draw: NoiseDraw,
    config: ObjectiveConfig,
    depth_processor: DepthProcessor,
    teacher: Callable | None = None,
) -> Losses:
    """
    Velocity loss of RGB and of depth, and self-distillation (paper, sections on the objective and on FLUX.2).

    The transformer returns RGB as a velocity, also where it predicts clean latents (the from-scratch family). Depth is
    a prediction of the clean tokens, compared as velocities, on valid pixels only. A modality that is clean pays
    nothing. Every sample counts alike, however many of its pixels are valid.

    Args:
        transformer: the model in training.
        latents: clean RGB tokens (B, N, C).
        depth: contracted depth (B, 1, H, W) in [0, 2).
        valid: its validity (B, 1, H, W), bool.
        prompt_embeds: text features (B, L, D), those of the empty prompt where the caption is dropped.
        draw: of [`draw_noise`].
        teacher: the frozen base. It is called without depth; given iff the distillation weights are not 0.
    """
    patch_size = depth_processor.config.patch_size
    rows, columns = depth.shape[-2] // patch_size, depth.shape[-1] // patch_size
    noisy = add_noise(latents, draw.noise, draw.timestep)
    noisy_depth = torch.where(valid, add_noise(depth, draw.depth_noise, draw.depth_timestep), draw.depth_noise)
    inputs = {
        "hidden_states": noisy,
        "encoder_hidden_states": prompt_embeds,
        "timestep": draw.timestep,
        "img_ids": position_ids(rows=rows, columns=columns).to(latents.device),
        "txt_ids": position_ids(length=prompt_embeds.shape[1]).to(latents.device),
        "return_dict": False,
    }
    velocity, clean_depth = transformer(
        **inputs,
        depth_hidden_states=depth_processor.patchify(noisy_depth),
        depth_timestep=draw.depth_timestep,
        depth_ids=position_ids(time=1, rows=rows, columns=columns).to(latents.device),
    )

    makes_rgb = (draw.timestep > 0).float()
    rgb_loss = makes_rgb * (velocity.float() - (draw.noise - latents)).square().mean(dim=(1, 2))

    # Both velocities with the same floor of t: below it the target stays the clean depth.
    clean_depth = depth_processor.unpatchify(clean_depth, *depth.shape[-2:])
    depth_error = velocity_from_clean(noisy_depth, clean_depth, draw.depth_timestep) - velocity_from_clean(
        noisy_depth, depth, draw.depth_timestep
    )
    counted = valid & (draw.depth_timestep > 0).view(-1, 1, 1, 1)
    depth_loss = (depth_error.square() * counted).sum(dim=(1, 2, 3)) / valid.sum(dim=(1, 2, 3)).clamp(min=1)

    distillation_loss = torch.zeros_like(rgb_loss)
    if teacher is not None:
        with torch.no_grad():
            base_velocity = teacher(**inputs)[0]
        weight = config.distillation_high * draw.depth_timestep + config.distillation_low * (1 - draw.depth_timestep)
        distance = (base_velocity.float() - velocity.float()).square().mean(dim=(1, 2))
        distillation_loss = makes_rgb * weight * distance

    total = (rgb_loss + config.depth_weight * depth_loss + distillation_loss).mean()
    return Losses(total, rgb_loss.detach(), depth_loss.detach(), distillation_loss.detach())
