import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from mf_diffusers.modality_forcing.image_processor import image_to_pixels, image_to_tensor, processing_size, resize
from mf_diffusers.modality_forcing.resampling import resample


@pytest.mark.parametrize("size", [(512, 512), (375, 1242), (480, 640), (2048, 1365), (3, 3), (1080, 1920)])
def test_processing_size_keeps_the_aspect_ratio_and_the_budget(size):
    height, width = processing_size(*size, pixels=512 * 512)
    assert height % 16 == width % 16 == 0
    assert abs(height * width / 512**2 - 1) < 0.1
    # Never stretched by more than the rounding to 16 pixels explains.
    scale = np.sqrt(512**2 / (size[0] * size[1]))
    assert abs(height - scale * size[0]) <= 8 and abs(width - scale * size[1]) <= 8


def test_a_line_is_too_thin():
    assert processing_size(1, 1000, pixels=512 * 512) == (16, 16192)
    with pytest.raises(ValueError, match=r"1x5000 .* is too long and thin"):
        processing_size(1, 5000, pixels=512 * 512)


def test_arrays_of_every_kind():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels / 255.0).float().movedim(-1, 0)[None]
    flipped = pixels[..., ::-1].copy()[..., ::-1]
    for array in (pixels, flipped, pixels.astype(np.uint16) * 257, pixels / 255, (pixels / 255).astype(np.float16)):
        assert torch.allclose(image_to_tensor(array), expected, atol=1e-3)
    assert image_to_tensor(np.full((4, 6, 3), 1 + 1e-6)).max() == 1


def test_a_rotated_photograph_is_upright():
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0] = 255
    picture = PIL.Image.fromarray(pixels)
    picture.getexif()[0x0112] = 6  # to be turned by 90 degrees clockwise
    tensor = image_to_tensor(picture)
    assert tensor.shape == (1, 3, 6, 4) and tensor[0, 0, 0, 3] == 1


@pytest.mark.parametrize(
    ("picture", "value"),
    [
        (PIL.Image.new("RGBA", (4, 4), (255, 0, 0, 0)), (1, 1, 1)),
        (PIL.Image.new("LA", (4, 4), (0, 255)), (0, 0, 0)),
        (PIL.Image.new("L", (4, 4), 51), (0.2, 0.2, 0.2)),
        (PIL.Image.new("RGB", (4, 4), (255, 0, 51)).convert("P", palette=PIL.Image.Palette.ADAPTIVE), (1, 0, 0.2)),
        (PIL.Image.fromarray(np.full((4, 4), 13107, np.uint16)), (0.2, 0.2, 0.2)),
        (PIL.Image.new("1", (4, 4), 1), (1, 1, 1)),
        (PIL.Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (1, 0, 0)),
    ],
    ids=lambda value: getattr(value, "mode", ""),
)
def test_pictures_of_every_mode(picture, value):
    assert torch.allclose(image_to_tensor(picture)[0, :, 0, 0], torch.tensor(value, dtype=torch.float32), atol=0.01)


def test_resize_keeps_the_range():
    image = (torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    resized = resize(image, (48, 80))
    assert resized.shape == (1, 3, 48, 80) and resized.min() >= 0 and resized.max() <= 1
    assert resize(image, (32, 48)) is image


def test_the_long_side_decides_where_the_rule_says_so():
    assert processing_size(1080, 1920, 512 * 512, 16, "long_side") == (288, 512)
    assert processing_size(1920, 1080, 512 * 512, 16, "long_side") == (512, 288)
    assert processing_size(300, 300, 512 * 512, 16, "long_side") == processing_size(300, 300, 512 * 512) == (512, 512)
    assert processing_size(1080, 1920, 512 * 512, 16) == (384, 688)


def gradients(count, height, width):
    """Images of different ranges: what one of them is clamped to must not reach another."""
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(count, 3, height, width, generator=generator) > 0.5).float()
    return images * torch.linspace(0.2, 0.4, count).view(-1, 1, 1, 1) + torch.linspace(0, 0.5, count).view(-1, 1, 1, 1)


@pytest.mark.parametrize("size", [(20, 24), (64, 100), (40, 60)])
def test_resizing_a_batch_is_resizing_its_images(size):
    batch = gradients(3, 40, 60)
    resized = resize(batch, size)
    for image, alone in zip(batch, resized):
        assert torch.equal(resize(image[None], size)[0], alone)
        assert alone.min() >= image.min() and alone.max() <= image.max()


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(20, 24), (64, 100), (20, 100), (64, 24), (40, 60), (1, 1)])
def test_bands_resample_as_the_whole(monkeypatch, mode, size):
    images = gradients(2, 40, 60)
    if size == (40, 60):
        images = images[:, :, :30, :20]
    whole = F.interpolate(images, size, mode=mode, antialias=True, align_corners=False)
    seen = []

    def finish(band, columns):
        seen.append(columns)
        return band

    for values in (1, 500, 10**9):  # a row or a column at a time, a few, and all
        monkeypatch.setattr("mf_diffusers.modality_forcing.resampling.BAND", values)
        torch.testing.assert_close(resample(images, size, mode, finish), whole, rtol=0, atol=1e-5)
    assert len(seen) > size[1]
    pictures = (255 * images).round().byte()
    torch.testing.assert_close(resample(pictures, size, mode), resample(pictures / 255, size, mode), rtol=0, atol=1e-6)


BATCH = (255 * gradients(3, 40, 60)).round().byte()  # (B, 3, H, W)
AS_ARRAYS = BATCH.movedim(1, -1).numpy()
KINDS = {
    "PIL": [PIL.Image.fromarray(array) for array in AS_ARRAYS],
    "PIL with alpha": [PIL.Image.fromarray(array).convert("RGBA") for array in AS_ARRAYS],
    "uint8 array": AS_ARRAYS,
    "uint16 array": AS_ARRAYS.astype(np.uint16) * 257,
    "float64 array": AS_ARRAYS / 255,
    "float16 array": (AS_ARRAYS / 255).astype(np.float16),
    "uint8 tensor": BATCH,
    "float tensor": BATCH / 255,
    "bfloat16 tensor": (BATCH / 255).bfloat16(),
    "mixed list": [PIL.Image.fromarray(AS_ARRAYS[0]), AS_ARRAYS[1] / 255, BATCH[2].float() / 255],
    "tuple of batches": (AS_ARRAYS[:2], BATCH[2:]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_batch_is_its_images(kind):
    images = KINDS[kind]
    batch = image_to_tensor(images if isinstance(images, (np.ndarray, torch.Tensor)) else list(images))
    assert batch.shape == BATCH.shape and batch.dtype == torch.float32
    torch.testing.assert_close(batch, BATCH / 255, rtol=0, atol=5e-3 if "16" in kind and "u" not in kind else 1e-3)
    assert torch.equal(torch.cat([image_to_tensor(image) for image in images]), batch)
    pixels = image_to_pixels(images if isinstance(images, (np.ndarray, torch.Tensor)) else list(images))
    for image, alone in zip(pixels, resize(pixels, (24, 36))):
        assert torch.equal(resize(image[None], (24, 36))[0], alone)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.complex64])
def test_tensors_of_no_range(dtype):
    with pytest.raises(ValueError, match=rf"floats in \[0, 1\] or uint8, got {dtype}"):
        image_to_tensor(torch.zeros(3, 4, 4, dtype=dtype))
