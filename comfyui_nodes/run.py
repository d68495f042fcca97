"""One sampling of an RGB-D latent, from what enters a sampler to what leaves it.

ComfyUI packs the streams of a latent into one tensor while it samples. A wrapper around its guiders makes a [`Run`] of
every sampling and puts it into that sampling's own transformer options, where the model finds it. Nothing of a run
lives on the model, which many samplings may share.

A latent has two or three streams: the image latent (B, C, h, w), the depth map (B, 1, H, W) in model space, and, where
something of them is given, the levels that they are held at (B, 2, H, W), image and depth; see [`Streams`]. The third
is there for nodes between ours and the sampler, which replace a noise mask or drop it.
"""

import logging
import math

import comfy.patcher_extension
import comfy.sample
import torch
import torch.nn.functional as F
from comfy.nested_tensor import NestedTensor

from mf_diffusers.modality_forcing.latent_tokens import hidden_cells

from .streams import Streams, log2_alpha_between


KEY = "modality_forcing"  # of the run among transformer options, and of the wrapper
# Samplers of ComfyUI, by their functions, that stop at the last noise level above 0, and those that have no form for
# flows (see [`Run.as_flow`]).
STOP_EARLY = {"dpm_fast_function", "dpm_adaptive_function"}
NO_FLOW = {
    "sample_ddpm",
    "sample_dpmpp_2s_ancestral_cfg_pp",
    "sample_res_multistep_ancestral",
    "sample_res_multistep_ancestral_cfg_pp",
}
HALF_STEPS = {"sample_dpmpp_2s_ancestral_cfg_pp"}  # of them, those that ask the model half way through a step too


class Run:
    """
    Both streams of a latent on their way through a sampler.

    Args:
        shapes: of the image latent (B, C, h, w) and of the depth map (B, 1, H, W).
        mask: packed noise mask (B, 1, N); see [`Streams`].
        latent, noise: packed clean latents and noise (B, 1, N).
        log2_alpha: trajectory of depth that is made together with the image.
        start: the sampler's first noise level, where it has no form for flows.

    `step_from` is the level that the sampler's step began at, while it asks half way through it.
    """

    def __init__(
        self,
        shapes,
        mask: torch.Tensor,
        latent: torch.Tensor,
        noise: torch.Tensor,
        log2_alpha: float,
        start: float | None = None,
    ):
        self.shapes, self.mask, self.latent, self.noise = shapes, mask, latent, noise
        self.log2_alpha, self.start, self.step_from = log2_alpha, start, None
        self.streams = Streams(shapes, mask, log2_alpha)
        self.state = None  # of the sampler, while guidance is at work
        self._batches = {}

    def enter(self, latent: torch.Tensor) -> torch.Tensor:
        """Clean latents (B, 1, N), as the sampler carries them."""
        return latent / self.streams.scale

    def leave(self, carried: torch.Tensor) -> torch.Tensor:
        """The inverse of [`enter`], of any state of the sampler; given streams come back bit by bit."""
        streams, device = self.streams, carried.device
        clean = carried * streams.scale.to(device)
        return torch.where(streams.given.to(device), self.latent.to(device), clean)

    def like(self, batch: torch.Tensor) -> "Run":
        """The run for `batch` (K B, 1, N), in which ComfyUI joins the K prompts of a step, on its device."""
        times, rest = divmod(len(batch), len(self.latent))
        if rest or batch.shape[1:] != self.latent.shape[1:]:
            raise ValueError(
                f"The sampler hands the model a latent of shape {list(batch.shape)}, where the run has "
                f"{list(self.latent.shape)}: a node cuts or joins latents in a way that does not suit two streams."
            )
        if (times, batch.device) not in self._batches:
            mask, latent, noise = (x.to(batch.device).repeat(times, 1, 1) for x in (self.mask, self.latent, self.noise))
            self._batches[times, batch.device] = Run(self.shapes, mask, latent, noise, self.log2_alpha)
        return self._batches[times, batch.device]

    def as_flow(self, carried: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What the sampler hands over at `sigma` (B,) as a state of the flow, and its noise level (B,).

        Ancestral samplers without a form for flows leave ``s = 1 - sigma^2 / start`` of the signal beside noise of
        `sigma`, more than the flow's ``1 - sigma``, and half way through a step from `step_from`
        ``s = 1 - sigma * step_from / start``. Divided by ``s + sigma``, it is a state of the flow again.
        """
        if self.start is None:
            return carried, sigma
        total = 1 - sigma * (sigma if self.step_from is None else self.step_from) / self.start + sigma
        return carried / total.view(-1, 1, 1), sigma / total

    # Guidance

    def guide_apart(self, guidance):
        """
        A guidance function of another node, called with one stream at a time: such functions are made for latents
        (B, C, h, w), and take means and norms over all that they are handed.
        """

        def guide(args: dict):
            self.state = args["input"]
            image, depth = (guidance({name: self._stream(x, place) for name, x in args.items()}) for place in (0, 1))
            self.state = None
            return (
                [Streams.join(*pair) for pair in zip(image, depth)]
                if isinstance(image, list)
                else Streams.join(image, depth)
            )

        return guide

    def _stream(self, value, place: int):
        """The stream at `place` of a packed latent, or of every one in a list; anything else as it is."""
        if isinstance(value, list):
            return [self._stream(x, place) for x in value]
        packed = torch.is_tensor(value) and value.shape[1:] == self.latent.shape[1:]
        return self.streams.split(value)[place] if packed else value

    def whole(self, latent: torch.Tensor) -> tuple[torch.Tensor, int | None]:
        """
        What the model is to see where guidance asks it about one stream: that stream with the other one beside it.

        Returns:
            A packed latent (B, 1, N), and the place of the stream that is asked for; `None`: both.
        """
        if self.state is None or latent.ndim == self.state.ndim:
            return latent, None
        place = int(latent.shape[1:] == self.shapes[1][1:])
        streams = [x.repeat(len(latent) // len(x), 1, 1, 1) for x in self.streams.split(self.state)]
        streams[place] = latent
        return Streams.join(*streams), place


def sample(
    executor,
    noise,
    latent_image,
    sampler,
    sigmas,
    denoise_mask=None,
    callback=None,
    disable_pbar=False,
    seed=None,
    latent_shapes=None,
    **kwargs,
):
    """Samples in a run of its own: a wrapper around `CFGGuider.outer_sample`."""
    guider = executor.class_obj
    model, device = guider.model_patcher.model, guider.model_patcher.load_device
    model.check_latent(latent_shapes)
    model.check_prompts(prompt for prompts in guider.conds.values() for prompt in prompts)

    # 1. The two streams, and what is given of them
    shapes = latent_shapes[:2]
    for prompts in guider.conds.values():
        prompts[:] = [_with_packed_region(prompt, shapes) for prompt in prompts]
    latent_image = latent_image.to(device, torch.float32)
    latent, held = latent_image.split([_entries(shapes), latent_image.shape[-1] - _entries(shapes)], dim=-1)
    mask = torch.ones_like(latent) if denoise_mask is None else denoise_mask.to(latent)[..., : latent.shape[-1]]
    if held.numel():
        mask = _with_held(mask, held.unflatten(-1, latent_shapes[2][1:]).squeeze(1), shapes)
    if noise.any():
        noise = given_noise = noise.to(latent)[..., : latent.shape[-1]]
    else:  # none is added, of which ComfyUI 0.27 makes the first stream alone; what is given needs some all the same
        noise, given_noise = torch.zeros_like(latent), _noise(shapes, seed).to(latent)
    log2_alpha = guider.model_patcher.get_model_object("log2_alpha")
    depth_denoise = guider.model_patcher.get_model_object("depth_denoise")
    if depth_denoise is not None and sigmas[0] < 1:
        log2_alpha += log2_alpha_between(float(sigmas[0]), depth_denoise)
    name = getattr(getattr(sampler, "sampler_function", None), "__name__", None)
    run = Run(shapes, mask, latent, given_noise, log2_alpha, float(sigmas[0]) if name in NO_FLOW else None)
    run.streams.check()

    # 2. What is given is the run's part; of what is made, masks hold parts of the image, which is the sampler's part
    mask = torch.where(run.streams.given, 1.0, mask)
    _prepare_options(guider.model_options, run, model)
    wrappers = {}
    if name in STOP_EARLY:
        wrappers[comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE] = _finish
    if name in HALF_STEPS:
        wrappers[comfy.patcher_extension.WrappersMP.PREDICT_NOISE] = _half_steps(run)
    for kind, wrapper in wrappers.items():
        comfy.patcher_extension.add_wrapper(kind, wrapper, guider.model_options, is_model_options=True)
    samples = executor(
        noise,
        run.enter(latent),
        sampler,
        sigmas,
        None if (mask == 1).all() else mask,
        callback and _call_back(run, held, model.latent_format, callback),
        disable_pbar,
        seed,
        latent_shapes=shapes,
        **kwargs,
    )
    return torch.cat([run.leave(samples), held.to(samples)], dim=-1)


def _finish(
    executor,
    guider,
    sigmas,
    extra_args,
    callback,
    noise,
    latent_image=None,
    denoise_mask=None,
    disable_pbar=False,
    **kwargs,
):
    """
    Wraps `KSAMPLER.sample` of a sampler that stops at the last noise level above 0, with the step to 0. There the depth
    may be noise still, which settles after the image.
    """
    samples = executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar, **kwargs)
    if len(sigmas) < 2 or sigmas[-1] > 0:
        return samples
    level = sigmas[-2].expand(len(samples))
    estimate = guider(samples, level, model_options=extra_args["model_options"], seed=extra_args["seed"])
    return estimate if denoise_mask is None else estimate * denoise_mask + latent_image * (1 - denoise_mask)


def _half_steps(run: Run):
    """Wraps `CFGGuider.predict_noise` of a sampler whose every second question is half way through a step."""

    before = None

    def predict(executor, x, level, *args, **kwargs):
        nonlocal before
        run.step_from, before = before, level.flatten()[0] if before is None else None
        return executor(x, level, *args, **kwargs)

    return predict


def _prepare_options(options: dict, run: Run, model):
    """Makes the model options of one sampling ready for two streams."""
    if "sampler_cfg_function" in options:
        options["sampler_cfg_function"] = run.guide_apart(options["sampler_cfg_function"])
    for name in ("sampler_pre_cfg_function", "sampler_post_cfg_function"):
        options[name] = [run.guide_apart(guidance) for guidance in options.get(name, [])]
    transformer_options = options["transformer_options"]
    if getattr(transformer_options.get("easycache"), "name", None) == "LazyCache":
        raise ValueError(
            "LazyCache reuses what a sampler carries, in which the depth of a Modality Forcing model is small beside "
            "its noise: take EasyCache, which reuses what the model says."
        )
    unused = {*transformer_options.get("patches", {})} - model.known_patches
    unused |= {*transformer_options.get("patches_replace", {})} - model.known_replacements
    if unused:
        logging.warning(
            f"A Modality Forcing model has no place for what a node patches ({', '.join(sorted(unused))}): it is left "
            "out."
        )
    transformer_options[KEY] = run


def _entries(shapes) -> int:
    return sum(math.prod(shape[1:]) for shape in shapes)


def _with_held(mask: torch.Tensor, held: torch.Tensor, shapes) -> torch.Tensor:
    """
    A packed noise mask (B, 1, N) from other nodes, and what 'Encode RGB-D' has written to be held (B, 2, H, W): both
    count.
    """
    image_shape, depth_shape = shapes
    image_held = hidden_cells(held[:, :1], *image_shape[-2:], channels=image_shape[1]).view(image_shape).to(held)
    if (mask[..., : math.prod(image_shape[1:])] < 1).any() and not image_held.any():
        logging.warning(
            "A noise mask has no say over an image that is kept whole: choose in 'Encode RGB-D' what to keep, and mask "
            "an image that is made."
        )
    return torch.minimum(mask, Streams.join(image_held, held[:, 1:].expand(depth_shape)))


def _with_packed_region(prompt: dict, shapes) -> dict:
    """
    A prompt whose mask or area, if it has one, lies over both streams of a packed latent, as a mask (B, N). The model
    sees the whole picture for every prompt; each counts in its region.
    """
    if not {"mask", "area"} & prompt.keys():
        return prompt
    image_shape, depth_shape = shapes
    height, width = depth_shape[-2:]
    region = torch.ones(1, 1, height, width)
    if prompt.get("area") is not None:
        by_share, *area = prompt["area"] if prompt["area"][0] == "percentage" else (None, *prompt["area"])
        units = (height, width) * 2 if by_share else (8,) * 4  # pixels of what ComfyUI measures areas in
        rows, columns, top, left = (round(side * unit) for side, unit in zip(area, units))
        region = torch.zeros_like(region)
        region[..., top : top + rows, left : left + columns] = 1
    if prompt.get("mask") is not None:
        mask = prompt["mask"].float().cpu()
        region = region * F.interpolate(mask.reshape(-1, 1, *mask.shape[-2:]), (height, width), mode="bilinear")
    image = F.adaptive_avg_pool2d(region, image_shape[-2:]).expand(-1, image_shape[1], -1, -1)
    packed = {name: value for name, value in prompt.items() if name not in ("area", "set_area_to_bounds")}
    return packed | {"mask": Streams.join(image, region)[:, 0]}


def _noise(shapes, seed: int | None) -> torch.Tensor:
    """The noise that ComfyUI makes of a seed, packed: (B, 1, N)."""
    empty = NestedTensor([torch.zeros(shape) for shape in shapes])
    return Streams.join(*comfy.sample.prepare_noise(empty, seed or 0).unbind())


def _call_back(run: Run, held: torch.Tensor, latent_format, callback):
    """`callback`, which is to see clean latents, and whose previewer is to see both of them."""

    def call_back(step, estimate, state, total_steps):
        estimate, state = run.leave(estimate), run.leave(state)
        with latent_format.showing(*run.streams.split(estimate)):
            whole = (torch.cat([x, held.to(x)], dim=-1) for x in (estimate, state))
            callback(step, *whole, total_steps)

    return call_back
