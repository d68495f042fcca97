"""Depth maps to depth tokens and back: unit mean, contraction, patches (paper, depth representation)."""

import math
import os

import numpy as np
import PIL.Image
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import PipelineDepthInput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from .resampling import resample, row_bands


logger = logging.get_logger(__name__)


def contract(depth: torch.Tensor) -> torch.Tensor:
    """mip-NeRF 360 contraction of non-negative depth to [0, 2): x up to 1, ``2 - 1/x`` above."""
    return torch.where(depth <= 1, depth, 2 - 1 / depth.clamp(min=1))


def uncontract(contracted: torch.Tensor) -> torch.Tensor:
    """Inverse of [`contract`] for values below 2."""
    return torch.where(contracted <= 1, contracted, 1 / (2 - contracted.clamp(min=1)))


def shrink(depth: torch.Tensor, valid: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Depth and validity (B, 1, H, W) at another (height, width), without inventing depth between a surface and what lies
    behind it: a pixel takes the depth in its middle and, where that is missing, the nearest depth of all that become
    this pixel. So no measurement of a sparse map is lost without need. Depth is 0 where it is missing.
    """
    if size == tuple(depth.shape[-2:]):
        return torch.where(valid, depth, 0.0), valid
    places = [_places(new, old, depth.device) for new, old in zip(size, depth.shape[-2:])]  # the middles of new pixels
    middle, is_known = (maps[..., places[0][:, None], places[1]] for maps in (depth, valid))
    rows, columns = (_places(old, new, depth.device) for old, new in zip(depth.shape[-2:], size))  # where old ones fall
    largest = torch.finfo(depth.dtype).max  # for depth that is known to be infinite
    nearest = torch.full((len(depth), size[0] * size[1]), torch.inf, dtype=depth.dtype, device=depth.device)
    for band in row_bands(depth.shape):
        values = torch.where(valid[..., band, :], depth[..., band, :].clamp(max=largest), torch.inf).flatten(1)
        target = (rows[band, None] * size[1] + columns).flatten().expand(len(depth), -1)
        nearest.scatter_reduce_(1, target, values, "amin")
    nearest = nearest.view(middle.shape)
    valid = is_known | (nearest <= largest)
    filled = torch.where(is_known, middle, torch.where(nearest < largest, nearest, torch.inf))
    return torch.where(valid, filled, 0.0), valid


class DepthProcessor(ConfigMixin):
    r"""
    Turns depth maps into the tokens that the transformer sees, and its tokens back into depth maps.

    A map is divided by the mean over its own valid pixels, contracted to [0, 2), and cut into square patches; missing
    pixels are filled with Gaussian noise. All of it is invertible on the valid pixels, up to the scale of the map.

    Args:
        patch_size (`int`, defaults to 16): Side of a depth token in pixels.
        near (`float`, defaults to 1e-3):
            Smallest relative depth (1 = mean of the map) that [`postprocess`] returns; nearer pixels are not valid.
        far (`float`, defaults to 1000.0):
            Largest relative depth that [`postprocess`] returns; farther pixels (sky) are clamped to it and not valid.
        infinite_depth (`bool`, defaults to `False`):
            Whether inf in a map is known depth, 2 when contracted, which a model must have been trained with. Default:
            it is missing depth, as of the published model.

    Raises:
        ValueError: a number that no depth has.

    Example:
        >>> import torch
        >>> from mf_diffusers import DepthProcessor
        >>> processor = DepthProcessor(patch_size=8)
        >>> metres = torch.linspace(1, 5, 16 * 24).view(1, 1, 16, 24)
        >>> tokens, valid, scale = processor.preprocess(metres)
        >>> tuple(tokens.shape), round(scale.item(), 3)
        ((1, 6, 64), 3.0)
        >>> restored, _ = processor.postprocess(tokens, 16, 24, scale=scale)
        >>> torch.allclose(restored, metres, rtol=1e-5)
        True
    """

    config_name = "depth_processor_config.json"

    @register_to_config
    def __init__(self, patch_size: int = 16, near: float = 1e-3, far: float = 1000.0, infinite_depth: bool = False):
        super().__init__()
        if patch_size < 1:
            raise ValueError(f"patch_size must be at least 1, got {patch_size!r}.")
        if not 0 < near <= 1 <= far < math.inf:
            raise ValueError(f"near must lie above 0, far be finite, and 1 between them; got {near!r} and {far!r}.")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs
    ) -> "DepthProcessor":
        """Loads the processor that `save_pretrained` wrote, from a folder or a Hub repository."""
        config, kwargs, _ = cls.load_config(
            pretrained_model_name_or_path,
            subfolder=subfolder,
            return_unused_kwargs=True,
            return_commit_hash=True,
            **kwargs,
        )
        return cls.from_config(config)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Writes `depth_processor_config.json` into `save_directory`."""
        self.save_config(save_directory, **kwargs)

    def to_tensor(self, depth: PipelineDepthInput) -> torch.Tensor:
        """
        Args:
            depth: a map or a batch of maps in any positive unit. `torch.Tensor` or `np.ndarray` of shape (H, W),
                (B, H, W), (B, 1, H, W), (H, W, 1) or (B, H, W, 1), of which the masked pixels of a masked array are
                missing; `PIL.Image.Image` with one channel (modes "I;16", "I", "F", "L"); or a list of these, all of
                one size.

        Returns:
            `torch.Tensor` of shape (B, 1, H, W), float32.

        Raises:
            ValueError: a shape or kind that is not in the list, an empty map, or maps of different sizes.
        """
        maps = _as_batch(depth, "depth map")
        if maps.dtype == torch.bool or maps.is_complex():
            raise ValueError(f"A depth map holds numbers, not {maps.dtype}; a mask goes into `depth_mask`.")
        if maps.dtype == torch.uint8:
            logger.warning("The depth map has 8 bits, so at most 256 levels: expect visible steps in the geometry.")
        return maps.float()

    def mask_to_tensor(self, mask: PipelineDepthInput) -> torch.Tensor:
        """Validity masks of any kind that [`to_tensor`] takes, as (B, 1, H, W), bool, True where not zero."""
        return _as_batch(mask, "depth mask") != 0

    def is_valid(self, depth: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            depth (`torch.Tensor` of shape (B, 1, H, W)): any positive unit; 0, negative and NaN mean missing, and so
                does inf without `infinite_depth`.
            mask (`torch.Tensor` of shape (B, 1, H, W), *optional*): False where a pixel is missing besides those.

        Returns:
            Validity (B, 1, H, W), bool.
        """
        valid = depth > 0
        if not self.config.infinite_depth:
            valid &= depth < torch.inf  # not isfinite, which copies the map
        return valid if mask is None else valid & mask.bool()

    def scale(self, depth: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The mean (B,) of the valid finite pixels of maps as [`is_valid`] takes them, 1 where a map has none."""
        peak = torch.full((len(depth),), torch.finfo(torch.float32).tiny, device=depth.device)
        total, count = torch.zeros_like(peak), torch.zeros_like(peak)

        def bands():
            for rows in row_bands(depth.shape):
                band = depth[..., rows, :]
                finite = self.is_valid(band, None if mask is None else mask[..., rows, :]) & torch.isfinite(band)
                yield torch.where(finite, band, 0.0), finite

        for band, finite in bands():
            peak = torch.maximum(peak, band.amax(dim=(1, 2, 3)))
            count += finite.sum(dim=(1, 2, 3))
        for band, _ in bands():  # the mean of depth relative to its peak, so that no unit overflows float32
            total += (band / peak.view(-1, 1, 1, 1)).sum(dim=(1, 2, 3))
        return torch.where(count > 0, peak * (total / count.clamp(min=1)), 1.0)

    def normalize(
        self, depth: torch.Tensor, mask: torch.Tensor | None = None, scale: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            depth, mask: see [`is_valid`].
            scale (`torch.Tensor` of shape (B,), *optional*): what to divide by; default: see [`scale`].

        Returns:
            Contracted depth (B, 1, H, W) in [0, 2], 0 where missing; validity (B, 1, H, W), bool; and the scale (B,)
            by which the relative depth was divided: the mean of the valid finite pixels, 1 where a map has none.
        """
        scale = self.scale(depth, mask) if scale is None else scale
        valid = self.is_valid(depth, mask)
        infinite = valid & torch.isposinf(depth)
        contracted = contract(torch.where(valid & ~infinite, depth, 0.0) / scale.view(-1, 1, 1, 1))
        return torch.where(infinite, 2.0, contracted), valid, scale

    def encode(
        self,
        depth: torch.Tensor,
        mask: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Depth maps to contracted depth at another size.

        Args:
            depth (`torch.Tensor` of shape (H, W) or (B, 1, H, W)): see [`to_tensor`] and [`normalize`].
            mask (`torch.Tensor` of the shape of `depth`, *optional*): False where a pixel is missing.
            height, width (`int`, *optional*): size to resample to, see [`shrink`]; default: the map's own size.

        Returns:
            Contracted depth (B, 1, height, width), 0 where missing; validity of the same shape; and scale (B,).
        """
        depth = self.to_tensor(depth)
        if mask is not None:
            mask = self.mask_to_tensor(mask).to(depth.device)
            if mask.shape[-2:] != depth.shape[-2:] or len(mask) not in (1, len(depth)):
                raise ValueError(f"The mask has shape {tuple(mask.shape)}, but the depth has {tuple(depth.shape)}.")
        scale = self.scale(depth, mask)
        size = (height or depth.shape[-2], width or depth.shape[-1])
        return self.normalize(*shrink(depth, self.is_valid(depth, mask), size), scale)

    def preprocess(
        self,
        depth: torch.Tensor,
        mask: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Depth maps to depth tokens.

        Args:
            depth, mask, height, width: see [`encode`]; multiples of `patch_size`.
            generator: source of the noise that fills the missing pixels.

        Returns:
            Tokens (B, N, p*p), validity per pixel (B, 1, height, width) and scale (B,).
        """
        contracted, valid, scale = self.encode(depth, mask, height, width)
        noise = randn_tensor(contracted.shape, generator=generator, device=contracted.device)
        return self.patchify(torch.where(valid, contracted, noise)), valid, scale

    def postprocess(
        self,
        tokens: torch.Tensor,
        height: int,
        width: int,
        output_size: tuple[int, int] | None = None,
        scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Depth tokens to depth maps.

        Args:
            tokens (`torch.Tensor` of shape (B, N, p*p)): clean depth tokens.
            height, width (`int`): size of the token grid in pixels.
            output_size (`tuple[int, int]`, *optional*): (height, width) to return; see [`resize`].
            scale (`torch.Tensor` of shape (B,), *optional*): what [`preprocess`] divided by, to return its unit.

        Returns:
            Relative depth (B, 1, H, W), float32 in [near, far] (times `scale`), larger is farther; and its validity
            (B, 1, H, W), bool: False where the tokens say nearer than `near` or farther than `far`.
        """
        contracted = self.unpatchify(tokens.float(), height, width)
        near, far = self.config.near, 2 - 1 / self.config.far
        valid = (contracted >= near) & (contracted <= far)
        depth = uncontract(torch.nan_to_num(contracted, nan=near).clamp(near, far))
        if output_size is not None:
            depth, valid = self.resize(depth, valid, output_size)
        return (depth if scale is None else depth * scale.view(-1, 1, 1, 1)), valid

    def resize(
        self, depth: torch.Tensor, valid: torch.Tensor, size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Relative depth and validity (B, 1, H, W) at another (height, width): depth bilinearly in contracted depth, where
        even far pixels weigh no more than others; validity by the majority.
        """
        if tuple(depth.shape[-2:]) == tuple(size):
            return depth, valid
        near, far = self.config.near, 2 - 1 / self.config.far
        resized = resample(contract(depth), size, "bilinear", lambda band, _: uncontract(band.clamp(near, far)))
        return resized, resample(valid.float(), size, "bilinear", lambda share, _: share >= 0.5)

    def patchify(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, 1, H, W) -> (B, N, p*p): row-major over the patches and within each."""
        p = self.config.patch_size
        batch_size, _, height, width = maps.shape
        if height % p or width % p:
            raise ValueError(
                f"Depth of {height}x{width} cannot be cut into {p}x{p} patches: resize it to multiples of {p}."
            )
        maps = maps.reshape(batch_size, height // p, p, width // p, p).transpose(2, 3)
        return maps.reshape(batch_size, -1, p * p)

    def unpatchify(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(B, N, p*p) -> (B, 1, height, width), the inverse of [`patchify`]."""
        p = self.config.patch_size
        if tokens.shape[1:] != (height // p * (width // p), p * p):
            raise ValueError(f"Tokens of shape {tuple(tokens.shape)} do not make a depth map of {height}x{width}.")
        maps = tokens.reshape(-1, height // p, width // p, p, p).transpose(2, 3)
        return maps.reshape(-1, 1, height, width)


def _places(count: int, of: int, device) -> torch.Tensor:
    """Which of `of` pixels in a row have the middles of `count` pixels in the same place."""
    return (2 * torch.arange(count, device=device) + 1) * of // (2 * count)


def _as_batch(maps, noun: str) -> torch.Tensor:
    """Maps of any kind that `DepthProcessor.to_tensor` lists, as (B, 1, H, W) in the dtype they have."""
    if isinstance(maps, (list, tuple)):
        if not maps:
            raise ValueError(f"The list holds no {noun}.")
        maps = [_as_batch(one, noun) for one in maps]
        sizes = {tuple(one.shape[-2:]) for one in maps}
        if len(sizes) != 1:
            raise ValueError(f"Every {noun} of a batch must share one size, got {sorted(sizes)} (H, W).")
        return torch.cat(maps)
    if isinstance(maps, PIL.Image.Image):
        if len(maps.getbands()) != 1 or maps.mode == "P":
            raise ValueError(
                f"A {noun} has one channel, but this picture has mode {maps.mode!r}. A coloured depth picture carries "
                "no depth values: give the raw depth (16-bit PNG, EXR, npy) instead."
            )
        maps = np.array(maps)
    if isinstance(maps, np.ma.MaskedArray):
        maps = maps.astype(np.float32).filled(np.nan)
    if isinstance(maps, np.ndarray) and maps.dtype.kind in "buif":
        if maps.dtype.kind != "b" and maps.dtype.itemsize not in (1, 4):
            with np.errstate(over="ignore"):
                maps = maps.astype(np.float32)  # of some types torch knows nothing, of others few operations
        maps = torch.from_numpy(np.ascontiguousarray(maps, dtype=maps.dtype.newbyteorder("=")))
    if not isinstance(maps, torch.Tensor):
        raise ValueError(
            f"A {noun} must be a tensor, a numeric array, a PIL image or a list of these, got {type(maps)}."
        )
    shape = tuple(maps.shape)
    if maps.ndim in (3, 4) and shape[-1] == 1:
        maps = maps[..., 0]
    if maps.ndim == 2:
        maps = maps[None]
    if maps.ndim == 3:
        maps = maps[:, None]
    if maps.ndim != 4 or maps.shape[1] != 1 or maps.numel() == 0 or shape[2:] in ((3,), (4,)):
        raise ValueError(f"A {noun} must have shape (H, W), (B, H, W) or (B, 1, H, W) and a pixel, got {shape}.")
    return maps
