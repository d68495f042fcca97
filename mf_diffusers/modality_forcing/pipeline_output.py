from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class ModalityForcingPipelineOutput(BaseOutput):
    r"""
    What [`ModalityForcingPipeline`] made; a modality that was given is `None`.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            By `output_type`: PIL images; array (B, H, W, 3) in [0, 1]; tensor (B, 3, H, W) in [0, 1]; VAE latents.
        depth (`np.ndarray` or `torch.Tensor`):
            Relative depth, float32, larger is farther, about 1 in the mean of each map. Array (B, H, W) for the output
            types "pil" and "np"; tensor (B, 1, H, W) for "pt"; contracted depth (B, 1, H, W) for "latent".
        depth_mask (`np.ndarray` or `torch.Tensor`):
            Validity of `depth`, bool, same shape: False where it was clamped, in the sky for example.
        depth_uncertainty (`np.ndarray` or `torch.Tensor`):
            With an ensemble: relative uncertainty of `depth` (0.1 is about 10%), same shape.

    Example:
        >>> from mf_diffusers import ModalityForcingPipeline
        >>> from mf_diffusers.embedded import EMBEDDED_MODEL
        >>> pipe = ModalityForcingPipeline.from_pretrained(EMBEDDED_MODEL)
        >>> output = pipe("a green cone", num_inference_steps=2, output_type="np")
        >>> output.images.shape, output.depth.shape, output.depth_mask.dtype, output.depth_uncertainty
        ((1, 64, 64, 3), (1, 64, 64), dtype('bool'), None)
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor | None = None
    depth: np.ndarray | torch.Tensor | None = None
    depth_mask: np.ndarray | torch.Tensor | None = None
    depth_uncertainty: np.ndarray | torch.Tensor | None = None
