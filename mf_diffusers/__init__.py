"""Modality Forcing for diffusers and ComfyUI: one diffusion transformer of images and depth."""

from .modality_forcing import (
    DepthProcessor,
    ModalityForcingDiTTransformer2DModel,
    ModalityForcingFlux2Transformer2DModel,
    ModalityForcingPipeline,
    ModalityForcingPipelineOutput,
    ModalityForcingTransformerOutput,
)


__version__ = "0.1.0"

__all__ = [
    "DepthProcessor",
    "ModalityForcingDiTTransformer2DModel",
    "ModalityForcingFlux2Transformer2DModel",
    "ModalityForcingPipeline",
    "ModalityForcingPipelineOutput",
    "ModalityForcingTransformerOutput",
]
