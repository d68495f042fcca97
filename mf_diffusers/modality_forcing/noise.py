"""Noise levels of the two modalities: how they are drawn in training and walked through in sampling.

Flow matching: ``z_t = (1 - t) * x0 + t * noise``, so ``t = 1`` is pure noise and ``t = 0`` is clean. RGB and depth each
have a level of their own (paper, section 3); which levels move decides the task.
"""

import math

import torch


# Floor of t when a clean prediction is divided by t (published model; also the choice of JiT, the closest relative).
MIN_TIMESTEP = 0.05


def add_noise(clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Noisy sample ``z_t`` at `timestep` in [0, 1], which is a scalar or has shape (B,)."""
    timestep = _like_sample(timestep, clean)
    return (1 - timestep) * clean + timestep * noise


def velocity_from_clean(noisy: torch.Tensor, clean: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Velocity ``noise - x0`` that belongs to a prediction of the clean sample: ``(z_t - x0) / max(t, 0.05)``.

    Args:
        noisy: ``z_t``, shape (B, ...).
        clean: prediction of ``x0``, same shape.
        timestep: t in [0, 1], a scalar or shape (B,).
    """
    return (noisy - clean) / _like_sample(timestep, noisy).clamp(min=MIN_TIMESTEP)


def shift_timestep(timestep: torch.Tensor, alpha: float) -> torch.Tensor:
    """Trajectory warp ``f_a(t) = a t / (1 + (a - 1) t)`` (paper, inference trajectory).

    ``alpha > 1`` keeps depth noisier than RGB on the way (RGB resolves first), ``alpha < 1`` the other way round. It is
    what ``FlowMatchEulerDiscreteScheduler(shift=alpha)`` does to its sigmas.
    """
    return alpha * timestep / (alpha * timestep + (1 - timestep))


def sample_logit_normal(
    shape: tuple[int, ...],
    mu: float = 1.1,
    sigma: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """RGB noise levels for training: ``sigmoid(mu + sigma * n)`` with n standard normal; float32 in (0, 1)."""
    return torch.sigmoid(mu + sigma * torch.randn(shape, generator=generator, device=device))


def sample_plateau_logit_normal(
    shape: tuple[int, ...],
    mu: float = 1.1,
    sigma: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Depth noise levels for training: logit-normal up to its mode ``t*``, constant at the mode's density above it.

    With P and p the logit-normal's distribution function and density, the plateau holds ``(1 - t*) p(t*)`` of the mass
    ``Z = P(t*) + (1 - t*) p(t*)`` (paper, training noise). Sampled by inverting the distribution function.

    Returns:
        float32 of the given shape, in (0, 1].
    """
    mode = logit_normal_mode(mu, sigma)
    below = _normal_cdf((_logit(mode) - mu) / sigma)
    density = math.exp(-0.5 * ((_logit(mode) - mu) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi) * mode * (1 - mode))
    total = below + (1 - mode) * density

    mass = torch.rand(shape, generator=generator, device=device) * total
    on_plateau = mode + (mass - below) / density
    logit = mu + sigma * torch.special.ndtri(mass.clamp(1e-7, below))
    return torch.where(mass > below, on_plateau, torch.sigmoid(logit))


def logit_normal_mode(mu: float, sigma: float = 1.0) -> float:
    """The highest mode of the logit-normal density: the largest root of ``logit(t) - mu = sigma**2 (2t - 1)``."""
    # The right side is at most sigma^2, and the fixed-point iteration that starts there falls to the largest root.
    logit = mu + sigma**2
    for _ in range(200):
        logit = mu + sigma**2 * math.tanh(logit / 2)
    return 1 / (1 + math.exp(-logit))


def _like_sample(timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    timestep = torch.as_tensor(timestep, dtype=sample.dtype, device=sample.device)
    return timestep.view(-1, *[1] * (sample.ndim - 1)) if timestep.ndim else timestep


def _logit(t: float) -> float:
    return math.log(t / (1 - t))


def _normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))
