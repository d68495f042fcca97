"""One pipeline of images and depth: what is given decides what is made."""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM, T5TokenizerFast, UMT5EncoderModel

from .adapter import ModalityForcingAdapterMixin
from .depth_processor import DepthProcessor
from .ensemble import ensemble_depth
from .image_processor import image_to_tensor, processing_size, resize
from .latent_tokens import decode_latents, image_to_tokens, position_ids, tokens_to_latents
from .loaders import ModalityForcingLoaderMixin
from .noise import add_noise, shift_timestep, velocity_from_clean
from .pipeline_output import ModalityForcingPipelineOutput
from .text_features import encode_text
from .transformer_dit import ModalityForcingDiTTransformer2DModel
from .transformer_flux2 import ModalityForcingFlux2Transformer2DModel


logger = logging.get_logger(__name__)


class ModalityForcingPipeline(DiffusionPipeline, ModalityForcingAdapterMixin, ModalityForcingLoaderMixin):
    r"""
    Text to image and depth, image to depth, depth to image, with one set of weights (Modality Forcing). With a base of
    the from-scratch family, whose transformer has no depth, it makes images alone.

    Args:
        transformer ([`ModalityForcingFlux2Transformer2DModel`] or [`ModalityForcingDiTTransformer2DModel`]):
            Denoiser of both modalities.
        scheduler ([`FlowMatchEulerDiscreteScheduler`]):
            Walks the RGB noise levels. With `stochastic_sampling`, which helps a model that has trained little, every
            step adds noise anew, drawn from `generator`.
        depth_scheduler ([`FlowMatchEulerDiscreteScheduler`]):
            Walks the depth noise levels where depth alone is made. Where both are made, depth follows the RGB levels
            along the trajectory that `log2_alpha` names. Absent where the transformer has no depth.
        vae ([`AutoencoderKLFlux2`]): Images to latents and back.
        text_encoder ([`Qwen3ForCausalLM`] or [`UMT5EncoderModel`]): Its hidden states are the text features. May be
            absent when the caller passes `prompt_embeds` (and `negative_prompt_embeds`).
        tokenizer (`Qwen2TokenizerFast` or `T5TokenizerFast`): The text encoder's; Qwen's with a chat template.
        depth_processor ([`DepthProcessor`]): Depth maps to tokens and back. Absent where the transformer has no depth.
        text_encoder_out_layers (`list[int]`, defaults to `[9, 18, 27]`): Hidden layers of Qwen3 to put side by side;
            of UMT5 it is always the last.
        max_sequence_length (`int`, defaults to 512): Text tokens; shorter prompts are padded to it.
        default_sample_size (`int`, defaults to 512): Side of the square whose area is the pixel budget.
        default_log2_alpha (`float`, defaults to 5.0): Trajectory of joint generation.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["text_encoder", "tokenizer", "depth_scheduler", "depth_processor"]
    _callback_tensor_inputs = ["latents", "depth_latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        transformer: ModalityForcingFlux2Transformer2DModel | ModalityForcingDiTTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        depth_scheduler: FlowMatchEulerDiscreteScheduler | None,
        vae: AutoencoderKLFlux2,
        text_encoder: Qwen3ForCausalLM | UMT5EncoderModel | None,
        tokenizer: Qwen2TokenizerFast | T5TokenizerFast | None,
        depth_processor: DepthProcessor | None,
        text_encoder_out_layers: list[int] = (9, 18, 27),
        max_sequence_length: int = 512,
        default_sample_size: int = 512,
        default_log2_alpha: float = 5.0,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            depth_scheduler=depth_scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            depth_processor=depth_processor,
        )
        self.register_to_config(
            text_encoder_out_layers=list(text_encoder_out_layers),
            max_sequence_length=max_sequence_length,
            default_sample_size=default_sample_size,
            default_log2_alpha=default_log2_alpha,
        )
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1) if getattr(self, "vae", None) else 8
        # A latent token is a 2x2 cell of VAE latents; a depth token covers the same pixels.
        self.token_size = 2 * self.vae_scale_factor
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.token_size)
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._attention_kwargs = None
        self._current_timestep = None
        self._interrupt = False

    def check_inputs(
        self,
        prompt,
        prompt_embeds,
        negative_prompt_embeds,
        image,
        depth,
        depth_mask,
        height,
        width,
        num_inference_steps,
        sigmas,
        guidance_scale,
        log2_alpha,
        num_refinement_steps,
        ensemble_size,
        num_images_per_prompt,
        generator,
        latents,
        depth_latents,
        output_type,
        callback_on_step_end_tensor_inputs,
    ):
        # What is made of what
        if not self.has_depth:
            for name, value in (
                ("image", image),
                ("depth", depth),
                ("log2_alpha", log2_alpha),
                ("num_refinement_steps", num_refinement_steps or None),
                ("depth_latents", depth_latents),
            ):
                if value is not None:
                    raise ValueError(
                        f"`{name}` is about depth, but this transformer is a text-to-image base: leave it out, or take "
                        "a model with depth (ModalityForcingPipeline.from_base starts one)."
                    )
        if image is not None and depth is not None:
            raise ValueError(
                "Both `image` and `depth` were given, so nothing is left to make: give one of them, or neither."
            )
        if prompt is not None and prompt_embeds is not None:
            raise ValueError("Give `prompt` or `prompt_embeds`, not both.")
        if prompt is None and prompt_embeds is None and image is None:
            raise ValueError("Give a `prompt` (or `prompt_embeds`); only image -> depth does without one.")
        if prompt is not None and not (
            isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(isinstance(p, str) for p in prompt))
        ):
            raise ValueError(f"`prompt` must be a string or a list of strings, got {prompt!r}.")
        if num_refinement_steps and (image is not None or depth is not None):
            raise ValueError(
                "`num_refinement_steps` refines the depth of joint generation: give neither `image` nor `depth`."
            )
        if ensemble_size != 1 and image is None and not num_refinement_steps:
            raise ValueError("`ensemble_size` needs depth made from an image: give `image`, or `num_refinement_steps`.")
        if ensemble_size != 1 and output_type == "latent":
            raise ValueError("An ensemble is a median of depth maps: take the `output_type` 'pt' in place of 'latent'.")
        if ensemble_size != 1 and depth_latents is not None:
            raise ValueError("`depth_latents` is the noise of one sample, so it cannot start an ensemble.")
        if log2_alpha is not None and image is not None:
            raise ValueError(
                "`log2_alpha` couples the noise levels of two modalities, but the image is given: leave it out."
            )
        if latents is not None and image is not None:
            raise ValueError("`latents` is the noise of a new image, but the image is given: leave it out.")
        if depth_latents is not None and depth is not None and log2_alpha is None:
            raise ValueError("`depth_latents` is the noise of a new depth map, but the depth is given: leave it out.")
        if depth_mask is not None and depth is None:
            raise ValueError("`depth_mask` says where `depth` is valid: give both.")

        # Numbers
        for name, value, least in (
            ("num_inference_steps", num_inference_steps, 1),
            ("num_refinement_steps", num_refinement_steps, 0),
            ("ensemble_size", ensemble_size, 1),
            ("num_images_per_prompt", num_images_per_prompt, 1),
            ("height", height, 1),
            ("width", width, 1),
        ):
            is_size = name in ("height", "width")
            if not (is_size and value is None) and (
                not isinstance(value, Integral) or isinstance(value, bool) or value < least
            ):
                raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
        for name, value, low, high in (
            ("guidance_scale", guidance_scale, 0, math.inf),
            ("log2_alpha", log2_alpha, -30, 30),
        ):
            if value is not None and not (isinstance(value, Real) and low <= value <= high and math.isfinite(value)):
                raise ValueError(f"`{name}` must be a number from {low} to {high}, got {value!r}.")
        if sigmas is not None:
            levels = np.asarray(sigmas, dtype=np.float64)
            if (
                levels.ndim != 1
                or not len(levels)
                or not (levels[0] <= 1 and levels[-1] > 0 and (np.diff(levels) < 0).all())
            ):
                raise ValueError(f"`sigmas` must fall from at most 1 to above 0, got {sigmas!r}.")

        # Tensors and the rest
        generators = generator if isinstance(generator, list) else [generator]
        if generator is not None and not all(isinstance(g, torch.Generator) for g in generators):
            raise ValueError(f"`generator` must be a torch.Generator or a list of them, got {generator!r}.")
        for name, value in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
            channels = self.transformer.config.joint_attention_dim
            if value is not None and not (
                isinstance(value, torch.Tensor) and value.ndim == 3 and len(value) and value.shape[2] == channels
            ):
                got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value)
                raise ValueError(f"`{name}` must be a tensor of shape (B, L, {channels}), got {got}.")
        for name, value in (
            ("latents", latents),
            ("depth_latents", depth_latents),
            ("prompt_embeds", prompt_embeds),
            ("negative_prompt_embeds", negative_prompt_embeds),
        ):
            if value is not None and not (isinstance(value, torch.Tensor) and torch.isfinite(value).all()):
                raise ValueError(f"`{name}` must be a tensor of finite values.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}; known are {self._callback_tensor_inputs}."
            )
        self.check_components()

    def check_components(self):
        """Raises ValueError where the components do not fit one another, or this pipeline."""
        schedulers = [self.scheduler]
        if self.has_depth:
            schedulers.append(self.depth_scheduler)
            patch_size = self.depth_processor.config.patch_size
            channels = self.transformer.config.depth_channels
            if not (patch_size == self.token_size and patch_size**2 == channels):
                raise ValueError(
                    f"A depth token must cover the pixels of an image token, but the depth processor's patches are "
                    f"{patch_size} pixels wide, the VAE's tokens {self.token_size}, and the transformer takes "
                    f"{channels} values for each: graft with depth_channels = patch_size**2."
                )
        for scheduler in schedulers:
            if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.use_dynamic_shifting:
                raise ValueError(
                    f"This pipeline takes Euler steps of a static shift, but a scheduler is {scheduler}: give "
                    "FlowMatchEulerDiscreteScheduler(shift=math.exp(1.1))."
                )
        if self.transformer.config.get("guidance_embeds"):
            raise ValueError("A guidance-distilled transformer (guidance_embeds) is not supported: take a base model.")
        if self.transformer.dtype == torch.float16:
            raise ValueError(
                "The transformer overflows in float16: load it with dtype=torch.bfloat16 or torch.float32."
            )

    def encode_prompt(
        self,
        prompt: str | list[str],
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Text features, hidden states of the text encoder: see [`encode_text`].

        Returns:
            Features (B * num_images_per_prompt, L, D) and text positions (1, L, 4).
        """
        device = device or self._execution_device
        if prompt_embeds is None and (self.text_encoder is None or self.tokenizer is None):
            raise ValueError(
                "This pipeline has no text encoder or no tokenizer: give `prompt_embeds`, and `negative_prompt_embeds` "
                "for guidance."
            )
        if prompt_embeds is None:
            prompt_embeds = encode_text(
                self.text_encoder,
                self.tokenizer,
                [prompt] if isinstance(prompt, str) else prompt,
                self.config.text_encoder_out_layers,
                self.config.max_sequence_length,
                device,
            )
        prompt_embeds = prompt_embeds.to(device).repeat_interleave(num_images_per_prompt, dim=0)
        return prompt_embeds, text_position_ids(prompt_embeds)

    def prepare_latents(
        self, batch_size: int, height: int, width: int, device, generator, latents: torch.Tensor | None = None
    ) -> torch.Tensor:
        """RGB noise of shape (B, C, height / 16, width / 16), drawn or given, as tokens (B, N, C) in float32."""
        channels = self.transformer.config.in_channels
        shape = (batch_size, channels, height // self.token_size, width // self.token_size)
        latents = _given_or_drawn("latents", latents, shape, generator, device)
        return latents.flatten(2).transpose(1, 2)

    def prepare_depth_latents(
        self, batch_size: int, height: int, width: int, device, generator, depth_latents: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Depth noise of shape (B, 1, height, width), drawn or given, as tokens (B, N, p*p) in float32."""
        shape = (batch_size, 1, height, width)
        return self.depth_processor.patchify(_given_or_drawn("depth_latents", depth_latents, shape, generator, device))

    def prepare_size(
        self, height: int | None, width: int | None, input_size: tuple[int, int] | None
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """
        The (height, width) to work at, multiples of a token, and the (height, width) to return.

        What comes in goes out at its own size; it is worked on near the pixel budget, or near `height` x `width` where
        the caller gives them. Without an input, the size asked for is returned.
        """
        side = self.config.default_sample_size
        if height is None and width is None:
            working = processing_size(*(input_size or (side, side)), pixels=side * side, multiple=self.token_size)
            return working, input_size or working
        if input_size is not None:
            height = height or round(input_size[0] * width / input_size[1])
            width = width or round(input_size[1] * height / input_size[0])
        asked = (height or side, width or side)
        working = tuple(max(1, round(length / self.token_size)) * self.token_size for length in asked)
        if working != asked:
            logger.warning(
                f"{asked[0]}x{asked[1]} is not a multiple of {self.token_size}: working at {working[0]}x{working[1]}."
            )
        return working, input_size or asked

    def prepare_scheduler(
        self, scheduler: FlowMatchEulerDiscreteScheduler, sigmas, device
    ) -> FlowMatchEulerDiscreteScheduler:
        """The scheduler set to step through `sigmas`, which it shifts, down to 0."""
        scheduler.set_timesteps(sigmas=np.asarray(sigmas, dtype=np.float32), device=device)
        scheduler.set_begin_index(0)
        return scheduler

    def prepare_depth_condition(
        self, depth, depth_mask, batch_size: int, height: int, width: int, device, generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Given depth (B, 1, H, W) as clean tokens (batch_size, N, p*p), noise where missing; and their validity."""
        repeats = batch_size // len(depth)
        if depth_mask is not None:
            depth_mask = self.depth_processor.mask_to_tensor(depth_mask)
            if len(depth_mask) > 1:
                depth_mask = depth_mask.repeat_interleave(repeats, dim=0)
        depth = depth.to(device).repeat_interleave(repeats, dim=0)
        tokens, valid, _ = self.depth_processor.preprocess(depth, depth_mask, height, width, generator)
        empty = (~valid.flatten(1).any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"Depth map {empty[0] // repeats} of the batch has no valid pixel: depth must be positive and finite "
                "somewhere. Give a depth map with values, or leave `depth` out."
            )
        return tokens, self.depth_processor.patchify(valid)

    def denoise(
        self,
        latents: torch.Tensor,
        depth_latents: torch.Tensor,
        scheduler: FlowMatchEulerDiscreteScheduler | None,
        depth_scheduler: FlowMatchEulerDiscreteScheduler | None,
        prompt_embeds: torch.Tensor,
        latent_ids: torch.Tensor,
        depth_ids: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None = None,
        depth_condition: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        progress_bar=None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        The sampling loop of every task: Euler steps of the streams that have a scheduler.

        Args:
            latents, depth_latents (`torch.Tensor` of shape (B, N, C)): Tokens at the first noise level, float32.
                `depth_latents` is `None` where the transformer has no depth.
            scheduler, depth_scheduler: With `set_timesteps` done, as many steps in both. `None`: that stream is clean
                and stays as it is.
            negative_prompt_embeds: Features of ""; guidance is on where they are given and `guidance_scale` is above 1.
            depth_condition (`torch.Tensor`): Clean depth tokens that steer the image loosely: the depth stream is
                not sampled but is this map at the scheduler's noise level, `depth_latents` being its noise.
            generator: Draws the noise of schedulers with `stochastic_sampling`.

        Returns:
            The two streams' tokens after the last step.
        """
        leading_scheduler = depth_scheduler if scheduler is None else scheduler
        still = torch.zeros_like(leading_scheduler.sigmas)
        sigmas = still if scheduler is None else scheduler.sigmas
        depth_sigmas = still if depth_scheduler is None else depth_scheduler.sigmas
        depth_noise = depth_latents
        dtype = self.transformer.dtype
        prompt_embeds, text_ids = prompt_embeds.to(dtype), text_position_ids(prompt_embeds)
        if negative_prompt_embeds is not None:
            negative_text_ids = text_position_ids(negative_prompt_embeds)
            negative_prompt_embeds = negative_prompt_embeds.to(dtype)

        for i, t in enumerate(leading_scheduler.timesteps):
            if self.interrupt:
                continue
            self._current_timestep = t
            if depth_condition is not None:
                depth_latents = add_noise(depth_condition, depth_noise, depth_sigmas[i])
            inputs = {
                "hidden_states": latents.to(dtype),
                "timestep": sigmas[i].expand(len(latents)),
                "img_ids": latent_ids,
                "depth_hidden_states": None if depth_latents is None else depth_latents.to(dtype),
                "depth_timestep": depth_sigmas[i].expand(len(latents)),
                "depth_ids": depth_ids,
                "joint_attention_kwargs": self.attention_kwargs,
                "return_dict": False,
            }
            with self.transformer.cache_context("cond"):
                velocity, clean_depth = self.transformer(
                    encoder_hidden_states=prompt_embeds, txt_ids=text_ids, **inputs
                )
            velocity = velocity.float()
            if negative_prompt_embeds is not None and self.do_classifier_free_guidance:
                # On both raw outputs, before the clean depth becomes a velocity (published model).
                with self.transformer.cache_context("uncond"):
                    uncond, uncond_depth = self.transformer(
                        encoder_hidden_states=negative_prompt_embeds,
                        txt_ids=negative_text_ids,
                        **inputs,
                    )
                velocity = uncond.float() + self.guidance_scale * (velocity - uncond.float())
                if clean_depth is not None:
                    clean_depth = uncond_depth + self.guidance_scale * (clean_depth - uncond_depth)

            if scheduler is not None:
                latents = scheduler.step(
                    velocity, scheduler.timesteps[i], latents, generator=generator, return_dict=False
                )[0]
            if depth_scheduler is not None and depth_condition is None:
                depth_velocity = velocity_from_clean(depth_latents, clean_depth, depth_sigmas[i])
                depth_latents = depth_scheduler.step(
                    depth_velocity,
                    depth_scheduler.timesteps[i],
                    depth_latents,
                    generator=generator,
                    return_dict=False,
                )[0]

            if callback_on_step_end is not None:
                callback_kwargs = {}
                for name in callback_on_step_end_tensor_inputs:
                    callback_kwargs[name] = locals()[name]
                outputs = callback_on_step_end(self, i, t, callback_kwargs) or {}
                latents = outputs.pop("latents", latents)
                depth_latents = outputs.pop("depth_latents", depth_latents)
                prompt_embeds = outputs.pop("prompt_embeds", prompt_embeds)
                negative_prompt_embeds = outputs.pop("negative_prompt_embeds", negative_prompt_embeds)
            if progress_bar is not None:
                progress_bar.update()
        return latents, depth_latents

    def postprocess_depth(
        self, samples: list[torch.Tensor], height: int, width: int, output_size: tuple[int, int], output_type: str
    ) -> tuple[torch.Tensor | np.ndarray | None, ...]:
        """Depth tokens of one or several samples -> depth, validity and uncertainty, as `output_type` says."""
        if output_type == "latent":
            return self.depth_processor.unpatchify(samples[0], height, width), None, None
        maps, masks = zip(*(self.depth_processor.postprocess(sample, height, width) for sample in samples))
        depth, mask, uncertainty = maps[0], masks[0], None
        if len(samples) > 1:
            depth, mask, uncertainty = ensemble_depth(torch.stack(maps), torch.stack(masks))
            uncertainty = resize(uncertainty, output_size)
        depth, mask = self.depth_processor.resize(depth, mask, output_size)
        if output_type == "pt":
            return depth, mask, uncertainty
        return tuple(None if m is None else m[:, 0].cpu().numpy() for m in (depth, mask, uncertainty))

    @property
    def has_depth(self) -> bool:
        return self.transformer.config.depth_channels is not None

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image=None,
        depth=None,
        depth_mask=None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        log2_alpha: float | None = None,
        num_refinement_steps: int = 0,
        ensemble_size: int = 1,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        depth_latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[["ModalityForcingPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents", "depth_latents"],  # noqa: B006
    ) -> ModalityForcingPipelineOutput | tuple:
        r"""
        What is given decides what is made: a prompt makes an image and its depth, an image (with a prompt or without)
        makes depth, depth and a prompt make an image.

        Args:
            prompt (`str` or `list[str]`, *optional*): What to show.
            image (*optional*): Image or images to make depth of: PIL, array (H, W, 3) or tensor (3, H, W), batches of
                these with an axis in front, or a list; values in [0, 1]. Any size, one size a call.
            depth (*optional*): Depth map or maps to make images of, larger is farther: array or tensor (H, W), batches
                with an axis in front, one-channel PIL image, or a list. 0, negative and NaN mean missing, and so does
                inf for a model that was not trained with infinite depth (`depth_processor.config.infinite_depth`).
            depth_mask (*optional*): False where `depth` is missing besides; of its shape.
            height, width (`int`, *optional*): Size to work at, rounded to the token size. Default: the aspect ratio of
                the input near `default_sample_size`. The result has the size of the input, where there is one.
            num_inference_steps (`int`, defaults to 50): Euler steps. For image -> depth 1 to 4 already give good maps.
            sigmas (`list[float]`, *optional*): Own noise levels in place of an even grid, before the scheduler's shift.
            guidance_scale (`float`, *optional*): Guidance away from the empty prompt, on above 1. Default: 4.0, and
                1.0 for image -> depth.
            log2_alpha (`float`, *optional*): Trajectory `t_depth = f(t_rgb, 2**log2_alpha)`. Joint generation: above 0
                RGB resolves first (default 5.0), below 0 depth does. Depth -> image: how tightly the depth is followed,
                from -5 (loose) over -8 and -11 to -14 (tight); default: rigidly.
            num_refinement_steps (`int`, defaults to 0): After joint generation, steps of an image -> depth pass over
                the generated image, for sharper depth.
            ensemble_size (`int`, defaults to 1): Image -> depth samples to align and take the median of; also gives
                `depth_uncertainty`.
            num_images_per_prompt (`int`, defaults to 1): Results for each prompt, image or depth map.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Makes the result repeatable; a list
                has one for each result.
            latents (`torch.Tensor` of shape (B, C, height / 16, width / 16), *optional*): RGB noise to start from.
            depth_latents (`torch.Tensor` of shape (B, 1, height, width), *optional*): Depth noise to start from.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape (B, L, D), *optional*): In place of `prompt`
                and of the empty prompt.
            output_type (`str`, defaults to "pil"): "pil", "np", "pt" or "latent": see
                [`ModalityForcingPipelineOutput`].
            return_dict (`bool`, defaults to `True`): Whether to return a [`ModalityForcingPipelineOutput`] or a tuple
                (images, depth, depth_mask, depth_uncertainty).
            attention_kwargs (`dict`, *optional*): For the attention processors; `{"scale": 0.5}` weakens a LoRA.
            callback_on_step_end (`Callable`, *optional*): Called as `f(pipe, step, timestep, tensors)` after each step;
                returns a dict of the tensors to replace.
            callback_on_step_end_tensor_inputs (`list[str]`): Which tensors it gets, of `_callback_tensor_inputs`.

        Raises:
            ValueError: the message names the argument, its value and what to give instead.
        """
        # 1. Check the inputs and settle the task
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            prompt,
            prompt_embeds,
            negative_prompt_embeds,
            image,
            depth,
            depth_mask,
            height,
            width,
            num_inference_steps,
            sigmas,
            guidance_scale,
            log2_alpha,
            num_refinement_steps,
            ensemble_size,
            num_images_per_prompt,
            generator,
            latents,
            depth_latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        device = self._execution_device
        self._guidance_scale = guidance_scale if guidance_scale is not None else (4.0 if image is None else 1.0)
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None
        self._interrupt = False

        # 2. Inputs as tensors, and the batch size they ask for
        given = None
        if image is not None:
            given = image = image_to_tensor(image)
        elif depth is not None:
            given = depth = self.depth_processor.to_tensor(depth)
        if prompt_embeds is None and (prompt is None or isinstance(prompt, str)):
            prompt = [prompt or ""]
        num_prompts = len(prompt if prompt_embeds is None else prompt_embeds)
        num_given = 1 if given is None else len(given)
        if num_prompts != num_given and 1 not in (num_prompts, num_given):
            raise ValueError(
                f"{num_prompts} prompts do not go with {num_given} inputs: give as many, or one of either."
            )
        batch_size = max(num_prompts, num_given) * num_images_per_prompt
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"{len(generator)} generators do not go with {batch_size} results: give one for each, or one."
            )
        (height, width), output_size = self.prepare_size(height, width, given.shape[-2:] if given is not None else None)

        # 3. Text features; guidance steers away from those of the empty prompt
        prompt_embeds, _ = self.encode_prompt(prompt, device, batch_size // num_prompts, prompt_embeds)
        if self.do_classifier_free_guidance:
            num_negative = 1 if negative_prompt_embeds is None else len(negative_prompt_embeds)
            if num_negative not in (1, num_prompts):
                raise ValueError(f"{num_negative} `negative_prompt_embeds` do not go with {num_prompts} prompts.")
            negative_prompt_embeds, _ = self.encode_prompt(
                "", device, batch_size // num_negative, negative_prompt_embeds
            )
        else:
            negative_prompt_embeds = None

        # 4. Noise levels and positions
        if sigmas is None:
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        refinement_sigmas = sigmas
        if num_refinement_steps:
            refinement_sigmas = np.linspace(1.0, 1 / num_refinement_steps, num_refinement_steps)
        rows, columns = height // self.token_size, width // self.token_size
        denoise_kwargs = {
            "latent_ids": position_ids(rows=rows, columns=columns).to(device),
            "depth_ids": position_ids(time=1, rows=rows, columns=columns).to(device),
            "generator": generator,
            "callback_on_step_end": callback_on_step_end,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
        }
        makes_image, estimates_depth = image is None, image is not None or num_refinement_steps > 0
        self._num_timesteps = len(sigmas) * makes_image + len(refinement_sigmas) * ensemble_size * estimates_depth

        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            # 5. The RGB stream: made together with depth, made from depth, or the latents of the given image
            if makes_image:
                latents = self.prepare_latents(batch_size, height, width, device, generator, latents)
                scheduler = self.prepare_scheduler(self.scheduler, sigmas, device)
                depth_scheduler = depth_condition = None
                if depth is not None:
                    depth_condition, depth_valid = self.prepare_depth_condition(
                        depth, depth_mask, batch_size, height, width, device, generator
                    )
                if depth is None and log2_alpha is None and self.has_depth:
                    log2_alpha = self.config.default_log2_alpha
                if log2_alpha is not None:
                    depth_latents = self.prepare_depth_latents(
                        batch_size, height, width, device, generator, depth_latents
                    )
                    depth_scheduler = self.prepare_scheduler(
                        type(self.depth_scheduler).from_config(self.depth_scheduler.config, shift=1.0),
                        shift_timestep(scheduler.sigmas[:-1].cpu().double(), 2.0**log2_alpha),
                        device,
                    )
                    if depth is not None:
                        # A hole is the same noise at every level, as in training.
                        depth_condition = torch.where(depth_valid, depth_condition, depth_latents)
                else:
                    depth_latents, depth_condition = depth_condition, None
                latents, depth_latents = self.denoise(
                    latents,
                    depth_latents,
                    scheduler,
                    depth_scheduler,
                    prompt_embeds,
                    negative_prompt_embeds=negative_prompt_embeds,
                    depth_condition=depth_condition,
                    progress_bar=progress_bar,
                    **denoise_kwargs,
                )
            else:
                image = resize(image, (height, width)).to(device)
                latents = image_to_tokens(self.vae, image).repeat_interleave(batch_size // num_given, dim=0)

            # 6. The depth stream of a finished image
            estimates = []
            if estimates_depth:
                for _ in range(ensemble_size):
                    noise = self.prepare_depth_latents(
                        batch_size, height, width, device, generator, None if makes_image else depth_latents
                    )
                    _, depth_sample = self.denoise(
                        latents,
                        noise,
                        None,
                        self.prepare_scheduler(self.depth_scheduler, refinement_sigmas, device),
                        prompt_embeds,
                        # A refinement pass is image -> depth, where guidance is off by default.
                        negative_prompt_embeds=None if makes_image else negative_prompt_embeds,
                        progress_bar=progress_bar,
                        **denoise_kwargs,
                    )
                    if self.interrupt and (makes_image or estimates):
                        break  # what is there already is better than a map half made
                    estimates.append(depth_sample)
        self._current_timestep = None

        # 7. Back to images and depth maps
        images, depth_outputs = None, (None, None, None)
        if makes_image:
            images = tokens_to_latents(self.vae, latents, rows, columns)
            if output_type != "latent":
                images = resize(decode_latents(self.vae, images), output_size)
                images = self.image_processor.postprocess(images, output_type)
        if depth is None and self.has_depth:
            depth_outputs = self.postprocess_depth(
                estimates or [depth_latents], height, width, output_size, output_type
            )

        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, *depth_outputs)
        return ModalityForcingPipelineOutput(images, *depth_outputs)


def text_position_ids(prompt_embeds: torch.Tensor) -> torch.Tensor:
    return position_ids(length=prompt_embeds.shape[1]).to(prompt_embeds.device)


def _given_or_drawn(name: str, latents: torch.Tensor | None, shape: tuple, generator, device) -> torch.Tensor:
    if latents is None:
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    if tuple(latents.shape) != shape:
        raise ValueError(f"`{name}` must have shape {shape} for this call, got {tuple(latents.shape)}.")
    return latents.to(device=device, dtype=torch.float32)
