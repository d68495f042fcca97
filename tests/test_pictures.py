"""Reading pictures: modes, colours, orientation, damage."""

import io
import warnings

import numpy as np
import pytest
from icc_profiles import (
    ADOBE_RGB,
    DISPLAY_P3,
    INKS,
    PROPHOTO,
    SRGB,
    cmyk_profile,
    gray_profile,
    rgb_profile,
    srgb_of_lab,
    srgb_of_rgb,
)
from PIL import Image, ImageCms

from mf_diffusers.input_warning import InputWarning
from mf_diffusers.pictures import (
    TURNS,
    as_rgb,
    fov_from_exif,
    orientation,
    read_image,
    read_oriented,
    turned_upright,
    upright_size,
)


LEVELS = np.array([[0, 1, 256], [1000, 40000, 65535]], dtype=np.uint16)
COLORS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
BLOCKS = COLORS.repeat(8, axis=0).repeat(8, axis=1)  # of a JPEG block each, so that they survive it


def oriented_exif(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def palette_with_transparency():
    picture = Image.new("P", (2, 1))
    picture.putpalette([0, 0, 0, 200, 100, 50])
    picture.putdata([0, 1])
    picture.info["transparency"] = 0
    return picture


# Modes


@pytest.mark.parametrize(
    "picture, expected",
    [
        (Image.new("RGB", (1, 1), (1, 2, 3)), [(1, 2, 3)]),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 0)), [(255, 255, 255)]),
        (Image.new("RGBA", (1, 1), (0, 0, 0, 51)), [(204, 204, 204)]),
        (Image.new("LA", (1, 1), (0, 0)), [(255, 255, 255)]),
        (Image.new("LA", (1, 1), (0, 51)), [(204, 204, 204)]),
        (Image.new("L", (1, 1), 7), [(7, 7, 7)]),
        (Image.new("1", (1, 1), 1), [(255, 255, 255)]),
        (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), [(255, 0, 0)]),
        (palette_with_transparency(), [(255, 255, 255), (200, 100, 50)]),
        (Image.fromarray(LEVELS), [(v, v, v) for v in (0, 0, 1, 4, 156, 255)]),
        (Image.fromarray(LEVELS.astype(np.int32)), [(v, v, v) for v in (0, 0, 1, 4, 156, 255)]),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_as_rgb(picture, expected):
    rgb = as_rgb(picture)
    assert rgb.mode == "RGB"
    assert np.array_equal(np.asarray(rgb).reshape(-1, 3), expected)


@pytest.mark.parametrize(
    "picture, message",
    [
        (Image.fromarray(np.ones((2, 2), dtype=np.float32)), "no known range"),
        (Image.fromarray(np.array([[70000]], dtype=np.int32)), "70000.*do not fit 16 bits"),
        (Image.fromarray(np.array([[-1]], dtype=np.int32)), "-1.*do not fit 16 bits"),
    ],
)
def test_as_rgb_rejects(picture, message):
    with pytest.raises(ValueError, match=message):
        as_rgb(picture)


@pytest.mark.parametrize("name", ["rgba.png", "palette.png", "gray16.png", "cmyk.jpg"])
def test_read_image_of_every_mode(tmp_path, name):
    picture = {
        "rgba.png": Image.new("RGBA", (3, 2), (0, 0, 0, 0)),
        "palette.png": palette_with_transparency(),
        "gray16.png": Image.fromarray(np.full((2, 3), 65535, dtype=np.uint16)),
        "cmyk.jpg": Image.new("CMYK", (3, 2), (0, 0, 0, 0)),
    }[name]
    picture.save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert (image.mode, image.size) == ("RGB", picture.size)
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_read_image_names_the_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        read_image(tmp_path / "nothing.png")


@pytest.mark.parametrize("damage", ["garbage", "empty", "truncated"])
def test_read_image_names_the_damaged_file(tmp_path, damage):
    path = tmp_path / "damaged.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes({"garbage": b"garbage", "empty": b"", "truncated": path.read_bytes()[:500]}[damage])
    with pytest.raises(ValueError, match=r"damaged\.png: cannot be read as a picture: ."):
        read_image(path)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_pictures_after_the_first_are_left_out_and_said_so(tmp_path, suffix):
    first, *others = (Image.new("RGB", (4, 4), color) for color in ("white", "black", "gray"))
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=others)
    with pytest.warns(InputWarning, match=rf"a\.{suffix}: only the first of 3 pictures is used"):
        assert read_image(tmp_path / f"a.{suffix}").getpixel((0, 0)) == (255, 255, 255)


# Colours


def with_alpha(colors):
    return Image.fromarray(np.dstack([colors, np.full(colors.shape[:2], 255, np.uint8)]))


@pytest.mark.parametrize(
    "name, primaries, gamma",
    [
        ("a98.jpg", ADOBE_RGB, 2.19921875),
        ("prophoto.png", PROPHOTO, 1.8),
        ("p3.webp", DISPLAY_P3, 2.19921875),
        ("linear.tif", SRGB, 1.0),
        ("alpha.png", ADOBE_RGB, 2.19921875),
        ("palette.png", PROPHOTO, 1.8),
    ],
)
def test_colors_are_converted_by_their_profile(tmp_path, name, primaries, gamma):
    picture = Image.fromarray(BLOCKS)
    if name == "alpha.png":
        picture = with_alpha(BLOCKS)
    if name == "palette.png":
        picture = picture.convert("P", palette=Image.Palette.ADAPTIVE)
    settings = {"lossless": True} if name.endswith("webp") else {"quality": 100, "subsampling": 0}
    picture.save(tmp_path / name, icc_profile=rgb_profile(primaries, gamma), **settings)
    image = read_image(tmp_path / name)
    expected = srgb_of_rgb(BLOCKS, primaries, gamma)
    assert np.abs(np.asarray(image) - expected).mean() < 1.5
    assert np.abs(BLOCKS - expected).mean() > 4  # which is what leaving the profile out of account would give
    image.save(tmp_path / "image.png")
    assert not Image.open(tmp_path / "image.png").info.get("icc_profile")


@pytest.mark.parametrize("name", ["cmyk.jpg", "progressive.jpg", "cmyk.tif", "deflate.tif"])
def test_inks_are_converted_by_their_profile(tmp_path, name):
    inks = np.array(list(INKS), dtype=np.uint8)[None].repeat(16, axis=0).repeat(16, axis=1) * 255
    picture = Image.frombytes("CMYK", inks.shape[1::-1], inks.tobytes())
    options = {"quality": 100, "subsampling": 0, "progressive": name == "progressive.jpg"}
    if name == "deflate.tif":
        options = {"compression": "tiff_adobe_deflate"}
    picture.save(tmp_path / name, icc_profile=cmyk_profile(), **options)
    image = np.asarray(read_image(tmp_path / name))[8, 8::16]
    expected = np.array([srgb_of_lab(lab) for lab in INKS.values()])
    assert np.abs(image[1:] - expected[1:]).mean() < 3
    assert (image[0] > 253).all()  # paper becomes white
    assert np.abs(np.asarray(picture.convert("RGB"))[8, 8::16] - expected).mean() > 25


@pytest.mark.parametrize("name", ["gray.jpg", "gray16.png", "gray16.tif", "opaque.png"])
def test_grays_are_converted_by_their_profile(tmp_path, name):
    levels = np.arange(256, dtype=np.uint8)[None].repeat(16, axis=0)
    picture = Image.fromarray(levels.astype(np.uint16) * 257 if "16" in name else levels)
    if name == "opaque.png":
        picture.putalpha(255)
    picture.save(tmp_path / name, icc_profile=gray_profile(1.0), quality=100)
    image = np.asarray(read_image(tmp_path / name))
    expected = srgb_of_rgb(np.stack(3 * [levels], axis=-1), SRGB, 1.0)
    assert np.abs(image - expected).mean() < 1 and np.abs(levels[..., None] - expected).mean() > 30


def test_a_profile_of_srgb_changes_nothing():
    picture = Image.fromarray(COLORS)
    picture.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(as_rgb(picture), COLORS)


def test_gray_with_the_profile_of_a_colour_picture():
    picture = Image.fromarray(COLORS[..., 0])
    picture.info["icc_profile"] = rgb_profile(PROPHOTO, 1.8)
    expected = srgb_of_rgb(np.stack(3 * [COLORS[..., 0]], axis=-1), PROPHOTO, 1.8)
    assert np.abs(np.asarray(as_rgb(picture)) - expected).max() < 2


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA"])
@pytest.mark.parametrize(
    "profile",
    [
        b"",
        b"garbage",
        cmyk_profile(),
        gray_profile(2.2),
        rgb_profile(ADOBE_RGB, 2.2),
        rgb_profile(ADOBE_RGB, 2.2)[:150],
    ],
    ids=["none", "garbage", "cmyk", "gray", "rgb", "truncated"],
)
def test_a_profile_that_does_not_fit_is_left_out_and_said_so(tmp_path, profile, mode):
    picture = Image.fromarray(COLORS).convert(mode)
    picture.save(tmp_path / "a.tif", icc_profile=profile)
    fits = {cmyk_profile(): "CMYK", gray_profile(2.2): "L", rgb_profile(ADOBE_RGB, 2.2): "RGB RGBA L", b"": mode}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = read_image(tmp_path / "a.tif")
    assert "icc_profile" not in image.info
    if mode in fits.get(profile, "").split():
        assert not caught
    else:
        assert np.array_equal(image, picture.convert("RGB"))
        (warning,) = caught
        assert warning.category is InputWarning and "a.tif: the colour profile cannot be used" in str(warning.message)


def test_the_picture_of_the_caller_stays_as_it_is():
    picture = Image.fromarray(COLORS)
    picture.info["icc_profile"] = rgb_profile(PROPHOTO, 1.8)
    picture.getexif()[0x0112] = 6
    as_rgb(picture)
    assert np.array_equal(picture, COLORS) and "icc_profile" in picture.info and orientation(picture) == 6


# Orientation


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "avif", "mpo"])
@pytest.mark.parametrize("value", range(1, 9))
def test_pictures_are_turned_upright(tmp_path, suffix, value):
    """EXIF 2.32: orientation 6 means that the first row is the right side and the first column the top, for one."""
    if suffix == "avif" and ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow cannot decode AVIF")
    upright = Image.fromarray(BLOCKS)
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[value]
    path = tmp_path / f"a.{suffix}"
    stored.save(path, exif=oriented_exif(value), quality=95)
    image, said = read_oriented(path)
    assert np.abs(np.asarray(image).astype(int) - BLOCKS).mean() < 12 and image.size == upright.size
    assert said == value and upright_size(path) == (image.height, image.width)
    assert np.array_equal(turned_upright(np.asarray(stored), value), upright)
    assert orientation(image) == 1
    if suffix != "tif":  # whose decoder turns it
        assert read_image(path, upright=False).size == stored.size


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16", "P", "CMYK", "RGBA"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("value", [5, 6, 7, 8])
def test_a_lying_tiff_has_its_decoded_size(tmp_path, mode, compression, value):
    stored = Image.fromarray(BLOCKS).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        stored = Image.fromarray(np.asarray(stored).astype(np.uint16) * 257)
    stored.save(tmp_path / "a.tif", compression=compression, exif=oriented_exif(value))
    image = read_image(tmp_path / "a.tif")
    assert upright_size(tmp_path / "a.tif") == (image.height, image.width) == BLOCKS.shape[1::-1]
    assert np.array_equal(image, turned_upright(np.asarray(as_rgb(stored)), value))


@pytest.mark.parametrize("value", [0, 9, "upright"])
def test_an_orientation_that_does_not_exist_is_none(value):
    picture = Image.fromarray(COLORS)
    picture.getexif()[0x0112] = value
    assert orientation(picture) == 1 and np.array_equal(as_rgb(picture), COLORS)


def test_damaged_exif_data_costs_no_picture(tmp_path):
    Image.fromarray(BLOCKS).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert read_image(tmp_path / "a.jpg").size == BLOCKS.shape[1::-1]
    assert fov_from_exif(tmp_path / "a.jpg") is None


def test_transposes_are_those_of_exif():
    assert sorted(TURNS) == list(range(2, 9))


# Field of view


def focal_length_exif(value):
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    exif.get_ifd(0x8769)[0xA405] = value
    return exif


@pytest.mark.parametrize(
    "size, length, degrees",
    [((36, 24), 50, 39.6), ((24, 36), 50, 39.6), ((40, 30), 26, 67.3), ((36, 24), 13, 108.3), ((36, 24), 400, 5.15)],
)
@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
def test_fov_from_exif(tmp_path, size, length, degrees, suffix):
    Image.new("RGB", size).save(tmp_path / f"a.{suffix}", exif=focal_length_exif(length))
    assert fov_from_exif(tmp_path / f"a.{suffix}") == pytest.approx(degrees, abs=0.06)


@pytest.mark.parametrize("length", [0, None, 65535])
def test_a_photo_that_does_not_know_its_focal_length(length):
    file = io.BytesIO()
    exif = Image.Exif() if length is None else focal_length_exif(length)
    Image.new("RGB", (36, 24)).save(file, "JPEG", exif=exif)
    assert fov_from_exif(file) is None
