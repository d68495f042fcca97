"""Nodes for raw depth: from files, to pictures, masks, points and geometry, and many samples to one."""

import os
from io import BytesIO
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import Types, io

from mf_diffusers.depth_io import DEPTH_SUFFIXES, read_depth
from mf_diffusers.geometry import EDGE_THRESHOLD, FOV_DEGREES
from mf_diffusers.modality_forcing.ensemble import ensemble_depth
from mf_diffusers.visualization import colorize_depth

from .depth_sockets import (
    depth_from_image,
    fov_of,
    geometry_from_depth,
    image_from_depth,
    image_from_socket,
    points_from_depth,
)
from .sockets import CATEGORY, MogeGeometry, depth_input, depth_outputs, valid_input


COLORMAPS = {
    "spectral (near red, far blue)": "Spectral",
    "turbo (near red, far blue)": "turbo_r",
    "inferno (near bright)": "inferno_r",
    "gray (near bright)": "gray_r",
    "gray (far bright)": "gray",
}


class LoadDepth(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        folder = Path(folder_paths.get_input_directory())
        files = [path for path in folder.rglob("*") if path.suffix.lower() in DEPTH_SUFFIXES and may_be_depth(path)]
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
            outputs=depth_outputs(),
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
        return io.NodeOutput(image_from_depth(depth), (depth[:, 0] > 0).float(), geometry_from_depth(depth, depth > 0))


def may_be_depth(path: Path) -> bool:
    """Whether a file of a depth format is no picture: a PNG has 16 bits, or one channel."""
    if path.suffix.lower() != ".png":
        return True
    with path.open("rb") as file:
        header = file.read(26)
    return len(header) == 26 and (header[24] == 16 or header[25] == 0)


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
                depth_input(),
                valid_input(),
                io.Combo.Input(
                    "colormap", options=list(COLORMAPS), tooltip="Colours follow inverse depth, as eyes do."
                ),
                io.Combo.Input(
                    "range",
                    options=["each map", "whole batch"],
                    default="each map",
                    optional=True,
                    tooltip="What the colours span: for a video, the whole batch, so that they do not flicker.",
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, depth, colormap, valid=None, range="each map") -> io.NodeOutput:
        maps = [x[:, 0].numpy() for x in depth_from_image(*image_from_socket(depth, valid))]
        shape = maps[0].shape
        if range == "whole batch":
            maps = [x.reshape(-1, shape[-1]) for x in maps]
        picture = colorize_depth(*maps, COLORMAPS[colormap]).reshape(*shape, 3)
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
                depth_input(),
                valid_input(),
                io.Image.Input("image", optional=True, tooltip="Colours of the points, of the size of the depth."),
                io.Float.Input(
                    "fov",
                    default=FOV_DEGREES,
                    min=0.0,
                    max=170.0,
                    step=0.5,
                    tooltip="Field of view along the longer side, in degrees. Phones see 50 to 80. 0: that of the "
                    "geometry that is connected as depth, as of the core's MoGe.",
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
        fov = fov or fov_of(depth)
        files, geometry = points_from_depth(*image_from_socket(depth, valid), image, fov, edge_threshold or None)
        return io.NodeOutput([Types.File3D(BytesIO(ply), file_format="ply") for ply in files], geometry)


class DepthMask(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        distance = {"min": 0.0, "max": 1e6, "step": 0.01}
        return io.Schema(
            node_id="ModalityForcingDepthMask",
            display_name="Depth to Mask",
            category=CATEGORY,
            description="A mask of what lies between two distances, or one that rises between them: for fog and blur.",
            search_aliases=["near far mask", "depth range", "fog", "depth of field", "foreground", "background"],
            inputs=[
                depth_input(),
                valid_input(),
                io.Float.Input("near", default=0.0, **distance, tooltip="In the unit of the depth."),
                io.Float.Input("far", default=1.0, **distance, tooltip="1 is the mean of relative depth."),
                io.Combo.Input(
                    "shape",
                    options=["between", "ramp"],
                    tooltip="between: 1 from near to far, 0 elsewhere. ramp: 0 up to near, 1 from far on, as fog.",
                ),
            ],
            outputs=[io.Mask.Output(tooltip="Where depth is missing, as in the sky: far away.")],
        )

    @classmethod
    def execute(cls, depth, near, far, shape, valid=None) -> io.NodeOutput:
        if not near < far:
            raise ValueError(f"`near` is {near:g} and `far` {far:g}: give a nearer one and a farther one.")
        depth, valid = depth_from_image(*image_from_socket(depth, valid))
        depth = torch.where(valid, depth, torch.inf)[:, 0]
        inside = (depth >= near) & (depth <= far)
        return io.NodeOutput(inside.float() if shape == "between" else ((depth - near) / (far - near)).clamp(0, 1))


class EnsembleDepth(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ModalityForcingEnsembleDepth",
            display_name="Ensemble Depth",
            category=CATEGORY,
            description="Several samples of depth of one image to one steadier map, and how far they agree.",
            search_aliases=["average depth", "median depth", "uncertainty", "confidence", "error bars"],
            inputs=[
                depth_input("A batch of samples of one image: give 'Encode RGB-D' the image as a batch of copies."),
                valid_input(),
            ],
            outputs=[
                *depth_outputs(),
                io.Image.Output(display_name="uncertainty", tooltip="Relative: 0.1 is about 10 %. Raw, as depth is."),
            ],
        )

    @classmethod
    def execute(cls, depth, valid=None) -> io.NodeOutput:
        depth, valid = depth_from_image(*image_from_socket(depth, valid))
        if len(depth) < 2:
            raise ValueError("One map is no ensemble: connect a batch of samples of one image, 5 or 10 of them.")
        unit = depth.sum(dim=(1, 2, 3), keepdim=True) / valid.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
        depth, valid = torch.where(valid, depth, unit)[:, None], valid[:, None]
        median, valid, uncertainty = ensemble_depth(depth, valid)
        return io.NodeOutput(
            image_from_depth(median),
            valid[:, 0].float(),
            geometry_from_depth(median, valid),
            image_from_depth(uncertainty),
        )
