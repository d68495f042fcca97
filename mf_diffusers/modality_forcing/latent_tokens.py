"""Images to the transformer's RGB tokens and back: VAE latents in 2x2 cells, whitened, and the tokens' positions."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F


if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderKLFlux2


def image_to_tokens(vae: "AutoencoderKLFlux2 | AutoencoderKL", image: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1] -> whitened latent tokens (B, N, C), float32, C = 4 times the latent channels."""
    cells = pack_cells(vae.encode((2 * image - 1).to(vae.dtype)).latent_dist.mode().float())
    mean, std = _cell_statistics(vae, cells.device)
    return ((cells - mean) / std).transpose(1, 2)


def pack_cells(latents: torch.Tensor) -> torch.Tensor:
    """VAE latents (B, C, H, W), or a mask of theirs, in cells of 2x2: (B, 4 * C, H / 2 * W / 2), row-major."""
    batch_size, channels, height, width = latents.shape
    cells = latents.reshape(batch_size, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return cells.reshape(batch_size, 4 * channels, -1)


def hidden_cells(hidden: torch.Tensor, rows: int, columns: int, channels: int) -> torch.Tensor:
    """
    Args:
        hidden: (B, 1, H, W) in [0, 1], 1 where an image is made anew.
        channels: of its tokens.

    Returns:
        Which values of its tokens are made anew, (B, channels, rows * columns), bool: those of each VAE latent of which
        any pixel is hidden by half or more.
    """
    latents = F.adaptive_max_pool2d(hidden, (2 * rows, 2 * columns)) >= 0.5
    return pack_cells(latents.expand(-1, channels // 4, -1, -1))


def tokens_to_latents(
    vae: "AutoencoderKLFlux2 | AutoencoderKL", tokens: torch.Tensor, rows: int, columns: int
) -> torch.Tensor:
    """Whitened latent tokens (B, rows * columns, C) -> VAE latents (B, C / 4, 2 * rows, 2 * columns), float32."""
    mean, std = _cell_statistics(vae, tokens.device)
    cells = (tokens.float().transpose(1, 2) * std + mean).view(len(tokens), -1, 2, 2, rows, columns)
    return cells.permute(0, 1, 4, 2, 5, 3).reshape(len(tokens), -1, 2 * rows, 2 * columns)


def decode_latents(vae: "AutoencoderKLFlux2 | AutoencoderKL", latents: torch.Tensor) -> torch.Tensor:
    """VAE latents -> images (B, 3, H, W) in [-1, 1], float32."""
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0].float().clamp(-1, 1)


def position_ids(time: int = 0, rows: int = 1, columns: int = 1, length: int = 1) -> torch.Tensor:
    """Positions (time, row, column, text index) of a row-major grid or of a text: (1, rows * columns * length, 4)."""
    return torch.cartesian_prod(torch.tensor([time]), torch.arange(rows), torch.arange(columns), torch.arange(length))[
        None
    ]


def _cell_statistics(
    vae: "AutoencoderKLFlux2 | AutoencoderKL", device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel of a 2x2 cell, (C, 1) each, float32; FLUX.1's VAE has one of each."""
    if not hasattr(vae, "bn"):
        one = torch.ones(4 * vae.config.latent_channels, 1, device=device)
        return vae.config.shift_factor * one, one / vae.config.scaling_factor
    std = torch.sqrt(vae.bn.running_var.float() + vae.config.batch_norm_eps)
    return vae.bn.running_mean.float().to(device)[:, None], std.to(device)[:, None]
