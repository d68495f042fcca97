import os

import numpy as np
import OpenEXR
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mf_diffusers.depth_io import (
    DEPTH_SUFFIXES,
    DEPTH_WRITE_SUFFIXES,
    as_depth_map,
    read_depth,
    write_depth,
)
from mf_diffusers.files import atomic_write
from mf_diffusers.input_warning import InputWarning


DEPTH = np.array([[0.5, 1.25, 0], [3, 7.75, 2.5]], dtype=np.float32)
LEVELS = np.array([[0, 1, 256], [1000, 40000, 65535]], dtype=np.uint16)


def write_exr(path, **channels):
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    OpenEXR.File(header, channels).write(str(path))


def write_pfm(path, depth, byte_order):
    sign = -1.0 if byte_order == "<" else 1.0
    header = f"Pf\n{depth.shape[1]} {depth.shape[0]}\n{sign}\n".encode()
    path.write_bytes(header + depth[::-1].astype(f"{byte_order}f4").tobytes())


def save_png(path, array, **notes):
    info = PngInfo()
    for key, text in notes.items():
        info.add_text(key, text)
    Image.fromarray(array).save(path, pnginfo=info)


# Depth: reading


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".exr", ".tif", ".tiff", ".pfm", ".NPY"])
def test_read_float_depth(tmp_path, suffix):
    path = tmp_path / f"depth{suffix}"
    if suffix.lower() == ".npy":
        with path.open("wb") as file:
            np.save(file, DEPTH)
    elif suffix == ".npz":
        np.savez(path, depth=DEPTH)
    elif suffix == ".exr":
        write_exr(path, Z=DEPTH)
    elif suffix == ".pfm":
        write_pfm(path, DEPTH, "<")
    else:
        Image.fromarray(DEPTH).save(path)
    depth = read_depth(path)
    assert depth.dtype == np.float32
    assert np.array_equal(depth, DEPTH)
    assert np.array_equal(read_depth(path, scale=0.5), DEPTH / 2)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("scale", [None, 1 / 1000, 1 / 256])
def test_read_16_bit_depth(tmp_path, suffix, scale):
    Image.fromarray(LEVELS).save(tmp_path / f"a{suffix}")
    depth = read_depth(tmp_path / f"a{suffix}", scale=scale)
    assert np.array_equal(depth, (LEVELS * (scale or 1.0)).astype(np.float32))


@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_pfm_byte_orders(tmp_path, byte_order):
    write_pfm(tmp_path / "a.pfm", DEPTH, byte_order)
    assert np.array_equal(read_depth(tmp_path / "a.pfm"), DEPTH)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32, np.uint16, ">f4"])
@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3), (2, 3, 1)])
def test_npy_types_and_shapes(tmp_path, dtype, shape):
    stored = np.arange(6).reshape(shape).astype(dtype)
    np.save(tmp_path / "a.npy", stored)
    depth = read_depth(tmp_path / "a.npy")
    assert depth.dtype == np.float32
    assert np.array_equal(depth, [[0, 1, 2], [3, 4, 5]])


def test_missing_pixels_come_back_as_zero(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[np.nan, -np.inf, -1, 0, 2]]))
    assert read_depth(tmp_path / "a.npy").tolist() == [[0, 0, 0, 0, 2]]


def test_what_float32_cannot_hold_is_missing_and_said(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[1e300, 2]]))
    with pytest.warns(InputWarning, match=r"a\.npy: 1 pixels are missing, 1e\+300: too large for float32"):
        assert read_depth(tmp_path / "a.npy").tolist() == [[0, 2]]
    np.save(tmp_path / "a.npy", np.array([[1e30, 2]]))
    with pytest.warns(InputWarning, match="too large"):
        assert read_depth(tmp_path / "a.npy", scale=1e10).tolist() == [[0, np.float32(2e10)]]


def test_infinite_depth_stays_infinite(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[np.inf, 0, 0.5, 4]]))
    assert read_depth(tmp_path / "a.npy", scale=2).tolist() == [[np.inf, 0, 1, 8]]
    assert read_depth(tmp_path / "a.npy", invalid=np.inf).tolist() == [[0, 0, 0.5, 4]]
    assert read_depth(tmp_path / "a.npy", infinite=4, maximum=0.4).tolist() == [[np.inf, 0, 0, np.inf]]
    # In inverse depth it is the other way around.
    assert read_depth(tmp_path / "a.npy", inverse=True, scale=0.5).tolist() == [[0, 0, 4, 0.5]]
    assert read_depth(tmp_path / "a.npy", inverse=True, infinite=0).tolist() == [[0, np.inf, 2, 0.25]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_invalid_values_of_floats(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.array([[0.1, 5, 9, 2]], dtype=dtype)[None])
    assert read_depth(tmp_path / "a.npy", scale=2, invalid=(0.1, 9)).tolist() == [[0, 10, 0, 4]]


def test_invalid_values_of_integers(tmp_path):
    Image.fromarray(LEVELS).save(tmp_path / "a.png")
    assert read_depth(tmp_path / "a.png", invalid=65535).tolist() == [[0, 1, 256], [1000, 40000, 0]]
    assert read_depth(tmp_path / "a.png", invalid=(-1, 256, 40000)).tolist() == [[0, 1, 0], [1000, 0, 65535]]


def test_npz_keys(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, depth=DEPTH, other=2 * DEPTH)
    assert np.array_equal(read_depth(path), DEPTH)
    assert np.array_equal(read_depth(path, key="other"), 2 * DEPTH)
    np.savez(path, only=DEPTH)
    assert np.array_equal(read_depth(path), DEPTH)


@pytest.mark.parametrize(
    "names, key", [("ZR", None), ("YA", None), (["depth", "R"], None), ("RGB", None), (["Layer.V"], None), ("AX", "A")]
)
def test_exr_channels(tmp_path, names, key):
    gray = "".join(names) == "RGB"
    write_exr(tmp_path / "a.exr", **{name: DEPTH if gray or i == 0 else DEPTH + 1 for i, name in enumerate(names)})
    assert np.array_equal(read_depth(tmp_path / "a.exr", key=key), DEPTH)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P"])
def test_8_bit_depth_is_read_with_a_warning(tmp_path, mode):
    gray = np.array([[0, 10], [20, 255]], dtype=np.uint8)
    Image.fromarray(gray).convert(mode).save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match=r"a\.png.*only 256 levels"):
        depth = read_depth(tmp_path / "a.png", scale=0.5)
    assert np.array_equal(depth, gray / 2)


def save_coloured(path):
    Image.new("RGB", (2, 2), (1, 2, 3)).save(path)


@pytest.mark.parametrize(
    "name, make, options, message",
    [
        ("a.png", save_coloured, {}, "coloured depth picture.*raw depth"),
        ("a.tif", save_coloured, {}, "coloured depth picture.*raw depth"),
        ("a.exr", lambda p: write_exr(p, R=DEPTH, G=DEPTH, B=DEPTH + 1), {}, "coloured depth picture.*raw depth"),
        ("a.exr", lambda p: write_exr(p, U=DEPTH, V=DEPTH), {}, r"named as depth is among \['U', 'V'\].*key="),
        ("a.exr", lambda p: write_exr(p, Z=DEPTH), {"key": "V"}, r"no channel 'V' among \['Z'\].*key="),
        ("a.exr", lambda p: p.write_bytes(b"garbage"), {}, "damaged, or not the .exr file"),
        ("a.npz", lambda p: np.savez(p, x=DEPTH, y=DEPTH), {}, r"no array 'depth' among \['x', 'y'\].*key="),
        ("a.npz", lambda p: np.savez(p, x=DEPTH), {"key": "y"}, r"no array 'y' among \['x'\].*key="),
        ("a.npz", lambda p: np.savez(p), {}, r"no array 'depth' among \[\]"),
        ("a.npz", lambda p: p.write_bytes(b"PK\3\4garbage"), {}, "damaged, or not the .npz file"),
        ("a.npy", lambda p: p.write_bytes(b"garbage"), {}, "no NumPy file"),
        ("a.npy", lambda p: p.write_bytes(b""), {}, "no NumPy file"),
        ("a.npy", lambda p: np.save(p, np.array([[{}]])), {}, "type object are no numbers"),
        ("a.npy", lambda p: np.save(p, np.ones(3)), {}, r"shape \(3,\) is no depth map; give one map \(H, W\)"),
        ("a.npy", lambda p: np.save(p, np.ones((2, 3, 3))), {}, r"shape \(2, 3, 3\) is no depth map"),
        ("a.npy", lambda p: np.save(p, np.ones((0, 3))), {}, r"shape \(0, 3\) is no depth map"),
        ("a.npy", lambda p: np.save(p, np.ones((2, 2), bool)), {"scale": 2}, "type bool are not real numbers"),
        ("a.npy", lambda p: np.save(p, np.ones((2, 2), complex)), {}, "type complex128 are not real numbers"),
        ("a.npy", lambda p: np.save(p, DEPTH), {"key": "depth"}, "key='depth'.*leave it out for .npy"),
        ("a.npy", lambda p: np.save(p, DEPTH), {"scale": 0}, "scale=0 must be a positive number"),
        ("a.npy", lambda p: np.save(p, DEPTH), {"scale": float("nan")}, "scale=nan must be a positive number"),
        ("a.png", lambda p: p.write_bytes(b"garbage"), {}, "damaged, or not the .png file"),
        ("a.png", lambda p: save_png(p, LEVELS, depth_scale="often"), {}, "depth_scale.*'often'.*pass scale"),
        ("a.png", lambda p: save_png(p, LEVELS, depth_scale="-1"), {}, "depth_scale.*'-1'.*pass scale"),
        ("a.pfm", lambda p: p.write_bytes(b"garbage"), {}, "no PFM header"),
        ("a.pfm", lambda p: p.write_bytes(b"Pf\n1 1\nx\n" + bytes(4)), {}, "no PFM header"),
        ("a.pfm", lambda p: p.write_bytes(b"PF\n1 1\n-1\n" + bytes(range(12))), {}, "coloured depth picture"),
        ("a.pfm", lambda p: p.write_bytes(b"Pf\n2 1\n-1\n" + bytes(7)), {}, "7 bytes of values where 2x1 pixels"),
        ("a.jpg", save_coloured, {}, r"no depth format has the suffix '\.jpg'; use \.png, \.npy"),
        ("depth", lambda p: p.write_bytes(b""), {}, "no depth format has the suffix ''"),
    ],
)
def test_read_depth_rejects(tmp_path, name, make, options, message):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        read_depth(tmp_path / name, **options)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("suffix", DEPTH_SUFFIXES)
def test_read_depth_names_the_missing_file(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_depth(tmp_path / f"nothing{suffix}")


def test_damaged_pixel_data_is_an_error(tmp_path):
    noise = np.random.default_rng(0).integers(0, 65536, (64, 64), dtype=np.uint16)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:4000])
    write_exr(tmp_path / "a.exr", Z=noise.astype(np.float32))
    (tmp_path / "a.exr").write_bytes((tmp_path / "a.exr").read_bytes()[:-4000])
    for name in ("a.png", "a.exr"):
        with pytest.raises(ValueError, match=f"{name}: damaged"):
            read_depth(tmp_path / name)


def test_a_given_scale_stands_before_the_noted_one(tmp_path):
    save_png(tmp_path / "a.png", LEVELS, depth_scale="0.25")
    assert np.array_equal(read_depth(tmp_path / "a.png"), LEVELS / 4)
    save_png(tmp_path / "a.png", LEVELS, depth_scale="often")
    assert np.array_equal(read_depth(tmp_path / "a.png", scale=2), LEVELS * 2.0)


# Depth: writing


@pytest.mark.parametrize("suffix", [*DEPTH_WRITE_SUFFIXES, ".NPY", ".PNG"])
def test_write_and_read_back(tmp_path, suffix):
    depth = np.random.default_rng(0).uniform(0.2, 12, (37, 53)).astype(np.float32)
    depth[:4] = [[np.nan], [-1], [np.inf], [0]]
    path = tmp_path / f"depth{suffix}"
    write_depth(path, depth)
    read = read_depth(path)
    assert not read[:4].any()
    tolerance = 12 / 65535 / 2 * 1.001 if suffix.lower() == ".png" else 0
    assert np.abs(read[4:] - depth[4:]).max() <= tolerance
    assert os.listdir(tmp_path) == [path.name]


def test_png_levels(tmp_path):
    write_depth(tmp_path / "a.png", [[0, 1e-7, 1, 2]])
    with Image.open(tmp_path / "a.png") as image:
        assert np.asarray(image).tolist() == [[0, 1, 32768, 65535]]  # the nearest pixel is not rounded to "missing"
        assert float(image.info["depth_scale"]) == 2 / 65535
    assert read_depth(tmp_path / "a.png").max() == 2
    assert read_depth(tmp_path / "a.png", scale=1).max() == 65535


@pytest.mark.parametrize("suffix", DEPTH_WRITE_SUFFIXES)
def test_write_all_missing(tmp_path, suffix):
    write_depth(tmp_path / f"a{suffix}", np.full((2, 2), np.nan))
    assert read_depth(tmp_path / f"a{suffix}").tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    "name, depth, message",
    [
        ("a.jpg", DEPTH, r"cannot be written with the suffix '\.jpg'; use \.npy, \.exr, \.png"),
        ("a.npy", np.ones((2, 2, 3)), r"shape \(2, 2, 3\) is no depth map"),
        ("a.npy", np.ones((0, 2)), r"shape \(0, 2\) is no depth map"),
        ("a.npy", [["far"]], "not real numbers"),
    ],
)
def test_write_depth_rejects(tmp_path, name, depth, message):
    with pytest.raises(ValueError, match=message):
        write_depth(tmp_path / name, depth)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("suffix", DEPTH_WRITE_SUFFIXES)
def test_write_depth_into_a_missing_folder(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match=r"folder .*nowhere does not exist"):
        write_depth(tmp_path / "nowhere" / f"a{suffix}", DEPTH)


def test_as_depth_map_mask():
    assert as_depth_map([[1, 2]], mask=[[0, 1]]).tolist() == [[0, 2]]
    with pytest.raises(ValueError, match=r"mask of shape \(2,\) does not fit depth of shape \(1, 2\)"):
        as_depth_map([[1, 2]], mask=[0, 1])


def test_atomic_write_replaces_the_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path) as temporary:
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".txt")
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_failing_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with (
        pytest.raises(UnicodeEncodeError),
        atomic_write(path) as temporary,
        temporary.open("w", encoding="ascii") as file,
    ):
        file.write("half")
        file.flush()
        file.write("\N{SNOWMAN}")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_failing_replacement_leaves_no_temporary_file(tmp_path):
    (tmp_path / "a.npy").mkdir()
    with pytest.raises(OSError):
        write_depth(tmp_path / "a.npy", DEPTH)
    assert os.listdir(tmp_path) == ["a.npy"]
