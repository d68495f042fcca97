"""What Modality Forcing adds to any backbone: the depth timestep, its exchange with RGB, and the depth head."""

import math

import torch
import torch.nn as nn
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.utils.torch_utils import maybe_adjust_dtype_for_device


def timestep_sinusoids(timestep: torch.Tensor, channels: int) -> torch.Tensor:
    """Cosines, then sines, of `timestep` (B,) at ``10000**(-i / (channels / 2))``: (B, channels), float32."""
    half = channels // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    # expf differs in its last bit from machine to machine, and t * 1000 turns that bit into 1e-4 of the output.
    frequencies = exponent.to(maybe_adjust_dtype_for_device(torch.float64, timestep.device)).exp().float()
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class DepthTimestepEmbeddings(nn.Module):
    r"""
    Conditioning vector of the depth stream, and the exchange of noise levels between the streams (v2 of the method).

    ``temb += a_rgb * MLP(emb(t_depth))`` and ``depth_temb += a_depth * MLP(emb(t_rgb))``; both scalars start at zero,
    so a fresh graft leaves the RGB stream as it was.

    Args:
        in_channels (`int`): Width of the sinusoidal embedding.
        embedding_dim (`int`): Width of the conditioning vectors.
        mixing (`bool`): Whether the streams hear each other's noise level.
    """

    def __init__(self, in_channels: int, embedding_dim: int, mixing: bool):
        super().__init__()
        self.in_channels = in_channels
        self.timestep_embedder = TimestepEmbedding(in_channels, embedding_dim, sample_proj_bias=False)
        self.mixing = mixing
        if mixing:
            self.depth_to_rgb = TimestepEmbedding(in_channels, embedding_dim, sample_proj_bias=False)
            self.rgb_to_depth = TimestepEmbedding(in_channels, embedding_dim, sample_proj_bias=False)
            self.alpha_rgb = nn.Parameter(torch.zeros(1))
            self.alpha_depth = nn.Parameter(torch.zeros(1))

    def forward(
        self, temb: torch.Tensor, timestep: torch.Tensor, depth_timestep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            temb (`torch.Tensor` of shape (B, D)): conditioning vector of the RGB stream.
            timestep, depth_timestep (`torch.Tensor` of shape (B,)): noise levels times 1000, in the body's dtype.

        Returns:
            The conditioning vectors of the RGB and of the depth stream, (B, D) each.
        """
        rgb_proj = timestep_sinusoids(timestep, self.in_channels).to(temb.dtype)
        depth_proj = timestep_sinusoids(depth_timestep, self.in_channels).to(temb.dtype)
        depth_temb = self.timestep_embedder(depth_proj)
        if self.mixing:
            temb = temb + self.alpha_rgb * self.depth_to_rgb(depth_proj)
            depth_temb = depth_temb + self.alpha_depth * self.rgb_to_depth(rgb_proj)
        return temb, depth_temb


class DepthHead(nn.Module):
    r"""
    AdaLN and linear projection to clean depth tokens, computed in float32 whatever the body's dtype: in bfloat16 the
    depth comes out in bands.

    Args:
        dim (`int`): Width of the body.
        out_channels (`int`): Values per depth token.
        eps (`float`): Epsilon of the LayerNorm.
    """

    def __init__(self, dim: int, out_channels: int, eps: float = 1e-6):
        super().__init__()
        self.norm_out = AdaLayerNormContinuous(dim, dim, elementwise_affine=False, eps=eps, bias=False)
        self.proj_out = nn.Linear(dim, out_channels, bias=False)

    def _apply(self, fn, recurse=True):
        # What moves the model moves the head; what casts it (`pipe.to(torch.bfloat16)`) leaves the head in float32.
        def move(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def forward(self, hidden_states: torch.Tensor, depth_temb: torch.Tensor) -> torch.Tensor:
        """(B, N, D) and (B, D) -> (B, N, out_channels), float32."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_states = self.norm_out(hidden_states.float(), depth_temb.float())
            return self.proj_out(hidden_states)
