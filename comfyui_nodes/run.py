"""One sampling of an RGB-D latent, from what enters a sampler to what leaves it.

ComfyUI packs the streams of a latent into one tensor while it samples. A wrapper around its guiders makes a [`Run`] of
every sampling and puts it into that sampling's own transformer options, where the model finds it. Nothing of a run
lives on the model, which many samplings may share.
"""

import torch

from .streams import Streams


KEY = "modality_forcing"  # of the run among transformer options, and of the wrapper


class Run:
    """
    Both streams of a latent on their way through a sampler.

    Args:
        shapes: of the image latent (B, C, h, w) and of the depth map (B, 1, H, W).
        mask: packed noise mask (B, 1, N); see [`Streams`].
        latent, noise: packed clean latents and noise (B, 1, N).
        log2_alpha: trajectory of depth that is made together with the image.
    """

    def __init__(self, shapes, mask: torch.Tensor, latent: torch.Tensor, noise: torch.Tensor, log2_alpha: float):
        self.shapes, self.mask, self.latent, self.noise, self.log2_alpha = shapes, mask, latent, noise, log2_alpha
        self.streams = Streams(shapes, mask, log2_alpha)
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

    latent = latent_image.to(device, torch.float32)
    if noise.shape != latent.shape and not noise.any():
        noise = torch.zeros_like(latent)  # ComfyUI 0.27 makes no noise of the first stream alone
    noise = noise.to(device, torch.float32)
    mask = torch.ones_like(latent) if denoise_mask is None else denoise_mask.to(device, torch.float32)

    run = Run(latent_shapes, mask, latent, noise, guider.model_patcher.get_model_object("log2_alpha"))
    run.streams.check()
    guider.model_options["transformer_options"][KEY] = run
    samples = executor(
        noise,
        run.enter(latent),
        sampler,
        sigmas,
        denoise_mask,
        callback and _call_back(run, model.latent_format, callback),
        disable_pbar,
        seed,
        latent_shapes=latent_shapes,
        **kwargs,
    )
    return run.leave(samples)


def _call_back(run: Run, latent_format, callback):
    """`callback`, which is to see clean latents, and whose previewer is to see both of them."""

    def call_back(step, estimate, state, total_steps):
        estimate = run.leave(estimate)
        with latent_format.showing(*run.streams.split(estimate)):
            callback(step, estimate, run.leave(state), total_steps)

    return call_back
