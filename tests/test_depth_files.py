"""Depth files as other programs write them. A table a kind; every row writes such a file and names what is right."""

import io
import math
import struct
import warnings
import zipfile
import zlib

import numpy as np
import OpenEXR
import pytest
import tifffile
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from mf_diffusers.depth_background import far_end
from mf_diffusers.depth_io import as_depth_map, read_depth, read_values
from mf_diffusers.input_warning import InputWarning


ROWS, COLUMNS = 40, 60
SCENE = (1 + 0.1 * np.add.outer(np.arange(ROWS), np.arange(COLUMNS))).astype(np.float32)  # 1 to 10.8
SKY = np.zeros((ROWS, COLUMNS), dtype=bool)
SKY[:12] = True
LEVELS = (1000 * SCENE + 0.4).astype(np.uint16)  # whole millimetres with low bytes of all kinds


def scene(background, dtype=np.float32, nearer=SCENE, where=SKY):
    return np.where(where, dtype(background), nearer.astype(dtype))


def save(path, values):
    np.save(path / "a.npy", values)
    return path / "a.npy"


# A background that a renderer or a sensor writes as depth


BACKGROUNDS = {
    "Blender 1e10": scene(1e10),
    "half floats 65504": scene(65504, np.float16),
    "65535 as float": scene(65535),
    "1e6": scene(1e6),
    "clip plane 1000": scene(1000),
    "clip plane 1000 behind a landscape": scene(
        1000, nearer=1.2 + 482 * np.linspace(0, 1, SCENE.size).reshape(SCENE.shape) ** 8
    ),
    "float max": scene(np.finfo(np.float32).max),
    "millimetres 65535": scene(65535, np.uint16, nearer=LEVELS),
    "centimetres 65535": scene(65535, np.uint16, nearer=LEVELS / 2),
    "millimetres 65535 not far behind a landscape": scene(
        65535, np.uint16, nearer=1000 + 50_000 * np.linspace(0, 1, SCENE.size).reshape(SCENE.shape) ** 8
    ),
    "int16 32767": scene(32767, np.int16, nearer=LEVELS / 3),
    "int32 2147483647": scene(2**31 - 1, np.int32, nearer=LEVELS),
    "a few pixels": scene(1e10, where=np.arange(SCENE.size).reshape(SCENE.shape) < 4),
    "few levels": scene(1e10, nearer=np.round(SCENE / 4) + 1),
}


@pytest.mark.parametrize("values", BACKGROUNDS.values(), ids=BACKGROUNDS)
def test_a_background_is_missing_and_said(tmp_path, values):
    path = save(tmp_path, values)
    with pytest.warns(InputWarning, match=r"a\.npy: \d+ pixels hold .* taken for background, and missing"):
        depth = read_depth(path, scale=0.5)
    background = values == values.max()
    assert np.array_equal(depth, np.where(background, 0, values * 0.5).astype(np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        number = values.max()
        assert np.array_equal(read_depth(path, scale=0.5, invalid=number), depth)
        assert np.array_equal(read_depth(path, scale=0.5, maximum=float(values[~background].max()) / 2), depth)
        infinite = read_depth(path, scale=0.5, infinite=number)
        assert np.array_equal(infinite, np.where(background, np.inf, depth))
        kept = read_depth(path, scale=0.5, maximum=math.inf)
        assert np.array_equal(kept > 0, values > 0)
        assert kept.max() == pytest.approx(float(number) / 2)


DEPTHS = {
    "a far wall": scene(40),
    "a far wall in millimetres": scene(20000, np.uint16, nearer=LEVELS),
    "a wall at 50 times the nearest": scene(50),
    "sky clamped at 80 m": np.minimum(np.geomspace(1, 500, SCENE.size).reshape(SCENE.shape), 80),
    "sky clamped at 80 m above a street": scene(80, nearer=3 * SCENE),
    "whole numbers": scene(11, np.uint8, nearer=np.round(SCENE)),
    "whole metres up to 255": np.minimum(np.arange(SCENE.size).reshape(SCENE.shape) // 8 + 1, 255).astype(np.uint16),
    "a sensor at the end of its range": np.minimum(2 * LEVELS, 10000),
    "a sensor of 16 bits at its end": np.minimum(12 * LEVELS.astype(np.int32), 65535).astype(np.uint16),
    "16 bits spread over the whole range": (SCENE / SCENE.max() * 65535).astype(np.uint16),
    "a wall at the end of the whole range": scene(65535, np.uint16, nearer=3000 * SCENE),
    "three outliers": scene(1000, where=np.arange(SCENE.size).reshape(SCENE.shape) < 3),
    "too few to compare with": np.where(np.arange(SCENE.size).reshape(SCENE.shape) < 3, 1, scene(1e10, where=True)),
    "a single depth": np.full(SCENE.shape, 1e10, dtype=np.float32),
    "nothing": np.zeros(SCENE.shape, dtype=np.float32),
}


@pytest.mark.parametrize("values", DEPTHS.values(), ids=DEPTHS)
def test_depth_stays_however_often_the_farthest_repeats(tmp_path, values):
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)
        warnings.filterwarnings("ignore", "8-bit|.*8-bit depth")
        assert np.array_equal(read_depth(save(tmp_path, values)), values.astype(np.float32))


def test_the_far_end_of_inverse_depth(tmp_path):
    path = save(tmp_path, scene(1e-4, nearer=1 / SCENE))
    with pytest.warns(InputWarning, match=r"720 pixels hold 9\.99999975e-05"):
        depth = read_depth(path, inverse=True)
    assert np.array_equal(depth > 0, ~SKY)
    np.testing.assert_allclose(depth[~SKY], SCENE[~SKY], rtol=1e-6)


BLENDED = {
    "halves": np.linspace(10_000, 9e9, COLUMNS),
    "almost all of it": np.linspace(9e9, 1e10, COLUMNS),
    "overshoot": np.linspace(1e10, 1.2e10, COLUMNS),
}


@pytest.mark.parametrize("row", BLENDED.values(), ids=BLENDED)
def test_a_background_that_resizing_mixed_with_depth(tmp_path, row):
    blended = scene(1e10)
    blended[12] = row
    with pytest.warns(InputWarning, match=r"780 pixels hold up to 1.*e\+10, .* give maximum=\.\.\. for another"):
        depth = read_depth(save(tmp_path, blended))
    assert np.array_equal(depth, np.where(np.arange(ROWS)[:, None] > 12, SCENE, 0))
    assert np.array_equal(read_depth(save(tmp_path, blended), maximum=math.inf), blended)


def test_a_single_impossible_depth(tmp_path):
    values = scene(1e7, where=np.arange(SCENE.size).reshape(SCENE.shape) < 1)
    with pytest.warns(InputWarning, match="1 pixels hold up to 10000000"):
        assert np.array_equal(read_depth(save(tmp_path, values)) > 0, values < 1e7)


def test_several_backgrounds(tmp_path):
    values = scene(1e10)
    values[:3], values[3:6] = 65504, 1000
    with pytest.warns(InputWarning) as warned:
        assert np.array_equal(read_depth(save(tmp_path, values)), np.where(SKY, 0, SCENE))
    assert [str(one.message).split(" hold ")[1].split(",")[0] for one in warned] == ["1e+10", "65504", "1000"]


def test_the_far_end_of_a_large_map_is_that_of_a_sample():
    depth = np.tile(scene(1e10), (30, 30))
    end = far_end(depth)
    assert (end.value, end.pixels) == (1e10, 900 * SKY.sum())
    assert end.median == pytest.approx(np.median(SCENE[12:]), rel=0.01)
    assert far_end(np.ones((2, 2), np.float32)) is None


# 16 bits in several channels


def png(levels, colour_type, **notes):
    """A PNG of 16 bits, (H, W) or (H, W, C), by hand: Pillow does not write these."""
    rows = levels.astype(">u2").reshape(len(levels), -1).view(np.uint8)
    rows = np.concatenate([np.zeros((len(rows), 1), np.uint8), rows], axis=1)  # filter type 0

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], 16, colour_type, 0, 0, 0)
    texts = b"".join(chunk(b"tEXt", f"{key}\0{text}".encode("latin-1")) for key, text in notes.items())
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes())) + texts + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def channels(count, alpha=None):
    equal = np.repeat(LEVELS[..., None], count, axis=2)
    return equal if alpha is None else np.concatenate([equal, np.full((ROWS, COLUMNS, 1), alpha, np.uint16)], axis=2)


def tiff(**options):
    def write(levels):
        file = io.BytesIO()
        tifffile.imwrite(file, levels, **options)
        return file.getvalue()

    return write


RGB = {"photometric": "rgb"}
SEVERAL_CHANNELS = {
    "PNG, gray": (".png", png(LEVELS, 0)),
    "PNG, gray and alpha": (".png", png(channels(1, 65535), 4)),
    "PNG, RGB": (".png", png(channels(3), 2)),
    "PNG, RGBA": (".png", png(channels(3, 65535), 6)),
    "PNG, four equal": (".png", png(channels(4), 6)),
    "TIFF, RGB": (".tif", tiff(**RGB)(channels(3))),
    "TIFF, RGBA, big endian": (".tiff", tiff(**RGB, byteorder=">", extrasamples=["unassalpha"])(channels(3, 65535))),
    "TIFF, four equal, deflate": (".tif", tiff(**RGB, compression="deflate", predictor=True)(channels(4))),
    "TIFF, RGB, LZW": (".tif", tiff(**RGB, compression="lzw", predictor=True)(channels(3))),
    "TIFF, RGB in planes": (".tif", tiff(**RGB, planarconfig="separate")(np.moveaxis(channels(3), -1, 0))),
    "TIFF, gray and alpha": (".tif", tiff(photometric="minisblack", planarconfig="contig")(channels(2))),
    "TIFF, RGB of floats": (".tif", tiff(**RGB)(channels(3).astype(np.float32))),
    "TIFF, float64": (".tif", tiff()(LEVELS.astype(np.float64))),
    "TIFF, uint32": (".tif", tiff()(LEVELS.astype(np.uint32))),
}


@pytest.mark.parametrize("suffix, data", SEVERAL_CHANNELS.values(), ids=SEVERAL_CHANNELS)
def test_16_bits_are_read_whole(tmp_path, recwarn, suffix, data):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    assert np.array_equal(read_depth(path, scale=1 / 1000), (LEVELS / 1000).astype(np.float32))
    assert not recwarn.list


def test_a_half_float_tiff(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff()(SCENE.astype(np.float16)))
    assert np.array_equal(read_depth(tmp_path / "a.tif"), SCENE.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_brought_upright_as_pictures_are(tmp_path, orientation):
    levels = np.arange(1, 7, dtype=np.uint16).reshape(2, 3)
    tag = (274, "H", 1, orientation, True)
    (tmp_path / "a.tif").write_bytes(tiff(photometric="minisblack", extratags=[tag])(levels))
    picture = Image.fromarray(levels)
    picture.getexif()[274] = orientation
    assert np.array_equal(read_depth(tmp_path / "a.tif"), np.asarray(ImageOps.exif_transpose(picture)))


@pytest.mark.parametrize("dtype, value", [(np.float32, 99), (np.float64, -9999), (np.uint16, 20000), (np.int32, -1)])
def test_missing_values_that_a_tiff_names(tmp_path, dtype, value):
    values = scene(value, dtype, nearer=SCENE if dtype in (np.float32, np.float64) else LEVELS)
    (tmp_path / "a.tif").write_bytes(tiff(extratags=[(42113, "s", 0, str(value), True)])(values))
    assert np.array_equal(read_depth(tmp_path / "a.tif") > 0, ~SKY)
    assert np.array_equal(np.isnan(read_values(tmp_path / "a.tif")), SKY)


def test_pages_after_the_first_are_left_out_and_said_so(tmp_path):
    for name, subfiletypes in {"pages.tif": [0, 0, 0], "pyramid.tif": [0, 1, 1]}.items():
        with tifffile.TiffWriter(tmp_path / name) as file:
            for number, kind in enumerate(subfiletypes):
                file.write(SCENE * (number + 1), subfiletype=kind)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            assert np.array_equal(read_depth(tmp_path / name), SCENE)
        assert [str(one.message).split(": ")[1] for one in warned] == (
            ["only the first of 3 pages is used"] if name == "pages.tif" else []
        )


def test_a_jpeg_is_no_png_whatever_its_name(tmp_path):
    Image.fromarray((10 * SCENE).astype(np.uint8)).save(tmp_path / "a.png", "JPEG")
    with pytest.raises(ValueError, match=r"a\.png: damaged, or not the \.png file"):
        read_depth(tmp_path / "a.png")


@pytest.mark.parametrize("suffix, write", [(".png", lambda c: png(c, 2)), (".tif", tiff(**RGB))])
def test_colours_of_16_bits_are_no_depth(tmp_path, suffix, write):
    coloured = channels(3)
    coloured[0, 0, 2] += 1  # in a low byte
    (tmp_path / f"a{suffix}").write_bytes(write(coloured))
    with pytest.raises(ValueError, match=rf"a\{suffix}: a coloured depth picture"):
        read_depth(tmp_path / f"a{suffix}")


# MoGe's logarithmic PNG


def log_levels(depth, near, far):
    levels = np.round(1 + 65533 * np.log(depth / near) / np.log(far / near)).astype(np.uint16)
    levels[0, 0], levels[0, 1] = 0, 65535
    return levels


@pytest.mark.parametrize("unit", [None, "2.5"])
@pytest.mark.parametrize("near, far", [(1, 10.8), (1e-3, 1e5), (0.5, 400)])
@pytest.mark.parametrize("kind", ["gray", "RGB", "chunks at the end"])
def test_logarithmic_png(tmp_path, near, far, unit, kind):
    levels, notes = (
        log_levels(SCENE, near, far),
        {"near": str(near), "far": str(far)} | ({"unit": unit} if unit else {}),
    )
    path = tmp_path / "a.png"
    if kind == "gray":
        info = PngInfo()
        for key, text in notes.items():
            info.add_text(key, text)
        Image.fromarray(levels).save(path, pnginfo=info)
    else:
        several = np.repeat(levels[..., None], 3, axis=2) if kind == "RGB" else levels
        path.write_bytes(png(several, 2 if kind == "RGB" else 0, **notes))
    depth = read_depth(path)
    assert (depth[0, 0], depth[0, 1]) == (0, np.inf)
    np.testing.assert_allclose(depth[1:], SCENE[1:] * float(unit or 1), rtol=math.log(far / near) / 65533)
    assert read_depth(path, invalid=np.inf)[0, 1] == 0
    assert np.isnan(read_values(path)[0, :2]).all()


def test_near_alone_does_not_make_a_png_logarithmic(tmp_path):
    (tmp_path / "a.png").write_bytes(png(LEVELS, 0, near="1"))
    assert np.array_equal(read_depth(tmp_path / "a.png"), LEVELS)
    (tmp_path / "a.png").write_bytes(png(LEVELS, 0, near="0", far="3"))
    with pytest.raises(ValueError, match="the text chunk 'near' is '0', no positive number"):
        read_depth(tmp_path / "a.png")


# EXR: layers, parts, windows


def write_exr(path, *parts, **header):
    """Parts as dicts of channels, or (name, dict)."""
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage} | header
    if len(parts) == 1:
        OpenEXR.File(header, parts[0]).write(str(path))
    else:
        OpenEXR.File([OpenEXR.Part(dict(header), channels, name) for name, channels in parts]).write(str(path))
    return path


def others(names, prefix=""):
    return {f"{prefix}{name}": np.random.default_rng(ord(name)).random(SCENE.shape, np.float32) for name in names}


LAYERS = {
    "Z beside colours": [others("RGBA") | {"Z": SCENE}],
    "depth.Z (Nuke)": [others("RGB") | {"depth.Z": SCENE}],
    "ViewLayer.Depth.Z (Blender)": [
        others("RGBA", "ViewLayer.Combined.") | others("XYZ", "ViewLayer.Normal.") | {"ViewLayer.Depth.Z": SCENE}
    ],
    "View Layer.Depth.V": [others("XYZW", "View Layer.Vector.") | {"View Layer.Depth.V": SCENE}],
    "Depth.V": [{"Depth.V": SCENE, "Image.R": SCENE + 1}],
    "beauty.depth": [others("RGB", "beauty.") | {"beauty.depth": SCENE}],
    "a layer depth of equal colours": [
        others("RGB") | {f"depth.{name}": SCENE for name in "RGB"} | others("A", "depth.")
    ],
    "V alone": [{"V": SCENE}],
    "V and alpha": [{"V": SCENE, "A": SCENE * 0 + 1}],
    "gray RGBA": [dict.fromkeys("RGB", SCENE) | {"A": SCENE * 0 + 1}],
    "half floats": [{"Z": SCENE.astype(np.float16).astype(np.float32).astype(np.float16)}],
    "a part named depth": [("rgba", others("RGBA")), ("depth", {"Y": SCENE})],
    "Z in the second part": [("rgba", others("RGBA")), ("data", {"Z": SCENE})],
    "depth.Z in a part of that name": [("rgba", others("RGBA")), ("depth", {"depth.Z": SCENE})],
}


@pytest.mark.parametrize("parts", LAYERS.values(), ids=LAYERS)
def test_the_depth_among_the_channels_of_an_exr(tmp_path, parts):
    np.testing.assert_allclose(read_depth(write_exr(tmp_path / "a.exr", *parts)), SCENE, rtol=1e-3)


AMBIGUOUS = {
    "Z of two layers": ([{"left.Z": SCENE, "right.Z": SCENE + 1}], "left.Z"),
    "Z and depth.Z": ([{"Z": SCENE + 1, "depth.Z": SCENE}], "depth.Z"),
    "two parts": ([("left", {"Z": SCENE}), ("right", {"Z": SCENE + 1})], "left.Z"),
    "no name of depth": ([{"U": SCENE, "V": SCENE + 1}], "U"),
    "a normal alone": ([{"N.X": SCENE + 1, "N.Y": SCENE + 2, "N.Z": SCENE}], "N.Z"),
    "gray colours of two layers": ([{f"{a}.{c}": SCENE for a in ("one", "two") for c in "RGB"}], "two.G"),
}


@pytest.mark.parametrize("parts, key", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_channels_that_could_all_be_meant_are_listed(tmp_path, parts, key):
    path = write_exr(tmp_path / "a.exr", *parts)
    with pytest.raises(ValueError, match=rf"among \[.*'{key}'.*\]; name one of them with key="):
        read_depth(path)
    assert np.array_equal(read_depth(path, key=key), SCENE)
    with pytest.raises(ValueError, match="no channel 'other' among"):
        read_depth(path, key="other")


def test_a_key_that_two_parts_have(tmp_path):
    path = write_exr(tmp_path / "a.exr", ("left", {"Z": SCENE}), ("right", {"Z": SCENE + 1}))
    with pytest.raises(ValueError, match=r"more than one channel 'Z' among \['left.Z', 'right.Z'\]"):
        read_depth(path, key="Z")


@pytest.mark.parametrize("top, left", [(2, 3), (-5, -7), (-5, 3), (100, 0)])
def test_a_data_window_is_laid_on_the_display_window(tmp_path, top, left):
    window = {
        "dataWindow": (np.array([left, top], np.int32), np.array([left + COLUMNS - 1, top + ROWS - 1], np.int32)),
        "displayWindow": (np.array([0, 0], np.int32), np.array([49, 29], np.int32)),
    }
    depth = read_depth(write_exr(tmp_path / "a.exr", {"Z": SCENE}, **window))
    expected = np.zeros((30, 50), np.float32)
    for row in range(30):
        for column in range(50):
            if 0 <= row - top < ROWS and 0 <= column - left < COLUMNS:
                expected[row, column] = SCENE[row - top, column - left]
    assert np.array_equal(depth, expected)


# PFM


def pfm(header, values=SCENE, order="<"):
    return header + np.ascontiguousarray(values[::-1]).astype(f"{order}f4").tobytes()


HEADERS = {
    "plain": b"Pf\n60 40\n-1.0\n",
    "comment": b"Pf\n# made by a program\n60 40\n-1.0\n",
    "several comments": b"Pf # one\n# 3 4\n60 # columns\n40\n# scale:\n-1.0\n",
    "comment behind the scale": b"Pf\n60 40\n-1.0\n# last words\n",
    "scale -1.": b"Pf\n60 40\n-1.\n",
    "scale -.5": b"Pf\n60 40\n-.5\n",
    "scale -1e+00": b"Pf\n60 40\n-1e+00\n",
    "scale of Middlebury": b"Pf\n60 40\n-0.003922\n",
    "spaces": b"Pf 60 40 -1 ",
    "spaces at the ends of lines": b"Pf \n60 40 \n-1.0 \n",
    "a space and a comment behind the scale": b"Pf\n60 40\n-1.0 \r\n# last words\r\n",
    "Windows": b"Pf\r\n60 40\r\n-1.0\r\n",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_pfm_headers(tmp_path, header):
    (tmp_path / "a.pfm").write_bytes(pfm(header))
    assert np.array_equal(read_depth(tmp_path / "a.pfm"), SCENE)
    (tmp_path / "a.pfm").write_bytes(pfm(header.replace(b"-", b"+"), order=">"))
    assert np.array_equal(read_depth(tmp_path / "a.pfm"), SCENE)


def test_colour_pfm(tmp_path):
    equal = np.repeat(SCENE[..., None], 3, axis=2)
    (tmp_path / "a.pfm").write_bytes(pfm(b"PF\n60 40\n-1\n", equal))
    assert np.array_equal(read_depth(tmp_path / "a.pfm"), SCENE)
    equal[3, 4] = np.nan
    (tmp_path / "a.pfm").write_bytes(pfm(b"PF\n60 40\n-1\n", equal))
    assert np.count_nonzero(read_depth(tmp_path / "a.pfm")) == SCENE.size - 1
    (tmp_path / "a.pfm").write_bytes(pfm(b"PF\n60 40\n-1\n", equal + np.array([0, 0, 1])))
    with pytest.raises(ValueError, match=r"a\.pfm: a coloured depth picture"):
        read_depth(tmp_path / "a.pfm")


@pytest.mark.parametrize("scale", ["0", "-0.0", "nan", "inf", "one", "1e999"])
def test_a_pfm_scale_that_is_no_byte_order(tmp_path, scale):
    (tmp_path / "a.pfm").write_bytes(pfm(f"Pf\n60 40\n{scale}\n".encode()))
    with pytest.raises(ValueError, match=f"no PFM header: its scale is '{scale}'"):
        read_depth(tmp_path / "a.pfm")


@pytest.mark.parametrize(
    "data", [b"Pf", b"Pf\n#", b"Pf\n60\n", b"Pf\n60 40", b"Pf\n" + b"\n# x" * 5000, b"P6\n1 1\n255\n"]
)
def test_what_is_no_pfm_header_is_said_at_once(tmp_path, data):
    (tmp_path / "a.pfm").write_bytes(data)
    with pytest.raises(ValueError, match="no PFM header"):
        read_depth(tmp_path / "a.pfm")


# Arrays


ARRAYS = {
    **{np.dtype(kind).name: SCENE.astype(kind) for kind in (np.float16, np.float64, np.longdouble, np.int8)},
    **{np.dtype(kind).name: SCENE.astype(kind) for kind in (np.uint16, np.uint32, np.int64, np.uint64)},
    "big endian": SCENE.astype(">f8"),
    "Fortran order": np.asfortranarray(SCENE),
    "(1, 1, H, W)": SCENE[None, None],
    "(1, H, W, 1)": SCENE[None, ..., None],
}


@pytest.mark.parametrize("values", ARRAYS.values(), ids=ARRAYS)
@pytest.mark.parametrize("suffix", [".npy", ".npz", "compressed.npz"])
def test_arrays_of_all_types(tmp_path, suffix, values):
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, values)
    else:
        (np.savez_compressed if "compressed" in suffix else np.savez)(path, values)
    assert np.array_equal(read_depth(path), values.reshape(SCENE.shape).astype(np.float32))


def test_masked_arrays():
    masked = np.ma.masked_greater(SCENE, 5)
    assert np.array_equal(as_depth_map(masked), np.where(SCENE > 5, 0, SCENE))
    masked = np.ma.masked_less(LEVELS, 5000)
    assert np.array_equal(as_depth_map(masked), np.where(LEVELS < 5000, 0, LEVELS))
    assert np.array_equal(as_depth_map(np.ma.masked_invalid([[np.inf, 1]]), infinite=np.inf), [[0, 1]])


def test_as_depth_map_takes_the_values_that_files_take():
    values = np.array([[1, 2, 3, 1e10, np.inf]])
    assert as_depth_map(values, invalid=2, infinite=1e10, maximum=2.5).tolist() == [[1, 0, 0, np.inf, 0]]
    assert as_depth_map(values, infinite=(1e10, np.inf)).tolist() == [[1, 2, 3, np.inf, np.inf]]
    assert as_depth_map(values, mask=[[1, 1, 1, 0, 0]], infinite=np.inf).tolist() == [[1, 2, 3, 0, 0]]


# Headers that promise more than there is


def npy(shape, data=b""):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue() + data


def bomb(shape, path, said=None):
    """An npz of zeros whose directory is true, or says `said`, and that unpacks to a few hundred megabytes at most."""
    size = 4 * math.prod(shape)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.npy", "w") as file,
    ):
        file.write(npy(said or shape))
        for _ in range(0, size, 1 << 20):
            file.write(bytes(min(1 << 20, size)))


class NoMemory:
    available = 1_000_000


@pytest.mark.parametrize("shape", [(2**20, 2**20), (2**40, 1), (1, 2**62)])
def test_absurd_headers(tmp_path, shape):
    (tmp_path / "a.npy").write_bytes(npy(shape, bytes(100)))
    with pytest.raises(ValueError, match=r"a\.npy: damaged: 100 bytes of values, but its header says"):
        read_depth(tmp_path / "a.npy")
    bomb((10, 10), tmp_path / "a.npz", said=shape)
    with pytest.raises(ValueError, match=r"a\.npz: damaged: \d+ bytes of values, but its header says"):
        read_depth(tmp_path / "a.npz")


LARGER_THAN_MEMORY = {
    "a.npz": lambda path: np.savez_compressed(path, np.zeros((300, 300), np.float32)),
    "a.npy": lambda path: np.save(path, np.ones((300, 300), np.float32)),
    "a.png": lambda path: Image.new("I;16", (300, 300)).save(path),
    "a.tif": lambda path: tifffile.imwrite(path, np.zeros((300, 300), np.uint16), compression="deflate"),
    "a.exr": lambda path: write_exr(path, {"Z": np.zeros((300, 300), np.float32)}),
}


@pytest.mark.parametrize("name", LARGER_THAN_MEMORY)
def test_what_would_not_fit_into_memory_is_refused_by_its_header(tmp_path, monkeypatch, name):
    LARGER_THAN_MEMORY[name](tmp_path / name)
    read_depth(tmp_path / name)
    monkeypatch.setattr("psutil.virtual_memory", NoMemory)
    with pytest.raises(
        ValueError, match=rf"{name}: its header says 300x300, which takes .* of memory, and 1.0 MB are free"
    ):
        read_depth(tmp_path / name)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.png", "a.tif", "a.exr", "a.pfm"])
@pytest.mark.parametrize("kept", [0, 0.1, 0.5, 0.95])
def test_a_truncated_file_is_one_error(tmp_path, name, kept):
    noise = np.random.default_rng(0).integers(1, 65535, (50, 50), dtype=np.uint16)
    path = tmp_path / name
    {
        ".npy": lambda: np.save(path, noise),
        ".npz": lambda: np.savez_compressed(path, noise),
        ".png": lambda: Image.fromarray(noise).save(path),
        ".tif": lambda: tifffile.imwrite(path, noise, compression="deflate"),
        ".exr": lambda: write_exr(path, {"Z": noise.astype(np.float32)}),
        ".pfm": lambda: path.write_bytes(pfm(b"Pf\n50 50\n-1\n", noise)),
    }[path.suffix]()
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=rf"{name}: ."):
        read_depth(path)
