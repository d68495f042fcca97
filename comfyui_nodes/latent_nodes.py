"""Nodes around the model: RGB-D latents in and out, apart and together, and the trajectory."""

import logging
from dataclasses import replace

import torch
import torch.nn.functional as F
from comfy_api.latest import io

from mf_diffusers.modality_forcing.conversion import PUBLISHED_SETTINGS
from mf_diffusers.modality_forcing.image_processor import resize

from .depth_sockets import geometry_from_depth, image_from_depth, image_from_socket
from .latents import (
    KEY,
    Info,
    encode_image,
    geometry,
    given_depth,
    given_image,
    image_levels,
    info_of,
    nested,
    streams_of,
    working_size,
)
from .sockets import CATEGORY, MODEL_TIP, blocked, depth_input, depth_outputs
from .streams import DEPTH_STRENGTHS, held_at


KEEP_AUTO = "what is connected"
KEEPS = {"image": (True, False), "depth": (False, True), "both": (True, True), "nothing": (False, False)}


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
        channels, token = geometry(model)
        rows, columns = (max(1, round(side / token)) for side in (height, width))
        working = (rows * token, columns * token)
        if working != (height, width):
            logging.warning(f"{height}x{width} (H x W) is no multiple of {token}: made at {working[0]}x{working[1]}.")
        samples = nested(torch.zeros(batch_size, channels, rows, columns), torch.zeros(batch_size, 1, *working))
        info = Info((height, width), working, model.model.depth_processor, model.model.latent_format)
        return io.NodeOutput({"samples": samples, KEY: info})


class Encode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ModalityForcingEncode",
            display_name="Encode RGB-D",
            category=CATEGORY,
            description="Gives an image, depth, or a part of either; the sampler makes the rest.",
            search_aliases=[
                *("image to depth", "depth to image", "depth estimation", "depth control", "rgbd", "vae encode"),
                *("inpaint", "outpaint", "depth completion", "sparse depth", "lidar"),
            ],
            inputs=[
                io.Model.Input("model", tooltip=MODEL_TIP),
                io.Vae.Input("vae", optional=True, tooltip="The model's VAE. Needed where an image is connected."),
                io.Image.Input("image", optional=True, tooltip="Image or batch of any size, to make depth of."),
                depth_input(
                    optional=True,
                    tooltip="Raw depth, in any unit: larger is farther; 0, negative and NaN are missing, and so is inf "
                    "unless the model knows infinite depth. Kept beside an image that is kept, it is known in part: "
                    "the rest is made, in its unit.",
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
                    options=[KEEP_AUTO, *KEEPS],
                    default=KEEP_AUTO,
                    tooltip="What is given and stays as it is, where no mask hides it. 'nothing' lets both change, for "
                    "a denoise below 1.",
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
                io.Mask.Input(
                    "image_mask",
                    optional=True,
                    tooltip="1 where the image is made anew, 0 where it is kept: to inpaint, or to outpaint with the "
                    "mask of 'Pad Image for Outpainting'.",
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
        image_mask=None,
    ) -> io.NodeOutput:
        channels, token = geometry(model)
        processor = model.model.depth_processor
        for name, mask, owner in (("image", image_mask, image), ("depth", depth_mask, depth)):
            if mask is not None and owner is None:
                raise ValueError(f"A mask of {name} is connected, but no {name}: connect both.")
        image = None if image is None else given_image(image, image_mask)
        depth = None if depth is None else given_depth(*image_from_socket(depth, depth_mask), processor, inverse_depth)
        keeps_image, keeps_depth = _what_to_keep(keep, image, depth, latent)

        given = [x.size for x in (image, depth) if x is not None]
        if len(set(given)) > 1:
            raise ValueError(
                f"The image is {given[0][0]}x{given[0][1]} and the depth {given[1][0]}x{given[1][1]} (H x W): resize "
                "one to the size of the other."
            )

        # 1. Streams at the working size, from what is connected, or else from the latent
        if latent is None:
            working = working_size(model, size, given[0])
            rows, columns = (side // token for side in working)
            images, depths = torch.zeros(1, channels, rows, columns), torch.zeros(1, 1, *working)
            info = Info(given[0], working, processor, model.model.latent_format)
        else:
            images, depths = (x.cpu() for x in streams_of(latent))
            (rows, columns), working = images.shape[-2:], tuple(depths.shape[-2:])
            info = replace(info_of(latent))
            info.size = given[0] if given else info.size
        missing = depths == 0  # what a latent holds where depth is missing
        if image is not None:
            images = encode_image(vae, image, working, (channels, rows, columns), model.model.latent_format).cpu()
            info.image = None if image.hidden is None else image
        if depth is not None:
            depths, valid, info.scale = processor.encode(depth.depth, depth.valid, *working)
            missing, info.depth, info.completes = ~valid, depth, False

        # 2. What is held of them; depth of a whole image is made first, and what is known of it comes in afterwards
        is_whole = keeps_image and (image is None or image.hidden is None)
        in_part = info.depth is not None and not info.depth.is_whole
        if is_whole and in_part and (keeps_depth or depth is None):
            keeps_depth, info.completes = False, True
        if is_whole and keeps_depth:
            raise ValueError(
                "Image and depth are given whole, so nothing is left to make. Say what to `keep`: 'image' (depth is "
                "made), 'depth' (the image is made) or 'nothing'; or connect a mask that hides a part."
            )
        if not keeps_image:
            info.image = None
        if not keeps_depth and not (is_whole and info.completes):
            info.depth, info.completes = None, False
            info.scale = info.scale if depth is not None or not keeps_image else None
        streams = [images, depths]
        if keeps_image or keeps_depth:
            made = torch.ones(1, 1, *working)
            image_held = image_levels(image, rows, columns, token) if keeps_image else made
            streams += [image_held, torch.where(missing, 1.0, held_at(depth_strength)) if keeps_depth else made]
        batch_size = max(len(x) for x in streams)
        if {len(x) for x in streams} - {1, batch_size}:
            raise ValueError(
                f"{len(images)} images do not go with {len(depths)} depth maps: give as many, or one of either."
            )
        images, depths, *held = (x.expand(batch_size, -1, -1, -1).clone() for x in streams)
        held = [torch.cat(held, dim=1)] if held else []
        return io.NodeOutput({"samples": nested(images, depths, *held), KEY: info})


def _what_to_keep(keep: str, image, depth, latent) -> tuple[bool, bool]:
    """Whether the image is kept, and depth."""
    if image is None and depth is None and latent is None:
        raise ValueError("Nothing is connected: give an image to make depth of it, or depth to make images of it.")
    if keep == KEEP_AUTO and image is None and depth is None:
        raise ValueError("Say what to `keep` of the latent: 'image' (depth is made), 'depth', 'both' or 'nothing'.")
    keeps = (image is not None, depth is not None) if keep == KEEP_AUTO else KEEPS[keep]
    for name, is_kept, given in (("image", keeps[0], image), ("depth", keeps[1], depth)):
        if is_kept and given is None and latent is None:
            raise ValueError(f"`keep` is '{keep}', but there is none: connect {name}, or a latent that has it.")
    if image is not None and image.hidden is not None and not keeps[0]:
        raise ValueError(f"The image's mask says which part to keep, but `keep` is '{keep}': choose 'image' or 'both'.")
    return keeps


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
                io.Float.Input(
                    "depth_denoise",
                    default=0.0,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    optional=True,
                    tooltip="The noise level that depth starts at, before the trajectory, where the sampler's denoise "
                    "is below 1: less changes depth less than the image. 0: the same as the image's.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, log2_alpha, depth_denoise=0.0) -> io.NodeOutput:
        geometry(model)
        model = model.clone()
        model.add_object_patch("log2_alpha", log2_alpha)
        model.add_object_patch("depth_denoise", depth_denoise or None)
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
            outputs=[io.Image.Output(display_name="image", tooltip="Needs the VAE."), *depth_outputs()],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, latent, vae=None) -> io.NodeOutput:
        images, depths = streams_of(latent)
        info = info_of(latent).for_batch(len(images))
        depth, valid = info.depth_maps(depths.cpu())
        image = None
        if vae is not None:
            image = resize(vae.decode(info.latent_format.to_vae(images)).movedim(-1, 1), info.size)
            image = (image if info.image is None else info.image.over(image)).movedim(1, -1)
        return io.NodeOutput(
            blocked(cls, 0, "The image is wanted, but no VAE is connected: connect the VAE of the model.")
            if image is None
            else image,
            image_from_depth(depth),
            valid[:, 0].float(),
            geometry_from_depth(depth, valid, image),
        )


class Split(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ModalityForcingSplitLatent",
            display_name="Split RGB-D Latent",
            category=CATEGORY,
            description="Takes an RGB-D latent apart, so that the core's latent nodes work on each part: upscale, "
            "repeat, batch, select, flip, mask. 'Join RGB-D Latent' puts them together.",
            search_aliases=["latent upscale", "hires fix", "latent batch", "repeat latent", "separate latent"],
            inputs=[io.Latent.Input("latent", tooltip="An RGB-D latent.")],
            outputs=[
                io.Latent.Output(display_name="image", tooltip="Image latents."),
                io.Latent.Output(display_name="depth", tooltip="Contracted depth in pixels, one channel."),
            ],
        )

    @classmethod
    def execute(cls, latent) -> io.NodeOutput:
        masks = latent.get("noise_mask")
        masks = masks.unbind()[:2] if masks is not None and masks.is_nested else [masks, None]
        parts = []
        info = info_of(latent)
        images, depths = streams_of(latent)
        for stream, mask in zip((info.latent_format.to_vae(images), depths), masks):
            part = latent | {"samples": stream, KEY: info, "noise_mask": mask}
            parts.append({name: value for name, value in part.items() if value is not None})
        return io.NodeOutput(*parts)


class Join(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ModalityForcingJoinLatent",
            display_name="Join RGB-D Latent",
            category=CATEGORY,
            description="Puts image latents and depth together to an RGB-D latent; depth takes the size of the image.",
            search_aliases=["latent upscale", "hires fix", "latent batch", "combine latents"],
            inputs=[
                io.Latent.Input("image", tooltip="Image latents, from 'Split RGB-D Latent' or a VAE."),
                io.Latent.Input("depth", tooltip="Depth, from 'Split RGB-D Latent'."),
            ],
            outputs=[io.Latent.Output(tooltip="Nothing of it is held: 'Encode RGB-D' says what to keep of a latent.")],
        )

    @classmethod
    def execute(cls, image, depth) -> io.NodeOutput:
        images, depths = image["samples"], depth["samples"]
        if KEY not in depth or depths.is_nested or depths.shape[1] != 1 or images.is_nested:
            raise ValueError(
                "These are no parts of an RGB-D latent: connect both outputs of 'Split RGB-D Latent', or what other "
                "nodes made of them."
            )
        batch_size = max(len(images), len(depths))
        if {len(images), len(depths)} - {1, batch_size}:
            raise ValueError(
                f"{len(images)} images do not go with {len(depths)} depth maps: give as many, or one of either."
            )
        info = depth[KEY].for_batch(batch_size)
        images = info.latent_format.from_vae(images)
        token = info.depth_processor.config.patch_size
        working = tuple(token * side for side in images.shape[-2:])
        if working != info.working:
            size = tuple(round(side * new / old) for side, new, old in zip(info.size, working, info.working))
            info = Info(size, working, info.depth_processor, info.latent_format, info.scale)
        if working != tuple(depths.shape[-2:]):
            # Between depth and where it is missing, which is 0, there is nothing.
            depths = F.interpolate(depths.float(), working, mode="bilinear" if depths.all() else "nearest-exact")
        images, depths = (x.expand(batch_size, -1, -1, -1).clone() for x in (images, depths))
        latent = {**image, "samples": nested(images, depths), KEY: info}
        if "noise_mask" in image or "noise_mask" in depth:
            made = torch.ones(1, 1, *working)
            masks = [part.get("noise_mask", made) for part in (image, depth)]
            masks[1] = (F.interpolate(masks[1].reshape(-1, 1, *masks[1].shape[-2:]), working) >= 0.5).float()
            latent["noise_mask"] = nested(*masks)
        return io.NodeOutput(latent)
