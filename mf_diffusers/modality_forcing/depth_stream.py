"""What Modality Forcing adds to any backbone: the depth timestep, its exchange with RGB, the depth head, the graft."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormContinuous, RMSNorm
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import maybe_adjust_dtype_for_device


@dataclass
class ModalityForcingTransformerOutput(BaseOutput):
    r"""
    Args:
        sample (`torch.Tensor` of shape `(batch_size, image_sequence_length, out_channels)`):
            RGB velocity, noise minus clean latents.
        depth_sample (`torch.Tensor` of shape `(batch_size, image_sequence_length, depth_channels)`, *optional*):
            Clean depth tokens (x-prediction), float32. `None` when no depth went in.

    Example:
        >>> import torch
        >>> from mf_diffusers import ModalityForcingTransformerOutput
        >>> output = ModalityForcingTransformerOutput(sample=torch.zeros(1, 64, 32))  # what went in had no depth
        >>> tuple(output.sample.shape), output.depth_sample
        ((1, 64, 32), None)
    """

    sample: torch.Tensor
    depth_sample: torch.Tensor | None = None


@dataclass
class TransformerShape:
    """
    The sizes of a transformer that others ask for, whatever its config calls them.

    Args:
        width: of a token in the trunk.
        trunk_blocks: blocks over all tokens.
        mlp_ratio: width of their MLPs over that of a token.
        token_channels: values of an RGB token that goes in.
        text_channels: width of the text features.
        float32_values: values for each of a token's that a block keeps in float32 for the backward pass, whatever it
            computes in.
    """

    width: int
    trunk_blocks: int
    mlp_ratio: float
    token_channels: int
    text_channels: int
    float32_values: float = 0


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
        hidden_dim (`int`, *optional*): Width inside the MLPs. Default: `embedding_dim`.
        bias (`bool`, defaults to `False`): Whether the MLPs have biases.
    """

    def __init__(
        self, in_channels: int, embedding_dim: int, mixing: bool, hidden_dim: int | None = None, bias: bool = False
    ):
        super().__init__()
        self.in_channels = in_channels

        def mlp() -> TimestepEmbedding:
            return TimestepEmbedding(
                in_channels, hidden_dim or embedding_dim, out_dim=embedding_dim, sample_proj_bias=bias
            )

        self.timestep_embedder = mlp()
        self.mixing = mixing
        if mixing:
            self.depth_to_rgb = mlp()
            self.rgb_to_depth = mlp()
            self.alpha_rgb = nn.Parameter(torch.zeros(1))
            self.alpha_depth = nn.Parameter(torch.zeros(1))

    def forward(
        self, temb: torch.Tensor, timestep: torch.Tensor, depth_timestep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            temb (`torch.Tensor` of shape (B, D)): conditioning vector of the RGB stream.
            timestep, depth_timestep (`torch.Tensor` of shape (B,)): noise levels as the base counts them, times 1000.

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
        conditioning_dim (`int`, *optional*): Width of the conditioning vector. Default: that of the body.
    """

    def __init__(self, dim: int, out_channels: int, eps: float = 1e-6, conditioning_dim: int | None = None):
        super().__init__()
        self.norm_out = AdaLayerNormContinuous(
            dim, conditioning_dim or dim, elementwise_affine=False, eps=eps, bias=False
        )
        self.proj_out = nn.Linear(dim, out_channels, bias=False)

    def _apply(self, fn, recurse=True):
        # What moves the model moves the head; what casts it (`pipe.to(torch.bfloat16)`) leaves the head in float32.
        def move(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def forward(self, hidden_states: torch.Tensor, depth_temb: torch.Tensor) -> torch.Tensor:
        """(B, N, dim) and (B, conditioning_dim) -> (B, N, out_channels), float32."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_states = self.norm_out(hidden_states.float(), depth_temb.float())
            return self.proj_out(hidden_states)


class DepthStreamMixin:
    """What a transformer says of its depth stream. Its class names the modules that depth adds in `_depth_modules`."""

    _depth_modules: frozenset[str]

    def _run_block(self, block: nn.Module, *inputs) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """What a block makes of its inputs; with gradient checkpointing, anew in the backward pass."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def is_depth_parameter(self, name: str) -> bool:
        """Whether the parameter of this name was added by depth, to the transformer or to a LoRA on it."""
        return not self._depth_modules.isdisjoint(name.split("."))

    @classmethod
    def shape_of(cls, config: dict[str, Any]) -> TransformerShape:
        """The sizes of a transformer of this class, or of its base, by its config."""
        return TransformerShape(
            width=config["num_attention_heads"] * config["attention_head_dim"],
            trunk_blocks=config["num_layers"] + config.get("num_single_layers", 0),
            mlp_ratio=config["mlp_ratio"],
            token_channels=config["in_channels"],
            text_channels=config["joint_attention_dim"],
        )

    @property
    def shape(self) -> TransformerShape:
        return self.shape_of(self.config)

    def depth_outputs(self) -> list[nn.Module]:
        """The modules by which depth writes to the outside: gates of the decoder, and the head."""
        return [self.depth_decoder_modulation, self.depth_head]

    def reset_depth_outputs(self) -> None:
        """Sets to zero what writes to the outside at the start: decoder gates, head, timestep mixers."""
        embed = self.depth_time_embed
        mixers = [embed.alpha_rgb, embed.alpha_depth] if embed.mixing else []
        for parameter in (*mixers, *(p for module in self.depth_outputs() for p in module.parameters())):
            nn.init.zeros_(parameter)


def graft_depth(model: ModelMixin, base: ModelMixin, clones: dict[str, str]) -> None:
    """
    Fills a transformer with the weights of its text-to-image base, and starts the depth modules.

    Depth modules with a twin in the image stream start as its copy, the depth embedder and decoder start fresh, and
    whatever writes to the outside (decoder gates, head, timestep mixers) starts at zero. Nothing is shared with `base`.

    Args:
        model: on the meta device, so that billions of weights are not drawn only to be overwritten. It ends on the
            base's device and in its dtype, `_keep_in_fp32_modules` in float32.
        clones: which parameter of the base each cloned parameter of `model` starts from, by name.
    """
    for name, child in model.named_children():
        child.to(torch.float32 if name in model._keep_in_fp32_modules else base.dtype)
    weights = base.state_dict()
    for depth_name, image_name in clones.items():
        weights[depth_name] = weights[image_name]
    model.load_state_dict({name: w.clone() for name, w in weights.items()}, strict=False, assign=True)
    for module in model.modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty(device=base.device, recurse=False)
            if isinstance(module, RMSNorm):  # diffusers' own does not know how it starts
                nn.init.ones_(module.weight)
            elif hasattr(module, "reset_parameters"):  # all but what `reset_depth_outputs` sets
                module.reset_parameters()
    model.reset_depth_outputs()


def join_ids(*ids: torch.Tensor) -> torch.Tensor:
    """Positions of the streams, one after another: (N, 4) or (B, N, 4) each -> (sum of N, 4).

    Context parallelism wants ids with a batch axis; positions are the same for every sample.
    """
    return torch.cat([stream[0] if stream.ndim == 3 else stream for stream in ids])
