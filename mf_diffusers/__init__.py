"""Modality Forcing for diffusers and ComfyUI: one diffusion transformer of images and depth.

The classes are imported when they are first asked for: `import mf_diffusers` itself loads neither torch nor diffusers.
"""

import importlib
from typing import TYPE_CHECKING

from .registration import register_with_diffusers


if TYPE_CHECKING:
    from .modality_forcing.depth_processor import DepthProcessor as DepthProcessor
    from .modality_forcing.depth_stream import ModalityForcingTransformerOutput as ModalityForcingTransformerOutput
    from .modality_forcing.pipeline import ModalityForcingPipeline as ModalityForcingPipeline
    from .modality_forcing.pipeline_output import ModalityForcingPipelineOutput as ModalityForcingPipelineOutput
    from .modality_forcing.transformer_dit import (
        ModalityForcingDiTTransformer2DModel as ModalityForcingDiTTransformer2DModel,
    )
    from .modality_forcing.transformer_flux2 import (
        ModalityForcingFlux2Transformer2DModel as ModalityForcingFlux2Transformer2DModel,
    )
    from .modality_forcing.transformer_z_image import (
        ModalityForcingZImageTransformer2DModel as ModalityForcingZImageTransformer2DModel,
    )


__version__ = "0.1.0"

_MODULES = {
    "DepthProcessor": "depth_processor",
    "ModalityForcingDiTTransformer2DModel": "transformer_dit",
    "ModalityForcingFlux2Transformer2DModel": "transformer_flux2",
    "ModalityForcingPipeline": "pipeline",
    "ModalityForcingPipelineOutput": "pipeline_output",
    "ModalityForcingTransformerOutput": "depth_stream",
    "ModalityForcingZImageTransformer2DModel": "transformer_z_image",
}
"""Where the public classes live in `modality_forcing`."""

__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(f".modality_forcing.{_MODULES[name]}", __name__), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_diffusers()
