"""A modality on its way through sampling: what is known of it, what is made, and at which noise level it stands."""

from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from .noise import add_noise, velocity_from_clean


@dataclass
class Stream:
    r"""
    One modality, images or depth, while the pipeline walks its noise levels. Tokens have shape (B, N, C), float32.

    What is known of the modality stands at the stream's level at every step; the rest is the stream's state, which is
    stepped where a modality is made. So a stream that is known throughout and has no scheduler is a given modality, one
    without known tokens is made from nothing, and one that is known in part is completed.

    Args:
        noise (`torch.Tensor`): The noise of the stream: its state at level 1, and the noise of what is known.
        levels (`torch.Tensor` of shape (steps + 1,)): Noise levels, one for each step and the last; 0 is clean.
        known (`torch.Tensor`, *optional*): Clean tokens, of which those under `mask` are known.
        mask (`torch.Tensor`, *optional*): bool, True where `known` is known; `None`: everywhere. Missing pixels of a
            modality that is not made are the same noise at every level, as in training.
        start (`torch.Tensor`, *optional*): Clean tokens that a stream in the making begins with, at its first level;
            where there are none, `noise` itself. Default: noise.
        scheduler ([`FlowMatchEulerDiscreteScheduler`], *optional*): Makes the steps; its sigmas are `levels`. `None`:
            the modality is not made.
        predicts_clean (`bool`): Whether the transformer predicts clean tokens, as of depth, or a velocity, as of
            images.
    """

    noise: torch.Tensor
    levels: torch.Tensor
    known: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    start: torch.Tensor | None = None
    scheduler: FlowMatchEulerDiscreteScheduler | None = None
    predicts_clean: bool = False

    def __post_init__(self):
        self.state = self.noise if self.start is None else add_noise(self.start, self.noise, self.levels[0])

    @classmethod
    def given(cls, tokens: torch.Tensor, levels: torch.Tensor) -> "Stream":
        """A modality that is given whole, clean at every step beside a stream with these `levels`."""
        return cls(tokens, torch.zeros_like(levels), known=tokens)

    @property
    def is_made(self) -> bool:
        return self.scheduler is not None

    def shown(self, step: int) -> torch.Tensor:
        """What the transformer sees at a step: the state, and what is known at the level of the step."""
        if self.known is None:
            return self.state
        known = add_noise(self.known, self.noise, self.levels[step])
        return known if self.mask is None else torch.where(self.mask, known, self.state)

    def advance(
        self, prediction: torch.Tensor, step: int, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> None:
        """
        Takes a step towards the next level; a stream that is not made stays as it is.

        Args:
            prediction (`torch.Tensor`): The transformer's, of what `shown` returned for the step.
            generator: Draws the noise of a scheduler with `stochastic_sampling`.
        """
        if not self.is_made:
            return
        shown = self.shown(step)
        if self.predicts_clean:
            prediction = velocity_from_clean(shown, prediction, self.levels[step])
        timestep = self.scheduler.timesteps[step]
        self.state = self.scheduler.step(prediction, timestep, shown, generator=generator, return_dict=False)[0]

    @property
    def tokens(self) -> torch.Tensor:
        """The tokens as they stand: the state, and what is known, clean."""
        if self.known is None:
            return self.state
        return self.known if self.mask is None else torch.where(self.mask, self.known, self.state)
