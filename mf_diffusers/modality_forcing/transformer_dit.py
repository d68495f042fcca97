"""The from-scratch family: a flat-token DiT for text-to-image, with or without depth (paper, from-scratch family)."""

from typing import Any

import torch
import torch.nn as nn
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, apply_rotary_emb
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed, Flux2SwiGLU
from diffusers.utils import apply_lora_scale

from .depth_stream import (
    DepthHead,
    DepthStreamMixin,
    DepthTimestepEmbeddings,
    ModalityForcingTransformerOutput,
    graft_depth,
    join_ids,
    timestep_sinusoids,
)
from .noise import velocity_from_clean


class ModalityForcingDiTAttnProcessor:
    """Grouped-query attention over all tokens, and the SwiGLU MLP beside it."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "ModalityForcingDiTParallelAttention",
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        query, key, value, mlp_hidden_states = attn.to_qkv_mlp_proj(hidden_states).split(attn.projection_dims, dim=-1)
        query = attn.norm_q(query.unflatten(-1, (-1, attn.head_dim)))
        key = attn.norm_k(key.unflatten(-1, (-1, attn.head_dim)))
        value = value.unflatten(-1, (-1, attn.head_dim))

        query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
        key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        # Repeated here, because most attention backends, and context parallelism, take no grouped queries.
        groups = query.shape[2] // key.shape[2]
        key, value = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
        attn_output = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        attn_output = attn_output.flatten(2, 3).to(query.dtype)
        return attn.to_out(torch.cat([attn_output, attn.mlp_act_fn(mlp_hidden_states)], dim=-1))


class ModalityForcingDiTParallelAttention(nn.Module, AttentionModuleMixin):
    """Attention and MLP side by side: one projection in, one out (as in FLUX.2's single-stream blocks)."""

    _default_processor_cls = ModalityForcingDiTAttnProcessor
    _available_processors = [ModalityForcingDiTAttnProcessor]
    _supports_qkv_fusion = False  # it is fused from the start

    def __init__(self, heads: int, kv_heads: int, dim_head: int, mlp_ratio: float, eps: float):
        super().__init__()
        dim, kv_dim = heads * dim_head, kv_heads * dim_head
        mlp_dim = int(dim * mlp_ratio)
        self.head_dim = dim_head
        self.projection_dims = [dim, kv_dim, kv_dim, 2 * mlp_dim]
        self.to_qkv_mlp_proj = nn.Linear(dim, sum(self.projection_dims), bias=False)
        self.norm_q = nn.RMSNorm(dim_head, eps=eps)
        self.norm_k = nn.RMSNorm(dim_head, eps=eps)
        self.mlp_act_fn = Flux2SwiGLU()
        self.to_out = nn.Linear(dim + mlp_dim, dim, bias=False)
        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.processor(self, hidden_states, **kwargs)


class ModalityForcingDiTTransformerBlock(nn.Module):
    """Parallel attention and MLP between two RMSNorms; their weights are all that a block modulates on its own."""

    def __init__(self, heads: int, kv_heads: int, dim_head: int, mlp_ratio: float, eps: float):
        super().__init__()
        self.norm1 = nn.RMSNorm(heads * dim_head, eps=eps)
        self.attn = ModalityForcingDiTParallelAttention(heads, kv_heads, dim_head, mlp_ratio, eps)
        self.norm2 = nn.RMSNorm(heads * dim_head, eps=eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        scale: torch.Tensor,
        gate: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        attn_output = self.attn(
            scale * self.norm1(hidden_states), image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
        )
        return hidden_states + gate * self.norm2(attn_output)


TransformerBlockRegistry.register(
    ModalityForcingDiTTransformerBlock,
    TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),
)


class ModalityForcingDiTModulation(nn.Module):
    """Scale and gate for the tokens of a stream, the same in every block; zero at the start, when a block is idle."""

    def __init__(self, time_embed_dim: int, dim: int):
        super().__init__()
        self.act_fn = nn.SiLU()
        self.linear = nn.Linear(time_embed_dim, 2 * dim, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, temb: torch.Tensor) -> torch.Tensor:
        """(B, time_embed_dim) -> (B, 1, 2 * dim)."""
        return self.linear(self.act_fn(temb))[:, None]


class ModalityForcingDiTTransformer2DModel(
    ModelMixin,
    ConfigMixin,
    PeftAdapterMixin,
    CacheMixin,
    AttentionMixin,
    DepthStreamMixin,
):
    r"""
    A diffusion transformer over one flat sequence of tokens, [text, image] or [text, image, depth], trained from
    scratch on the latents of the FLUX.2 VAE. It predicts clean latents and clean depth (x-prediction).

    Without `depth_channels` it is the text-to-image base; [`from_base`] grafts depth onto one. Called without depth, a
    graft is its base, to the bit. All that depth adds has `depth` in its name.

    Args:
        in_channels (`int`, defaults to 128): Values per RGB token: a 2x2 cell of VAE latents.
        num_layers (`int`, defaults to 30): Blocks of the trunk.
        attention_head_dim (`int`, defaults to 64): Width of a head.
        num_attention_heads (`int`, defaults to 16): Query heads; the model's width is that many times the head's.
        num_key_value_heads (`int`, defaults to 4): Key and value heads, each shared by a group of query heads.
        mlp_ratio (`float`, defaults to 3.0): Width of the MLP over that of the model.
        joint_attention_dim (`int`, defaults to 4096): Width of the text features (UMT5-XXL).
        time_channels (`int`, defaults to 256): Width of the sinusoidal embedding of a noise level.
        time_embed_dim (`int`, defaults to 256): Width of the conditioning vector made of it. The paper does not say:
            one number needs little, and a vector as wide as the model would make the 800M configuration 4% too large.
        axes_dims_rope (`tuple[int]`, defaults to `(16, 16, 16, 16)`): Share of a head's width for each position axis
            (time, row, column, text index).
        rope_theta (`int`, defaults to 2000): As in FLUX.2.
        eps (`float`, defaults to 1e-6): Of all norms.
        depth_channels (`int`, *optional*): Values per depth token, the square of the depth patch size. Default: no
            depth.
        num_depth_decoder_layers (`int`, defaults to 4): Blocks of the depth decoder.
        depth_timestep_mixing (`bool`, defaults to `True`): Whether the streams hear each other's noise level.

    Raises:
        ValueError: heads that do not share out, or position axes that do not fill a head.

    Example:
        >>> import torch
        >>> from mf_diffusers import ModalityForcingDiTTransformer2DModel
        >>> base = ModalityForcingDiTTransformer2DModel(
        ...     in_channels=32,
        ...     num_layers=2,
        ...     attention_head_dim=8,
        ...     num_attention_heads=4,
        ...     num_key_value_heads=1,
        ...     joint_attention_dim=24,
        ...     axes_dims_rope=(2, 2, 2, 2),
        ... )
        >>> model = ModalityForcingDiTTransformer2DModel.from_base(base, depth_channels=64, num_depth_decoder_layers=1)
        >>> positions = {name: torch.zeros(1, 6, 4, dtype=torch.long) for name in ("img_ids", "txt_ids", "depth_ids")}
        >>> latents, depth, text = torch.randn(1, 6, 32), torch.randn(1, 6, 64), torch.randn(1, 6, 24)
        >>> levels = {"timestep": torch.tensor([0.5]), "depth_timestep": torch.tensor([1.0])}
        >>> output = model(latents, text, depth_hidden_states=depth, **levels, **positions)
        >>> tuple(output.sample.shape), tuple(output.depth_sample.shape)
        ((1, 6, 32), (1, 6, 64))
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ModalityForcingDiTTransformerBlock"]
    _repeated_blocks = ["ModalityForcingDiTTransformerBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "depth_head"]
    _keep_in_fp32_modules = ["depth_head"]
    _depth_modules = frozenset(
        {
            "depth_time_embed",
            "depth_modulation",
            "depth_embedder",
            "depth_decoder_modulation",
            "depth_decoder_blocks",
            "depth_head",
        }
    )
    _cp_plan = {
        "": {
            name: ContextParallelInput(split_dim=1, expected_dims=3, split_output=False)
            for name in ("encoder_hidden_states", "depth_hidden_states", "img_ids", "txt_ids", "depth_ids")
        },
        # The latents stay whole, because the velocity is made of them and of the gathered clean latents.
        "x_embedder": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
        "depth_head": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    @register_to_config
    def __init__(
        self,
        in_channels: int = 128,
        num_layers: int = 30,
        attention_head_dim: int = 64,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 4,
        mlp_ratio: float = 3.0,
        joint_attention_dim: int = 4096,
        time_channels: int = 256,
        time_embed_dim: int = 256,
        axes_dims_rope: tuple[int, ...] = (16, 16, 16, 16),
        rope_theta: int = 2000,
        eps: float = 1e-6,
        depth_channels: int | None = None,
        num_depth_decoder_layers: int = 4,
        depth_timestep_mixing: bool = True,
    ):
        super().__init__()
        if num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"{num_attention_heads} query heads cannot share {num_key_value_heads} key and value heads equally: "
                "choose num_key_value_heads to divide num_attention_heads (the paper's family: a quarter of it)."
            )
        if sum(axes_dims_rope) != attention_head_dim:
            raise ValueError(
                f"axes_dims_rope {tuple(axes_dims_rope)} must add up to attention_head_dim, {attention_head_dim}."
            )
        self.inner_dim = num_attention_heads * attention_head_dim
        block_kwargs = {
            "heads": num_attention_heads,
            "kv_heads": num_key_value_heads,
            "dim_head": attention_head_dim,
            "mlp_ratio": mlp_ratio,
            "eps": eps,
        }

        # 1. Positions, noise levels, and the modulation that all blocks share
        self.pos_embed = Flux2PosEmbed(theta=rope_theta, axes_dim=axes_dims_rope)
        self.time_embed = TimestepEmbedding(time_channels, time_embed_dim, sample_proj_bias=False)
        self.modulation = ModalityForcingDiTModulation(time_embed_dim, self.inner_dim)

        # 2. Input projections
        self.x_embedder = nn.Linear(in_channels, self.inner_dim, bias=False)
        self.context_norm = nn.RMSNorm(joint_attention_dim, eps=eps)
        self.context_embedder = nn.Linear(joint_attention_dim, self.inner_dim, bias=False)

        # 3. Trunk
        self.transformer_blocks = nn.ModuleList(
            [ModalityForcingDiTTransformerBlock(**block_kwargs) for _ in range(num_layers)]
        )

        # 4. Output head; the first prediction is the mean of the whitened latents, 0
        self.norm_out = AdaLayerNormContinuous(
            self.inner_dim, time_embed_dim, elementwise_affine=False, eps=eps, bias=False
        )
        self.proj_out = nn.Linear(self.inner_dim, in_channels, bias=False)
        nn.init.zeros_(self.proj_out.weight)

        # 5. Depth: noise level, modulation, input projection, a decoder of the depth tokens alone, head
        if depth_channels is not None:
            self.depth_time_embed = DepthTimestepEmbeddings(time_channels, time_embed_dim, mixing=depth_timestep_mixing)
            self.depth_modulation = ModalityForcingDiTModulation(time_embed_dim, self.inner_dim)
            self.depth_embedder = nn.Linear(depth_channels, self.inner_dim, bias=False)
            self.depth_decoder_modulation = ModalityForcingDiTModulation(time_embed_dim, self.inner_dim)
            self.depth_decoder_blocks = nn.ModuleList(
                [ModalityForcingDiTTransformerBlock(**block_kwargs) for _ in range(num_depth_decoder_layers)]
            )
            self.depth_head = DepthHead(self.inner_dim, depth_channels, eps=eps, conditioning_dim=time_embed_dim)

        self.gradient_checkpointing = False

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
        depth_hidden_states: torch.Tensor | None = None,
        depth_timestep: torch.Tensor | None = None,
        depth_ids: torch.Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> ModalityForcingTransformerOutput | tuple[torch.Tensor, torch.Tensor | None]:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(B, N, in_channels)`): RGB latent tokens.
            encoder_hidden_states (`torch.Tensor` of shape `(B, L, joint_attention_dim)`): Text features, 0 where the
                prompt is padded.
            timestep (`torch.Tensor` of shape `(B,)`): RGB noise level in [0, 1]; 1 is pure noise.
            img_ids (`torch.Tensor` of shape `(B, N, 4)` or `(N, 4)`): Positions (0, row, column, 0).
            txt_ids (`torch.Tensor` of shape `(B, L, 4)` or `(L, 4)`): Positions (0, 0, 0, index).
            depth_hidden_states (`torch.Tensor` of shape `(B, N, depth_channels)`, *optional*): Depth tokens.
            depth_timestep (`torch.Tensor` of shape `(B,)`, *optional*): Depth noise level in [0, 1].
            depth_ids (`torch.Tensor` of shape `(B, N, 4)` or `(N, 4)`, *optional*): Positions (1, row, column, 0).
            joint_attention_kwargs (`dict`, *optional*): `scale` of the LoRA layers; arguments of the processor.
            return_dict (`bool`): Whether to return a [`ModalityForcingTransformerOutput`] or a plain tuple.

        Returns:
            RGB velocity and, where depth went in, clean depth tokens; both in float32.
        """
        # 1. Noise levels
        noisy_latents, dtype = hidden_states.float(), hidden_states.dtype
        temb = self.time_embed(timestep_sinusoids(1000 * timestep, self.config.time_channels).to(dtype))
        if depth_hidden_states is not None:
            temb, depth_temb = self.depth_time_embed(temb, 1000 * timestep, 1000 * depth_timestep)

        # 2. Input projections, positions and modulation
        hidden_states = self.x_embedder(hidden_states)
        encoder_hidden_states = self.context_embedder(self.context_norm(encoder_hidden_states))
        text_length, image_length, depth_length = encoder_hidden_states.shape[1], hidden_states.shape[1], 0
        hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        modulation = self.modulation(temb)
        ids = [txt_ids, img_ids]
        if depth_hidden_states is not None:
            depth_length = depth_hidden_states.shape[1]
            hidden_states = torch.cat([hidden_states, self.depth_embedder(depth_hidden_states)], dim=1)
            # A token is modulated by the level of its own modality; text goes with RGB.
            modulation = torch.cat(
                [
                    modulation.expand(-1, text_length + image_length, -1),
                    self.depth_modulation(depth_temb).expand(-1, depth_length, -1),
                ],
                dim=1,
            )
            ids.append(depth_ids)
        scale, gate = modulation.chunk(2, dim=-1)
        scale = 1 + scale  # here, not in each block, which would keep a copy for the backward pass
        rotary_emb = self.pos_embed(join_ids(*ids))

        # 3. Trunk over [text, image, depth]
        for block in self.transformer_blocks:
            hidden_states = self._run_block(block, hidden_states, scale, gate, rotary_emb, joint_attention_kwargs)
        _, hidden_states, depth = hidden_states.split([text_length, image_length, depth_length], dim=1)

        # 4. Clean latents, and the velocity that belongs to them
        clean_latents = self.proj_out(self.norm_out(hidden_states, temb))
        sample = velocity_from_clean(noisy_latents, clean_latents.float(), timestep)

        # 5. Depth decoder and clean depth
        depth_sample = None
        if depth_hidden_states is not None:
            scale, gate = self.depth_decoder_modulation(depth_temb).chunk(2, dim=-1)
            scale = 1 + scale
            depth_rotary_emb = tuple(emb[-depth_length:] for emb in rotary_emb)
            for block in self.depth_decoder_blocks:
                depth = self._run_block(block, depth, scale, gate, depth_rotary_emb, joint_attention_kwargs)
            depth_sample = self.depth_head(depth, depth_temb)

        if not return_dict:
            return (sample, depth_sample)
        return ModalityForcingTransformerOutput(sample=sample, depth_sample=depth_sample)

    @classmethod
    def from_base(
        cls,
        base: "ModalityForcingDiTTransformer2DModel",
        depth_channels: int = 256,
        num_depth_decoder_layers: int = 4,
        depth_timestep_mixing: bool = True,
    ) -> "ModalityForcingDiTTransformer2DModel":
        r"""
        Grafts depth onto a text-to-image base.

        Depth tokens join the sequence of every block with a noise level and a modulation of their own, which start as
        copies of RGB's; the depth embedder and decoder start fresh; and whatever writes to the outside (decoder gates,
        head, timestep mixers) starts at zero. The first depth prediction is 0, and RGB is only disturbed by the new
        tokens it attends to: without them the graft is its base. The base's weights are copied bit by bit.

        Args:
            base: The text-to-image base; it shares no memory with the result.
            depth_channels, num_depth_decoder_layers, depth_timestep_mixing: See the class.

        Returns:
            The new transformer on the base's device and in its dtype, the depth head in float32.

        Raises:
            ValueError: the base has depth already.
        """
        if base.config.depth_channels is not None:
            raise ValueError("This transformer has depth already: graft onto a text-to-image base.")
        config = {name: value for name, value in base.config.items() if not name.startswith("_")}
        config |= {
            "depth_channels": depth_channels,
            "num_depth_decoder_layers": num_depth_decoder_layers,
            "depth_timestep_mixing": depth_timestep_mixing,
        }
        with torch.device("meta"):
            model = cls(**config)
        twins = {"depth_time_embed.timestep_embedder.": "time_embed.", "depth_modulation.": "modulation."}
        names = list(model.state_dict())
        graft_depth(model, base, {n: n.replace(d, rgb) for n in names for d, rgb in twins.items() if n.startswith(d)})
        return model
