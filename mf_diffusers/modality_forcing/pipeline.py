"""One pipeline of images and depth: the inputs decide what is generated."""

from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineDepthInput, PipelineImageInput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM, Qwen3Model, T5TokenizerFast, UMT5EncoderModel

from .adapter import ModalityForcingAdapterMixin
from .backbones import backbone_of
from .completion import complete
from .depth_processor import DepthProcessor
from .ensemble import ensemble_depth
from .image_processor import processing_size, resize
from .inputs import (
    GivenDepth,
    GivenImage,
    check_components,
    check_counts,
    check_given,
    check_inputs,
    check_memory,
    read_depth,
    read_image,
)
from .latent_tokens import decode_latents, hidden_cells, image_to_tokens, position_ids, tokens_to_latents
from .loaders import ModalityForcingLoaderMixin
from .model_files import check_loaded
from .noise import shift_timestep
from .pipeline_output import ModalityForcingPipelineOutput
from .stream import Stream
from .task import Levels, Task
from .transformer_dit import ModalityForcingDiTTransformer2DModel
from .transformer_flux2 import ModalityForcingFlux2Transformer2DModel
from .transformer_z_image import ModalityForcingZImageTransformer2DModel


logger = logging.get_logger(__name__)


class ModalityForcingPipeline(ModalityForcingLoaderMixin, ModalityForcingAdapterMixin, DiffusionPipeline):
    r"""
    Text to image and depth, image to depth, depth to image, with one set of weights (Modality Forcing). With a base of
    the from-scratch family, whose transformer has no depth, it makes images alone.

    Args:
        transformer ([`ModalityForcingFlux2Transformer2DModel`], [`ModalityForcingZImageTransformer2DModel`] or
            [`ModalityForcingDiTTransformer2DModel`]): Denoiser of both modalities.
        scheduler ([`FlowMatchEulerDiscreteScheduler`]):
            Walks the RGB noise levels. With `stochastic_sampling`, which helps a model that has trained little, every
            step adds noise anew, drawn from `generator`.
        depth_scheduler ([`FlowMatchEulerDiscreteScheduler`]):
            Walks the depth noise levels where depth alone is made. Where both are made, depth follows the RGB levels
            along the trajectory that `log2_alpha` names. Absent where the transformer has no depth.
        vae ([`AutoencoderKLFlux2`], or [`AutoencoderKL`] with Z-Image): Images to latents and back.
        text_encoder ([`Qwen3ForCausalLM`], [`Qwen3Model`] or [`UMT5EncoderModel`]): Its hidden states are the text
            features. May be absent when the caller passes `prompt_embeds` (and `negative_prompt_embeds`).
        tokenizer (`Qwen2TokenizerFast` or `T5TokenizerFast`): The text encoder's; Qwen's with a chat template.
        depth_processor ([`DepthProcessor`]): Depth maps to tokens and back. Absent where the transformer has no depth.
        text_encoder_out_layers (`list[int]`, defaults to `[9, 18, 27]`): Hidden layers of Qwen3 to put side by side;
            of UMT5 it is always the last.
        max_sequence_length (`int`, defaults to 512): Text tokens; shorter prompts are padded to it.
        default_sample_size (`int`, defaults to 512): Size to work at, as `default_size_rule` reads it.
        default_size_rule (`str`, defaults to "area"): "area": the area of a square of this side; "long_side": the
            longer side has as many pixels, as in the training of the published model.
        default_log2_alpha (`float`, defaults to 5.0): Trajectory of joint generation.
        default_num_inference_steps, default_depth_steps (`int`, default to 50): Steps where images are made, and where
            depth alone is.
        default_guidance_scale (`float`, defaults to 4.0), default_depth_guidance_scale (`float`, defaults to 1.0): The
            same for guidance; 1 switches it off.

    Example:
        >>> from mf_diffusers import ModalityForcingPipeline
        >>> from mf_diffusers.embedded import EMBEDDED_MODEL
        >>> pipe = ModalityForcingPipeline.from_pretrained(EMBEDDED_MODEL)
        >>> output = pipe("a red ball on the left of a yellow block", num_inference_steps=2)
        >>> output.images[0].size, output.depth.shape
        ((64, 64), (1, 64, 64))
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["text_encoder", "tokenizer", "depth_scheduler", "depth_processor"]
    _callback_tensor_inputs = ["latents", "depth_latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        transformer: ModalityForcingFlux2Transformer2DModel
        | ModalityForcingZImageTransformer2DModel
        | ModalityForcingDiTTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        depth_scheduler: FlowMatchEulerDiscreteScheduler | None,
        vae: AutoencoderKLFlux2 | AutoencoderKL,
        text_encoder: Qwen3ForCausalLM | Qwen3Model | UMT5EncoderModel | None,
        tokenizer: Qwen2TokenizerFast | T5TokenizerFast | None,
        depth_processor: DepthProcessor | None,
        text_encoder_out_layers: list[int] = (9, 18, 27),
        max_sequence_length: int = 512,
        default_sample_size: int = 512,
        default_size_rule: str = "area",
        default_log2_alpha: float = 5.0,
        default_num_inference_steps: int = 50,
        default_depth_steps: int = 50,
        default_guidance_scale: float = 4.0,
        default_depth_guidance_scale: float = 1.0,
    ):
        super().__init__()
        check_loaded(transformer=transformer, vae=vae, text_encoder=text_encoder)
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
            default_size_rule=default_size_rule,
            default_log2_alpha=default_log2_alpha,
            default_num_inference_steps=default_num_inference_steps,
            default_depth_steps=default_depth_steps,
            default_guidance_scale=default_guidance_scale,
            default_depth_guidance_scale=default_depth_guidance_scale,
        )
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1) if getattr(self, "vae", None) else 8
        # A latent token is a 2x2 cell of VAE latents; a depth token covers the same pixels.
        self.token_size = 2 * self.vae_scale_factor
        self._guidance_scale = 1.0
        self._num_inference_steps = 0
        self._num_timesteps = 0
        self._working_size = None
        self._attention_kwargs = None
        self._current_timestep = None
        self._interrupt = False

    def encode_prompt(
        self,
        prompt: str | list[str],
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Text features, hidden states of the text encoder: see [`encode_qwen3`] and [`encode_t5`].

        Returns:
            Features (B * num_images_per_prompt, L, D) and text positions (1, L, 4).

        Example:
            >>> from mf_diffusers import ModalityForcingPipeline
            >>> from mf_diffusers.embedded import EMBEDDED_MODEL
            >>> pipe = ModalityForcingPipeline.from_pretrained(EMBEDDED_MODEL)
            >>> prompt_embeds, text_ids = pipe.encode_prompt(["a red ball", "a blue cone"])
            >>> tuple(prompt_embeds.shape), tuple(text_ids.shape)
            ((2, 32, 384), (1, 32, 4))
            >>> output = pipe(prompt_embeds=prompt_embeds, guidance_scale=1.0, num_inference_steps=2)
            >>> len(output.images)
            2
        """
        device = device or self._execution_device
        if prompt_embeds is None and (self.text_encoder is None or self.tokenizer is None):
            raise ValueError(
                "This pipeline has no text encoder or no tokenizer: give `prompt_embeds`, and `negative_prompt_embeds` "
                "for guidance."
            )
        if prompt_embeds is None:
            prompt_embeds = backbone_of(self.transformer).encode_text(
                self.text_encoder,
                self.tokenizer,
                [prompt] if isinstance(prompt, str) else prompt,
                self.config.text_encoder_out_layers,
                self.config.max_sequence_length,
                device,
            )
        prompt_embeds = prompt_embeds.to(device).repeat_interleave(num_images_per_prompt, dim=0)
        return prompt_embeds, text_position_ids(prompt_embeds)

    def prepare_prompts(
        self,
        prompt: str | list[str] | None,
        batch_size: int,
        device: torch.device,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Text features of `batch_size` results, and, where guidance is on, those that it steers away from, (B, L, D)
        each: by default those of the empty prompt.
        """
        prompts = [prompt or ""] if prompt is None or isinstance(prompt, str) else prompt
        num_prompts = len(prompts if prompt_embeds is None else prompt_embeds)
        prompt_embeds, _ = self.encode_prompt(prompts, device, batch_size // num_prompts, prompt_embeds)
        if not self.do_classifier_free_guidance:
            return prompt_embeds, None
        num_negative = 1 if negative_prompt_embeds is None else len(negative_prompt_embeds)
        if num_negative not in (1, num_prompts):
            raise ValueError(f"{num_negative} `negative_prompt_embeds` do not go with {num_prompts} prompts.")
        return prompt_embeds, self.encode_prompt("", device, batch_size // num_negative, negative_prompt_embeds)[0]

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        device: torch.device | str,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """RGB noise of shape (B, C, height / 16, width / 16), drawn or given, as tokens (B, N, C) in float32."""
        channels = self.transformer.shape.token_channels
        shape = (batch_size, channels, height // self.token_size, width // self.token_size)
        latents = _given_or_drawn("latents", latents, shape, generator, device)
        return latents.flatten(2).transpose(1, 2)

    def prepare_depth_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        device: torch.device | str,
        generator: torch.Generator | list[torch.Generator] | None,
        depth_latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Depth noise of shape (B, 1, height, width), drawn or given, as tokens (B, N, p*p) in float32."""
        shape = (batch_size, 1, height, width)
        return self.depth_processor.patchify(_given_or_drawn("depth_latents", depth_latents, shape, generator, device))

    def prepare_size(
        self, height: int | None, width: int | None, input_size: tuple[int, int] | None
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """
        The (height, width) to work at, multiples of a token, and the (height, width) to return.

        What comes in goes out at its own size; it is worked on at the size that the checkpoint's rule gives it, or near
        `height` x `width` where the caller gives them. Without an input, the size asked for is returned.

        Example:
            >>> from mf_diffusers import ModalityForcingPipeline
            >>> from mf_diffusers.embedded import EMBEDDED_MODEL
            >>> pipe = ModalityForcingPipeline.from_pretrained(EMBEDDED_MODEL)
            >>> pipe.prepare_size(None, None, input_size=(480, 640))  # the height and width of a picture
            ((56, 72), (480, 640))
            >>> pipe.prepare_size(96, 64, input_size=None)
            ((96, 64), (96, 64))
        """
        side = self.config.default_sample_size
        if height is None and width is None:
            rule = self.config.default_size_rule
            working = processing_size(*(input_size or (side, side)), side * side, self.token_size, rule)
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
        self, scheduler: FlowMatchEulerDiscreteScheduler, sigmas: Levels, device: torch.device | str
    ) -> FlowMatchEulerDiscreteScheduler:
        """
        The scheduler set to step through `sigmas`, which it shifts, down to 0.

        Example:
            >>> from mf_diffusers import ModalityForcingPipeline
            >>> from mf_diffusers.embedded import EMBEDDED_MODEL
            >>> pipe = ModalityForcingPipeline.from_pretrained(EMBEDDED_MODEL)
            >>> pipe.prepare_scheduler(pipe.scheduler, [1.0, 0.5], "cpu").sigmas
            tensor([1.0000, 0.7503, 0.0000])
        """
        scheduler.set_timesteps(sigmas=np.asarray(sigmas, dtype=np.float32), device=device)
        scheduler.set_begin_index(0)
        return scheduler

    def prepare_image(
        self, image: torch.Tensor, batch_size: int, height: int, width: int, device: torch.device | str
    ) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1], or uint8, as clean tokens (batch_size, N, C)."""
        tokens = image_to_tokens(self.vae, resize(image, (height, width)).to(device))
        return tokens.repeat_interleave(batch_size // len(image), dim=0)

    def prepare_image_stream(
        self,
        image: GivenImage | None,
        noise: torch.Tensor,
        height: int,
        width: int,
        sigmas: Levels,
        device: torch.device | str,
    ) -> Stream:
        """
        The image as a stream that is made: from noise, around what is known of it, or from a given start.

        Args:
            noise (`torch.Tensor` of shape (B, N, C)): Its noise.
            sigmas: Noise levels before the scheduler's shift, from the first.
        """
        scheduler = self.prepare_scheduler(self.scheduler, sigmas, device)
        known = mask = start = None
        if image is not None and image.is_start:
            start = self.prepare_image(image.pixels, len(noise), height, width, device)
        if image is not None and image.hidden is not None:
            known = self.prepare_image(image.without_hidden, len(noise), height, width, device)
            rows, columns = height // self.token_size, width // self.token_size
            hidden = hidden_cells(image.hidden.to(device), rows, columns, channels=known.shape[2]).transpose(1, 2)
            mask = ~hidden.repeat_interleave(len(noise) // len(hidden), dim=0)
        return Stream(noise, scheduler.sigmas, known, mask, start, scheduler)

    def prepare_depth(
        self, depth: GivenDepth, batch_size: int, height: int, width: int, device: torch.device | str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Given depth as clean tokens (batch_size, N, p*p), their validity of the same shape, and the scale (B,).

        Example:
            >>> import numpy as np
            >>> from mf_diffusers import ModalityForcingPipeline
            >>> from mf_diffusers.embedded import EMBEDDED_MODEL
            >>> pipe = ModalityForcingPipeline.from_pretrained(EMBEDDED_MODEL)
            >>> from mf_diffusers.modality_forcing.inputs import read_depth
            >>> plane = read_depth(np.full((64, 64), 3.0), None, None, pipe.depth_processor)
            >>> tokens, valid, scale = pipe.prepare_depth(plane, batch_size=2, height=64, width=64, device="cpu")
            >>> tuple(tokens.shape), scale.tolist()
            ((2, 64, 64), [3.0, 3.0])
        """
        contracted, valid, scale = self.depth_processor.encode(
            depth.depth.to(device), depth.valid.to(device), height, width
        )
        repeats = batch_size // len(contracted)
        tokens = (self.depth_processor.patchify(maps).repeat_interleave(repeats, dim=0) for maps in (contracted, valid))
        return *tokens, scale.repeat_interleave(repeats, dim=0)

    def prepare_depth_beside_image(
        self,
        depth: GivenDepth | None,
        noise: torch.Tensor,
        image: Stream,
        height: int,
        width: int,
        log2_alpha: float | None,
        depth_strength: float | None,
    ) -> Stream:
        """
        Depth as a stream beside an image in the making: made with it, or given to steer it.

        Args:
            noise (`torch.Tensor` of shape (B, N, p*p)): Its noise.
            log2_alpha: Its level follows the image's, warped by `2**log2_alpha`; `None`: given depth is clean.
        """
        levels = image.levels.cpu().double()
        if depth is not None and not depth.is_start:
            known, mask, _ = self.prepare_depth(depth, len(noise), height, width, noise.device)
            levels = torch.zeros_like(levels) if log2_alpha is None else shift_timestep(levels, 2.0**log2_alpha)
            return Stream(noise, levels.to(noise), known, mask, predicts_clean=True)
        start = None
        if depth is not None:
            start, mask, _ = self.prepare_depth(depth, len(noise), height, width, noise.device)
            start = torch.where(mask, start, noise)
        # It starts at pure noise, or at its own strength, wherever the image starts.
        levels = levels / levels[0] * (1.0 if depth_strength is None else depth_strength)
        scheduler = self.prepare_scheduler(
            type(self.depth_scheduler).from_config(self.depth_scheduler.config, shift=1.0),
            shift_timestep(levels[:-1], 2.0**log2_alpha),
            noise.device,
        )
        return Stream(noise, scheduler.sigmas, start=start, scheduler=scheduler, predicts_clean=True)

    def prepare_depth_of_image(
        self, depth: GivenDepth | None, noise: torch.Tensor, height: int, width: int, sigmas: Levels
    ) -> Stream:
        """
        Depth as the stream that is made of a finished image, from noise or from a start. What is known of it in part
        comes in afterwards, see [`complete`].

        Example:
            >>> import torch
            >>> from PIL import Image
            >>> from mf_diffusers import ModalityForcingPipeline
            >>> from mf_diffusers.embedded import EMBEDDED_MODEL, EMBEDDED_SCENES
            >>> pipe = ModalityForcingPipeline.from_pretrained(EMBEDDED_MODEL)
            >>> from mf_diffusers.modality_forcing.inputs import read_image
            >>> from mf_diffusers.modality_forcing.pipeline import token_positions
            >>> from mf_diffusers.modality_forcing.stream import Stream
            >>> photo = read_image(Image.open(EMBEDDED_SCENES / "test-018.png"))
            >>> with torch.no_grad():
            ...     tokens = pipe.prepare_image(photo.pixels, 1, 64, 64, "cpu")
            ...     noise = pipe.prepare_depth_latents(1, 64, 64, "cpu", torch.Generator().manual_seed(0))
            ...     depth = pipe.prepare_depth_of_image(None, noise, 64, 64, sigmas=[1.0])
            ...     streams = {"image": Stream.given(tokens, depth.levels), "depth": depth}
            ...     pipe.denoise(streams, token_positions(8, 8, "cpu"), *pipe.prepare_prompts("", 1, "cpu"))
            ...     maps, mask, _ = pipe.postprocess_depth([depth.tokens], 64, 64, None, (64, 64))
            >>> tuple(maps.shape)
            (1, 1, 64, 64)
        """
        scheduler = self.prepare_scheduler(self.depth_scheduler, sigmas, noise.device)
        start = None
        if depth is not None and depth.is_start:
            start, mask, _ = self.prepare_depth(depth, len(noise), height, width, noise.device)
            start = torch.where(mask, start, noise)
        return Stream(noise, scheduler.sigmas, start=start, scheduler=scheduler, predicts_clean=True)

    def denoise(
        self,
        streams: dict[str, Stream],
        positions: dict[str, torch.Tensor],
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        on_step: Callable | None = None,
    ) -> None:
        r"""
        The sampling loop of every task: at each noise level, a step of the streams that are made.

        Args:
            streams (`dict[str, Stream]`): "image", and "depth" where the transformer has it; as many levels in both.
            positions (`dict[str, torch.Tensor]`): Of their tokens, see [`token_positions`].
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape (B, L, D)): Features of the prompt, and those
                of "", towards and away from which guidance steers; it is on where the latter are given and
                `guidance_scale` is above 1.
            generator: Draws the noise of schedulers with `stochastic_sampling`.
            on_step: Called after each step as `on_step(step, timestep, streams, features)`; may change the streams, and
                the features, which are the list of the two above.

        Example:
            >>> import torch
            >>> from mf_diffusers import ModalityForcingPipeline
            >>> from mf_diffusers.embedded import EMBEDDED_MODEL
            >>> pipe = ModalityForcingPipeline.from_pretrained(EMBEDDED_MODEL)
            >>> from mf_diffusers.modality_forcing.pipeline import token_positions
            >>> generator, size = torch.Generator().manual_seed(0), (64, 64)
            >>> with torch.no_grad():
            ...     noise = pipe.prepare_latents(1, *size, "cpu", generator)
            ...     image = pipe.prepare_image_stream(None, noise, *size, sigmas=[1.0, 0.5], device="cpu")
            ...     noise = pipe.prepare_depth_latents(1, *size, "cpu", generator)
            ...     depth = pipe.prepare_depth_beside_image(None, noise, image, *size, 5.0, None)
            ...     features = pipe.prepare_prompts("a red ball", 1, "cpu")
            ...     pipe.denoise({"image": image, "depth": depth}, token_positions(8, 8, "cpu"), *features)
            ...     picture = pipe.postprocess_image(image.tokens, 8, 8, None, size, "pil")[0]
            ...     images, maps, *_ = pipe.postprocess(image.tokens, [depth.tokens], None, None, size, size, "np")
            >>> picture.size, images.shape, maps.shape
            ((64, 64), (1, 64, 64, 3), (1, 64, 64))
        """
        features = [prompt_embeds, negative_prompt_embeds]
        leading = next(stream for stream in streams.values() if stream.is_made)
        for step, timestep in enumerate(leading.scheduler.timesteps):
            if self.interrupt:
                continue
            self._current_timestep = timestep
            shown = {name: stream.shown(step) for name, stream in streams.items()}
            levels = {name: stream.levels[step] for name, stream in streams.items()}
            with self.transformer.cache_context("cond"):
                predictions = self.predict(shown, levels, positions, features[0])
            if features[1] is not None and self.do_classifier_free_guidance:
                # On both raw outputs, before the clean depth becomes a velocity (published model).
                with self.transformer.cache_context("uncond"):
                    unguided = self.predict(shown, levels, positions, features[1])
                for name, base in unguided.items():
                    predictions[name] = base + self.guidance_scale * (predictions[name] - base)
            for name, stream in streams.items():
                stream.advance(predictions[name], step, generator)
            if on_step is not None:
                on_step(step, timestep, streams, features)

    def predict(
        self,
        shown: dict[str, torch.Tensor],
        levels: dict[str, torch.Tensor],
        positions: dict[str, torch.Tensor],
        prompt_embeds: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """
        What the transformer predicts of each stream, (B, N, C), float32, from its tokens and noise level.

        Example:
            >>> import torch
            >>> from mf_diffusers import ModalityForcingPipeline
            >>> from mf_diffusers.embedded import EMBEDDED_MODEL
            >>> pipe = ModalityForcingPipeline.from_pretrained(EMBEDDED_MODEL)
            >>> from mf_diffusers.modality_forcing.pipeline import token_positions
            >>> tokens = {"image": torch.randn(1, 64, 32), "depth": torch.randn(1, 64, 64)}
            >>> levels = {"image": torch.tensor(0.0), "depth": torch.tensor(1.0)}
            >>> with torch.no_grad():
            ...     prompt_embeds, _ = pipe.encode_prompt("")
            ...     predictions = pipe.predict(tokens, levels, token_positions(8, 8, "cpu"), prompt_embeds)
            >>> {name: tuple(prediction.shape) for name, prediction in predictions.items()}
            {'image': (1, 64, 32), 'depth': (1, 64, 64)}
        """
        dtype, image, depth = self.transformer.dtype, shown["image"], shown.get("depth")
        velocity, clean_depth = self.transformer(
            hidden_states=image.to(dtype),
            encoder_hidden_states=prompt_embeds.to(dtype),
            timestep=levels["image"].expand(len(image)),
            img_ids=positions["image"],
            txt_ids=text_position_ids(prompt_embeds),
            depth_hidden_states=None if depth is None else depth.to(dtype),
            depth_timestep=None if depth is None else levels["depth"].expand(len(depth)),
            depth_ids=positions["depth"],
            joint_attention_kwargs=self.attention_kwargs,
            return_dict=False,
        )
        predictions = {"image": velocity.float()}
        return predictions if depth is None else predictions | {"depth": clean_depth.float()}

    def _run_callback(self, callback, names, step: int, timestep, streams: dict[str, Stream], features: list) -> None:
        """Calls `callback_on_step_end` with the tensors that it asked for, and takes over those that it returns."""
        tensors = {
            "latents": streams["image"].tokens,
            "depth_latents": streams["depth"].tokens if "depth" in streams else None,
            "prompt_embeds": features[0],
            "negative_prompt_embeds": features[1],
        }
        changed = callback(self, step, timestep, {name: tensors[name] for name in names}) or {}
        if "latents" in changed:
            streams["image"].state = changed["latents"]
        if "depth_latents" in changed:
            streams["depth"].state = changed["depth_latents"]
        features[:] = (changed.get(name, tensors[name]) for name in ("prompt_embeds", "negative_prompt_embeds"))

    def postprocess_image(
        self,
        tokens: torch.Tensor,
        rows: int,
        columns: int,
        given: GivenImage | None,
        output_size: tuple[int, int],
        output_type: str,
    ) -> torch.Tensor | np.ndarray | list[PIL.Image.Image]:
        """Image tokens -> images as `output_type` says; pixels that are known are those of the given image."""
        images = decode_latents(self.vae, tokens_to_latents(self.vae, tokens, rows, columns))

        def finish(band, place):
            band = band / 2 + 0.5
            if given is not None and given.hidden is not None:
                band = given.over(band, place)
            return (255 * band).round().to(torch.uint8) if output_type == "pil" else band

        images = resize(images, output_size, finish)
        if output_type == "pt":
            return images
        images = images.movedim(1, -1).cpu().numpy()
        return [PIL.Image.fromarray(image) for image in images] if output_type == "pil" else images

    def postprocess_depth(
        self,
        samples: list[torch.Tensor],
        height: int,
        width: int,
        given: GivenDepth | None,
        output_size: tuple[int, int],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Depth tokens of one or several samples -> depth, validity and uncertainty, (B, 1, H, W) each. Where depth was
        given it is in the unit of what was given, and pixels that are known are as they were.
        """
        maps, masks = zip(*(self.depth_processor.postprocess(sample, height, width) for sample in samples))
        depth, mask, uncertainty = maps[0], masks[0], None
        if len(samples) > 1:
            depth, mask, uncertainty = ensemble_depth(torch.stack(maps), torch.stack(masks))
            uncertainty = resize(uncertainty, output_size)
        resized, mask = self.depth_processor.resize(depth, mask, output_size)
        if given is None:
            return resized, mask, uncertainty
        known, is_known = given.depth.to(depth), given.valid.to(depth.device)
        if len(known) < len(depth):
            known, is_known = (maps.repeat_interleave(len(depth) // len(maps), dim=0) for maps in (known, is_known))
        if given.is_start:
            return resized * self.depth_processor.scale(known, is_known).view(-1, 1, 1, 1), mask, uncertainty
        is_known = is_known & (known < torch.inf)  # not isfinite, which copies the map
        return complete(depth, resized, known, is_known), mask | is_known, uncertainty

    def postprocess(
        self,
        image_tokens: torch.Tensor | None,
        depth_samples: list[torch.Tensor],
        image: GivenImage | None,
        depth: GivenDepth | None,
        size: tuple[int, int],
        output_size: tuple[int, int],
        output_type: str,
    ) -> tuple[Any, Any, Any, Any]:
        """
        What a call returns, of what it made at `size` and what it was given: images, depth, its mask and its
        uncertainty, `None` where there is none. See [`ModalityForcingPipelineOutput`].
        """
        rows, columns = (length // self.token_size for length in size)
        images, depth_outputs = None, (None, None, None)
        if image_tokens is not None and output_type == "latent":
            images = tokens_to_latents(self.vae, image_tokens, rows, columns)
        elif image_tokens is not None:
            images = self.postprocess_image(image_tokens, rows, columns, image, output_size, output_type)
        if depth_samples and output_type == "latent":
            depth_outputs = (self.depth_processor.unpatchify(depth_samples[0], *size), None, None)
        elif depth_samples:
            depth_outputs = self.postprocess_depth(depth_samples, *size, depth, output_size)
            if output_type != "pt":
                depth_outputs = (None if maps is None else maps[:, 0].cpu().numpy() for maps in depth_outputs)
        return images, *depth_outputs

    @property
    def has_depth(self) -> bool:
        return self.transformer.config.depth_channels is not None

    @property
    def working_size(self) -> tuple[int, int] | None:
        """(height, width) at which the last call worked."""
        return self._working_size

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
    def num_inference_steps(self) -> int:
        """Steps of the last call, as it asked for or as the checkpoint says."""
        return self._num_inference_steps

    @property
    def num_timesteps(self) -> int:
        """Steps of the last call, over all its passes."""
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
        image: PipelineImageInput | None = None,
        depth: PipelineDepthInput | None = None,
        mask_image: PipelineImageInput | None = None,
        depth_mask: PipelineDepthInput | None = None,
        strength: float | None = None,
        depth_strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
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
        The inputs decide what is generated: each modality is given whole, given in part, or made.

        | `image` | `depth` | what is made |
        |---|---|---|
        | - | - | both |
        | whole | - | the depth |
        | whole | in part (`depth_mask`, missing pixels) | the rest of the depth, in the unit of the given depth |
        | - | whole | the image |
        | - | in part | the image, and the rest of the depth |
        | in part (`mask_image`) | - | the hidden part of the image, and its depth |
        | in part | whole | the hidden part of the image under this geometry |
        | in part | in part | the hidden part of the image, and the rest of the depth |
        | start (`strength`) | - | another version of the image, with its depth |
        | start | whole | another version of the image under this geometry |
        | start | start (`depth_strength`) | another version of both |

        Args:
            prompt (`str` or `list[str]`, *optional*): What to show. Only an image that is given whole does without.
            image (*optional*): Image or images: PIL, array (H, W, 3) or tensor (3, H, W), batches of these with an axis
                in front, or a list; values in [0, 1]. Any size, one size a call.
            depth (*optional*): Depth map or maps of any positive unit, larger is farther: array or tensor (H, W),
                batches with an axis in front, one-channel PIL image, or a list. 0, negative and NaN mean missing, and
                so does inf for a model that was not trained with infinite depth
                (`depth_processor.config.infinite_depth`).
            mask_image (*optional*): White where the image is made anew, of the size of `image`: PIL image, array or
                tensor (H, W), batches with an axis in front, or a list. Where it is black, the result has the pixels of
                `image`; where it is grey, it blends.
            depth_mask (*optional*): False where `depth` is missing besides; of its shape.
            strength (`float`, *optional*): Above 0, up to 1: `image` is not kept, it is where sampling starts, and this
                share of the steps is made.
            depth_strength (`float`, *optional*): The same for `depth`.
            height, width (`int`, *optional*): Size to work at, rounded to the token size. Default: the aspect ratio of
                the input, at `default_sample_size` by `default_size_rule`. The result has the size of the input, where
                there is one.
            num_inference_steps (`int`, *optional*): Euler steps. Default: the checkpoint's,
                `default_num_inference_steps` where an image is made, else `default_depth_steps`.
            sigmas (`list[float]`, *optional*): Own noise levels in place of an even grid, before the scheduler's shift.
            guidance_scale (`float`, *optional*): Guidance away from the empty prompt, on above 1. Default: the
                checkpoint's, `default_guidance_scale` where an image is made, else `default_depth_guidance_scale`.
            log2_alpha (`float`, *optional*): Trajectory `t_depth = f(t_rgb, 2**log2_alpha)`. Where both are made: above
                0 RGB resolves first, below 0 depth does; default: the checkpoint's `default_log2_alpha`. Where depth is
                given: how tightly the image follows it, from -5 (loose) over -8 and -11 to -14 (tight); default:
                rigidly.
            num_refinement_steps (`int`, defaults to 0): Steps of an image -> depth pass over a generated image, for
                sharper depth. Where depth is given in part and the image is made, this pass makes the rest of the
                depth; 0 stands for `default_depth_steps` there.
            ensemble_size (`int`, defaults to 1): Samples of depth made from a finished image, to align and take the
                median of; also gives `depth_uncertainty`.
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

        Example:
            >>> import numpy as np
            >>> from PIL import Image
            >>> from mf_diffusers import ModalityForcingPipeline
            >>> from mf_diffusers.embedded import EMBEDDED_MODEL, EMBEDDED_SCENES
            >>> pipe = ModalityForcingPipeline.from_pretrained(EMBEDDED_MODEL)
            >>> photo = Image.open(EMBEDDED_SCENES / "test-018.png")
            >>> output = pipe(image=photo)  # the depth of an image
            >>> output.images is None, output.depth.shape
            (True, (1, 256, 256))
            >>> images = pipe("a blue ball", depth=output.depth, num_inference_steps=2).images  # of that geometry
            >>> mask = np.zeros((256, 256))
            >>> mask[64:192, 64:192] = 1
            >>> output = pipe("a blue ball", image=photo, mask_image=mask, num_inference_steps=2)  # a part made anew
            >>> sparse = np.where(np.random.default_rng(0).random((256, 256)) < 0.05, output.depth[0], 0)
            >>> completed = pipe(image=output.images[0], depth=sparse).depth[0]  # the rest of the depth
            >>> bool((completed[sparse > 0] == sparse[sparse > 0]).all())
            True
        """
        # 1. Inputs, as tensors, and the batch size they ask for
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        check_inputs(
            has_depth=self.has_depth,
            text_channels=self.transformer.shape.text_channels,
            callback_tensors=self._callback_tensor_inputs,
            prompt=prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            image=image,
            mask_image=mask_image,
            strength=strength,
            depth=depth,
            depth_mask=depth_mask,
            depth_strength=depth_strength,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            log2_alpha=log2_alpha,
            num_refinement_steps=num_refinement_steps,
            ensemble_size=ensemble_size,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            depth_latents=depth_latents,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        check_components(self)
        image = read_image(image, mask_image, strength)
        depth = read_depth(depth, depth_mask, depth_strength, self.depth_processor)
        check_given(
            image,
            depth,
            ensemble_size=ensemble_size,
            num_refinement_steps=num_refinement_steps,
            log2_alpha=log2_alpha,
            depth_latents=depth_latents,
        )
        batch_size = check_counts(prompt, prompt_embeds, image, depth, num_images_per_prompt, generator)
        input_size = next((given.size for given in (image, depth) if given is not None), None)
        (height, width), output_size = self.prepare_size(height, width, input_size)
        device = self._execution_device
        check_memory(self, batch_size, (height, width), output_size, device)

        # 2. What is made, in which steps
        task = Task.of_call(
            image,
            depth,
            self.config,
            strength=strength,
            depth_strength=depth_strength,
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            num_refinement_steps=num_refinement_steps,
            ensemble_size=ensemble_size,
        )
        self._working_size = (height, width)
        self._guidance_scale = task.guidance_scale
        self._num_inference_steps = task.num_inference_steps
        self._num_timesteps = task.num_timesteps
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None
        self._interrupt = False

        # 3. Text features
        features = self.prepare_prompts(prompt, batch_size, device, prompt_embeds, negative_prompt_embeds)

        positions = token_positions(height // self.token_size, width // self.token_size, device)
        shape = (batch_size, height, width, device, generator)
        with self.progress_bar(total=self._num_timesteps) as progress_bar:

            def on_step(step, timestep, streams, features):
                if callback_on_step_end is not None:
                    names = callback_on_step_end_tensor_inputs
                    self._run_callback(callback_on_step_end, names, step, timestep, streams, features)
                progress_bar.update()

            # 4. The image, together with its depth or with what is known of it; or the tokens of a given one
            depth_samples = []
            if task.makes_image:
                noise = self.prepare_latents(*shape, latents)
                streams = {"image": self.prepare_image_stream(image, noise, height, width, task.sigmas, device)}
                if self.has_depth:
                    if log2_alpha is None and (depth is None or depth.is_start):
                        log2_alpha = self.config.default_log2_alpha
                    noise = self.prepare_depth_latents(*shape, depth_latents)
                    streams["depth"] = self.prepare_depth_beside_image(
                        depth, noise, streams["image"], height, width, log2_alpha, depth_strength
                    )
                self.denoise(streams, positions, *features, generator, on_step)
                image_tokens = streams["image"].tokens
                if self.has_depth and streams["depth"].is_made:
                    depth_samples = [streams["depth"].tokens]
            else:
                image_tokens = self.prepare_image(image.pixels, batch_size, height, width, device)

            # 5. The depth of a finished image: estimated, refined, or completed
            estimates = []
            for _ in range(task.depth_passes):
                noise = self.prepare_depth_latents(*shape, None if task.makes_image else depth_latents)
                given = depth if task.completes_depth else None
                depth_stream = self.prepare_depth_of_image(given, noise, height, width, task.depth_sigmas)
                streams = {"image": Stream.given(image_tokens, depth_stream.levels), "depth": depth_stream}
                # Over an image that was made, guidance is off, as it is for image -> depth by default.
                negative = None if task.makes_image else features[1]
                self.denoise(streams, positions, features[0], negative, generator, on_step)
                if self.interrupt and (depth_samples or estimates):
                    break  # what is there already is better than a map half made
                estimates.append(depth_stream.tokens)
        self._current_timestep = None

        # 6. Back to images and depth maps
        outputs = self.postprocess(
            image_tokens if task.makes_image else None,
            estimates or depth_samples,
            image,
            depth,
            (height, width),
            output_size,
            output_type,
        )
        self.maybe_free_model_hooks()
        if not return_dict:
            return outputs
        return ModalityForcingPipelineOutput(*outputs)


def token_positions(rows: int, columns: int, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Positions of the tokens of each stream, (1, rows * columns, 4)."""
    return {
        "image": position_ids(rows=rows, columns=columns).to(device),
        "depth": position_ids(time=1, rows=rows, columns=columns).to(device),
    }


def text_position_ids(prompt_embeds: torch.Tensor) -> torch.Tensor:
    return position_ids(length=prompt_embeds.shape[1]).to(prompt_embeds.device)


def _given_or_drawn(name: str, latents: torch.Tensor | None, shape: tuple, generator, device) -> torch.Tensor:
    if latents is None:
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    if tuple(latents.shape) != shape:
        raise ValueError(f"`{name}` must have shape {shape} for this call, got {tuple(latents.shape)}.")
    return latents.to(device=device, dtype=torch.float32)
