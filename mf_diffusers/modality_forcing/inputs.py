"""What a call of the pipeline is given: is it all there, does it go together, which values does it have."""

import math
import warnings
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import PIL.Image
import psutil
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import PipelineDepthInput, PipelineImageInput

from mf_diffusers.depth_background import far_end

from .depth_processor import DepthProcessor
from .image_processor import image_to_pixels
from .resampling import to_unit_range


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class GivenImage:
    """
    Args:
        pixels (`torch.Tensor` of shape (B, 3, H, W)): in [0, 1], or uint8.
        hidden (`torch.Tensor` of shape (B or 1, 1, H, W), *optional*): in [0, 1], 1 where the image is made anew;
            `None`: nowhere.
        is_start: Whether the image is only what sampling starts from (`strength`).
    """

    pixels: torch.Tensor
    hidden: torch.Tensor | None = None
    is_start: bool = False

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.pixels.shape[-2:])

    @property
    def is_whole(self) -> bool:
        return self.hidden is None and not self.is_start

    @property
    def without_hidden(self) -> torch.Tensor:
        """The pixels, where they are hidden the mean of the others, so that nothing of what is hidden shows through."""
        hidden = (self.hidden >= 0.5).expand(len(self.pixels), -1, -1, -1)
        shown = (~hidden).float()
        pixels = to_unit_range(self.pixels)
        mean = (pixels * shown).sum(dim=(2, 3), keepdim=True) / shown.sum(dim=(2, 3), keepdim=True).clamp(min=1)
        return torch.where(hidden, mean, pixels)

    def over(self, made: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        """Images (N B, 3, H, W) that were made, under the given ones where these are not hidden; of some columns."""
        repeats = len(made) // len(self.pixels), len(made) // len(self.hidden)
        pixels = to_unit_range(self.pixels[..., columns]).to(made).repeat_interleave(repeats[0], dim=0)
        hidden = self.hidden[..., columns].to(made).repeat_interleave(repeats[1], dim=0)
        return pixels + hidden * (made - pixels)


@dataclass
class GivenDepth:
    """
    Args:
        depth (`torch.Tensor` of shape (B, 1, H, W)): in any positive unit; what it holds elsewhere means nothing.
        valid (`torch.Tensor` of shape (B, 1, H, W)): bool, where depth is known.
        is_start: Whether the depth is only what sampling starts from (`depth_strength`).
    """

    depth: torch.Tensor
    valid: torch.Tensor
    is_start: bool = False

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.depth.shape[-2:])

    @property
    def is_whole(self) -> bool:
        return bool(self.valid.all()) and not self.is_start


def read_image(
    image: PipelineImageInput | None, mask_image: PipelineImageInput | None = None, strength: float | None = None
) -> GivenImage | None:
    """The `image`, `mask_image` and `strength` of a call as tensors; `None` where there is no image."""
    if image is None:
        return None
    pixels = image_to_pixels(image)
    hidden = None if mask_image is None else mask_to_tensor(mask_image)
    if hidden is not None:
        if hidden.shape[-2:] != pixels.shape[-2:] or len(hidden) not in (1, len(pixels)):
            raise ValueError(
                f"`mask_image` has shape {tuple(hidden.shape)}, but `image` has {tuple(pixels.shape)}: give a mask of "
                "the size of the image, one for all images or one for each."
            )
        if not (hidden >= 0.5).flatten(1).any(dim=1).all():
            raise ValueError("`mask_image` hides nothing: white (1) says where the image is made anew.")
    return GivenImage(pixels, hidden, is_start=strength is not None)


def read_depth(
    depth: PipelineDepthInput | None,
    depth_mask: PipelineDepthInput | None,
    depth_strength: float | None,
    depth_processor: DepthProcessor | None,
) -> GivenDepth | None:
    """The `depth`, `depth_mask` and `depth_strength` of a call as tensors; `None` where there is no depth.

    Warns with UserWarning of a map whose far end looks like the background of a renderer.
    """
    if depth is None:
        return None
    depth = depth_processor.to_tensor(depth)
    mask = None if depth_mask is None else depth_processor.mask_to_tensor(depth_mask)
    if mask is not None and (mask.shape[-2:] != depth.shape[-2:] or len(mask) not in (1, len(depth))):
        raise ValueError(f"The mask has shape {tuple(mask.shape)}, but the depth has {tuple(depth.shape)}.")
    valid = depth_processor.is_valid(depth, mask)
    empty = (~valid.flatten(1).any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"Depth map {empty[0]} of the batch has no valid pixel: depth must be positive and finite somewhere. Give "
            "a depth map with values, or leave `depth` out."
        )
    for number, (one, is_valid) in enumerate(zip(depth, valid)):
        end = far_end(torch.where(is_valid, one, 0.0)[0].cpu().numpy())
        if end is not None and end.background(end.value) is not None:
            warnings.warn(
                f"Depth map {number} of the batch: {end.pixels} pixels hold {end.value:.9g}, {end.ratio:.3g} times the "
                "median of the others, which are next to nothing beside it. Leave a background out by `depth_mask`.",
                UserWarning,
                stacklevel=2,
            )
    return GivenDepth(depth, valid, is_start=depth_strength is not None)


def mask_to_tensor(mask: PipelineDepthInput) -> torch.Tensor:
    """
    Args:
        mask: a mask or a batch of masks, white where something is made anew. `PIL.Image.Image`; `np.ndarray` or
            `torch.Tensor` of shape (H, W), (B, H, W), (B, 1, H, W), (H, W, 1) or (B, H, W, 1), bool, uint8 or floats
            in [0, 1]; or a list of these, all of one size.

    Returns:
        `torch.Tensor` of shape (B, 1, H, W), float32 in [0, 1].

    Raises:
        ValueError: a shape, kind or range that is not in the list.
    """
    if isinstance(mask, (list, tuple)) and mask:
        masks = [mask_to_tensor(one) for one in mask]
        if len({one.shape[-2:] for one in masks}) == 1:
            return torch.cat(masks)
    if isinstance(mask, PIL.Image.Image):
        mask = np.array(mask.convert("L"))
    if isinstance(mask, np.ndarray) and mask.dtype.kind in "buf":
        mask = torch.from_numpy(np.ascontiguousarray(mask))
    if not isinstance(mask, torch.Tensor):
        raise ValueError(
            f"`mask_image` must be a PIL image, an array, a tensor or a list of these of one size, got {type(mask)}."
        )
    values = mask.float() / 255 if mask.dtype == torch.uint8 else mask.float()
    if values.ndim in (3, 4) and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim == 4 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3 or values.numel() == 0 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(
            f"`mask_image` must have shape (H, W), (B, H, W) or (B, 1, H, W) and values in [0, 1], got "
            f"{tuple(mask.shape)} from {values.min():g} to {values.max():g}."
            if values.numel()
            else f"`mask_image` has no pixel: {tuple(mask.shape)}."
        )
    return values[:, None]


def check_inputs(
    *,
    has_depth: bool,
    text_channels: int,
    callback_tensors: list[str],
    prompt: Any,
    prompt_embeds: Any,
    negative_prompt_embeds: Any,
    image: Any,
    mask_image: Any,
    strength: Any,
    depth: Any,
    depth_mask: Any,
    depth_strength: Any,
    height: Any,
    width: Any,
    num_inference_steps: Any,
    sigmas: Any,
    guidance_scale: Any,
    log2_alpha: Any,
    num_refinement_steps: Any,
    ensemble_size: Any,
    num_images_per_prompt: Any,
    generator: Any,
    latents: Any,
    depth_latents: Any,
    output_type: Any,
    callback_on_step_end_tensor_inputs: Any,
) -> None:
    """Raises ValueError for the first argument of a call that is wrong or does not go with another.

    Args:
        has_depth: Whether the transformer has depth.
        text_channels: Width of its text features.
        callback_tensors: Names that a callback may ask for.
        The rest: as in `ModalityForcingPipeline.__call__`.
    """
    is_image_whole = image is not None and mask_image is None and strength is None
    if not has_depth:
        _check_text_to_image(
            image=image if is_image_whole else None,
            depth=depth,
            log2_alpha=log2_alpha,
            num_refinement_steps=num_refinement_steps or None,
            depth_latents=depth_latents,
        )
    for name, owner, other in (
        ("mask_image", "image", mask_image if image is None else None),
        ("strength", "image", strength if image is None else None),
        ("depth_mask", "depth", depth_mask if depth is None else None),
        ("depth_strength", "depth", depth_strength if depth is None else None),
    ):
        if other is not None:
            raise ValueError(f"`{name}` is about `{owner}`: give both.")
    _check_prompt(prompt, prompt_embeds, is_needed=not is_image_whole)
    if ensemble_size != 1:
        _check_ensemble(
            image_or_pass=is_image_whole or num_refinement_steps or depth is not None,
            depth_latents=depth_latents,
            output_type=output_type,
        )
    if is_image_whole:
        for name, value, why in (
            ("log2_alpha", log2_alpha, "couples the noise levels of two modalities"),
            ("latents", latents, "is the noise of a new image"),
            ("num_refinement_steps", num_refinement_steps or None, "refines the depth of a new image"),
        ):
            if value is not None:
                raise ValueError(f"`{name}` {why}, but the image is given: leave it out.")
    _check_numbers(
        least={
            "num_inference_steps": (num_inference_steps, 1),
            "num_refinement_steps": (num_refinement_steps, 0),
            "ensemble_size": (ensemble_size, 1),
            "num_images_per_prompt": (num_images_per_prompt, 1),
            "height": (height, 1),
            "width": (width, 1),
        },
        between={
            "guidance_scale": (guidance_scale, 0, math.inf),
            "log2_alpha": (log2_alpha, -30, 30),
            "strength": (strength, 0, 1),
            "depth_strength": (depth_strength, 0, 1),
        },
    )
    for name, value in (("strength", strength), ("depth_strength", depth_strength)):
        if value == 0:
            raise ValueError(f"`{name}` 0 leaves everything as it is: give more, up to 1.")
    _check_sigmas(sigmas)
    generators = generator if isinstance(generator, list) else [generator]
    if generator is not None and not all(isinstance(g, torch.Generator) for g in generators):
        raise ValueError(f"`generator` must be a torch.Generator or a list of them, got {generator!r}.")
    _check_text_features(text_channels, prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds)
    for name, value in (("latents", latents), ("depth_latents", depth_latents)):
        if value is not None and not (isinstance(value, torch.Tensor) and torch.isfinite(value).all()):
            raise ValueError(f"`{name}` must be a tensor of finite values.")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
    unknown = set(callback_on_step_end_tensor_inputs) - set(callback_tensors)
    if unknown:
        raise ValueError(f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}; known are {callback_tensors}.")


def check_given(
    image: GivenImage | None,
    depth: GivenDepth | None,
    *,
    ensemble_size: int,
    num_refinement_steps: int,
    log2_alpha: float | None,
    depth_latents: torch.Tensor | None,
) -> None:
    """Raises ValueError where nothing is left to make, or an argument is about what is given whole."""
    if depth is None:
        return
    if image is not None and image.is_whole and depth.is_whole:
        raise ValueError(
            "Both `image` and `depth` were given whole, so nothing is left to make: leave one of them out, or say what "
            "is to be made anew by `mask_image`, `strength`, `depth_mask` or `depth_strength`."
        )
    if depth.is_whole:
        for name, value, why in (
            ("num_refinement_steps", num_refinement_steps or None, "refines depth that is made"),
            ("ensemble_size", None if ensemble_size == 1 else ensemble_size, "is about depth that is made"),
            ("depth_latents", depth_latents if log2_alpha is None else None, "is the noise of a new depth map"),
        ):
            if value is not None:
                raise ValueError(f"`{name}` {why}, but the depth is given: leave it out.")


def check_counts(
    prompt: str | list[str] | None,
    prompt_embeds: torch.Tensor | None,
    image: GivenImage | None,
    depth: GivenDepth | None,
    num_images_per_prompt: int,
    generator: torch.Generator | list[torch.Generator] | None,
) -> int:
    """How many results a call has.

    Raises ValueError where prompts, images and depth maps are neither as many, nor one for all, or of two sizes; or
    where generators are not as many as results.
    """
    prompts = prompt if isinstance(prompt, list) else [prompt]
    counts = {"prompts": len(prompts if prompt_embeds is None else prompt_embeds)}
    if image is not None:
        counts["images"] = len(image.pixels)
    if depth is not None:
        counts["depth maps"] = len(depth.depth)
    most = max(counts.values())
    if set(counts.values()) - {1, most}:
        said = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"These do not go together: {said}. Give as many of each, or one for all.")
    if image is not None and depth is not None and image.size != depth.size:
        raise ValueError(
            f"`image` is {image.size} and `depth` {depth.size} (H, W): give them at one size, pixel over pixel."
        )
    results = most * num_images_per_prompt
    if isinstance(generator, list) and len(generator) != results:
        raise ValueError(f"{len(generator)} generators do not go with {results} results: give one for each, or one.")
    return results


def check_memory(
    pipe: DiffusionPipeline, batch_size: int, size: tuple[int, int], output_size: tuple[int, int], device: torch.device
) -> None:
    """Raises ValueError where the tensors that are surely held at once are larger than the memory that is free.

    Args:
        size, output_size: (height, width) to work at and to return.
    """
    vae = pipe.vae
    tokens = batch_size * math.prod(size) // pipe.token_size**2 * (2 if pipe.has_depth else 1)
    # In a block: its input, the norm of it, queries, keys, values, and of the MLP as much again.
    states = 8 * tokens * pipe.transformer.shape.width * pipe.transformer.dtype.itemsize
    # A convolution of the VAE at full size: what goes in and what comes out.
    pixels = 0 if vae.use_tiling else math.prod(size) * (1 if vae.use_slicing else batch_size)
    convolved = 2 * pixels * vae.config.block_out_channels[0] * vae.dtype.itemsize
    result = batch_size * math.prod(output_size) * 8  # depth, its mask, and 8 bits of three colours
    for needed, where in ((max(states, convolved), torch.device(device)), (result, torch.device("cpu"))):
        free = free_memory(where)
        if needed > free:
            height, width = size if needed != result else output_size
            raise ValueError(
                f"{batch_size} of {height}x{width} (H x W) take at least {needed / 1e9:.3g} GB, but {free / 1e9:.3g} "
                f"GB of memory are free on {where.type}: give a smaller `height` and `width`, or fewer at once."
            )


def free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated on a device, infinite where it does not tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available if device.type == "cpu" else math.inf


def check_components(pipe: DiffusionPipeline) -> None:
    """Raises ValueError where the components of a pipeline do not fit one another."""
    schedulers = [pipe.scheduler]
    if pipe.has_depth:
        schedulers.append(pipe.depth_scheduler)
        patch_size = pipe.depth_processor.config.patch_size
        channels = pipe.transformer.config.depth_channels
        if not (patch_size == pipe.token_size and patch_size**2 == channels):
            raise ValueError(
                f"A depth token must cover the pixels of an image token, but the depth processor's patches are "
                f"{patch_size} pixels wide, the VAE's tokens {pipe.token_size}, and the transformer takes "
                f"{channels} values for each: graft with depth_channels = patch_size**2."
            )
    for scheduler in schedulers:
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.use_dynamic_shifting:
            raise ValueError(
                f"This pipeline takes Euler steps of a static shift, but a scheduler is {scheduler}: give "
                "FlowMatchEulerDiscreteScheduler(shift=math.exp(1.1))."
            )
    if pipe.transformer.config.get("guidance_embeds"):
        raise ValueError("A guidance-distilled transformer (guidance_embeds) is not supported: take a base model.")
    if pipe.transformer.dtype == torch.float16:
        raise ValueError("The transformer overflows in float16: load it with dtype=torch.bfloat16 or torch.float32.")


def _check_text_to_image(**about_depth):
    for name, value in about_depth.items():
        if value is not None:
            raise ValueError(
                f"`{name}` is about depth, but this transformer is a text-to-image base: leave it out, or take a model "
                "with depth (ModalityForcingPipeline.from_base starts one)."
            )


def _check_prompt(prompt, prompt_embeds, is_needed):
    if prompt is not None and prompt_embeds is not None:
        raise ValueError("Give `prompt` or `prompt_embeds`, not both.")
    if prompt is None and prompt_embeds is None and is_needed:
        raise ValueError("Give a `prompt` (or `prompt_embeds`); only an image that is given whole does without one.")
    if prompt is not None and not (
        isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(isinstance(p, str) for p in prompt))
    ):
        raise ValueError(f"`prompt` must be a string or a list of strings, got {prompt!r}.")


def _check_ensemble(image_or_pass, depth_latents, output_type):
    if not image_or_pass:
        raise ValueError("`ensemble_size` needs depth made from an image: give `image`, or `num_refinement_steps`.")
    if output_type == "latent":
        raise ValueError("An ensemble is a median of depth maps: take the `output_type` 'pt' in place of 'latent'.")
    if depth_latents is not None:
        raise ValueError("`depth_latents` is the noise of one sample, so it cannot start an ensemble.")


def _check_numbers(least, between):
    for name, (value, low) in least.items():
        is_default = value is None and name in ("height", "width", "num_inference_steps")
        if not is_default and (not isinstance(value, Integral) or isinstance(value, bool) or value < low):
            raise ValueError(f"`{name}` must be an integer of at least {low}, got {value!r}.")
    for name, (value, low, high) in between.items():
        if value is not None and not (isinstance(value, Real) and low <= value <= high and math.isfinite(value)):
            raise ValueError(f"`{name}` must be a number from {low} to {high}, got {value!r}.")


def _check_sigmas(sigmas):
    if sigmas is None:
        return
    levels = np.asarray(sigmas, dtype=np.float64)
    is_falling = levels.ndim == 1 and len(levels) and levels[0] <= 1 and levels[-1] > 0 and (np.diff(levels) < 0).all()
    if not is_falling:
        raise ValueError(f"`sigmas` must fall from at most 1 to above 0, got {sigmas!r}.")


def _check_text_features(channels, **features):
    for name, value in features.items():
        if value is None:
            continue
        if not (isinstance(value, torch.Tensor) and value.ndim == 3 and len(value) and value.shape[2] == channels):
            got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value)
            raise ValueError(f"`{name}` must be a tensor of shape (B, L, {channels}), got {got}.")
        if not torch.isfinite(value).all():
            raise ValueError(f"`{name}` must be a tensor of finite values.")
