import numpy as np
import PIL.Image
import pytest
import torch

from mf_diffusers.modality_forcing.image_processor import image_to_tensor, processing_size, resize


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
