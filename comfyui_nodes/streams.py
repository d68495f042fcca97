"""The two streams of an RGB-D latent, image and depth, while one sampler walks one noise level for both."""

import math

import torch

from mf_diffusers.modality_forcing.noise import add_noise, shift_timestep


# How loosely a given depth map is followed (paper, partial depth conditioning): log2_alpha of its noise level.
DEPTH_STRENGTHS = {"rigid": None, "tight": -14.0, "firm": -11.0, "soft": -8.0, "loose": -5.0}


class Streams:
    r"""
    Which stream of each sample is given and which is made, and what the model sees of both at a noise level.

    A packed latent (B, 1, N) is the image latent (C, h, w) followed by the depth map (1, H, W) in model space, both
    flattened. The sampler walks the noise level sigma of the image. Depth that is made with it stands at another level,
    ``t = f_a(sigma)`` (paper, inference trajectory). It is carried as ``y = x_t (1 + (a - 1) sigma) / a``, which is
    ``(1 - sigma) x0 / a + sigma * noise``: a flow at the level sigma itself, so any sampler and scheduler will do.

    Args:
        latent_shapes: shapes of the image latent (B, C, h, w) and of the depth map (B, 1, H, W).
        mask (`torch.Tensor` of shape (B, 1, N)): packed noise mask. An image that is 0 throughout is given and stays
            clean. Depth that is 1 throughout is made; otherwise it is given, and a value is the noise level at which
            the pixel is held while the image is at 1/2: 0 rigidly, 1 where depth is missing and noise stands in.
        log2_alpha: trajectory of depth that is made together with the image.
    """

    def __init__(self, latent_shapes, mask: torch.Tensor, log2_alpha: float):
        self.image_shape, self.depth_shape = (torch.Size(shape[1:]) for shape in latent_shapes)
        image_mask, self.depth_mask = self.split(mask)
        self.image_given = image_mask.flatten(1).amax(1) == 0
        self.held_at = self.depth_mask.flatten(1).amin(1)
        self.depth_given = self.held_at < 1
        self.depth_missing = self.depth_mask == 1
        # A trajectory couples two streams on the move; depth beside a given image walks sigma itself.
        apart = self.image_given | self.depth_given
        self.alpha = torch.where(apart, 1.0, 2.0**log2_alpha)

    def check(self):
        """Raises ValueError where both streams are given, or the pixels of a given depth map are held unequally."""
        if (self.image_given & self.depth_given).any():
            raise ValueError(
                "Both image and depth are given, so nothing is left to make: let 'Encode RGB-D' keep one of them."
            )
        if not ((self.depth_mask == _per_sample(self.held_at)) | self.depth_missing).all():
            raise ValueError(
                "The noise mask of a depth map has several values, but a given map is held at one level, with 1 where "
                "depth is missing. Inpainting is for the image; give depth through 'Encode RGB-D'."
            )

    def split(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 1, N) -> image (B, C, h, w) and depth (B, 1, H, W)."""
        image, depth = packed.flatten(1).split([self.image_shape.numel(), self.depth_shape.numel()], dim=1)
        return image.reshape(-1, *self.image_shape), depth.reshape(-1, *self.depth_shape)

    @staticmethod
    def join(image: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
        """The inverse of [`split`]."""
        return torch.cat([image.flatten(1), depth.flatten(1)], dim=1)[:, None]

    def levels(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise levels of image and depth, (B,) each, at the sampler's level `sigma` (B,)."""
        # A rigidly held map is clean even at sigma = 1, where its quotient is 0 / 0.
        held = shift_timestep(sigma, self.held_at / (1 - self.held_at)).nan_to_num(0.0)
        made = shift_timestep(sigma, self.alpha)
        return torch.where(self.image_given, 0.0, sigma), torch.where(self.depth_given, held, made)

    def to_model(
        self, sampled: torch.Tensor, sigma: torch.Tensor, given: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            sampled (`torch.Tensor` of shape (B, 1, N)): the sampler's state at `sigma` (B,).
            given, noise (`torch.Tensor` of shape (B, 1, N)): clean latents and the run's noise.

        Returns:
            Image (B, C, h, w) and depth (B, 1, H, W) at their own noise levels.
        """
        image, depth = self.split(sampled)
        given_image, given_depth = self.split(given)
        _, depth_noise = self.split(noise)
        # The same noise in a hole at every level, as in training.
        held = add_noise(given_depth, depth_noise, self.levels(sigma)[1])
        held = torch.where(self.depth_missing, depth_noise, held)
        made = depth * _per_sample(self.alpha / (1 + (self.alpha - 1) * sigma))
        return (
            torch.where(_per_sample(self.image_given), given_image, image),
            torch.where(_per_sample(self.depth_given), held, made),
        )

    def to_sampler(self, image: torch.Tensor, depth: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """Clean estimates of image and depth, as the sampler carries them: (B, 1, N)."""
        return torch.where(self.given, given, self.join(image, depth) / self.scale)

    @property
    def given(self) -> torch.Tensor:
        """True on the streams that are given: (B, 1, N), bool."""
        return self._packed(self.image_given, self.depth_given)

    @property
    def scale(self) -> torch.Tensor:
        """Clean latents over what the sampler carries for them: (B, 1, N)."""
        return self._packed(torch.ones_like(self.alpha), self.alpha)

    def _packed(self, image: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
        """One value per sample and stream, (B,) each, spread over a packed latent."""
        return self.join(
            _per_sample(image).expand(-1, *self.image_shape), _per_sample(depth).expand(-1, *self.depth_shape)
        )


def held_at(strength: str) -> float:
    """The noise mask's value for a given depth map that is followed at a strength of `DEPTH_STRENGTHS`."""
    log2_alpha = DEPTH_STRENGTHS[strength]
    return 0.0 if log2_alpha is None else 1 / (1 + math.exp2(-log2_alpha))


def log2_alpha_between(level: float, other: float) -> float:
    """The log2_alpha of the trajectory that is at `other` where the image is at `level`; both lie between 0 and 1."""
    return math.log2(other * (1 - level) / (level * (1 - other)))


def _per_sample(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)
