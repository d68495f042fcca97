"""Nodes around the model: RGB-D latents in and out, the trajectory, and what to do with depth.

Raw depth travels as IMAGE: float32, three equal channels, larger is farther, so that ComfyUI's own nodes can save it.
"""

import io as bytes_io
import logging
import os
import tempfile
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from comfy.nested_tensor import NestedTensor
from comfy_api.latest import ComfyExtension, Types, io
from comfy_execution.graph_utils import ExecutionBlocker

from .depth_images import depth_from_image, encode_depth, image_from_depth
from .model import ModalityForcing
from .streams import DEFAULT_LOG2_ALPHA, DEPTH_STRENGTHS, held_at


CATEGORY = "Modality Forcing"
EMBEDDED = "embedded model (small, on board)"
DEPTH_SUFFIXES = (".png", ".npy", ".npz", ".exr", ".tif", ".tiff", ".pfm")  # of mf_diffusers.depth_io, which is heavy
COLORMAPS = {
    "spectral (near red, far blue)": "Spectral",
    "turbo (near red, far blue)": "turbo_r",
    "inferno (near bright)": "inferno_r",
    "gray (near bright)": "gray_r",
    "gray (far bright)": "gray",
}
INFO = "modality_forcing"  # key in a LATENT: (height, width) to return, and the scale of a given depth map
MogeGeometry = io.Custom("MOGE_GEOMETRY")


class LoadPipeline(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ModalityForcingLoadPipeline",
            display_name="Load Modality Forcing Pipeline",
            category=CATEGORY,
            description="Opens a Modality Forcing pipeline in diffusers' layout, or the small embedded model, as MODEL, "
            "CLIP and VAE. Single files open with the stock 'Load Diffusion Model'.",
            search_aliases=["modality forcing", "depth model", "rgbd", "rgb-d", "diffusers loader", "embedded model"],
            inputs=[
                io.Combo.Input(
                    "pipeline",
                    options=[EMBEDDED, *_pipeline_folders()],
                    default=EMBEDDED,
                    tooltip="A folder in ComfyUI/models/diffusers, written by 'mf-diffusers convert' or save_pretrained; "
                    "or the embedded model, which needs no download and knows simple scenes of 64 x 64 pixels.",
                )
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls, pipeline) -> io.NodeOutput:
        from mf_diffusers.demo import EMBEDDED_MODEL

        from .loader import load_pipeline

        folder = EMBEDDED_MODEL if pipeline == EMBEDDED else _pipeline_folders()[pipeline]
        if not folder.is_dir():
            raise FileNotFoundError(
                f"This installation has no embedded model ({folder}): choose a folder of ComfyUI/models/diffusers, or "
                "open a single file with 'Load Diffusion Model'."
            )
        model, clip, vae = load_pipeline(folder)
        no_clip = ExecutionBlocker(f"{pipeline} has no text encoder: connect 'Load CLIP' of type flux2 with its Qwen3.")
        return io.NodeOutput(model, no_clip if clip is None else clip, vae)


class EmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ModalityForcingEmptyLatent",
            display_name="Empty RGB-D Latent",
            category=CATEGORY,
            description="The start of text to image and depth: both are made.",
            search_aliases=["empty latent", "rgbd latent", "rgb-d", "text to image and depth"],
            inputs=[
                _model_input(),
                io.Int.Input(
                    "width",
                    default=512,
                    min=16,
                    max=4096,
                    step=8,
                    tooltip="Width in pixels. The published model knows areas near 512 x 512, the embedded one 64 x 64.",
                ),
                io.Int.Input("height", default=512, min=16, max=4096, step=8, tooltip="Height in pixels."),
                io.Int.Input("batch_size", default=1, min=1, max=256, tooltip="How many images, each with its depth."),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, model, width, height, batch_size) -> io.NodeOutput:
        channels, token = _geometry(model)
        rows, columns = (max(1, round(side / token)) for side in (height, width))
        if (height, width) != (rows * token, columns * token):
            logging.warning(
                f"{height}x{width} (H x W) is no multiple of {token}: made at {rows * token}x{columns * token}."
            )
        image, depth = _zeros(batch_size, channels, rows, columns), _zeros(batch_size, 1, rows * token, columns * token)
        return io.NodeOutput({"samples": NestedTensor((image, depth)), INFO: {"size": (height, width), "scale": None}})


class Encode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ModalityForcingEncode",
            display_name="Encode RGB-D",
            category=CATEGORY,
            description="Gives the model an image, to make depth of it, or a depth map, to make images of it. What is "
            "kept stays as it is; the other one is made at full denoise.",
            search_aliases=[
                "image to depth",
                "depth to image",
                "depth estimation",
                "depth control",
                "rgbd",
                "vae encode",
            ],
            inputs=[
                _model_input(),
                io.Vae.Input("vae", optional=True, tooltip="The model's VAE. Needed where an image is connected."),
                io.Image.Input("image", optional=True, tooltip="Photo or photos of any size to make depth of."),
                io.Image.Input(
                    "depth",
                    optional=True,
                    tooltip="Raw depth to make images of, in any unit: larger is farther; 0, negative, NaN and inf are "
                    "missing. From 'Load Depth' or 'Decode RGB-D'.",
                ),
                io.Mask.Input("depth_mask", optional=True, tooltip="1 where depth counts, 0 where it is missing."),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="An RGB-D latent that fills in for what is not connected: to refine depth, connect a finished "
                    "one and keep its image.",
                ),
                io.Combo.Input(
                    "keep",
                    options=["what is connected", "image", "depth", "nothing"],
                    default="what is connected",
                    tooltip="What is given and stays as it is. 'nothing' lets both change: for a denoise below 1.",
                ),
                io.Combo.Input(
                    "depth_strength",
                    options=list(DEPTH_STRENGTHS),
                    default="rigid",
                    tooltip="How closely the image follows the depth that is kept: pixel by pixel (rigid) down to the "
                    "rough layout (loose). log2_alpha -14 (tight), -11, -8, -5 (loose).",
                ),
                io.Boolean.Input(
                    "inverse_depth",
                    default=False,
                    tooltip="On for maps in which bright is near, as Depth Anything, MiDaS and ControlNet pictures have it.",
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=4096,
                    step=16,
                    tooltip="Side of the square whose area is worked on, the aspect ratio kept; results return at the "
                    "input's own size. 0: the model's own size.",
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
        from mf_diffusers.modality_forcing.image_processor import processing_size, resize

        channels, token = _geometry(model)
        image_latent, depth_map = (None, None) if latent is None else _streams_of(latent)
        if latent is not None:
            rows, columns = image_latent.shape[-2:]
            output_size = latent.get(INFO, {}).get("size", (rows * token, columns * token))
        connected = [x for x in (image, depth) if x is not None]
        if not connected and latent is None:
            raise ValueError("Nothing is connected: give an image to make depth of it, or depth to make images of it.")
        if len({tuple(x.shape[1:3]) for x in connected}) > 1:
            raise ValueError(
                f"The image is {_size(image)} and the depth {_size(depth)} (H x W): resize one of them to the other."
            )
        if connected:
            output_size = tuple(connected[0].shape[1:3])
        if latent is None:
            side = size or model.model.sample_size
            working = processing_size(*output_size, pixels=side * side, multiple=token)
            rows, columns = (length // token for length in working)
        working = (rows * token, columns * token)

        scale, missing = None, None
        if image is not None:
            if vae is None:
                raise ValueError("An image is connected, but no VAE: connect the VAE of the model.")
            pixels = resize(image[..., :3].movedim(-1, 1).float().clamp(0, 1), working)
            image_latent = vae.encode(pixels.movedim(1, -1)).float()
            if tuple(image_latent.shape[1:]) != (channels, rows, columns):
                raise ValueError(
                    f"This VAE makes latents {list(image_latent.shape[1:])}, the model takes {[channels, rows, columns]}: "
                    "connect the VAE that belongs to the model."
                )
        if depth is not None:
            depth_map, missing, scale = encode_depth(depth, depth_mask, working, inverse_depth)

        keep = _what_to_keep(keep, image, depth, image_latent, depth_map)
        batch = {len(x) for x in (image_latent, depth_map) if x is not None} - {1} or {1}
        if len(batch) > 1:
            raise ValueError(
                f"{len(image_latent)} images do not go with {len(depth_map)} depth maps: give as many, or one of either."
            )
        (batch_size,) = batch
        image_latent = _zeros(1, channels, rows, columns) if image_latent is None else image_latent
        depth_map = _zeros(1, 1, *working) if depth_map is None else depth_map
        image_latent, depth_map = (x.expand(batch_size, -1, -1, -1).clone() for x in (image_latent, depth_map))
        out = {
            "samples": NestedTensor((image_latent, depth_map)),
            INFO: {"size": output_size, "scale": None if keep == "image" else scale},
        }
        if keep != "nothing":
            image_mask, noise_mask = torch.ones_like(image_latent[:, :1]), torch.ones_like(depth_map)
            if keep == "image":
                image_mask.zero_()
            else:
                # A map from a latent has lost its mask: what is missing there is 0.
                missing = depth_map == 0 if missing is None else missing
                noise_mask = torch.where(missing, 1.0, held_at(depth_strength)).expand(batch_size, -1, -1, -1)
            out["noise_mask"] = NestedTensor((image_mask, noise_mask))
        return io.NodeOutput(out)


class Trajectory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ModalityForcingTrajectory",
            display_name="Modality Forcing Trajectory",
            category=CATEGORY,
            description="Which of image and depth settles first when both are made. Works with any sampler and scheduler.",
            search_aliases=["log2_alpha", "trajectory", "noise schedule", "modality forcing", "depth quality"],
            inputs=[
                _model_input(),
                io.Float.Input(
                    "log2_alpha",
                    default=DEFAULT_LOG2_ALPHA,
                    min=-14.0,
                    max=14.0,
                    step=0.5,
                    tooltip="Above 0 the image settles first, which gives better depth (a model starts with 5); 0: both "
                    "together; below 0 depth settles first.",
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
            description="Splits an RGB-D latent into image, raw depth and the mask of valid depth, at the size of what was "
            "encoded. The stock 'VAE Decode' gives the image too, at the size it was worked on.",
            search_aliases=["decode depth", "split rgbd", "vae decode", "raw depth", "depth map"],
            inputs=[
                io.Latent.Input("latent", tooltip="From a sampler."),
                io.Vae.Input(
                    "vae", optional=True, tooltip="The model's VAE. Leave it out where the image is not needed."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="Needs a VAE."),
                io.Image.Output(
                    display_name="depth",
                    tooltip="Raw float depth, larger is farther: relative, near 1 in the mean; in its own unit where it "
                    "was given. Save it as EXR with input_color_space 'linear'.",
                ),
                io.Mask.Output(display_name="valid", tooltip="1 where depth is valid, 0 in the sky and in holes."),
            ],
        )

    @classmethod
    def execute(cls, latent, vae=None) -> io.NodeOutput:
        from mf_diffusers import DepthProcessor
        from mf_diffusers.modality_forcing.image_processor import resize

        image_latent, depth_map = _streams_of(latent)
        info = latent.get(INFO, {})
        size, scale = info.get("size", tuple(depth_map.shape[-2:])), info.get("scale")
        processor = DepthProcessor(patch_size=1)
        depth, valid = processor.postprocess(
            processor.patchify(depth_map), *depth_map.shape[-2:], output_size=size, scale=scale
        )
        image = ExecutionBlocker("'Decode RGB-D' makes an image only with a VAE: connect the model's.")
        if vae is not None:
            image = resize(vae.decode(image_latent).movedim(-1, 1), size).movedim(1, -1)
        return io.NodeOutput(image, image_from_depth(depth), valid[:, 0].float())


class DepthPicture(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ModalityForcingDepthPicture",
            display_name="Depth to Picture",
            category=CATEGORY,
            description="Colours raw depth for the eye, or turns it into a gray map. It carries no depth values any more.",
            search_aliases=["colorize depth", "depth preview", "visualize depth", "colormap"],
            inputs=[
                *_depth_inputs(),
                io.Combo.Input(
                    "colormap", options=list(COLORMAPS), tooltip="Colours follow inverse depth, as eyes do."
                ),
                io.Float.Input(
                    "near",
                    default=0.0,
                    min=0.0,
                    max=1e6,
                    step=0.01,
                    tooltip="Depth at which the colours begin. 0: the 2nd percentile of each map.",
                ),
                io.Float.Input(
                    "far",
                    default=0.0,
                    min=0.0,
                    max=1e6,
                    step=0.01,
                    tooltip="Depth at which the colours end. 0: the 98th percentile of each map.",
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, depth, colormap, near, far, valid=None) -> io.NodeOutput:
        from mf_diffusers.visualization import colorize_depth

        depth, valid = depth_from_image(depth, valid)
        picture = colorize_depth(
            depth[:, 0].numpy(), valid[:, 0].numpy(), cmap=COLORMAPS[colormap], near=near or None, far=far or None
        )
        return io.NodeOutput(torch.from_numpy(picture).float() / 255)


class DepthPoints(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ModalityForcingDepthPoints",
            display_name="Depth to Points",
            category=CATEGORY,
            description="Raw depth to coloured point clouds (PLY) and to the geometry that ComfyUI's own MoGe nodes turn "
            "into meshes and normal maps.",
            search_aliases=["point cloud", "ply", "depth to mesh", "3d", "unproject", "moge geometry", "normals"],
            inputs=[
                *_depth_inputs(),
                io.Image.Input("image", optional=True, tooltip="Colours of the points, of the size of the depth."),
                io.Float.Input(
                    "fov",
                    default=55.0,
                    min=1.0,
                    max=170.0,
                    step=0.5,
                    tooltip="Field of view of the camera along the longer side, in degrees. Phones see 50 to 80.",
                ),
                io.Float.Input(
                    "edge_threshold",
                    default=0.1,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Points at depth jumps of more than this share are left out, where they would fly between "
                    "surfaces. 0: all stay.",
                ),
            ],
            outputs=[
                io.File3DPLY.Output(
                    display_name="point_cloud",
                    is_output_list=True,
                    tooltip="One PLY for each map; 'Save 3D Model' and 'Preview Point Cloud' take it.",
                ),
                MogeGeometry.Output(display_name="moge_geometry", tooltip="For the stock MoGe render and mesh nodes."),
            ],
        )

    @classmethod
    def execute(cls, depth, fov, edge_threshold, valid=None, image=None) -> io.NodeOutput:
        from mf_diffusers.geometry import depth_edges, intrinsics_from_fov, point_cloud, unproject

        maps, valid = depth_from_image(depth, valid)
        if image is not None and (image.shape[1:3] != depth.shape[1:3] or len(image) not in (1, len(depth))):
            raise ValueError(
                f"{len(image)} images of {_size(image)} do not fit {len(depth)} depth maps of {_size(depth)} (H x W): "
                "connect the image that belongs to the depth."
            )
        picture = torch.full((*depth.shape[:3], 3), 0.75) if image is None else image[..., :3].cpu().float()
        picture = picture.expand(len(depth), -1, -1, -1)
        height, width = depth.shape[1:3]
        camera = intrinsics_from_fov(width, height, fov)
        clouds, points, kept = [], [], []
        for values, mask, colors in zip(maps[:, 0].numpy(), valid[:, 0].numpy(), picture):
            colors = (colors.clamp(0, 1) * 255).round().byte().numpy()
            cloud = point_cloud(values, colors, mask, intrinsics=camera, edge_threshold=edge_threshold or None)
            clouds.append(_ply(*cloud))
            mask = mask & (values > 0)
            if edge_threshold:
                mask = mask & ~depth_edges(values, mask, edge_threshold)
            points.append(torch.from_numpy(unproject(values, camera)))
            kept.append(torch.from_numpy(mask))
        kept, normalized = torch.stack(kept), torch.tensor(camera, dtype=torch.float32)
        # ComfyUI's cameras measure in pictures, with pixel centres at halves.
        normalized[0] = torch.tensor([camera[0, 0] / width, 0, 0.5])
        normalized[1] = torch.tensor([0, camera[1, 1] / height, 0.5])
        geometry = {
            "points": torch.where(kept[..., None], torch.stack(points), torch.inf),
            "depth": torch.where(kept, maps[:, 0], torch.inf),
            "intrinsics": normalized.expand(len(maps), -1, -1),
            "mask": kept,
            "image": picture,
        }
        return io.NodeOutput(clouds, geometry)


class LoadDepth(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        folder = Path(folder_paths.get_input_directory())
        files = [
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in DEPTH_SUFFIXES
        ]
        return io.Schema(
            node_id="ModalityForcingLoadDepth",
            display_name="Load Depth",
            category=CATEGORY,
            description="Reads raw depth from EXR, 16-bit PNG, npy, npz, TIFF or PFM, unrounded and in its unit.",
            search_aliases=["load exr", "load npy", "16-bit png", "depth file", "import depth"],
            inputs=[
                io.Combo.Input("file", options=sorted(files), tooltip="A depth file in ComfyUI's input folder."),
                io.Float.Input(
                    "scale",
                    default=0.0,
                    min=0.0,
                    max=1e6,
                    step=0.0001,
                    tooltip="What stored values are multiplied by: 0.001 for millimetres. 0: as the file says, else 1.",
                ),
                io.Float.Input(
                    "missing_value",
                    default=0.0,
                    min=0.0,
                    max=1e12,
                    step=1.0,
                    tooltip="A stored value that means 'missing', 65535 for one; 0, negative, NaN and inf always do.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="depth", tooltip="Raw float depth, 0 where it is missing."),
                io.Mask.Output(display_name="valid", tooltip="1 where there is depth."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file) -> bool | str:
        path = Path(folder_paths.get_annotated_filepath(file)).resolve()
        roots = (
            folder_paths.get_input_directory(),
            folder_paths.get_output_directory(),
            folder_paths.get_temp_directory(),
        )
        if not any(path.is_relative_to(os.path.realpath(root)) for root in roots):
            return f"{file} lies outside ComfyUI's folders: copy it into {roots[0]}."
        if not path.is_file():
            return f"There is no file {file} in {roots[0]}: copy it there, or choose another."
        return True

    @classmethod
    def fingerprint_inputs(cls, file, **kwargs):
        status = os.stat(folder_paths.get_annotated_filepath(file))
        return status.st_mtime_ns, status.st_size

    @classmethod
    def execute(cls, file, scale, missing_value) -> io.NodeOutput:
        from mf_diffusers.depth_io import read_depth

        depth = read_depth(
            folder_paths.get_annotated_filepath(file), scale=scale or None, invalid=missing_value or None
        )
        depth = torch.from_numpy(depth)[None, None]
        return io.NodeOutput(image_from_depth(depth), (depth[:, 0] > 0).float())


class ModalityForcingExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadPipeline, EmptyLatent, Encode, Trajectory, Decode, DepthPicture, DepthPoints, LoadDepth]


def _model_input() -> io.Model.Input:
    return io.Model.Input(
        "model", tooltip="A Modality Forcing model, from 'Load Diffusion Model' or 'Load Modality Forcing Pipeline'."
    )


def _depth_inputs() -> list[io.Input]:
    return [
        io.Image.Input("depth", tooltip="Raw depth, larger is farther. From 'Decode RGB-D' or 'Load Depth'."),
        io.Mask.Input(
            "valid", optional=True, tooltip="1 where depth counts. Left out: wherever it is positive and finite."
        ),
    ]


def _pipeline_folders() -> dict[str, Path]:
    """Modality Forcing pipelines in ComfyUI's diffusers folders, by name."""
    folders = {}
    for root in map(Path, folder_paths.get_folder_paths("diffusers")):
        for index in sorted([*root.glob("*/model_index.json"), *root.glob("*/*/model_index.json")]):
            if '"ModalityForcingPipeline"' in index.read_text(encoding="utf-8"):
                folders.setdefault(index.parent.relative_to(root).as_posix(), index.parent)
    return folders


def _geometry(model) -> tuple[int, int]:
    """Channels of an image latent, and pixels along a token."""
    if not isinstance(model.model, ModalityForcing):
        raise ValueError(
            f"This model ({type(model.model).__name__}) has no depth stream: connect a Modality Forcing model, from 'Load "
            "Diffusion Model' or 'Load Modality Forcing Pipeline'."
        )
    return model.model.latent_format.latent_channels, model.model.latent_format.spacial_downscale_ratio


def _streams_of(latent: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Image latents (B, C, h, w) and depth maps (B, 1, H, W) of an RGB-D latent."""
    samples = latent["samples"]
    streams = samples.unbind() if getattr(samples, "is_nested", False) else [samples]
    if len(streams) != 2 or streams[1].ndim != 4 or streams[1].shape[1] != 1:
        raise ValueError(
            f"This latent has shapes {[list(x.shape) for x in streams]} and no depth in it: connect one from 'Empty RGB-D "
            "Latent' or 'Encode RGB-D', through a sampler."
        )
    return tuple(x.float() for x in streams)


def _what_to_keep(keep: str, image, depth, image_latent, depth_map) -> str:
    if keep == "what is connected":
        if (image is None) == (depth is None):
            raise ValueError("Say what to `keep`: 'image' (depth is made), 'depth' (the image is made) or 'nothing'.")
        return "image" if depth is None else "depth"
    for name, latent in (("image", image_latent), ("depth", depth_map)):
        if keep == name and latent is None:
            raise ValueError(f"`keep` is '{name}', but there is none: connect {name}, or a latent that has it.")
    return keep


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, device=comfy.model_management.intermediate_device())


def _size(image: torch.Tensor) -> str:
    return "x".join(map(str, image.shape[1:3]))


def _ply(points, colors) -> Types.File3D:
    from mf_diffusers.geometry import save_ply

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "points.ply")
        save_ply(path, points, colors)
        return Types.File3D(bytes_io.BytesIO(path.read_bytes()), file_format="ply")


async def comfy_entrypoint() -> ModalityForcingExtension:
    return ModalityForcingExtension()
