"""Nodes around the model: RGB-D latents in and out, the trajectory, and what to do with depth."""

import logging
import os
from io import BytesIO
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from comfy.nested_tensor import NestedTensor
from comfy_api.latest import ComfyExtension, Types, io
from comfy_execution.graph_utils import ExecutionBlocker

import mf_diffusers
from mf_diffusers.depth_io import DEPTH_SUFFIXES, read_depth
from mf_diffusers.embedded import EMBEDDED_MODEL
from mf_diffusers.geometry import EDGE_THRESHOLD, FOV_DEGREES
from mf_diffusers.modality_forcing.conversion import PUBLISHED_SETTINGS
from mf_diffusers.modality_forcing.image_processor import processing_size, resize
from mf_diffusers.visualization import colorize_depth

from .depth_sockets import depth_from_image, encode_depth, image_from_depth, points_from_depth
from .model import ModalityForcing
from .streams import DEPTH_STRENGTHS, held_at


CATEGORY = "Modality Forcing"
EMBEDDED = "embedded model (small, on board)"
KEEP_AUTO = "what is connected"
COLORMAPS = {
    "spectral (near red, far blue)": "Spectral",
    "turbo (near red, far blue)": "turbo_r",
    "inferno (near bright)": "inferno_r",
    "gray (near bright)": "gray_r",
    "gray (far bright)": "gray",
}
# Key in a LATENT: the "size" (height, width) to return, the "scale" (B,) of given depth, and the model's
# "depth_processor".
INFO = "modality_forcing"

MODEL_TIP = "A Modality Forcing model, from 'Load Diffusion Model' or 'Load Modality Forcing Pipeline'."
RAW_DEPTH_TIP = "Raw depth, larger is farther. From 'Decode RGB-D' or 'Load Depth'."
VALID_TIP = "1 where depth counts. Left out: wherever it is positive and finite."
MogeGeometry = io.Custom("MOGE_GEOMETRY")


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
            clip = _blocked(
                cls, 1, f"{pipeline} has no text encoder: connect 'Load CLIP' of type flux2 with its Qwen3."
            )
        return io.NodeOutput(model, clip, vae)


class EmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        side = {"default": 512, "min": 16, "max": 4096, "step": 8}
        return io.Schema(
            node_id="ModalityForcingEmptyLatent",
            display_name="Empty RGB-D Latent",
            category=CATEGORY,
            description="The start of text to image and depth: both are made.",
            search_aliases=["empty latent", "rgbd latent", "rgb-d", "text to image and depth"],
            inputs=[
                io.Model.Input("model", tooltip=MODEL_TIP),
                io.Int.Input("width", **side, tooltip="In pixels. The published model was made for 512 x 512."),
                io.Int.Input("height", **side, tooltip="In pixels. The embedded model was made for 64 x 64."),
                io.Int.Input("batch_size", default=1, min=1, max=256, tooltip="How many images, each with its depth."),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, model, width, height, batch_size) -> io.NodeOutput:
        channels, token = _geometry(model)
        rows, columns = (max(1, round(side / token)) for side in (height, width))
        working = (rows * token, columns * token)
        if working != (height, width):
            logging.warning(f"{height}x{width} (H x W) is no multiple of {token}: made at {working[0]}x{working[1]}.")
        samples = NestedTensor((_zeros(batch_size, channels, rows, columns), _zeros(batch_size, 1, *working)))
        return io.NodeOutput(
            {"samples": samples, INFO: {"size": (height, width), "depth_processor": model.model.depth_processor}}
        )


class Encode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ModalityForcingEncode",
            display_name="Encode RGB-D",
            category=CATEGORY,
            description="Gives an image, to make depth of it, or a depth map, to make images of it.",
            search_aliases=[
                "image to depth",
                "depth to image",
                "depth estimation",
                "depth control",
                "rgbd",
                "vae encode",
            ],
            inputs=[
                io.Model.Input("model", tooltip=MODEL_TIP),
                io.Vae.Input("vae", optional=True, tooltip="The model's VAE. Needed where an image is connected."),
                io.Image.Input("image", optional=True, tooltip="Image or batch of any size, to make depth of."),
                io.Image.Input(
                    "depth",
                    optional=True,
                    tooltip="Raw depth to make images of, in any unit: larger is farther; 0, negative and NaN are "
                    "missing, and so is inf unless the model knows infinite depth. From 'Load Depth' or 'Decode "
                    "RGB-D'.",
                ),
                io.Mask.Input("depth_mask", optional=True, tooltip="1 where depth counts, 0 where it is missing."),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="An RGB-D latent to take what is not connected from: keep the image of a finished one to "
                    "make its depth anew.",
                ),
                io.Combo.Input(
                    "keep",
                    options=[KEEP_AUTO, "image", "depth", "nothing"],
                    default=KEEP_AUTO,
                    tooltip="What is given and stays as it is. 'nothing' lets both change, for a denoise below 1.",
                ),
                io.Combo.Input(
                    "depth_strength",
                    options=list(DEPTH_STRENGTHS),
                    default="rigid",
                    tooltip="How closely the image follows depth that is kept: rigid is pixel by pixel; then come the "
                    "log2_alpha -14 (tight), -11, -8 and -5 (loose).",
                ),
                io.Boolean.Input(
                    "inverse_depth",
                    default=False,
                    tooltip="On for maps in which bright is near, as those of Depth Anything, MiDaS and ControlNets.",
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=4096,
                    step=16,
                    tooltip="Size to work at, in pixels: the longer side, or for some models, such as the embedded "
                    "one, the side of a square of the same area. Aspect ratio and output size remain the input's. 0: "
                    "the size that the model was made for.",
                ),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(
        cls,
        model,
        keep,
        depth_strength,
        inverse_depth,
        size,
        vae=None,
        image=None,
        depth=None,
        depth_mask=None,
        latent=None,
    ) -> io.NodeOutput:
        channels, token = _geometry(model)
        keep = _what_to_keep(keep, image, depth, latent)
        if depth_mask is not None and depth is None:
            raise ValueError("A depth mask is connected, but no depth: connect both.")
        (rows, columns), output_size = _sizes(model, size, image, depth, latent)
        working = (rows * token, columns * token)
        images, depths = _streams_of(latent) if latent else (_zeros(1, channels, rows, columns), _zeros(1, 1, *working))
        missing, scale = depths == 0, None  # 0 is what a latent holds where depth is missing
        if image is not None:
            images = _encode_image(vae, image, working, (channels, rows, columns))
        if depth is not None:
            depths, missing, scale = encode_depth(
                depth, depth_mask, working, model.model.depth_processor, inverse_depth
            )

        batch_size = max(len(images), len(depths))
        if {len(images), len(depths)} - {1, batch_size}:
            raise ValueError(
                f"{len(images)} images do not go with {len(depths)} depth maps: give as many, or one of either."
            )
        device = comfy.model_management.intermediate_device()
        images, depths, missing = (x.to(device).expand(batch_size, -1, -1, -1) for x in (images, depths, missing))
        streams = [images.clone(), depths.clone()]
        if keep != "nothing":
            image_held = torch.full_like(depths, 0.0 if keep == "image" else 1.0)
            depth_held = (
                torch.where(missing, 1.0, held_at(depth_strength)) if keep == "depth" else torch.ones_like(depths)
            )
            streams.append(torch.cat([image_held, depth_held], dim=1))
        info = {
            "size": output_size,
            "scale": None if keep == "image" else scale,
            "depth_processor": model.model.depth_processor,
        }
        return io.NodeOutput({"samples": NestedTensor(streams), INFO: info})


class Trajectory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ModalityForcingTrajectory",
            display_name="Modality Forcing Trajectory",
            category=CATEGORY,
            description="Which of image and depth settles first when both are made, with any sampler and scheduler.",
            search_aliases=["log2_alpha", "trajectory", "noise schedule", "modality forcing", "depth quality"],
            inputs=[
                io.Model.Input("model", tooltip=MODEL_TIP),
                io.Float.Input(
                    "log2_alpha",
                    default=PUBLISHED_SETTINGS["default_log2_alpha"],
                    min=-14.0,
                    max=14.0,
                    step=0.5,
                    tooltip="Above 0 the image settles first, which gives better depth (models start with 5). 0: both "
                    "together. Below 0 depth settles first.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, log2_alpha) -> io.NodeOutput:
        _geometry(model)
        model = model.clone()
        model.add_object_patch("log2_alpha", log2_alpha)
        return io.NodeOutput(model)


class Decode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ModalityForcingDecode",
            display_name="Decode RGB-D",
            category=CATEGORY,
            description="Splits an RGB-D latent into image, raw depth and its validity, at the size of the input.",
            search_aliases=["decode depth", "split rgbd", "vae decode", "raw depth", "depth map"],
            inputs=[
                io.Latent.Input("latent", tooltip="An RGB-D latent, from a sampler."),
                io.Vae.Input("vae", optional=True, tooltip="The model's VAE. Left out: depth alone is decoded."),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="Needs the VAE."),
                io.Image.Output(
                    display_name="depth",
                    tooltip="Raw float depth, larger is farther: relative, about 1 in the mean; depth that was given "
                    "has its own unit. To save it: EXR with input_color_space 'linear'.",
                ),
                io.Mask.Output(display_name="valid", tooltip="1 where depth is valid, 0 in the sky and in holes."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, latent, vae=None) -> io.NodeOutput:
        images, depths = _streams_of(latent)
        depths, info = depths.cpu(), latent.get(INFO, {})
        working = tuple(depths.shape[-2:])
        size = info.get("size", working)
        processor = info.get("depth_processor") or mf_diffusers.DepthProcessor(patch_size=1)
        depth, valid = processor.postprocess(processor.patchify(depths), *working, size, info.get("scale"))
        if vae is None:
            image = _blocked(cls, 0, "The image is wanted, but no VAE is connected: connect the VAE of the model.")
        else:
            image = resize(vae.decode(images).movedim(-1, 1), size).movedim(1, -1)
        return io.NodeOutput(image, image_from_depth(depth), valid[:, 0].float())


class DepthPicture(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ModalityForcingDepthPicture",
            display_name="Depth to Picture",
            category=CATEGORY,
            description="Colours raw depth for the eye. A picture carries no depth values any more.",
            search_aliases=["colorize depth", "depth preview", "visualize depth", "colormap"],
            inputs=[
                io.Image.Input("depth", tooltip=RAW_DEPTH_TIP),
                io.Mask.Input("valid", optional=True, tooltip=VALID_TIP),
                io.Combo.Input(
                    "colormap", options=list(COLORMAPS), tooltip="Colours follow inverse depth, as eyes do."
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, depth, colormap, valid=None) -> io.NodeOutput:
        depth, valid = depth_from_image(depth, valid)
        picture = colorize_depth(depth[:, 0].numpy(), valid[:, 0].numpy(), COLORMAPS[colormap])
        return io.NodeOutput(torch.from_numpy(picture).float() / 255)


class DepthPoints(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ModalityForcingDepthPoints",
            display_name="Depth to Points",
            category=CATEGORY,
            description="Raw depth to coloured point clouds, and to geometry for ComfyUI's MoGe mesh and render nodes.",
            search_aliases=["point cloud", "ply", "depth to mesh", "3d", "unproject", "moge geometry", "normals"],
            inputs=[
                io.Image.Input("depth", tooltip=RAW_DEPTH_TIP),
                io.Mask.Input("valid", optional=True, tooltip=VALID_TIP),
                io.Image.Input("image", optional=True, tooltip="Colours of the points, of the size of the depth."),
                io.Float.Input(
                    "fov",
                    default=FOV_DEGREES,
                    min=1.0,
                    max=170.0,
                    step=0.5,
                    tooltip="Field of view along the longer side, in degrees. Phones see 50 to 80.",
                ),
                io.Float.Input(
                    "edge_threshold",
                    default=EDGE_THRESHOLD,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Points at depth jumps above this share are left out, where they fly between surfaces. "
                    "0: all stay.",
                ),
            ],
            outputs=[
                io.File3DPLY.Output(display_name="point_cloud", is_output_list=True, tooltip="One PLY for each map."),
                MogeGeometry.Output(display_name="moge_geometry", tooltip="For the stock MoGe render and mesh nodes."),
            ],
        )

    @classmethod
    def execute(cls, depth, fov, edge_threshold, valid=None, image=None) -> io.NodeOutput:
        files, geometry = points_from_depth(depth, valid, image, fov, edge_threshold or None)
        return io.NodeOutput([Types.File3D(BytesIO(ply), file_format="ply") for ply in files], geometry)


class LoadDepth(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        folder = Path(folder_paths.get_input_directory())
        files = [path for path in folder.rglob("*") if path.suffix.lower() in DEPTH_SUFFIXES]
        return io.Schema(
            node_id="ModalityForcingLoadDepth",
            display_name="Load Depth",
            category=CATEGORY,
            description="Reads raw depth from EXR, 16-bit PNG, npy, npz, TIFF or PFM, unrounded and in its unit.",
            search_aliases=["load exr", "load npy", "16-bit png", "depth file", "import depth"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=sorted(path.relative_to(folder).as_posix() for path in files),
                    tooltip="A depth file in ComfyUI's input folder.",
                ),
                io.Float.Input(
                    "scale",
                    default=0.0,
                    min=0.0,
                    max=1e6,
                    step=0.0001,
                    tooltip="What stored values are multiplied by: 0.001 for millimetres. 0: what the file says, or 1.",
                ),
                io.Float.Input(
                    "missing_value",
                    default=0.0,
                    min=0.0,
                    max=1e12,
                    step=1.0,
                    tooltip="A stored value that means 'missing', such as 65535. 0, negative and NaN always do.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="depth", tooltip="Raw float depth, 0 where it is missing."),
                io.Mask.Output(display_name="valid", tooltip="1 where there is depth."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file) -> bool | str:
        folder = folder_paths.get_input_directory()
        allowed = (folder, folder_paths.get_output_directory(), folder_paths.get_temp_directory())
        try:
            path = Path(folder_paths.get_annotated_filepath(file)).resolve()
            within = any(path.is_relative_to(os.path.realpath(root)) for root in allowed)
        except ValueError:  # newer ComfyUI looks, too, but names no remedy
            within = False
        if not within:
            return f"{file} lies outside ComfyUI's folders: copy it into {folder}."
        return True if path.is_file() else f"There is no file {file} in {folder}: copy it there, or choose another."

    @classmethod
    def fingerprint_inputs(cls, file, **kwargs):
        status = os.stat(folder_paths.get_annotated_filepath(file))
        return status.st_mtime_ns, status.st_size

    @classmethod
    def execute(cls, file, scale, missing_value) -> io.NodeOutput:
        depth = read_depth(folder_paths.get_annotated_filepath(file), scale or None, missing_value or None)
        depth = torch.from_numpy(depth)[None, None]
        return io.NodeOutput(image_from_depth(depth), (depth[:, 0] > 0).float())


class ModalityForcingExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadPipeline, EmptyLatent, Encode, Trajectory, Decode, DepthPicture, DepthPoints, LoadDepth]


async def comfy_entrypoint() -> ModalityForcingExtension:
    return ModalityForcingExtension()


def _pipeline_folders() -> dict[str, Path]:
    """Modality Forcing pipelines in ComfyUI's diffusers folders, by name."""
    folders = {}
    for root in map(Path, folder_paths.get_folder_paths("diffusers")):
        for index in sorted([*root.glob("*/model_index.json"), *root.glob("*/*/model_index.json")]):
            if '"ModalityForcingPipeline"' in index.read_text(encoding="utf-8"):
                folders.setdefault(index.parent.relative_to(root).as_posix(), index.parent)
    return folders


def _geometry(model) -> tuple[int, int]:
    """Channels of a model's image latents, and pixels along its tokens."""
    if not isinstance(model.model, ModalityForcing):
        raise ValueError(
            f"This model ({type(model.model).__name__}) has no depth stream: connect a Modality Forcing model, from "
            "'Load Diffusion Model' or 'Load Modality Forcing Pipeline'."
        )
    return model.model.latent_format.latent_channels, model.model.latent_format.spacial_downscale_ratio


def _streams_of(latent: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Image latents (B, C, h, w) and depth maps (B, 1, H, W) of an RGB-D latent."""
    samples = latent["samples"]
    streams = samples.unbind() if samples.is_nested else [samples]
    if len(streams) not in (2, 3) or streams[1].ndim != 4 or streams[1].shape[1] != 1:
        raise ValueError(
            f"This latent has shapes {[list(x.shape) for x in streams]} and no depth in it: connect one from 'Empty "
            "RGB-D Latent' or 'Encode RGB-D', through a sampler."
        )
    return tuple(x.float() for x in streams[:2])


def _what_to_keep(keep: str, image, depth, latent) -> str:
    if image is None and depth is None and latent is None:
        raise ValueError("Nothing is connected: give an image to make depth of it, or depth to make images of it.")
    if keep == KEEP_AUTO:
        if (image is None) == (depth is None):
            raise ValueError("Say what to `keep`: 'image' (depth is made), 'depth' (the image is made) or 'nothing'.")
        return "image" if depth is None else "depth"
    if latent is None and ((keep == "image" and image is None) or (keep == "depth" and depth is None)):
        raise ValueError(f"`keep` is '{keep}', but there is none: connect {keep}, or a latent that has it.")
    return keep


def _sizes(model, side: int, image, depth, latent) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of tokens to work with, and the (height, width) to return."""
    token = _geometry(model)[1]
    given = [tuple(x.shape[1:3]) for x in (image, depth) if x is not None]
    if len(set(given)) > 1:
        raise ValueError(
            f"The image is {given[0][0]}x{given[0][1]} and the depth {given[1][0]}x{given[1][1]} (H x W): resize one "
            "to the size of the other."
        )
    if latent is not None:
        images, depths = _streams_of(latent)
        return tuple(images.shape[-2:]), (given or [latent.get(INFO, {}).get("size", tuple(depths.shape[-2:]))])[0]
    side = side or model.model.sample_size
    height, width = processing_size(*given[0], pixels=side * side, multiple=token, rule=model.model.size_rule)
    return (height // token, width // token), given[0]


def _encode_image(vae, image: torch.Tensor, working: tuple[int, int], shape: tuple[int, int, int]) -> torch.Tensor:
    """IMAGE (B, H, W, C) -> latents (B, *shape)."""
    if vae is None:
        raise ValueError("An image is connected, but no VAE: connect the VAE of the model.")
    pixels = resize(image[..., :3].movedim(-1, 1).float().clamp(0, 1), working)
    latents = vae.encode(pixels.movedim(1, -1)).float()
    if tuple(latents.shape[1:]) != shape:
        raise ValueError(
            f"This VAE makes latents {list(latents.shape[1:])} where the model takes {list(shape)}: connect the VAE "
            "that belongs to the model."
        )
    return latents


def _blocked(node, output: int, message: str) -> ExecutionBlocker:
    """In place of an output that cannot be made. Raises ValueError where the graph wants it."""
    if any([node.hidden.unique_id, output] in consumer["inputs"].values() for consumer in node.hidden.prompt.values()):
        raise ValueError(message)
    return ExecutionBlocker(message)  # cached, it may be wanted later


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, device=comfy.model_management.intermediate_device())
