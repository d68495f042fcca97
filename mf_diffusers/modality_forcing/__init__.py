"""Modality Forcing for diffusers: the model, its pipeline, and their place among diffusers' own."""

import sys

import diffusers
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES

from .conversion import convert_published_transformer
from .depth_processor import DepthProcessor
from .depth_stream import ModalityForcingTransformerOutput
from .pipeline import ModalityForcingPipeline
from .pipeline_output import ModalityForcingPipelineOutput
from .transformer_dit import ModalityForcingDiTTransformer2DModel
from .transformer_flux2 import ModalityForcingFlux2Transformer2DModel


# diffusers resolves the classes that a model_index.json names among its own pipelines. As one of them, these save and
# load through DiffusionPipeline without trust_remote_code.
diffusers.pipelines.modality_forcing = sys.modules[__name__]
for _cls in (
    ModalityForcingPipeline,
    ModalityForcingFlux2Transformer2DModel,
    ModalityForcingDiTTransformer2DModel,
    DepthProcessor,
):
    setattr(diffusers, _cls.__name__, _cls)
LOADABLE_CLASSES["diffusers"]["DepthProcessor"] = ["save_pretrained", "from_pretrained"]
ALL_IMPORTABLE_CLASSES.update(LOADABLE_CLASSES["diffusers"])
SINGLE_FILE_LOADABLE_CLASSES["ModalityForcingFlux2Transformer2DModel"] = {
    "checkpoint_mapping_fn": lambda checkpoint, **kwargs: convert_published_transformer(checkpoint)[1],
    "default_subfolder": "transformer",
}

__all__ = [
    "DepthProcessor",
    "ModalityForcingDiTTransformer2DModel",
    "ModalityForcingFlux2Transformer2DModel",
    "ModalityForcingPipeline",
    "ModalityForcingPipelineOutput",
    "ModalityForcingTransformerOutput",
]
