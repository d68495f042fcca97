"""Z-Image with depth tokens: the graft of Modality Forcing onto a single-stream transformer."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_z_image import (
    ADALN_EMBED_DIM,
    SEQ_MULTI_OF,
    FinalLayer,
    RopeEmbedder,
    TimestepEmbedder,
    ZImageTransformer2DModel,
    ZImageTransformerBlock,
)
from diffusers.utils import apply_lora_scale
from torch.nn.utils.rnn import pad_sequence

from .conversion import save_safetensors
from .depth_stream import (
    DepthHead,
    DepthStreamMixin,
    DepthTimestepEmbeddings,
    ModalityForcingTransformerOutput,
    TransformerShape,
    graft_depth,
)


PATCH = "2-1"  # of Z-Image's patch sizes the one that there is: 2x2 latents of one frame
TIME_CHANNELS = 256  # width of the sinusoidal embedding of a noise level
TIME_MLP_WIDTH = 1024


class ModalityForcingZImageTransformerBlock(ZImageTransformerBlock):
    r"""
    Z-Image's block over tokens of two noise levels, which it modulates by two vectors, as Z-Image does with noisy and
    clean images.

    Args:
        own_depth_modulation (`bool`): Whether depth tokens have a projection of their vector of their own; otherwise
            all tokens share one.
    """

    def __init__(self, *args, own_depth_modulation: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.adaLN_modulation_depth = None
        if own_depth_modulation:
            shared = self.adaLN_modulation[0]
            self.adaLN_modulation_depth = nn.Sequential(nn.Linear(shared.in_features, shared.out_features))

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None,
        freqs_cis: torch.Tensor,
        adaln_input: torch.Tensor | None = None,
        noise_mask: torch.Tensor | None = None,
        adaln_noisy: torch.Tensor | None = None,
        adaln_clean: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            x (`torch.Tensor` of shape `(B, S, dim)`): Tokens.
            attn_mask (`torch.Tensor` of shape `(B, S)`, *optional*): True where a token is attended.
            freqs_cis (`torch.Tensor` of shape `(B, S, head_dim / 2)`): Complex numbers that turn queries and keys.
            adaln_input (`torch.Tensor` of shape `(B, 256)`, *optional*): Vector that modulates all tokens.
            noise_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 1 where `adaln_noisy`, of image and text,
                modulates a token, 0 where `adaln_clean`, of depth, does.
        """
        if noise_mask is None or self.adaLN_modulation_depth is None:
            return super().forward(x, attn_mask, freqs_cis, adaln_input, noise_mask, adaln_noisy, adaln_clean)
        modulation = torch.where(
            noise_mask[..., None] == 1,
            self.adaLN_modulation(adaln_noisy)[:, None],
            self.adaLN_modulation_depth(adaln_clean)[:, None],
        )
        scale_msa, gate_msa, scale_mlp, gate_mlp = modulation.chunk(4, dim=-1)
        attn_out = self.attention(
            self.attention_norm1(x) * (1 + scale_msa), attention_mask=attn_mask, freqs_cis=freqs_cis
        )
        x = x + gate_msa.tanh() * self.attention_norm2(attn_out)
        mlp_out = self.feed_forward(self.ffn_norm1(x) * (1 + scale_mlp))
        return x + gate_mlp.tanh() * self.ffn_norm2(mlp_out)


TransformerBlockRegistry.register(
    ModalityForcingZImageTransformerBlock,
    TransformerBlockMetadata(
        return_hidden_states_index=0,
        return_encoder_hidden_states_index=None,
        hidden_states_argument_name="x",
    ),
)


class ModalityForcingZImageTransformer2DModel(
    ModelMixin,
    ConfigMixin,
    PeftAdapterMixin,
    FromOriginalModelMixin,
    CacheMixin,
    AttentionMixin,
    DepthStreamMixin,
):
    r"""
    The Z-Image transformer over [image, text, depth], with a noise level of its own for each modality.

    Depth tokens of 16x16 pixels come last in the sequence of every block of the trunk, after a refiner of their own,
    as image and text have one. Everything that Z-Image has keeps the parameter names of diffusers'
    `ZImageTransformer2DModel`, so its LoRAs load; everything that was added has `depth` in its name. Called without
    depth, it is Z-Image.

    Args:
        all_patch_size, all_f_patch_size, in_channels, dim, n_layers, n_refiner_layers, n_heads, n_kv_heads, norm_eps,
        qk_norm, cap_feat_dim, siglip_feat_dim, rope_theta, t_scale, axes_dims, axes_lens:
            As in `ZImageTransformer2DModel`; patches of 2x2 latents, and no SigLIP features.
        depth_channels (`int`, defaults to 256): Values per depth token, the square of the depth patch size.
        num_depth_decoder_layers (`int`, defaults to 4): Blocks of the depth decoder.
        depth_timestep_mixing (`bool`, defaults to `True`): Whether the streams hear each other's noise level.
        own_depth_modulation (`bool`, defaults to `False`): Whether the trunk modulates depth tokens by projections of
            their own, which start as copies; otherwise by those of image and text, with the vector of the depth level.

    Raises:
        ValueError: sizes that Z-Image does not have, or position axes that do not fill a head.

    Example:
        >>> import torch
        >>> from diffusers import ZImageTransformer2DModel
        >>> from mf_diffusers import ModalityForcingZImageTransformer2DModel
        >>> from mf_diffusers.modality_forcing.latent_tokens import position_ids
        >>> base = ZImageTransformer2DModel(
        ...     in_channels=4, dim=32, n_layers=2, n_heads=2, n_kv_heads=2, cap_feat_dim=24, axes_dims=(4, 6, 6)
        ... )
        >>> model = ModalityForcingZImageTransformer2DModel.from_base(base, depth_channels=16)
        >>> with torch.no_grad():
        ...     output = model(
        ...         hidden_states=torch.randn(1, 6, 16),
        ...         encoder_hidden_states=torch.randn(1, 5, 24),
        ...         timestep=torch.tensor([0.0]),  # a clean image
        ...         img_ids=position_ids(rows=2, columns=3),
        ...         txt_ids=position_ids(length=5),
        ...         depth_hidden_states=torch.randn(1, 6, 16),
        ...         depth_timestep=torch.tensor([1.0]),  # and depth that is all noise
        ...         depth_ids=position_ids(time=1, rows=2, columns=3),
        ...     )
        >>> tuple(output.sample.shape), tuple(output.depth_sample.shape)
        ((1, 6, 16), (1, 6, 16))
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ModalityForcingZImageTransformerBlock", "ZImageTransformerBlock"]
    _repeated_blocks = ["ModalityForcingZImageTransformerBlock", "ZImageTransformerBlock"]
    _skip_layerwise_casting_patterns = ["t_embedder", "cap_embedder", "norm", "depth_time_embed", "depth_head"]
    _keep_in_fp32_modules = ["depth_head"]
    _depth_modules = frozenset(
        {
            "depth_time_embed",
            "depth_embedder",
            "depth_pad_token",
            "depth_refiner",
            "adaLN_modulation_depth",
            "depth_decoder_blocks",
            "depth_head",
        }
    )

    @register_to_config
    def __init__(
        self,
        all_patch_size: tuple[int, ...] = (2,),
        all_f_patch_size: tuple[int, ...] = (1,),
        in_channels: int = 16,
        dim: int = 3840,
        n_layers: int = 30,
        n_refiner_layers: int = 2,
        n_heads: int = 30,
        n_kv_heads: int = 30,
        norm_eps: float = 1e-5,
        qk_norm: bool = True,
        cap_feat_dim: int = 2560,
        siglip_feat_dim: int | None = None,
        rope_theta: float = 256.0,
        t_scale: float = 1000.0,
        axes_dims: tuple[int, ...] = (32, 48, 48),
        axes_lens: tuple[int, ...] = (1024, 512, 512),
        depth_channels: int = 256,
        num_depth_decoder_layers: int = 4,
        depth_timestep_mixing: bool = True,
        own_depth_modulation: bool = False,
    ):
        super().__init__()
        if (tuple(all_patch_size), tuple(all_f_patch_size), siglip_feat_dim) != ((2,), (1,), None):
            raise ValueError(
                "Depth is grafted onto Z-Image with all_patch_size (2,), all_f_patch_size (1,) and no SigLIP features, "
                f"not onto {tuple(all_patch_size)}, {tuple(all_f_patch_size)}, siglip_feat_dim {siglip_feat_dim}."
            )
        if sum(axes_dims) * n_heads != dim:
            raise ValueError(f"axes_dims {tuple(axes_dims)} must add up to dim / n_heads, {dim} / {n_heads}.")
        self.time_dim = min(dim, ADALN_EMBED_DIM)
        block_args = (dim, n_heads, n_kv_heads, norm_eps, qk_norm)

        # 1. Positions and noise levels
        self.rope_embedder = RopeEmbedder(theta=rope_theta, axes_dims=axes_dims, axes_lens=axes_lens)
        self.t_embedder = TimestepEmbedder(self.time_dim, mid_size=TIME_MLP_WIDTH)
        self.depth_time_embed = DepthTimestepEmbeddings(
            TIME_CHANNELS, self.time_dim, mixing=depth_timestep_mixing, hidden_dim=TIME_MLP_WIDTH, bias=True
        )

        # 2. Input projections, and what fills each sequence up
        self.all_x_embedder = nn.ModuleDict({PATCH: nn.Linear(4 * in_channels, dim)})
        self.cap_embedder = nn.Sequential(RMSNorm(cap_feat_dim, eps=norm_eps), nn.Linear(cap_feat_dim, dim))
        self.depth_embedder = nn.Linear(depth_channels, dim)
        self.x_pad_token = nn.Parameter(torch.zeros(1, dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, dim))
        self.depth_pad_token = nn.Parameter(torch.zeros(1, dim))

        # 3. Refiners of each sequence, trunk, and a decoder of the depth tokens alone
        def blocks(number: int, first_id: int = 0, cls=ZImageTransformerBlock, **kwargs) -> nn.ModuleList:
            return nn.ModuleList([cls(first_id + i, *block_args, **kwargs) for i in range(number)])

        self.noise_refiner = blocks(n_refiner_layers, first_id=1000)
        self.context_refiner = blocks(n_refiner_layers, modulation=False)
        self.depth_refiner = blocks(n_refiner_layers, first_id=1000)
        self.layers = blocks(
            n_layers, cls=ModalityForcingZImageTransformerBlock, own_depth_modulation=own_depth_modulation
        )
        self.depth_decoder_blocks = blocks(num_depth_decoder_layers)

        # 4. Output heads
        self.all_final_layer = nn.ModuleDict({PATCH: FinalLayer(dim, 4 * in_channels)})
        self.depth_head = DepthHead(dim, depth_channels, conditioning_dim=self.time_dim)

        self.gradient_checkpointing = False

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor | list[torch.Tensor],
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor | list[torch.Tensor],
        txt_ids: torch.Tensor | None = None,
        depth_hidden_states: torch.Tensor | list[torch.Tensor] | None = None,
        depth_timestep: torch.Tensor | None = None,
        depth_ids: torch.Tensor | list[torch.Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> ModalityForcingTransformerOutput | tuple[torch.Tensor, torch.Tensor | None]:
        r"""
        As the other transformers of this package, it takes noise levels of which 1 is pure noise, and returns noise
        minus clean latents; Z-Image itself counts and steps the other way.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, N, 4 * in_channels)`): RGB latent tokens. Where the samples of a
                batch are of several sizes, a list of B tensors `(N_i, 4 * in_channels)`, and so of all that has N here.
            encoder_hidden_states (`torch.Tensor` of shape `(B, L, cap_feat_dim)`): Text features, 0 where the prompt is
                padded: padding at the end is dropped.
            timestep (`torch.Tensor` of shape `(B,)`): RGB noise level in [0, 1]; 1 is pure noise.
            img_ids (`torch.Tensor` of shape `(B, N, 4)`, `(1, N, 4)` or `(N, 4)`): Positions (0, row, column, 0).
            txt_ids (*optional*): Of no concern: the text's positions follow from its length.
            depth_hidden_states (`torch.Tensor` of shape `(B, N, depth_channels)`, *optional*): Depth tokens.
            depth_timestep (`torch.Tensor` of shape `(B,)`, *optional*): Depth noise level in [0, 1].
            depth_ids (`torch.Tensor` of shape as `img_ids`, *optional*): Positions (1, row, column, 0).
            joint_attention_kwargs (`dict`, *optional*): `scale` of the LoRA layers.
            return_dict (`bool`): Whether to return a [`ModalityForcingTransformerOutput`] or a plain tuple.

        Returns:
            RGB velocity and, where depth went in, clean depth tokens in float32; lists where lists went in.
        """
        # 1. Noise levels: Z-Image's t is 1 where the image is clean
        is_list = isinstance(hidden_states, list)
        dtype, device = encoder_hidden_states.dtype, encoder_hidden_states.device
        t_scale = self.config.t_scale
        image_t = t_scale * (1 - timestep.float())
        temb = self.t_embedder(image_t).to(dtype)
        depth_temb = None
        if depth_hidden_states is not None:
            temb, depth_temb = self.depth_time_embed(temb, image_t, t_scale * (1 - depth_timestep.float()))

        # 2. Each sequence embedded, filled up and refined
        hidden_states, image_lengths = _stack(hidden_states)
        text_lengths = _text_lengths(encoder_hidden_states)
        text_width = max(_filled(text_lengths))
        offsets = 1 + torch.tensor(_filled(text_lengths), device=device)[:, None]
        image = _fill_up(self.all_x_embedder[PATCH](_channels_last(hidden_states)), image_lengths, self.x_pad_token)
        image_mask, image_width = _mask(_filled(image_lengths), device), image.shape[1]
        image_rotary_emb = self._rotary_emb(_grid_ids(img_ids, image_lengths, offsets))
        image = self._run(self.noise_refiner, image, image_mask, image_rotary_emb, temb)

        text = _fill_up(self.cap_embedder(encoder_hidden_states[:, :text_width]), text_lengths, self.cap_pad_token)
        text_mask = _mask(_filled(text_lengths), device)
        text_ids = F.pad(torch.arange(1, text_width + 1, device=device)[:, None], (0, 2))
        text_rotary_emb = self._rotary_emb(text_ids.expand(len(text), -1, -1))
        text = self._run(self.context_refiner, text, text_mask, text_rotary_emb)

        sequences, masks, rotary_embs = [image, text], [image_mask, text_mask], [image_rotary_emb, text_rotary_emb]
        modulation = (temb,)
        if depth_hidden_states is not None:
            depth_hidden_states, depth_lengths = _stack(depth_hidden_states)
            depth = _fill_up(self.depth_embedder(depth_hidden_states), depth_lengths, self.depth_pad_token)
            depth_mask = _mask(_filled(depth_lengths), device)
            depth_rotary_emb = self._rotary_emb(_grid_ids(depth_ids, depth_lengths, offsets))
            depth = self._run(self.depth_refiner, depth, depth_mask, depth_rotary_emb, depth_temb)
            # In the trunk a token is modulated by the level of its own modality; text goes with RGB.
            is_rgb = torch.arange(image_width + text_width + depth.shape[1], device=device) < image_width + text_width
            modulation = (None, is_rgb.long().expand(len(depth), -1), temb, depth_temb)
            sequences.append(depth)
            masks.append(depth_mask)
            rotary_embs.append(depth_rotary_emb)

        # 3. Trunk over [image, text, depth]
        mask = None
        if any(one is not None for one in masks):
            full = (torch.ones(seq.shape[:2], dtype=torch.bool, device=device) for seq in sequences)
            mask = torch.cat([ones if one is None else one for one, ones in zip(masks, full)], dim=1)
        hidden_states = self._run(
            self.layers, torch.cat(sequences, dim=1), mask, torch.cat(rotary_embs, dim=1), *modulation
        )

        # 4. RGB velocity
        sample = self.all_final_layer[PATCH](hidden_states[:, : max(image_lengths)], c=temb)
        sample = -_channels_first(sample)

        # 5. Depth decoder and clean depth
        depth_sample = None
        if depth_temb is not None:
            length = max(depth_lengths)
            depth = hidden_states[:, image_width + text_width :][:, :length]
            depth_mask = _mask(depth_lengths, device)
            depth = self._run(self.depth_decoder_blocks, depth, depth_mask, depth_rotary_emb[:, :length], depth_temb)
            depth_sample = self.depth_head(depth, depth_temb)

        if is_list:
            sample = [one[:length] for one, length in zip(sample, image_lengths)]
            if depth_sample is not None:
                depth_sample = [one[:length] for one, length in zip(depth_sample, depth_lengths)]
        if not return_dict:
            return (sample, depth_sample)
        return ModalityForcingTransformerOutput(sample=sample, depth_sample=depth_sample)

    def _run(self, blocks: nn.ModuleList, hidden_states: torch.Tensor, *args) -> torch.Tensor:
        for block in blocks:
            hidden_states = self._run_block(block, hidden_states, *args)
        return hidden_states

    def _rotary_emb(self, ids: torch.Tensor) -> torch.Tensor:
        """Positions (B, S, 3) -> complex numbers (B, S, head_dim / 2)."""
        return self.rope_embedder(ids.flatten(0, 1)).unflatten(0, ids.shape[:2])

    @classmethod
    def shape_of(cls, config: dict[str, Any]) -> TransformerShape:
        return TransformerShape(
            width=config["dim"],
            # The refiners of three sequences cost about what as many blocks over all of them would.
            trunk_blocks=config["n_layers"] + config["n_refiner_layers"],
            mlp_ratio=8 / 3,
            token_channels=4 * config["in_channels"],
            text_channels=config["cap_feat_dim"],
            float32_values=20,  # measured: its norms and rotations, with the modulation of each token
        )

    def depth_outputs(self) -> list[nn.Module]:
        return [*(block.adaLN_modulation for block in self.depth_decoder_blocks), self.depth_head]

    @classmethod
    def from_base(
        cls,
        base: ZImageTransformer2DModel,
        depth_channels: int = 256,
        num_depth_decoder_layers: int = 4,
        depth_timestep_mixing: bool = True,
        own_depth_modulation: bool = False,
    ) -> "ModalityForcingZImageTransformer2DModel":
        r"""
        Grafts depth onto a pretrained Z-Image transformer.

        Depth refiner, pad token, timestep embedder and modulation start as copies of the image's, the depth embedder
        and decoder start fresh, and whatever writes to the outside (decoder gates, head, timestep mixers) starts at
        zero: the first depth prediction is 0 and the RGB stream is only disturbed by the new tokens it attends to. The
        base's weights are copied bit by bit.

        Args:
            base (`ZImageTransformer2DModel`): The pretrained model; it shares no memory with the result.
            depth_channels, num_depth_decoder_layers, depth_timestep_mixing, own_depth_modulation: See the class.

        Returns:
            The new transformer on the base's device and in its dtype, the depth head in float32.

        Raises:
            ValueError: the base is an Omni variant, with SigLIP features.
        """
        config = {name: value for name, value in base.config.items() if not name.startswith("_")}
        with torch.device("meta"):
            model = cls(
                **config,
                depth_channels=depth_channels,
                num_depth_decoder_layers=num_depth_decoder_layers,
                depth_timestep_mixing=depth_timestep_mixing,
                own_depth_modulation=own_depth_modulation,
            )
        graft_depth(model, base, depth_clones(model.state_dict()))
        return model

    def save_published(self, path: str | Path, prefix: str = "") -> None:
        """Writes the weights to one safetensors file in the layout that Z-Image was published in, depth beside it."""
        weights = self.state_dict()
        names = original_names(weights)
        save_safetensors({prefix + name: torch.cat([weights[part] for part in names[name]]) for name in names}, path)


def original_names(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The name of each weight in the layout that Z-Image was published in, which single files have; of the weights that
    it stacks along its rows, queries, keys and values, all are named."""
    renames = {
        f"all_x_embedder.{PATCH}.": "x_embedder.",
        f"all_final_layer.{PATCH}.": "final_layer.",
        ".attention.to_out.0.": ".attention.out.",
        ".attention.norm_q.": ".attention.q_norm.",
        ".attention.norm_k.": ".attention.k_norm.",
    }
    found = {}
    for name in names:
        stacked = re.fullmatch(r"(.+\.attention)\.to_[qkv]\.(.+)", name)
        if stacked:
            block, kind = stacked.groups()
            found[f"{block}.qkv.{kind}"] = tuple(f"{block}.to_{part}.{kind}" for part in "qkv")
            continue
        original = name
        for ours, theirs in renames.items():
            original = original.replace(ours, theirs)
        found[original] = (name,)
    return found


def call_z_image(
    base: ZImageTransformer2DModel,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    img_ids: torch.Tensor,
    txt_ids: torch.Tensor | None = None,
    return_dict: bool = False,
) -> tuple[torch.Tensor]:
    """The RGB velocity (B, N, 4 * in_channels) of Z-Image itself, called as `forward` of the graft above is; for a
    teacher of the graft, and where the base trains."""
    rows, columns = (int(ids.max()) + 1 for ids in img_ids.flatten(0, -2).T[1:3])
    latents = hidden_states.unflatten(1, (1, rows, columns)).unflatten(-1, (-1, 2, 2))
    latents = latents.permute(0, 4, 1, 2, 5, 3, 6).flatten(3, 4).flatten(4, 5)
    lengths = _text_lengths(encoder_hidden_states)
    texts = [features[:length] for features, length in zip(encoder_hidden_states, lengths)]
    velocity = torch.stack(base(list(latents), 1 - timestep.float(), texts, return_dict=False)[0])
    cells = velocity.unflatten(4, (columns, 2)).unflatten(3, (rows, 2)).permute(0, 2, 3, 5, 1, 4, 6)
    return (-cells.flatten(1, 3).flatten(2),)


def depth_clones(names: Iterable[str]) -> dict[str, str]:
    """Which parameter of Z-Image each parameter of depth is cloned from in a graft."""
    renames = {
        "depth_time_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
        "depth_time_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
        "depth_pad_token": "x_pad_token",
        "depth_refiner.": "noise_refiner.",
        "adaLN_modulation_depth.": "adaLN_modulation.",
    }
    return {name: name.replace(depth, image) for name in names for depth, image in renames.items() if depth in name}


def _stack(tokens: torch.Tensor | list[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """Tokens as a batch (B, N, C), the longest N, and how many of each sample there are."""
    if isinstance(tokens, list):
        return pad_sequence(tokens, batch_first=True), [len(one) for one in tokens]
    return tokens, [tokens.shape[1]] * len(tokens)


def _text_lengths(features: torch.Tensor) -> list[int]:
    """Tokens of each prompt without the zeros at its end; 1 at least."""
    places = torch.arange(1, features.shape[1] + 1, device=features.device)
    return (features.any(dim=-1) * places).amax(dim=1).clamp(min=1).tolist()


def _filled(lengths: list[int]) -> list[int]:
    """Lengths of sequences that are filled up."""
    return [length + (-length) % SEQ_MULTI_OF for length in lengths]


def _fill_up(tokens: torch.Tensor, lengths: list[int], pad_token: torch.Tensor) -> torch.Tensor:
    """Tokens (B, N, D) -> (B, S, D), S the longest filled length, where `pad_token` stands after each sequence."""
    tokens = F.pad(tokens, (0, 0, 0, max(_filled(lengths)) - tokens.shape[1]))
    places = torch.arange(tokens.shape[1], device=tokens.device)
    is_token = places < torch.tensor(lengths, device=tokens.device)[:, None]
    return torch.where(is_token[..., None], tokens, pad_token.to(tokens.dtype))


def _mask(lengths: list[int], device: torch.device) -> torch.Tensor | None:
    """True on the first tokens of each sequence, (B, longest); `None` where all are of one length."""
    if len(set(lengths)) == 1:
        return None
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]


def _grid_ids(ids: torch.Tensor | list[torch.Tensor], lengths: list[int], offsets: torch.Tensor) -> torch.Tensor:
    """Positions (time, row, column, 0) of a grid -> (offset + time, row, column), (0, 0, 0) of what fills up."""
    if isinstance(ids, list):
        ids = pad_sequence([one.squeeze(0) for one in ids], batch_first=True)
    ids = ids[..., :3].expand(len(lengths), -1, -1)
    ids = torch.cat([ids[..., :1] + offsets[..., None], ids[..., 1:]], dim=-1)
    return _fill_up(ids, lengths, ids.new_zeros(1, 3))


def _channels_last(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens of 2x2 latents (channel, row, column), as everywhere here, in Z-Image's order (row, column, channel)."""
    return tokens.unflatten(-1, (-1, 4)).transpose(-1, -2).flatten(-2)


def _channels_first(tokens: torch.Tensor) -> torch.Tensor:
    """The inverse of `_channels_last`."""
    return tokens.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2)
