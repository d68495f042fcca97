"""Z-Image with depth as a model of ComfyUI: its own NextDiT, after whose tokens those of depth stand.

The names of weights are those of Z-Image's single files, so that the stock loaders of LoRAs find their layers; what
depth adds has the library's names.
"""

import math

import comfy.latent_formats
import comfy.model_base
import comfy.patcher_extension
import comfy.supported_models
import torch
import torch.nn as nn
import torch.nn.functional as F
from comfy.ldm.lumina.model import JointTransformerBlock, NextDiT, pad_zimage, pos_ids_x
from comfy.ldm.modules.diffusionmodules.mmdit import TimestepEmbedder

import mf_diffusers
from mf_diffusers.modality_forcing.depth_stream import timestep_sinusoids
from mf_diffusers.modality_forcing.noise import velocity_from_clean
from mf_diffusers.modality_forcing.transformer_z_image import TIME_CHANNELS, TIME_MLP_WIDTH

from .model import ModalityForcing, RGBDLatentFormat, with_float32_head


TIME_DIM = 256  # of the vectors that modulate, where the model is as wide
PAD_MULTIPLE = 32  # sequences are filled up to it
QK_NORM_EPS = 1e-5  # where ComfyUI takes the dtype's epsilon
DEPTH_KEY = "depth_embedder.weight"


class TimestepMLP(nn.Module):
    """diffusers' `TimestepEmbedding`, by its names."""

    def __init__(self, time_dim, dtype=None, device=None, operations=None):
        super().__init__()
        self.linear_1 = operations.Linear(TIME_CHANNELS, TIME_MLP_WIDTH, dtype=dtype, device=device)
        self.linear_2 = operations.Linear(TIME_MLP_WIDTH, time_dim, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class DepthTimestepEmbeddings(nn.Module):
    """The library's module of this name, on ComfyUI's layers."""

    def __init__(self, time_dim: int, mixing: bool, device=None, **factory):
        super().__init__()
        self.timestep_embedder = TimestepMLP(time_dim, device=device, **factory)
        self.mixing = mixing
        if mixing:
            self.depth_to_rgb = TimestepMLP(time_dim, device=device, **factory)
            self.rgb_to_depth = TimestepMLP(time_dim, device=device, **factory)
            self.alpha_rgb = nn.Parameter(torch.zeros(1, dtype=torch.float32, device=device))
            self.alpha_depth = nn.Parameter(torch.zeros(1, dtype=torch.float32, device=device))

    def forward(self, vec, image_t, depth_t) -> tuple[torch.Tensor, torch.Tensor]:
        image_proj, depth_proj = (timestep_sinusoids(t, TIME_CHANNELS).to(vec.dtype) for t in (image_t, depth_t))
        depth_vec = self.timestep_embedder(depth_proj)
        if self.mixing:
            vec = vec + self.alpha_rgb.to(vec) * self.depth_to_rgb(depth_proj)
            depth_vec = depth_vec + self.alpha_depth.to(vec) * self.rgb_to_depth(image_proj)
        return vec, depth_vec


class DepthHead(nn.Module):
    """The library's float32 head, on ComfyUI's layers; in bfloat16 the depth comes out in bands."""

    def __init__(self, dim: int, time_dim: int, channels: int, device=None, operations=None):
        super().__init__()
        factory = {"bias": False, "dtype": torch.float32, "device": device}
        self.norm_out = nn.ModuleDict({"linear": operations.Linear(time_dim, 2 * dim, **factory)})
        self.proj_out = operations.Linear(dim, channels, **factory)

    def forward(self, x: torch.Tensor, vec: torch.Tensor) -> torch.Tensor:
        scale, shift = self.norm_out["linear"](F.silu(vec.float()))[:, None].chunk(2, dim=-1)
        return self.proj_out(F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


class OwnModulation(nn.Sequential):
    """A block's modulation where depth, the second half of the vectors, has another projection than image and text."""

    def __init__(self, shared: nn.Module, depth: nn.Module):
        super().__init__(shared)
        self.depth = [depth]  # a list: it is the block's submodule, not this one's

    def forward(self, vec: torch.Tensor) -> torch.Tensor:
        vec, depth_vec = vec.chunk(2)
        return torch.cat([self[0](vec), self.depth[0](depth_vec)])


class DepthNextDiT(NextDiT):
    r"""
    The Z-Image transformer over [text, image, depth], with a noise level of its own for each modality.

    Args:
        dim, n_layers, n_refiner_layers, n_heads, ...: as in ComfyUI's `NextDiT`.
        depth_channels (`int`): Values per depth token, the square of its side in pixels.
        num_depth_decoder_layers (`int`): Blocks of the depth decoder.
        depth_timestep_mixing (`bool`): Whether the streams hear each other's noise level.
        own_depth_modulation (`bool`): Whether depth tokens are modulated by projections of their own.
    """

    def __init__(
        self,
        depth_channels: int,
        num_depth_decoder_layers: int,
        depth_timestep_mixing: bool,
        own_depth_modulation: bool,
        dtype=None,
        device=None,
        operations=None,
        **next_dit,
    ):
        factory = {"dtype": dtype, "device": device, "operations": operations}
        super().__init__(**next_dit, **factory)
        dim, time_dim = self.dim, min(self.dim, TIME_DIM)

        def blocks(number: int) -> nn.ModuleList:
            names = ("n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "qk_norm")
            sizes = {name: next_dit[name] for name in names}
            return nn.ModuleList(
                JointTransformerBlock(i, dim, **sizes, z_image_modulation=True, operation_settings=factory)
                for i in range(number)
            )

        self.depth_processor = mf_diffusers.DepthProcessor(patch_size=math.isqrt(depth_channels))
        self.t_embedder = TimestepEmbedder(TIME_MLP_WIDTH, output_size=time_dim, **factory)
        self.depth_time_embed = DepthTimestepEmbeddings(time_dim, depth_timestep_mixing, **factory)
        self.depth_embedder = operations.Linear(depth_channels, dim, dtype=dtype, device=device)
        self.depth_pad_token = nn.Parameter(torch.empty(1, dim, dtype=dtype, device=device))
        self.depth_refiner = blocks(next_dit["n_refiner_layers"])
        if own_depth_modulation:
            for layer in self.layers:
                depth = operations.Linear(time_dim, 4 * dim, dtype=dtype, device=device)
                layer.adaLN_modulation_depth = nn.Sequential(depth)
                layer.adaLN_modulation = OwnModulation(layer.adaLN_modulation[0], layer.adaLN_modulation_depth)
        self.depth_decoder_blocks = blocks(num_depth_decoder_layers)
        self.depth_head = DepthHead(dim, time_dim, depth_channels, device=device, operations=operations)
        for module in self.modules():
            if hasattr(module, "q_norm"):
                module.q_norm.eps = module.k_norm.eps = QK_NORM_EPS

    def forward(self, x, timestep, context, transformer_options=None):
        """
        Args:
            x: image latents in 2x2 cells (B, 4 C, h, w) in the body's dtype, and depth map (B, 1, H, W) in model space,
                float32.
            timestep: noise levels of the two in [0, 1], (B,) each; 1 is pure noise.
            context: text features (B, L, D).

        Returns:
            Velocities of image (B, 4 C, h, w) and depth (B, 1, H, W), the latter float32.
        """
        transformer_options = transformer_options or {}
        wrappers = comfy.patcher_extension.get_all_wrappers(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, transformer_options
        )
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, transformer_options)

    def _forward(self, x, timestep, context, transformer_options):
        cells, depth = x
        rows, columns = cells.shape[-2:]
        # 1. Noise levels: Z-Image's t is 1 where the image is clean
        image_t, depth_t = (self.time_scale * (1 - level.float()) for level in timestep)
        vec, depth_vec = self.depth_time_embed(self.t_embedder(image_t, dtype=cells.dtype), image_t, depth_t)

        # 2. Text and image, refined; then depth, likewise
        latents = F.pixel_shuffle(cells, 2)
        hidden, _, sizes, text_lengths, pe, _ = self.patchify_and_embed(
            latents, context, None, vec, context.shape[1], transformer_options=transformer_options
        )
        text_length, start = text_lengths[0], hidden.shape[1]
        depth_tokens = self.depth_embedder(self.depth_processor.patchify(depth).to(cells.dtype))
        depth_tokens, extra = pad_zimage(depth_tokens, self.depth_pad_token, self.pad_tokens_multiple)
        ids = pos_ids_x(text_length + 2, rows, columns, 1, depth.device, transformer_options=transformer_options)
        depth_pe = self.rope_embedder(F.pad(ids, (0, 0, 0, extra))).movedim(1, 2).to(pe)
        for layer in self.depth_refiner:
            depth_tokens = layer(depth_tokens, None, depth_pe, depth_vec, transformer_options=transformer_options)

        # 3. Trunk over [text, image, depth]: a token is modulated by the level of its own modality; text goes with RGB
        hidden = torch.cat([hidden, depth_tokens], dim=1)
        hidden = self.run_trunk(
            hidden,
            torch.cat([pe, depth_pe], dim=1),
            torch.cat([vec, depth_vec]),
            slice(text_length, start),
            latents,
            transformer_options,
        )

        # 4. RGB velocity
        image = self.final_layer(hidden[:, text_length:start], vec)
        velocity = -self.unpatchify(image, sizes, [0] * len(image), return_tensor=True)

        # 5. Depth decoder and clean depth, in the terms of a velocity
        depth_tokens, depth_pe = (one[:, : rows * columns] for one in (hidden[:, start:], depth_pe))
        for layer in self.depth_decoder_blocks:
            depth_tokens = layer(depth_tokens, None, depth_pe, depth_vec, transformer_options=transformer_options)
        clean = self.depth_processor.unpatchify(self.depth_head(depth_tokens, depth_vec), *depth.shape[-2:])
        return [F.pixel_unshuffle(velocity, 2), velocity_from_clean(depth, clean, timestep[1])]

    def run_trunk(self, hidden, pe, vecs, image: slice, latents, transformer_options) -> torch.Tensor:
        """
        The blocks over all tokens, and after each what other nodes patch, ControlNets for example, which see text and
        image as they do in Z-Image.

        Args:
            vecs: modulation of image and text, then of depth, (2 B, 256).
            image: where in the sequence the image's tokens are; the text's are before them, the depth's after.
        """
        vec, before = vecs.chunk(2)[0], hidden
        patches = transformer_options.get("patches", {}).get("double_block", [])
        transformer_options |= {"total_blocks": len(self.layers), "block_type": "double"}
        for i, layer in enumerate(self.layers):
            transformer_options["block_index"] = i
            hidden = layer(
                hidden,
                None,
                pe,
                vecs,
                timestep_zero_index=[(image.stop, hidden.shape[1])],
                transformer_options=transformer_options,
            )
            for patch in patches:
                out = patch(
                    {
                        "img": hidden[:, image],
                        "img_input": before[:, image],
                        "txt": hidden[:, : image.start],
                        "pe": pe[:, image],
                        "vec": vec,
                        "x": latents,
                        "block_index": i,
                        "transformer_options": transformer_options,
                    }
                )
                if "img" in out:
                    hidden[:, image] = out["img"]
                if "txt" in out:
                    hidden[:, : image.start] = out["txt"]
        return hidden


class ZImageRGBDLatentFormat(RGBDLatentFormat):
    """Latents of Z-Image's VAE, normalised and in cells of 2x2, beside a depth map."""

    vae_format = comfy.latent_formats.Flux()
    latent_channels = 4 * vae_format.latent_channels
    spacial_downscale_ratio = 16

    def __init__(self):
        super().__init__()
        self.image_factors, self.image_bias = (
            self.vae_format.latent_rgb_factors,
            self.vae_format.latent_rgb_factors_bias,
        )

    def from_vae(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, 2 h, 2 w) as ComfyUI's VAE makes them -> (B, 4 C, h, w); those of another VAE as they are."""
        if 4 * latents.shape[1] != self.latent_channels:
            return latents
        return F.pixel_unshuffle(self.vae_format.process_in(latents), 2)

    def to_vae(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `from_vae`."""
        return self.vae_format.process_out(F.pixel_shuffle(latents, 2))


class ModalityForcingZImage(ModalityForcing, comfy.model_base.Lumina2):
    """The model that ComfyUI samples, on Z-Image; a `Lumina2`, as which the stock loaders of LoRAs know Z-Image."""

    known_patches = frozenset({"double_block", "noise_refiner"})
    known_replacements = frozenset()

    def __init__(self, model_config, device=None):
        comfy.model_base.BaseModel.__init__(
            self, model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=DepthNextDiT
        )
        self.memory_usage_factor_conds = ()


class ModalityForcingZImageConfig(comfy.supported_models.ZImage):
    """Recognises the weights of Z-Image with depth, and builds the model for them."""

    unet_config = {"image_model": "lumina2"}
    latent_format = ZImageRGBDLatentFormat

    def __init__(self, unet_config):
        super().__init__(unet_config | {"allow_fp16": False})  # float16 overflows

    @classmethod
    def matches(cls, unet_config, state_dict=None, **kwargs):
        return super().matches(unet_config) and any(key.endswith(DEPTH_KEY) for key in state_dict or ())

    def get_model(self, state_dict, prefix="", device=None):
        config = detect_config(state_dict, prefix)
        self.unet_config |= config
        self.latent_format.latent_channels = 4 * config["in_channels"]
        self.latent_format.spacial_downscale_ratio = math.isqrt(config["depth_channels"])
        # ComfyUI counts the N entries of a packed latent, and Z-Image's factor is for latents, four for a token; memory
        # goes with tokens, one of image and one of depth.
        self.memory_usage_factor *= 8 / (self.latent_format.latent_channels + config["depth_channels"])
        return ModalityForcingZImage(self, device=device)

    def process_unet_state_dict(self, state_dict):
        return with_float32_head(super().process_unet_state_dict(state_dict), "depth_head")


def detect_config(state_dict: dict, prefix: str = "") -> dict:
    """
    Constructor arguments of [`DepthNextDiT`], every dimension read off the shapes.

    Raises:
        ValueError: keys are missing.
    """
    keys = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}

    def shape(name: str) -> torch.Size:
        if name not in keys:
            raise ValueError(f"These are not the weights of Z-Image with depth: {name} is missing.")
        return state_dict[prefix + name].shape

    def count(stack: str) -> int:
        return len({key.split(".")[1] for key in keys if key.startswith(f"{stack}.")})

    dim, depth_channels = shape(DEPTH_KEY)
    (head_dim,) = shape("layers.0.attention.q_norm.weight")
    mlp_width = shape("layers.0.feed_forward.w1.weight")[0]
    return {
        "patch_size": 2,
        "in_channels": shape("x_embedder.weight")[1] // 4,
        "dim": dim,
        "n_layers": count("layers"),
        "n_refiner_layers": count("noise_refiner"),
        "n_heads": dim // head_dim,
        "n_kv_heads": dim // head_dim,
        "multiple_of": mlp_width,  # the width itself: NextDiT rounds 8/3 of the model's up to it
        "ffn_dim_multiplier": 8 / 3,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "cap_feat_dim": shape("cap_embedder.1.weight")[1],
        "axes_dims": [head_dim // 4, 3 * head_dim // 8, 3 * head_dim // 8],
        "axes_lens": [1536, 512, 512],
        "rope_theta": 256.0,
        "z_image_modulation": True,
        "time_scale": 1000.0,
        "pad_tokens_multiple": PAD_MULTIPLE,
        "depth_channels": depth_channels,
        "num_depth_decoder_layers": count("depth_decoder_blocks"),
        "depth_timestep_mixing": "depth_time_embed.alpha_rgb" in keys,
        "own_depth_modulation": "layers.0.adaLN_modulation_depth.0.weight" in keys,
    }


def register():
    """Puts the model first among those that ComfyUI knows; Z-Image's own entry would match these weights too."""
    if ModalityForcingZImageConfig not in comfy.supported_models.models:
        comfy.supported_models.models.insert(0, ModalityForcingZImageConfig)
