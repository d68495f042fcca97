"""Modality Forcing as a model of ComfyUI: FLUX.2 with a depth stream, for the stock loaders, samplers and LoRAs.

Built on ComfyUI's own FLUX.2 blocks and `operations`, so that its memory management, weight patches and storage dtypes
apply. Published names are ComfyUI's names: mf_diffusers' conversion is the only table of keys.
"""

import contextlib
import functools
import math

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.supported_models
import torch
import torch.nn as nn
import torch.nn.functional as F
from comfy.ldm.flux.layers import (
    DoubleStreamBlock,
    LastLayer,
    MLPEmbedder,
    Modulation,
    ModulationOut,
    QKNorm,
    SelfAttention,
    SingleStreamBlock,
    apply_mod,
    build_mlp,
)
from comfy.ldm.flux.math import attention
from comfy.ldm.flux.model import Flux

import mf_diffusers
from mf_diffusers.modality_forcing.conversion import (
    PUBLISHED_SETTINGS,
    PUBLISHED_SHIFT_MU,
    convert_published_transformer,
)
from mf_diffusers.modality_forcing.depth_stream import timestep_sinusoids
from mf_diffusers.modality_forcing.latent_tokens import position_ids
from mf_diffusers.modality_forcing.noise import velocity_from_clean

from .run import KEY as RUN
from .run import sample


# What prompts may bring from other nodes.
UNSUITED_PROMPTS = {"reference_latents": "reference latents", "control": "a ControlNet"}
QK_NORM_EPS = 1e-6  # where ComfyUI's own FLUX.2 takes the dtype's epsilon


class DepthDoubleStreamBlock(DoubleStreamBlock):
    """FLUX.2 double-stream block with a third stream, for depth: joint attention over [text, image, depth]."""

    def __init__(self, hidden_size, num_heads, mlp_ratio, dtype=None, device=None, operations=None):
        factory = {"dtype": dtype, "device": device, "operations": operations}
        super().__init__(
            hidden_size, num_heads, mlp_ratio, modulation=False, mlp_silu_act=True, proj_bias=False, **factory
        )
        norm = {"elementwise_affine": False, "eps": 1e-6, "dtype": dtype, "device": device}
        self.depth_norm1 = operations.LayerNorm(hidden_size, **norm)
        self.depth_attn = SelfAttention(hidden_size, num_heads, proj_bias=False, **factory)
        self.depth_norm2 = operations.LayerNorm(hidden_size, **norm)
        self.depth_mlp = build_mlp(hidden_size, int(hidden_size * mlp_ratio), mlp_silu_act=True, **factory)

    def forward(self, img, txt, vec, pe, attn_mask=None, transformer_options=None):
        """
        A block's interface in ComfyUI, to which other nodes' replacements of blocks are written.

        Args:
            img: image tokens followed by as many depth tokens (B, 2 L, D).
            txt: text tokens (B, T, D).
            vec: modulation by "txt", "img" and "depth".
        """
        image, depth = img.chunk(2, dim=1)
        streams = {"txt": txt, "img": image, "depth": depth}  # in the order of attention
        joint = zip(*(self.project(name, x, vec[name][0]) for name, x in streams.items()))
        query, key, value = (torch.cat(tokens, dim=2) for tokens in joint)
        joint = self.attend(
            query, key, value, pe, attn_mask, transformer_options | {"img_slice": [txt.shape[1], query.shape[2]]}
        )
        attended = joint.split([x.shape[1] for x in streams.values()], dim=1)
        txt, image, depth = (self.update(name, x, out, *vec[name]) for (name, x), out in zip(streams.items(), attended))
        return torch.cat([image, depth], dim=1), txt

    def attend(self, query, key, value, pe, attn_mask, transformer_options) -> torch.Tensor:
        """Joint attention, with what other nodes patch before and after it."""
        patches = transformer_options.get("patches", {})
        for patch in patches.get("attn1_patch", []):
            new = patch(query, key, value, pe=pe, attn_mask=attn_mask, extra_options=transformer_options)
            query, key, value = (new.get(name, x) for name, x in (("q", query), ("k", key), ("v", value)))
            pe, attn_mask = new.get("pe", pe), new.get("attn_mask", attn_mask)
        attended = attention(query, key, value, pe=pe, mask=attn_mask, transformer_options=transformer_options)
        for patch in patches.get("attn1_output_patch", []):
            attended = patch(attended, transformer_options)
        return attended

    def project(self, name: str, x: torch.Tensor, mod: ModulationOut) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values (B, heads, L, D / heads) of one stream."""
        norm, attn = getattr(self, f"{name}_norm1"), getattr(self, f"{name}_attn")
        qkv = attn.qkv(apply_mod(norm(x), 1 + mod.scale, mod.shift))
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return *attn.norm(query, key, value), value

    def update(
        self, name: str, x: torch.Tensor, attended: torch.Tensor, mod1: ModulationOut, mod2: ModulationOut
    ) -> torch.Tensor:
        norm, attn, mlp = (getattr(self, f"{name}_{part}") for part in ("norm2", "attn", "mlp"))
        x = x + mod1.gate * attn.proj(attended)
        return x + mod2.gate * mlp(apply_mod(norm(x), 1 + mod2.scale, mod2.shift))


def _single_block(block, modulation_dims, img, vec, pe, attn_mask, transformer_options):
    hidden = block(img, vec, pe, attn_mask, modulation_dims=modulation_dims, transformer_options=transformer_options)
    return (hidden,)


def _run_block(place: tuple[str, int], block, outputs: tuple[str, ...], args: dict, options: dict) -> dict:
    """`block(**args)`, its `outputs` by name; or what another node has put in its place, by the same interface."""

    def original(args):
        names = ("img", "txt", "vec", "pe", "attn_mask", "transformer_options")
        return dict(zip(outputs, block(**{name: args[name] for name in names if name in args})))

    args = args | {"transformer_options": options}
    replacements = options.get("patches_replace", {}).get("dit", {})
    return replacements[place](args, {"original_block": original}) if place in replacements else original(args)


class DepthFlux(Flux):
    r"""
    The FLUX.2 transformer joined by a depth stream, with a noise level of its own for each modality.

    Args:
        hidden_size, num_heads, mlp_ratio, depth, depth_single_blocks, ...: as in ComfyUI's `Flux`; `depth` counts the
            double-stream blocks.
        depth_channels (`int`): Values per depth token, the square of its side in pixels.
        num_depth_decoder_layers (`int`): Blocks of the depth decoder.
        depth_timestep_mixing (`bool`): Whether the streams hear each other's noise level.
    """

    def __init__(
        self,
        depth_channels: int,
        num_depth_decoder_layers: int,
        depth_timestep_mixing: bool,
        depth: int,
        dtype=None,
        device=None,
        operations=None,
        **flux,
    ):
        factory = {"dtype": dtype, "device": device, "operations": operations}
        super().__init__(depth=0, **factory, **flux)
        dim, heads, ratio = self.hidden_size, self.num_heads, self.params.mlp_ratio
        self.depth_processor = mf_diffusers.DepthProcessor(patch_size=math.isqrt(depth_channels))
        self.double_blocks = nn.ModuleList(DepthDoubleStreamBlock(dim, heads, ratio, **factory) for _ in range(depth))
        self.depth_decoder_blocks = nn.ModuleList(
            SingleStreamBlock(dim, heads, ratio, modulation=False, mlp_silu_act=True, bias=False, **factory)
            for _ in range(num_depth_decoder_layers)
        )
        self.depth_in = operations.Linear(depth_channels, dim, bias=False, dtype=dtype, device=device)
        self.time_in_depth = MLPEmbedder(256, dim, bias=False, **factory)
        self.depth_timestep_mixing = depth_timestep_mixing
        if depth_timestep_mixing:
            self.time_in_depth_to_img = MLPEmbedder(256, dim, bias=False, **factory)
            self.time_in_rgb_to_depth = MLPEmbedder(256, dim, bias=False, **factory)
            self.cross_alpha_img = nn.Parameter(torch.zeros(1, dtype=torch.float32, device=device))
            self.cross_alpha_depth = nn.Parameter(torch.zeros(1, dtype=torch.float32, device=device))
        self.double_stream_modulation_depth = Modulation(dim, double=True, bias=False, **factory)
        self.single_stream_modulation_depth = Modulation(dim, double=False, bias=False, **factory)
        self.depth_decoder_modulation = Modulation(dim, double=False, bias=False, **factory)
        # In bfloat16 the depth comes out in bands.
        self.depth_final_layer = LastLayer(
            dim, 1, depth_channels, bias=False, dtype=torch.float32, device=device, operations=operations
        )
        for module in self.modules():
            if isinstance(module, QKNorm):
                module.query_norm.eps = module.key_norm.eps = QK_NORM_EPS

    def forward(self, x, timestep, context, transformer_options=None):
        """
        Args:
            x: image latents (B, C, h, w) in the body's dtype, and depth map (B, 1, H, W) in model space, float32.
            timestep: noise levels of the two in [0, 1], (B,) each.
            context: text features (B, L, D).

        Returns:
            Velocities of image (B, C, h, w) and depth (B, 1, H, W), the latter float32.
        """
        transformer_options = transformer_options or {}
        wrappers = comfy.patcher_extension.get_all_wrappers(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, transformer_options
        )
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, transformer_options)

    def _forward(self, x, timestep, context, transformer_options):
        image, depth = x
        rows, columns = image.shape[-2:]
        # 1. Noise levels and modulation
        vec, depth_vec = self.embed_timesteps(*timestep, image.dtype)
        modulation = {
            "txt": self.double_stream_modulation_txt(vec),
            "img": self.double_stream_modulation_img(vec),
            "depth": self.double_stream_modulation_depth(depth_vec),
        }
        single_mod = self.single_stream_modulation(vec)[0]
        single_depth_mod = self.single_stream_modulation_depth(depth_vec)[0]

        # 2. Input projections and positions
        txt = self.txt_in(context)
        image_tokens = self.img_in(image.flatten(2).transpose(1, 2))
        depth_tokens = self.depth_in(self.depth_processor.patchify(depth).to(image.dtype))
        ids = [
            position_ids(length=txt.shape[1]),
            position_ids(rows=rows, columns=columns),
            position_ids(time=1, rows=rows, columns=columns),
        ]
        pe = self.pe_embedder(torch.cat(ids, dim=1).to(image.device))

        # 3. Double-stream blocks, then single-stream blocks over [text, image, depth]
        img = torch.cat([image_tokens, depth_tokens], dim=1)
        options = transformer_options | {"total_blocks": len(self.double_blocks), "block_type": "double"}
        for i, block in enumerate(self.double_blocks):
            args = {"img": img, "txt": txt, "vec": modulation, "pe": pe, "attn_mask": None}
            out = _run_block(("double_block", i), block, ("img", "txt"), args, options | {"block_index": i})
            img, txt = out["img"], out["txt"]
        hidden = torch.cat([txt, img], dim=1)
        # A token is modulated by the level of its own modality; text goes with RGB.
        mod = ModulationOut(
            *(
                torch.cat([getattr(single_mod, x), getattr(single_depth_mod, x)], dim=1)
                for x in ("shift", "scale", "gate")
            )
        )
        start, end = txt.shape[1] + rows * columns, hidden.shape[1]
        options = transformer_options | {"total_blocks": len(self.single_blocks), "block_type": "single"}
        options["img_slice"] = [txt.shape[1], end]
        dims = [(0, start, 0), (start, end, 1)]
        for i, block in enumerate(self.single_blocks):
            args = {"img": hidden, "vec": mod, "pe": pe, "attn_mask": None}
            single = functools.partial(_single_block, block, dims)
            hidden = _run_block(("single_block", i), single, ("img",), args, options | {"block_index": i})["img"]
        image_tokens, depth_tokens = hidden[:, txt.shape[1] :].chunk(2, dim=1)

        # 4. RGB velocity
        velocity = self.final_layer(image_tokens, vec).transpose(1, 2).unflatten(2, (rows, columns))

        # 5. Depth decoder and clean depth, in the terms of a velocity
        decoder_mod = self.depth_decoder_modulation(depth_vec)[0]
        options |= {"patches": {}}  # which are counted by the blocks above
        for block in self.depth_decoder_blocks:
            depth_tokens = block(depth_tokens, decoder_mod, pe[:, :, start:], transformer_options=options)
        clean = self.depth_final_layer(depth_tokens.float(), depth_vec.float())
        clean = self.depth_processor.unpatchify(clean, *depth.shape[-2:])
        return [velocity, velocity_from_clean(depth, clean, timestep[1])]

    def embed_timesteps(
        self, image_level: torch.Tensor, depth_level: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Conditioning vectors of image and depth, (B, D) each, in `dtype`."""
        # Levels are rounded to the body's dtype first (published model).
        image_proj, depth_proj = (
            timestep_sinusoids(level.to(dtype) * 1000, 256).to(dtype) for level in (image_level, depth_level)
        )
        vec, depth_vec = self.time_in(image_proj), self.time_in_depth(depth_proj)
        if self.depth_timestep_mixing:
            vec = vec + self.cross_alpha_img.to(vec) * self.time_in_depth_to_img(depth_proj)
            depth_vec = depth_vec + self.cross_alpha_depth.to(vec) * self.time_in_rgb_to_depth(image_proj)
        return vec, depth_vec


class RGBDLatentFormat(comfy.latent_formats.Flux2):
    """Image latents beside a depth map: ComfyUI asks a latent format how a preview of them looks."""

    def __init__(self):
        super().__init__()
        self.taesd_decoder_name = None  # it decodes image latents alone
        # The previewer projects what `preview` returns to colours, which it has already.
        self.image_factors, self.image_bias = self.latent_rgb_factors, self.latent_rgb_factors_bias
        self.latent_rgb_factors = torch.eye(3).tolist()
        self.latent_rgb_factors_bias = None
        self.latent_rgb_factors_reshape = self.preview
        self._shown = None

    @contextlib.contextmanager
    def showing(self, image: torch.Tensor, depth: torch.Tensor):
        """Within it, `preview` shows these streams, whichever view of them ComfyUI hands to its previewer."""
        self._shown = image, depth
        try:
            yield
        finally:
            self._shown = None

    def preview(self, latent: torch.Tensor) -> torch.Tensor:
        """The first sample that is shown, image left and depth right: (1, 3, H, 2W) in -1..1."""
        image, depth = (x[:1].float() for x in self._shown)
        image = self.image_picture(image)
        depth = 1 - F.interpolate(depth, image.shape[-2:], mode="area")  # near is bright: contracted depth is in 0..2
        return torch.cat([image, depth.expand(-1, 3, -1, -1)], dim=-1)

    def from_vae(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the VAE makes them, as the image stream has them."""
        return latents

    def to_vae(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `from_vae`."""
        return latents

    def image_picture(self, latent: torch.Tensor) -> torch.Tensor:
        """Image latents (1, C, h, w) to a coarse picture (1, 3, 2h, 2w); gray where a VAE's colours are not known."""
        cells = F.pixel_shuffle(latent, 2)
        if cells.shape[1] != len(self.image_factors):
            return torch.zeros_like(cells[:, :1]).expand(-1, 3, -1, -1)
        factors = torch.tensor(self.image_factors, dtype=cells.dtype, device=cells.device)
        bias = torch.tensor(self.image_bias, dtype=cells.dtype, device=cells.device)
        return torch.einsum("bchw,cd->bdhw", cells, factors) + bias.view(1, 3, 1, 1)


class ModalityForcing:
    """
    What a model that ComfyUI samples is where its latent has two streams, beside the class of its base.

    `log2_alpha` is the trajectory, and `depth_denoise` the level that depth starts at where a sampler starts below 1;
    the node 'Modality Forcing Trajectory' patches them. `sample_size` is the size, in pixels, that the model was made
    for, as `size_rule` reads it; see `processing_size`. A file of weights says nothing of them: they are those of the
    published model. `known_patches` and `known_replacements` are ComfyUI's kinds of patches that the transformer has a
    place for.
    """

    known_patches = frozenset({"attn1_patch", "attn1_output_patch"})
    known_replacements = frozenset({"dit"})
    depth_denoise = None
    log2_alpha = PUBLISHED_SETTINGS["default_log2_alpha"]
    sample_size = PUBLISHED_SETTINGS["default_sample_size"]
    size_rule = PUBLISHED_SETTINGS["default_size_rule"]

    @property
    def depth_processor(self):
        return self.diffusion_model.depth_processor

    def check_latent(self, shapes):
        """Raises ValueError where a latent of these shapes is none for this model."""
        token = self.latent_format.spacial_downscale_ratio
        fits = (
            len(shapes) in (2, 3)
            and all(len(shape) == 4 for shape in shapes)
            and shapes[0][1] == self.latent_format.latent_channels
            and tuple(shapes[1][1:]) == (1, token * shapes[0][2], token * shapes[0][3])
            and all(tuple(shape[1:]) == (2, *shapes[1][2:]) for shape in shapes[2:])
        )
        if not fits:
            raise ValueError(
                f"The latent has shapes {[list(shape) for shape in shapes]}, but this Modality Forcing model takes "
                f"image latents (B, {self.latent_format.latent_channels}, h, w) with depth (B, 1, {token} h, "
                f"{token} w): connect 'Empty RGB-D Latent' or 'Encode RGB-D' to the sampler."
            )

    def check_prompts(self, prompts):
        """Raises ValueError where a prompt brings what the model has no place for."""
        for prompt in prompts:
            for name, what in UNSUITED_PROMPTS.items():
                if prompt.get(name) is not None:
                    raise ValueError(
                        f"A Modality Forcing model takes no {what}: remove that node, and give images by 'Encode "
                        "RGB-D'."
                    )

    def encode_adm(self, **kwargs):
        return None  # neither base has pooled text

    def extra_conds(self, **kwargs):
        text = kwargs.get("cross_attn")
        return {} if text is None else {"c_crossattn": comfy.conds.CONDRegular(text)}

    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        """Clean latents as the sampler carries them (B, 1, N), from its state `x` at the noise level `t` (B,)."""
        run = transformer_options[RUN]
        x, stream = run.whole(x)
        x, t = run.as_flow(x, t)
        run = run.like(x)
        image, depth = run.streams.to_model(x, t, run.latent, run.noise)
        levels = run.streams.levels(t)
        dtype = self.get_dtype_inference()
        velocities = self.diffusion_model(
            [image.to(dtype, copy=True), depth.clone()],  # other nodes' wrappers may write into them
            levels,
            context=comfy.model_management.cast_to_device(c_crossattn, x.device, dtype),
            transformer_options=transformer_options,
        )
        clean = (
            noisy - level.view(-1, 1, 1, 1) * velocity.float()
            for noisy, level, velocity in zip((image, depth), levels, velocities)
        )
        carried = run.streams.to_sampler(*clean, run.latent)
        return carried if stream is None else run.streams.split(carried)[stream]


class ModalityForcingFlux(ModalityForcing, comfy.model_base.Flux):
    """The model on FLUX.2."""

    def __init__(self, model_config, device=None):
        super().__init__(model_config, device=device, unet_model=DepthFlux)


class ModalityForcingConfig(comfy.supported_models.Flux2):
    """Recognises the weights of a Modality Forcing transformer, and builds the model for them."""

    sampling_settings = {"shift": PUBLISHED_SHIFT_MU}
    latent_format = RGBDLatentFormat
    supported_inference_dtypes = [torch.bfloat16, torch.float32]  # float16 overflows

    @classmethod
    def matches(cls, unet_config, state_dict=None, **kwargs):
        return super().matches(unet_config) and any(key.endswith("depth_in.weight") for key in state_dict or ())

    def get_model(self, state_dict, prefix="", device=None):
        config = detect_config(state_dict, prefix)
        self.unet_config |= config
        self.latent_format.latent_channels = config["in_channels"]
        self.latent_format.spacial_downscale_ratio = math.isqrt(config["depth_channels"])
        # ComfyUI counts the N entries of a packed latent; memory goes with tokens, one of image and one of depth.
        self.memory_usage_factor *= 2 / (config["in_channels"] + config["depth_channels"])
        return ModalityForcingFlux(self, device=device)

    def process_unet_state_dict(self, state_dict):
        return with_float32_head(super().process_unet_state_dict(state_dict), "depth_final_layer")


def with_float32_head(state_dict: dict, head: str) -> dict:
    """Weights whose depth head, the module called `head`, is in float32."""
    return {
        key: tensor.float() if key.startswith(f"{head}.") and key.endswith(".weight") else tensor
        for key, tensor in state_dict.items()
    }


def detect_config(state_dict: dict, prefix: str = "") -> dict:
    """
    Constructor arguments of [`DepthFlux`], every dimension read off the shapes.

    Raises:
        ValueError: keys are missing, or the model is distilled for guidance.
    """
    # Scales and the like of quantised files have no place in the published layout, and files that ComfyUI saved have
    # its own name for the weights of norms.
    shapes = {
        key.removeprefix(prefix).replace("_norm.weight", "_norm.scale"): torch.empty(tensor.shape, device="meta")
        for key, tensor in state_dict.items()
        if key.startswith(prefix) and (key.endswith((".weight", "_norm.scale")) or "cross_alpha_" in key)
    }
    config, _ = convert_published_transformer(shapes)
    if config["guidance_embeds"]:
        raise ValueError("A guidance-distilled transformer (guidance_in.*) is not supported: take a base model.")
    return {
        "in_channels": config["in_channels"],
        "out_channels": config["in_channels"],
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": config["mlp_ratio"],
        "context_in_dim": config["joint_attention_dim"],
        "axes_dim": list(config["axes_dims_rope"]),
        "depth": config["num_layers"],
        "depth_single_blocks": config["num_single_layers"],
        "depth_channels": config["depth_channels"],
        "num_depth_decoder_layers": config["num_depth_decoder_layers"],
        "depth_timestep_mixing": config["depth_timestep_mixing"],
    }


def register():
    """
    Puts the model first among those that ComfyUI knows (FLUX.2's own entry would match these weights too), and has its
    patchers wrap every sampling in a [`Run`].

    ComfyUI keeps wrappers on patchers, and its loaders make a patcher without asking the model for any. So patchers add
    the wrapper as they are made.
    """
    if ModalityForcingConfig in comfy.supported_models.models:
        return
    comfy.supported_models.models.insert(0, ModalityForcingConfig)
    make = comfy.model_patcher.ModelPatcher.__init__

    @functools.wraps(make)
    def make_patcher(self, model, *args, **kwargs):
        make(self, model, *args, **kwargs)
        if isinstance(model, ModalityForcing):
            self.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, RUN, sample)

    comfy.model_patcher.ModelPatcher.__init__ = make_patcher
