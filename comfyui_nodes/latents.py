"""An RGB-D latent in a graph: its streams, what travels with them, and what is given of them."""

from dataclasses import dataclass, replace

import comfy.model_management
import torch
import torch.nn.functional as F
from comfy.nested_tensor import NestedTensor

from mf_diffusers import DepthProcessor
from mf_diffusers.modality_forcing.completion import complete
from mf_diffusers.modality_forcing.image_processor import processing_size, resize
from mf_diffusers.modality_forcing.inputs import GivenDepth, GivenImage
from mf_diffusers.modality_forcing.latent_tokens import hidden_cells

from .depth_sockets import known_depth
from .model import ModalityForcing, RGBDLatentFormat


KEY = "modality_forcing"  # of `Info` in a LATENT
REMEDY = (
    "An RGB-D latent has image and depth: take it apart by 'Split RGB-D Latent', let this node work on both parts, and "
    "put them together by 'Join RGB-D Latent'."
)


@dataclass
class Info:
    """
    What travels with an RGB-D latent from node to node.

    Args:
        size: (height, width) to return.
        working: (height, width) of the depth map, at which the model works.
        depth_processor, latent_format: the model's.
        scale: (B,) or (1,), the unit of depth that was given; `None`: relative.
        image: the image of which a part is given.
        depth: depth that is given, whole or in part.
        completes: whether depth is made of the image, and is to agree with the part that is given.
    """

    size: tuple[int, int]
    working: tuple[int, int]
    depth_processor: DepthProcessor
    latent_format: RGBDLatentFormat
    scale: torch.Tensor | None = None
    image: GivenImage | None = None
    depth: GivenDepth | None = None
    completes: bool = False

    def for_batch(self, size: int) -> "Info":
        """The same for a batch of `size`, without what belongs to another batch."""

        def fits(*batches) -> bool:
            return all(len(batch) in (1, size) for batch in batches)

        depth = self.depth if self.depth is not None and fits(self.depth.depth) else None
        return replace(
            self,
            scale=self.scale if self.scale is not None and fits(self.scale) else None,
            image=self.image if self.image is not None and fits(self.image.pixels, self.image.hidden) else None,
            depth=depth,
            completes=self.completes and depth is not None,
        )

    def depth_maps(self, contracted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Contracted depth (B, 1, h, w) -> depth and validity (B, 1, H, W); what is given is as it was."""
        processor = self.depth_processor
        depth, valid = processor.postprocess(processor.patchify(contracted), *self.working)
        resized, valid = processor.resize(depth, valid, self.size)
        unit = 1.0 if self.scale is None else self.scale.view(-1, 1, 1, 1)
        if self.depth is None:
            return resized * unit, valid
        known, is_known = (x.expand(len(depth), -1, -1, -1) for x in (self.depth.depth, self.depth.valid))
        is_known = is_known & known.isfinite()
        if self.completes:
            return complete(depth, resized, known, is_known), valid | is_known
        return torch.where(is_known, known, resized * unit), valid | is_known


def info_of(latent: dict) -> Info:
    size = tuple(streams_of(latent)[1].shape[-2:])
    return latent.get(KEY) or Info(size, size, DepthProcessor(patch_size=1), RGBDLatentFormat())


def streams_of(latent: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Image latents (B, C, h, w) and depth maps (B, 1, H, W) of an RGB-D latent."""
    samples = latent["samples"]
    streams = samples.unbind() if samples.is_nested else [samples]
    if len(streams) not in (2, 3) or streams[1].ndim != 4 or streams[1].shape[1] != 1:
        raise ValueError(
            f"This latent has shapes {[list(x.shape) for x in streams]} and no depth in it: connect one from 'Empty "
            "RGB-D Latent' or 'Encode RGB-D', through a sampler."
        )
    return tuple(x.float() for x in streams[:2])


def geometry(model) -> tuple[int, int]:
    """Channels of a model's image latents, and pixels along its tokens."""
    if not isinstance(model.model, ModalityForcing):
        raise ValueError(
            f"This model ({type(model.model).__name__}) has no depth stream: connect a Modality Forcing model, from "
            "'Load Diffusion Model' or 'Load Modality Forcing Pipeline'."
        )
    return model.model.latent_format.latent_channels, model.model.latent_format.spacial_downscale_ratio


def working_size(model, side: int, size: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) at which a model works on what has `size`; `side` 0: that which the model was made for."""
    side = side or model.model.sample_size
    return processing_size(*size, pixels=side * side, multiple=geometry(model)[1], rule=model.model.size_rule)


def given_image(image: torch.Tensor, mask: torch.Tensor | None) -> GivenImage:
    """An IMAGE (B, H, W, C), and the MASK (B, H, W), 1 where it is made anew."""
    pixels = image[..., :3].movedim(-1, 1).float().clamp(0, 1).cpu()
    if mask is None:
        return GivenImage(pixels)
    hidden = mask.float().clamp(0, 1).cpu()[:, None]
    if hidden.shape[-2:] != pixels.shape[-2:] or len(hidden) not in (1, len(pixels)):
        raise ValueError(
            f"The image's mask has shape {list(mask.shape)}, the image {list(image.shape[:3])} (B, H, W): connect the "
            "mask that belongs to the image."
        )
    if not (hidden >= 0.5).flatten(1).any(1).all():
        raise ValueError("The image's mask hides nothing: 1 says where the image is made anew, so invert it?")
    return GivenImage(pixels, hidden)


def given_depth(
    image: torch.Tensor, mask: torch.Tensor | None, processor: DepthProcessor, inverse: bool = False
) -> GivenDepth:
    """
    Raw depth as [`known_depth`] takes it; inf is known depth to a `processor` of infinite depth.

    Raises ValueError for a map without a valid pixel.
    """
    depth = known_depth(image, mask, inverse)
    valid = processor.is_valid(depth)
    empty = (~valid.flatten(1).any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"Depth map {empty[0]} of the batch has no valid pixel: depth must be positive and finite somewhere. Check "
            "the file and its mask, or leave depth out."
        )
    return GivenDepth(depth, valid)


def encode_image(
    vae, image: GivenImage, working: tuple[int, int], shape: tuple[int, int, int], latent_format: RGBDLatentFormat
) -> torch.Tensor:
    """-> latents (B, *shape), of which nothing shows that the mask hides."""
    if vae is None:
        raise ValueError("An image is connected, but no VAE: connect the VAE of the model.")
    pixels = resize(image.pixels if image.hidden is None else image.without_hidden, working)
    latents = latent_format.from_vae(vae.encode(pixels.movedim(1, -1)).float())
    if tuple(latents.shape[1:]) != shape:
        raise ValueError(
            f"This VAE makes latents {list(latents.shape[1:])} where the model takes {list(shape)}: connect the VAE "
            "that belongs to the model."
        )
    return latents


def image_levels(image: GivenImage | None, rows: int, columns: int, token: int) -> torch.Tensor:
    """The levels that an image is held at which is kept, whole or in part: (1 or B, 1, H, W), 1 where it is made."""
    if image is None or image.hidden is None:
        return torch.zeros(1, 1, rows * token, columns * token)
    cells = hidden_cells(image.hidden, rows, columns, channels=4).unflatten(2, (rows, columns)).float()
    side = token // 2  # of a VAE latent, in pixels
    return F.pixel_shuffle(cells, 2).repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)


def nested(*streams: torch.Tensor) -> NestedTensor:
    device = comfy.model_management.intermediate_device()
    return NestedTensor([x.to(device) for x in streams])


def explain_streams():
    """
    Lets latents of two streams say what to do where a core's node takes a latent for one tensor. Its errors are the
    same, with other words.
    """

    def missing(self, name):
        raise AttributeError(f"A latent of {len(self.tensors)} streams has no `{name}`{_remedy(self)}")

    def in_torch(cls, function, types, args=(), kwargs=None):
        first = next(x for x in args if isinstance(x, cls)) if any(isinstance(x, cls) for x in args) else None
        raise TypeError(f"torch.{function.__name__} takes no latent of several streams{_remedy(first)}")

    NestedTensor.__getattr__ = missing
    NestedTensor.__torch_function__ = classmethod(in_torch)


def _remedy(latent) -> str:
    streams = latent.__dict__.get("tensors", ()) if latent is not None else ()
    is_ours = len(streams) in (2, 3) and streams[1].ndim == 4 and streams[1].shape[1] == 1
    return f". {REMEDY}" if is_ours else ""
