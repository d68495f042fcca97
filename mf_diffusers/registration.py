"""The place of this package's classes among diffusers' own.

diffusers looks among its own classes for those that a model_index.json names. Entered there, ours save and load through
`DiffusionPipeline` without trust_remote_code. The entries are made when diffusers is imported, be it before this
package or after it, and this package does not import diffusers for them.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


MODELS_AND_PIPELINES = (
    "ModalityForcingPipeline",
    "ModalityForcingFlux2Transformer2DModel",
    "ModalityForcingDiTTransformer2DModel",
    "ModalityForcingZImageTransformer2DModel",
    "DepthProcessor",
)


def register_with_diffusers() -> None:
    """Make the entries in the modules of diffusers that are loaded, and in the others when they will be."""
    for name, enter in ENTRIES.items():
        if name in sys.modules:
            enter(sys.modules[name])
    sys.meta_path.insert(0, EnterAfterImport())


class EnterAfterImport(MetaPathFinder):
    """Leaves the modules of `ENTRIES` to the finders after it, and makes the entries once they are loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in ENTRIES:
            return None
        later = sys.meta_path[sys.meta_path.index(self) + 1 :]
        found = (finder.find_spec(name, path, target) for finder in later)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None:
            load = spec.loader.exec_module

            def exec_module(module):
                load(module)
                ENTRIES[name](sys.modules[name])  # not `module`: diffusers puts a lazy one in its place

            spec.loader.exec_module = exec_module
        return spec


def _enter_classes(diffusers: ModuleType) -> None:
    def attribute(name):
        if name not in MODELS_AND_PIPELINES:
            raise AttributeError(name)  # Python goes on to diffusers' own lazy names
        return getattr(sys.modules["mf_diffusers"], name)

    diffusers.__getattr__ = attribute


def _enter_pipeline_module(pipelines: ModuleType) -> None:
    """A pipeline's parts are looked up in the module of its folder: "modality_forcing" in a model_index.json."""
    pipelines.modality_forcing = sys.modules["mf_diffusers"]


def _enter_depth_processor(pipeline_loading_utils: ModuleType) -> None:
    methods = {"DepthProcessor": ["save_pretrained", "from_pretrained"]}
    pipeline_loading_utils.LOADABLE_CLASSES["diffusers"].update(methods)
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(methods)


def _enter_published_layout(single_file_model: ModuleType) -> None:
    def convert(checkpoint, **kwargs):
        from .modality_forcing.conversion import convert_published_transformer

        return convert_published_transformer(checkpoint)[1]

    classes = single_file_model.SINGLE_FILE_LOADABLE_CLASSES
    classes["ModalityForcingFlux2Transformer2DModel"] = {
        "checkpoint_mapping_fn": convert,
        "default_subfolder": "transformer",
    }
    classes["ModalityForcingZImageTransformer2DModel"] = classes["ZImageTransformer2DModel"]


ENTRIES = {
    "diffusers": _enter_classes,
    "diffusers.pipelines": _enter_pipeline_module,
    "diffusers.pipelines.pipeline_loading_utils": _enter_depth_processor,
    "diffusers.loaders.single_file_model": _enter_published_layout,
}
"""What is entered in which module of diffusers, which is given."""
