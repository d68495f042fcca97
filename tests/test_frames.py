"""Pictures that are not stored upright, beside depth: own folders, shards, and data sets as sensors wrote them."""

import io
import json
import warnings

import numpy as np
import pytest
from dataset_files import write_blendedmvs, write_foundationstereo, write_megadepth, write_taskonomy
from icc_profiles import PROPHOTO, rgb_profile, srgb_of_rgb
from PIL import Image

from finetune.data.sources import FolderConfig, WebDatasetConfig, build_source
from mf_diffusers.datasets import DATASETS
from mf_diffusers.datasets.folder import Folder
from mf_diffusers.input_warning import InputWarning


SENSOR = np.arange(1, 6 * 4 + 1, dtype=np.float32).reshape(4, 6)  # depth as the sensor wrote it: no two corners alike
LARGE_SENSOR = SENSOR.repeat(8, axis=0).repeat(8, axis=1)
UPRIGHT = {  # orientation: that depth as EXIF has it turned
    1: SENSOR,
    2: SENSOR[:, ::-1],
    3: SENSOR[::-1, ::-1],
    4: SENSOR[::-1],
    5: SENSOR.T,
    6: np.rot90(SENSOR, -1),
    7: np.rot90(SENSOR, 2).T,
    8: np.rot90(SENSOR),
}


def oriented(path, value, pixels=SENSOR, **settings):
    """A gray picture of `pixels` with this orientation."""
    exif = Image.Exif()
    exif[0x0112] = value
    Image.fromarray((10 * pixels).astype(np.uint8)).save(path, exif=exif, **settings)


def frame_folder(path, name, value, depth):
    path.mkdir(exist_ok=True)
    oriented(path / name, value, lossless=True)
    np.save(path / "d.npy", depth)
    (path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "depth_file_name": "d.npy"}))
    return path


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
@pytest.mark.parametrize("value", range(1, 9))
def test_depth_is_turned_along_with_its_picture(tmp_path, suffix, value):
    """All orientations, also where the decoder itself turns the picture (TIFF). Picture and depth hold one map."""
    folder = frame_folder(tmp_path, f"a.{suffix}", value, SENSOR)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        frame = Folder(folder)[0]
    assert np.array_equal(frame.depth, UPRIGHT[value])
    assert np.array_equal(frame.image[..., 0], 10 * UPRIGHT[value])
    assert [warning.category for warning in caught] == [InputWarning] * (value in (2, 3, 4))
    source = build_source(FolderConfig(path=str(folder), shuffle=False))
    sample = source[0]
    assert source.size(0) == tuple(sample["depth"].shape[1:]) == UPRIGHT[value].shape
    assert np.array_equal(sample["depth"][0], UPRIGHT[value])
    np.testing.assert_allclose(sample["image"][0] * 25.5, UPRIGHT[value], rtol=1e-5)


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
@pytest.mark.parametrize("value", [5, 6, 7, 8])
def test_depth_that_is_upright_already_stays(tmp_path, suffix, value):
    folder = frame_folder(tmp_path, f"a.{suffix}", value, UPRIGHT[value])
    assert np.array_equal(Folder(folder)[0].depth, UPRIGHT[value])
    assert np.array_equal(build_source(FolderConfig(path=str(folder)))[0]["depth"][0], UPRIGHT[value])


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("value", range(1, 9))
def test_depth_that_fits_neither_way_is_an_error(tmp_path, suffix, value):
    folder = frame_folder(tmp_path, f"a.{suffix}", value, np.ones((4, 4), dtype=np.float32))
    with pytest.raises(ValueError, match="a: depth of 4x4 does not belong to a picture of"):
        Folder(folder)[0]


def test_depth_of_a_turned_picture_has_a_size_of_its_own(tmp_path):
    folder = frame_folder(tmp_path, "a.png", 6, SENSOR[::2, ::2])
    assert np.array_equal(Folder(folder)[0].depth, np.rot90(SENSOR[::2, ::2], -1).repeat(2, axis=0).repeat(2, axis=1))


@pytest.mark.parametrize("value", [1, 3, 6, 7])
def test_depth_in_shards_is_turned_along(tmp_path, value):
    webdataset = pytest.importorskip("webdataset")
    picture, depth = io.BytesIO(), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = value
    Image.fromarray((10 * SENSOR).astype(np.uint8)).save(picture, "PNG", exif=exif)
    np.save(depth, SENSOR)
    with webdataset.TarWriter(str(tmp_path / "s.tar")) as writer:
        writer.write({"__key__": "a", "png": picture.getvalue(), "depth.npy": depth.getvalue(), "txt": "a"})
    sample = build_source(WebDatasetConfig(shards=str(tmp_path / "s.tar")))[0]
    assert np.array_equal(sample["depth"][0], UPRIGHT[value])
    np.testing.assert_allclose(sample["image"][0] * 25.5, UPRIGHT[value], rtol=1e-5)


def rewritten(path, **settings):
    """The picture at `path` in its place, with `settings` of the encoder."""
    with Image.open(path) as picture:
        picture.load()
    picture.save(path, **settings)


@pytest.mark.parametrize("value", [3, 6])
@pytest.mark.parametrize(
    "name, write",
    [
        ("blendedmvs", lambda root: write_blendedmvs(root / "scene", "00000003")),
        (
            "megadepth",
            lambda root: write_megadepth(root / "0000" / "dense0", "a", SENSOR.repeat(8, axis=0).repeat(8, axis=1)),
        ),
        ("taskonomy", lambda root: write_taskonomy(root, "allensville", "point_0_view_1")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pictures_of_data_sets_lie_as_their_sensor(tmp_path, name, write, value):
    write(tmp_path)
    before = DATASETS[name](tmp_path)[0]
    exif = Image.Exif()
    exif[0x0112] = value
    for path in [p for p in tmp_path.rglob("*") if p.suffix in (".jpg", ".png") and "depth" not in p.name]:
        rewritten(path, exif=exif, quality=100)
    after = DATASETS[name](tmp_path)[0]
    assert np.abs(after.image.astype(int) - before.image).mean() < 5
    assert np.array_equal(after.depth, before.depth)


def test_disparity_in_a_picture_has_no_colours(tmp_path):
    disparity = np.arange(12, dtype=int).reshape(3, 4) * 7000 + 1
    write_foundationstereo(tmp_path / "kitchen", "0003", disparity)
    dataset = DATASETS["foundationstereo"](tmp_path)
    before = dataset[0]
    (path,) = tmp_path.rglob("disparity/*.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    rewritten(path, icc_profile=rgb_profile(PROPHOTO, 1.8), exif=exif)
    assert np.array_equal(dataset[0].depth, before.depth)
    (path,) = tmp_path.rglob("rgb/*.jpg")
    rewritten(path, icc_profile=rgb_profile(PROPHOTO, 1.8), quality=100)
    assert np.abs(dataset[0].image - srgb_of_rgb(before.image, PROPHOTO, 1.8)).mean() < 4  # the picture has
