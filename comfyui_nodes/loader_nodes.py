"""Nodes that open models, and scenes to try them on."""

import json
from pathlib import Path

import folder_paths
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image

from mf_diffusers.depth_io import read_depth
from mf_diffusers.embedded import EMBEDDED_MODEL, EMBEDDED_SCENES

from .depth_sockets import geometry_from_depth, image_from_depth
from .sockets import CATEGORY, blocked, depth_outputs


EMBEDDED = "embedded model (small, on board)"


class LoadPipeline(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ModalityForcingLoadPipeline",
            display_name="Load Modality Forcing Pipeline",
            category=CATEGORY,
            description="Opens a pipeline in diffusers' layout, or the small embedded model, as MODEL, CLIP and VAE.",
            search_aliases=["modality forcing", "rgbd", "depth model", "diffusers loader", "embedded model"],
            inputs=[
                io.Combo.Input(
                    "pipeline",
                    options=[EMBEDDED, *_pipeline_folders()],
                    default=EMBEDDED,
                    tooltip="A folder in ComfyUI/models/diffusers; or the embedded model, which needs no download and "
                    "knows simple scenes of 64 x 64 pixels.",
                )
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, pipeline) -> io.NodeOutput:
        # Here, so that a core without the classes of text encoders that it leans on costs this node alone.
        from .loader import load_pipeline

        folder = EMBEDDED_MODEL if pipeline == EMBEDDED else _pipeline_folders()[pipeline]
        if not folder.is_dir():
            raise FileNotFoundError(
                f"This installation has no embedded model ({folder}): choose a folder of ComfyUI/models/diffusers, or "
                "open a single file by 'Load Diffusion Model'."
            )
        model, clip, vae = load_pipeline(folder)
        if clip is None:
            clip = blocked(cls, 1, f"{pipeline} has no text encoder: connect 'Load CLIP' of type flux2 with its Qwen3.")
        return io.NodeOutput(model, clip, vae)


class LoadAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ModalityForcingLoadAdapter",
            display_name="Load Modality Forcing Adapter",
            category=CATEGORY,
            description="Opens what LoRA training wrote, depth modules and a LoRA in one file, on its FLUX.2 base.",
            search_aliases=["modality forcing lora", "adapter", "trained lora", "depth lora"],
            inputs=[
                io.Combo.Input(
                    "base",
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip="The FLUX.2 that it was trained on, unquantised, in ComfyUI/models/diffusion_models.",
                ),
                io.Combo.Input(
                    "adapter",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="pipeline.adapter.safetensors of the training, in ComfyUI/models/loras.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Of the LoRA. The depth modules are as they were trained.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, base, adapter, strength) -> io.NodeOutput:
        from .loader import load_adapter  # as in 'Load Modality Forcing Pipeline'

        files = (
            Path(folder_paths.get_full_path_or_raise(folder, name))
            for folder, name in (("diffusion_models", base), ("loras", adapter))
        )
        return io.NodeOutput(load_adapter(*files, strength))


class LoadScene(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ModalityForcingLoadScene",
            display_name="Load Example Scene",
            category=CATEGORY,
            description="A picture of the kind that the embedded model knows, its true depth, and a prompt for it.",
            search_aliases=["example", "demo", "test scene", "sample image"],
            inputs=[
                io.Combo.Input("scene", options=list(_captions()), tooltip="One of those on board."),
                io.Combo.Input(
                    "known_depth",
                    options=["everywhere", "in 1% of pixels"],
                    tooltip="Where its depth is known: everywhere, or at points here and there, as of a laser scanner.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The picture."),
                *depth_outputs(),
                io.String.Output(display_name="caption", tooltip="What it shows, in the words of the training."),
            ],
        )

    @classmethod
    def execute(cls, scene, known_depth) -> io.NodeOutput:
        with Image.open(EMBEDDED_SCENES / f"{scene}.png") as picture:
            image = torch.from_numpy(np.array(picture.convert("RGB")))[None].float() / 255
        depth = torch.from_numpy(read_depth(EMBEDDED_SCENES / f"{scene}-depth.png"))[None, None]
        if known_depth != "everywhere":
            points = torch.rand(depth.shape, generator=torch.Generator().manual_seed(0)) < 0.01
            depth = torch.where(points, depth, 0.0)
        valid = depth > 0
        return io.NodeOutput(
            image,
            image_from_depth(depth),
            valid[:, 0].float(),
            geometry_from_depth(depth, valid, image),
            _captions()[scene],
        )


def _captions() -> dict[str, str]:
    """Of the scenes on board, by name."""
    return json.loads((EMBEDDED_SCENES / "captions.json").read_text(encoding="utf-8"))


def _pipeline_folders() -> dict[str, Path]:
    """Modality Forcing pipelines in ComfyUI's diffusers folders, by name."""
    folders = {}
    for root in map(Path, folder_paths.get_folder_paths("diffusers")):
        for index in sorted([*root.glob("*/model_index.json"), *root.glob("*/*/model_index.json")]):
            if '"ModalityForcingPipeline"' in index.read_text(encoding="utf-8"):
                folders.setdefault(index.parent.relative_to(root).as_posix(), index.parent)
    return folders
