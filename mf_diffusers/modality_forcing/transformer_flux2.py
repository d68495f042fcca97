"""FLUX.2 with a depth stream: the transformer of Modality Forcing (paper, section on the FLUX.2 variant)."""

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Attention,
    Flux2FeedForward,
    Flux2Modulation,
    Flux2PosEmbed,
    Flux2SingleTransformerBlock,
    Flux2TimestepGuidanceEmbeddings,
    Flux2Transformer2DModel,
    Flux2TransformerBlock,
    _get_qkv_projections,
)
from diffusers.utils import apply_lora_scale

from .conversion import (
    convert_published_transformer,
    export_published_transformer,
    load_safetensors,
    save_safetensors,
)
from .depth_stream import (
    DepthHead,
    DepthStreamMixin,
    DepthTimestepEmbeddings,
    ModalityForcingTransformerOutput,
    graft_depth,
    join_ids,
)
from .model_files import build_empty, check_weights


class ModalityForcingFlux2AttnProcessor:
    """Joint attention over [text, image, depth], each stream with its own projections."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "ModalityForcingFlux2Attention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        depth_hidden_states: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        query, key, value, text_query, text_key, text_value = _get_qkv_projections(
            attn, hidden_states, encoder_hidden_states
        )
        query = torch.cat(
            [attn.norm_added_q(attn.split_heads(text_query)), attn.norm_q(attn.split_heads(query))], dim=1
        )
        key = torch.cat([attn.norm_added_k(attn.split_heads(text_key)), attn.norm_k(attn.split_heads(key))], dim=1)
        value = torch.cat([attn.split_heads(text_value), attn.split_heads(value)], dim=1)
        if depth_hidden_states is not None:
            depth_query = attn.norm_depth_q(attn.split_heads(attn.depth_q_proj(depth_hidden_states)))
            depth_key = attn.norm_depth_k(attn.split_heads(attn.depth_k_proj(depth_hidden_states)))
            depth_value = attn.split_heads(attn.depth_v_proj(depth_hidden_states))
            query = torch.cat([query, depth_query], dim=1)
            key = torch.cat([key, depth_key], dim=1)
            value = torch.cat([value, depth_value], dim=1)

        query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
        key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        attn_output = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        attn_output = attn_output.flatten(2, 3).to(query.dtype)

        text_length, image_length = encoder_hidden_states.shape[1], hidden_states.shape[1]
        text_output = attn.to_add_out(attn_output[:, :text_length])
        image_output = attn.to_out[0](attn_output[:, text_length : text_length + image_length])
        image_output = attn.to_out[1](image_output)
        if depth_hidden_states is None:
            return image_output, text_output
        depth_output = attn.to_depth_out(attn_output[:, text_length + image_length :])
        return image_output, text_output, depth_output


class ModalityForcingFlux2Attention(Flux2Attention):
    """FLUX.2 joint attention with a third set of projections, for depth."""

    _default_processor_cls = ModalityForcingFlux2AttnProcessor
    _available_processors = [ModalityForcingFlux2AttnProcessor]

    def __init__(self, dim: int, heads: int, dim_head: int, eps: float):
        super().__init__(
            query_dim=dim,
            added_kv_proj_dim=dim,
            dim_head=dim_head,
            heads=heads,
            out_dim=dim,
            bias=False,
            added_proj_bias=False,
            out_bias=False,
            eps=eps,
        )
        self.norm_depth_q = nn.RMSNorm(dim_head, eps=eps)
        self.norm_depth_k = nn.RMSNorm(dim_head, eps=eps)
        self.depth_q_proj = nn.Linear(dim, self.inner_dim, bias=False)
        self.depth_k_proj = nn.Linear(dim, self.inner_dim, bias=False)
        self.depth_v_proj = nn.Linear(dim, self.inner_dim, bias=False)
        self.to_depth_out = nn.Linear(self.inner_dim, dim, bias=False)

    def split_heads(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.unflatten(-1, (-1, self.head_dim))


class ModalityForcingFlux2TransformerBlock(Flux2TransformerBlock):
    r"""
    FLUX.2 double-stream block with a third stream. Image and depth tokens arrive and leave as one sequence,
    `hidden_states` = [image, depth]: the interface stays FLUX.2's, so diffusers' cache hooks serve this block as they
    serve FLUX.2.
    """

    def __init__(self, dim: int, num_attention_heads: int, attention_head_dim: int, mlp_ratio: float, eps: float):
        super().__init__(dim, num_attention_heads, attention_head_dim, mlp_ratio=mlp_ratio, eps=eps, bias=False)
        self.attn = ModalityForcingFlux2Attention(dim, num_attention_heads, attention_head_dim, eps)
        self.norm1_depth = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)
        self.norm2_depth = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)
        self.ff_depth = Flux2FeedForward(dim=dim, dim_out=dim, mult=mlp_ratio)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb_mod_img: torch.Tensor,
        temb_mod_txt: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        temb_mod_depth: torch.Tensor | None = None,
        depth_length: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if temb_mod_depth is None:
            return super().forward(
                hidden_states,
                encoder_hidden_states,
                temb_mod_img,
                temb_mod_txt,
                image_rotary_emb,
                joint_attention_kwargs,
            )

        image, depth = hidden_states.split([hidden_states.shape[1] - depth_length, depth_length], dim=1)
        text = encoder_hidden_states
        (shift_msa, scale_msa, gate_msa), (shift_mlp, scale_mlp, gate_mlp) = Flux2Modulation.split(temb_mod_img, 2)
        (c_shift_msa, c_scale_msa, c_gate_msa), (c_shift_mlp, c_scale_mlp, c_gate_mlp) = Flux2Modulation.split(
            temb_mod_txt, 2
        )
        (d_shift_msa, d_scale_msa, d_gate_msa), (d_shift_mlp, d_scale_mlp, d_gate_mlp) = Flux2Modulation.split(
            temb_mod_depth, 2
        )

        # 1. Attention over the three streams together
        image_attn, text_attn, depth_attn = self.attn(
            hidden_states=(1 + scale_msa) * self.norm1(image) + shift_msa,
            encoder_hidden_states=(1 + c_scale_msa) * self.norm1_context(text) + c_shift_msa,
            depth_hidden_states=(1 + d_scale_msa) * self.norm1_depth(depth) + d_shift_msa,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        image = image + gate_msa * image_attn
        text = text + c_gate_msa * text_attn
        depth = depth + d_gate_msa * depth_attn

        # 2. A feed-forward network for each
        image = image + gate_mlp * self.ff((1 + scale_mlp) * self.norm2(image) + shift_mlp)
        text = text + c_gate_mlp * self.ff_context((1 + c_scale_mlp) * self.norm2_context(text) + c_shift_mlp)
        depth = depth + d_gate_mlp * self.ff_depth((1 + d_scale_mlp) * self.norm2_depth(depth) + d_shift_mlp)

        return text, torch.cat([image, depth], dim=1)


TransformerBlockRegistry.register(
    ModalityForcingFlux2TransformerBlock,
    TransformerBlockMetadata(return_hidden_states_index=1, return_encoder_hidden_states_index=0),
)


class ModalityForcingFlux2Transformer2DModel(
    ModelMixin,
    ConfigMixin,
    PeftAdapterMixin,
    FromOriginalModelMixin,
    CacheMixin,
    AttentionMixin,
    DepthStreamMixin,
):
    r"""
    The FLUX.2 transformer joined by a depth stream, with a noise level of its own for each modality.

    Everything that FLUX.2 has keeps the parameter names of diffusers' `Flux2Transformer2DModel`, so its LoRAs load;
    everything that was added has `depth` in its name. Called without depth, it is FLUX.2.

    Args:
        patch_size, in_channels, out_channels, num_layers, num_single_layers, attention_head_dim, num_attention_heads,
        joint_attention_dim, timestep_guidance_channels, mlp_ratio, axes_dims_rope, rope_theta, eps, guidance_embeds:
            As in `Flux2Transformer2DModel`.
        depth_channels (`int`, defaults to 256): Values per depth token, the square of the depth patch size.
        num_depth_decoder_layers (`int`, defaults to 4): Blocks of the depth decoder.
        depth_timestep_mixing (`bool`, defaults to `True`): Whether the streams hear each other's noise level.

    Raises:
        ValueError: position axes that do not fill a head.

    Example:
        >>> import torch
        >>> from mf_diffusers import ModalityForcingFlux2Transformer2DModel
        >>> from mf_diffusers.embedded import EMBEDDED_MODEL
        >>> from mf_diffusers.modality_forcing.latent_tokens import position_ids
        >>> model = ModalityForcingFlux2Transformer2DModel.from_pretrained(EMBEDDED_MODEL, subfolder="transformer")
        >>> with torch.no_grad():
        ...     output = model(
        ...         hidden_states=torch.randn(1, 64, 32),
        ...         encoder_hidden_states=torch.randn(1, 32, 384),
        ...         timestep=torch.tensor([0.0]),  # a clean image
        ...         img_ids=position_ids(rows=8, columns=8),
        ...         txt_ids=position_ids(length=32),
        ...         depth_hidden_states=torch.randn(1, 64, 64),
        ...         depth_timestep=torch.tensor([1.0]),  # and depth that is all noise
        ...         depth_ids=position_ids(time=1, rows=8, columns=8),
        ...     )
        >>> tuple(output.sample.shape), tuple(output.depth_sample.shape)
        ((1, 64, 32), (1, 64, 64))
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ModalityForcingFlux2TransformerBlock", "Flux2SingleTransformerBlock"]
    _repeated_blocks = ["ModalityForcingFlux2TransformerBlock", "Flux2SingleTransformerBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "depth_head"]
    _keep_in_fp32_modules = ["depth_head"]
    _depth_modules = frozenset(
        {
            "depth_time_embed",
            "double_stream_modulation_depth",
            "single_stream_modulation_depth",
            "depth_decoder_modulation",
            "depth_embedder",
            "depth_decoder_blocks",
            "depth_head",
            "norm_depth_q",
            "norm_depth_k",
            "depth_q_proj",
            "depth_k_proj",
            "depth_v_proj",
            "to_depth_out",
            "norm1_depth",
            "norm2_depth",
            "ff_depth",
        }
    )
    _cp_plan = {
        "": {
            name: ContextParallelInput(split_dim=1, expected_dims=3, split_output=False)
            for name in (
                "hidden_states",
                "encoder_hidden_states",
                "depth_hidden_states",
                "img_ids",
                "txt_ids",
                "depth_ids",
            )
        },
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
        "depth_head": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 128,
        out_channels: int | None = None,
        num_layers: int = 8,
        num_single_layers: int = 24,
        attention_head_dim: int = 128,
        num_attention_heads: int = 32,
        joint_attention_dim: int = 12288,
        timestep_guidance_channels: int = 256,
        mlp_ratio: float = 3.0,
        axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32),
        rope_theta: int = 2000,
        eps: float = 1e-6,
        guidance_embeds: bool = False,
        depth_channels: int = 256,
        num_depth_decoder_layers: int = 4,
        depth_timestep_mixing: bool = True,
    ):
        super().__init__()
        if sum(axes_dims_rope) != attention_head_dim:
            raise ValueError(
                f"axes_dims_rope {tuple(axes_dims_rope)} must add up to attention_head_dim, {attention_head_dim}."
            )
        self.out_channels = out_channels or in_channels
        self.inner_dim = num_attention_heads * attention_head_dim
        block_kwargs = {
            "dim": self.inner_dim,
            "num_attention_heads": num_attention_heads,
            "attention_head_dim": attention_head_dim,
            "mlp_ratio": mlp_ratio,
            "eps": eps,
        }

        # 1. Positions and noise levels
        self.pos_embed = Flux2PosEmbed(theta=rope_theta, axes_dim=axes_dims_rope)
        self.time_guidance_embed = Flux2TimestepGuidanceEmbeddings(
            timestep_guidance_channels, self.inner_dim, bias=False, guidance_embeds=guidance_embeds
        )
        self.depth_time_embed = DepthTimestepEmbeddings(
            timestep_guidance_channels, self.inner_dim, mixing=depth_timestep_mixing
        )

        # 2. Modulation, shared by the blocks of a stack
        self.double_stream_modulation_img = Flux2Modulation(self.inner_dim, mod_param_sets=2)
        self.double_stream_modulation_txt = Flux2Modulation(self.inner_dim, mod_param_sets=2)
        self.double_stream_modulation_depth = Flux2Modulation(self.inner_dim, mod_param_sets=2)
        self.single_stream_modulation = Flux2Modulation(self.inner_dim, mod_param_sets=1)
        self.single_stream_modulation_depth = Flux2Modulation(self.inner_dim, mod_param_sets=1)
        self.depth_decoder_modulation = Flux2Modulation(self.inner_dim, mod_param_sets=1)

        # 3. Input projections
        self.x_embedder = nn.Linear(in_channels, self.inner_dim, bias=False)
        self.context_embedder = nn.Linear(joint_attention_dim, self.inner_dim, bias=False)
        self.depth_embedder = nn.Linear(depth_channels, self.inner_dim, bias=False)

        # 4. Trunk, and a decoder of the depth tokens alone
        self.transformer_blocks = nn.ModuleList(
            [ModalityForcingFlux2TransformerBlock(**block_kwargs) for _ in range(num_layers)]
        )
        self.single_transformer_blocks = nn.ModuleList(
            [Flux2SingleTransformerBlock(**block_kwargs) for _ in range(num_single_layers)]
        )
        self.depth_decoder_blocks = nn.ModuleList(
            [Flux2SingleTransformerBlock(**block_kwargs) for _ in range(num_depth_decoder_layers)]
        )

        # 5. Output heads
        self.norm_out = AdaLayerNormContinuous(
            self.inner_dim, self.inner_dim, elementwise_affine=False, eps=eps, bias=False
        )
        self.proj_out = nn.Linear(self.inner_dim, patch_size * patch_size * self.out_channels, bias=False)
        self.depth_head = DepthHead(self.inner_dim, depth_channels, eps=eps)

        self.gradient_checkpointing = False

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
        guidance: torch.Tensor | None = None,
        depth_hidden_states: torch.Tensor | None = None,
        depth_timestep: torch.Tensor | None = None,
        depth_ids: torch.Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> ModalityForcingTransformerOutput | tuple[torch.Tensor, torch.Tensor | None]:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(B, N, in_channels)`): RGB latent tokens.
            encoder_hidden_states (`torch.Tensor` of shape `(B, L, joint_attention_dim)`): Text features.
            timestep (`torch.Tensor` of shape `(B,)`): RGB noise level in [0, 1]; 1 is pure noise.
            img_ids (`torch.Tensor` of shape `(B, N, 4)` or `(N, 4)`): Positions (0, row, column, 0).
            txt_ids (`torch.Tensor` of shape `(B, L, 4)` or `(L, 4)`): Positions (0, 0, 0, index).
            guidance (`torch.Tensor` of shape `(B,)`, *optional*): For guidance-distilled bases.
            depth_hidden_states (`torch.Tensor` of shape `(B, N, depth_channels)`, *optional*): Depth tokens.
            depth_timestep (`torch.Tensor` of shape `(B,)`, *optional*): Depth noise level in [0, 1].
            depth_ids (`torch.Tensor` of shape `(B, N, 4)` or `(N, 4)`, *optional*): Positions (1, row, column, 0).
            joint_attention_kwargs (`dict`, *optional*): `scale` of the LoRA layers; arguments of the processor.
            return_dict (`bool`): Whether to return a [`ModalityForcingTransformerOutput`] or a plain tuple.

        Returns:
            RGB velocity and, where depth went in, clean depth tokens in float32.
        """
        # 1. Noise levels and modulation
        timestep = timestep.to(hidden_states.dtype) * 1000
        if guidance is not None:
            guidance = guidance.to(hidden_states.dtype) * 1000
        temb = self.time_guidance_embed(timestep, guidance)
        if depth_hidden_states is not None:
            depth_timestep = depth_timestep.to(hidden_states.dtype) * 1000
            temb, depth_temb = self.depth_time_embed(temb, timestep, depth_timestep)

        double_stream_mod_img = self.double_stream_modulation_img(temb)
        double_stream_mod_txt = self.double_stream_modulation_txt(temb)
        single_stream_mod = self.single_stream_modulation(temb)
        double_stream_mod_depth = None

        # 2. Input projections and positions
        hidden_states = self.x_embedder(hidden_states)
        encoder_hidden_states = self.context_embedder(encoder_hidden_states)
        ids = [txt_ids, img_ids]
        text_length, image_length, depth_length = encoder_hidden_states.shape[1], hidden_states.shape[1], 0
        if depth_hidden_states is not None:
            double_stream_mod_depth = self.double_stream_modulation_depth(depth_temb)
            single_stream_mod_depth = self.single_stream_modulation_depth(depth_temb)
            hidden_states = torch.cat([hidden_states, self.depth_embedder(depth_hidden_states)], dim=1)
            ids.append(depth_ids)
            depth_length = depth_hidden_states.shape[1]
            # In the single-stream blocks a token is modulated by the level of its own modality; text goes with RGB.
            single_stream_mod = torch.cat(
                [
                    single_stream_mod[:, None].expand(-1, text_length + image_length, -1),
                    single_stream_mod_depth[:, None].expand(-1, depth_length, -1),
                ],
                dim=1,
            )
        rotary_emb = self.pos_embed(join_ids(*ids))

        # 3. Double-stream blocks: hidden_states is [image, depth]
        for block in self.transformer_blocks:
            encoder_hidden_states, hidden_states = self._run_block(
                block,
                hidden_states,
                encoder_hidden_states,
                double_stream_mod_img,
                double_stream_mod_txt,
                rotary_emb,
                joint_attention_kwargs,
                double_stream_mod_depth,
                depth_length,
            )

        # 4. Single-stream blocks over [text, image, depth]
        hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        for block in self.single_transformer_blocks:
            hidden_states = self._run_block(
                block, hidden_states, None, single_stream_mod, rotary_emb, joint_attention_kwargs
            )
        _, hidden_states, depth = hidden_states.split([text_length, image_length, depth_length], dim=1)

        # 5. RGB velocity
        sample = self.proj_out(self.norm_out(hidden_states, temb))

        # 6. Depth decoder and clean depth
        depth_sample = None
        if depth_hidden_states is not None:
            depth_decoder_mod = self.depth_decoder_modulation(depth_temb)
            depth_rotary_emb = tuple(emb[-depth_length:] for emb in rotary_emb)
            for block in self.depth_decoder_blocks:
                depth = self._run_block(block, depth, None, depth_decoder_mod, depth_rotary_emb, joint_attention_kwargs)
            depth_sample = self.depth_head(depth, depth_temb)

        if not return_dict:
            return (sample, depth_sample)
        return ModalityForcingTransformerOutput(sample=sample, depth_sample=depth_sample)

    @classmethod
    def from_base(
        cls,
        base: Flux2Transformer2DModel,
        depth_channels: int = 256,
        num_depth_decoder_layers: int = 4,
        depth_timestep_mixing: bool = True,
    ) -> "ModalityForcingFlux2Transformer2DModel":
        r"""
        Grafts the depth stream onto a pretrained FLUX.2 transformer.

        The depth stream starts as a copy of the image stream, the depth embedder and decoder start fresh, and whatever
        writes to the outside (decoder gates, head, timestep mixers) starts at zero: the first depth prediction is 0 and
        the RGB stream is only disturbed by the new tokens it attends to. The base's weights are copied bit by bit.

        Args:
            base (`Flux2Transformer2DModel`): The pretrained model; it shares no memory with the result.
            depth_channels, num_depth_decoder_layers, depth_timestep_mixing: See the class.

        Returns:
            The new transformer on the base's device and in its dtype, the depth head in float32.
        """
        config = {name: value for name, value in base.config.items() if not name.startswith("_")}
        with torch.device("meta"):
            model = cls(
                **config,
                depth_channels=depth_channels,
                num_depth_decoder_layers=num_depth_decoder_layers,
                depth_timestep_mixing=depth_timestep_mixing,
            )
        graft_depth(model, base, depth_stream_clones(model.state_dict()))
        return model

    def deepen_depth_decoder(self, num_layers: int) -> None:
        """
        Adds blocks at the end of the depth decoder. They start as the identity (their output projections are zero), so
        the model predicts what it did before until they are trained.

        Args:
            num_layers (`int`): How many blocks to add; at least 1.
        """
        for _ in range(num_layers):
            block = deepcopy(self.depth_decoder_blocks[-1])
            nn.init.zeros_(block.attn.to_out.weight)
            self.depth_decoder_blocks.append(block)
        self.register_to_config(num_depth_decoder_layers=len(self.depth_decoder_blocks))

    @classmethod
    def from_published(
        cls, pretrained_model_name_or_path: str | Path, dtype: torch.dtype | None = None
    ) -> "ModalityForcingFlux2Transformer2DModel":
        r"""
        Loads a transformer in the published layout; every dimension is read off the shapes. The published weights are
        licensed CC BY-NC 4.0 (not for commercial use).

        Args:
            pretrained_model_name_or_path: The safetensors file, or a folder with `model.safetensors`.
            dtype: dtype of the weights, but for the depth head's, which stay float32. Default: as stored.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not a safetensors file, or keys are missing, unexpected or of other shapes; the message names
                them.
        """
        path = Path(pretrained_model_name_or_path)
        config, state_dict = convert_published_transformer(
            load_safetensors(path / "model.safetensors" if path.is_dir() else path)
        )
        model = build_empty(cls, config, state_dict, str(path))
        check_weights(model, state_dict, path)
        for name, tensor in state_dict.items():
            keeps_fp32 = name.split(".")[0] in cls._keep_in_fp32_modules
            state_dict[name] = tensor.to(torch.float32 if keeps_fp32 else dtype or tensor.dtype)
        model.load_state_dict(state_dict, assign=True)
        return model.eval()

    def save_published(self, path: str | Path, prefix: str = "dit.") -> None:
        """Writes the weights to one safetensors file in the published layout; `prefix=""` for single-file loaders."""
        save_safetensors(export_published_transformer(self.state_dict(), prefix), path)


def depth_stream_clones(names: Iterable[str]) -> dict[str, str]:
    """Which parameter of the image stream each parameter of the depth stream is cloned from in a graft."""
    renames = {
        "double_stream_modulation_depth.": "double_stream_modulation_img.",
        "single_stream_modulation_depth.": "single_stream_modulation.",
        "depth_time_embed.timestep_embedder.": "time_guidance_embed.timestep_embedder.",
        "attn.norm_depth_q.": "attn.norm_q.",
        "attn.norm_depth_k.": "attn.norm_k.",
        "attn.depth_q_proj.": "attn.to_q.",
        "attn.depth_k_proj.": "attn.to_k.",
        "attn.depth_v_proj.": "attn.to_v.",
        "attn.to_depth_out.": "attn.to_out.0.",
        "ff_depth.": "ff.",
    }
    return {name: name.replace(depth, image) for name in names for depth, image in renames.items() if depth in name}
