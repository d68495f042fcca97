import numpy as np
import pytest
from PIL import Image

from mf_diffusers.visualization import MISSING_GRAY, colorize_depth, colorize_error, contact_sheet


GRAY = [MISSING_GRAY] * 3
RAMP = 1 / np.linspace(1, 0.1, 101)[None]  # from near to far, even in inverse depth


def is_white(picture):
    return (np.asarray(picture) == 255).all(axis=-1)


# Depth


def test_near_is_red_and_far_is_blue():
    near, *_, far = colorize_depth(RAMP)[0].astype(int)
    assert near[0] > near[2] + 50
    assert far[2] > far[0] + 50


def test_colours_are_even_in_inverse_depth_between_percentiles():
    gray = colorize_depth(RAMP, cmap="gray")[0, :, 0]
    assert np.abs(gray - np.clip((np.arange(101) - 2) / 96, 0, 1) * 255).max() < 2  # the map has 256 steps


def test_scale_of_depth_does_not_matter():
    assert np.array_equal(colorize_depth(RAMP), colorize_depth(RAMP * 1024))


def test_outliers_do_not_matter():
    depth = np.concatenate([RAMP, RAMP], axis=0)
    outlier = depth.copy()
    outlier[0, 50] = 1e-6
    difference = np.abs(colorize_depth(depth, cmap="gray").astype(int) - colorize_depth(outlier, cmap="gray"))
    difference[0, 50] = 0
    assert difference.max() <= 6


def test_near_and_far():
    gray = colorize_depth([[0.5, 1, 4 / 3, 2, 9]], cmap="gray", near=1, far=2)[0, :, 0]
    assert gray.tolist() == [0, 0, 128, 255, 255]
    assert colorize_depth([[3, 4]], cmap="gray", near=5)[0, :, 0].tolist() == [0, 0]  # all before `near`
    assert colorize_depth([[3, 4]], cmap="gray", far=2)[0, :, 0].tolist() == [255, 255]  # all behind `far`


@pytest.mark.parametrize("missing", [0, -1, np.nan, np.inf])
def test_missing_depth_is_gray(missing):
    depth = RAMP.copy()
    depth[0, 5] = missing
    picture = colorize_depth(depth)
    assert picture[0, 5].tolist() == GRAY
    assert np.array_equal(picture, colorize_depth(RAMP, mask=np.arange(101)[None] != 5))


def test_all_missing_depth():
    assert np.array_equal(colorize_depth(np.zeros((2, 3))), np.full((2, 3, 3), MISSING_GRAY))


def test_constant_depth_has_the_middle_colour():
    constant = np.full((2, 3), 7, dtype=np.float32)
    constant[0, 0] = np.nextafter(np.float32(7), np.float32(8))
    assert (colorize_depth(constant, cmap="gray") == 128).all()
    assert colorize_depth([[6, 7, 8]], cmap="gray", near=7, far=7)[0, :, 0].tolist() == [0, 128, 255]


def test_every_map_of_a_batch_has_its_own_range():
    batch = np.stack([RAMP, 5 * RAMP**2, 0 * RAMP])
    mask = np.random.default_rng(0).random(batch.shape) > 0.2
    pictures = colorize_depth(batch, mask)
    assert (pictures.shape, pictures.dtype) == ((3, 1, 101, 3), np.uint8)
    for picture, depth, its_mask in zip(pictures, batch, mask):
        assert np.array_equal(picture, colorize_depth(depth, its_mask))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"depth": np.ones(4)}, "is no depth map"),
        ({"depth": np.ones((0, 4))}, "is no depth map"),
        ({"depth": np.ones((0, 4, 4))}, "is no batch of maps"),
        ({"depth": np.ones((4, 4, 1))}, "is no batch of maps"),
        ({"depth": np.ones((1, 2, 4, 4))}, "is no depth map"),
        ({"depth": np.ones((4, 4), bool)}, "not real numbers"),
        ({"depth": np.ones((4, 4)), "mask": np.ones((4, 5))}, "mask of shape"),
        ({"depth": np.ones((2, 4, 4)), "mask": np.ones((4, 4))}, "mask of shape"),
        ({"depth": np.ones((4, 4)), "cmap": "rainbows"}, "no colour map 'rainbows'; try"),
        ({"depth": np.ones((4, 4)), "near": 0}, "near=0 must be a positive depth"),
        ({"depth": np.ones((4, 4)), "far": np.nan}, "far=nan must be a positive depth"),
        ({"depth": np.ones((4, 4)), "near": 2, "far": 1}, "near=2 must not be more than far=1"),
    ],
)
def test_colorize_depth_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        colorize_depth(**arguments)


# Errors


def test_error_goes_from_dark_to_bright():
    picture = colorize_error([[0, 0.5, 1, 2, np.nan]], max=1).astype(int)[0]
    assert picture[0].sum() < picture[1].sum() < picture[2].sum()
    assert np.array_equal(picture[2], picture[3])
    assert picture[4].tolist() == GRAY


def test_error_range_is_robust():
    error = np.linspace(0, 1, 101).reshape(1, 1, 101)
    assert np.array_equal(colorize_error(error), colorize_error(error, max=0.98))
    assert colorize_error(error).shape == (1, 1, 101, 3)


def test_error_mask_zero_and_nothing():
    assert colorize_error(np.ones((1, 2)), mask=[[True, False]])[0, 1].tolist() == GRAY
    assert np.array_equal(colorize_error(np.zeros((1, 2))), colorize_error(np.zeros((1, 2)), max=1))
    assert np.array_equal(colorize_error(np.full((1, 2), np.nan)), np.full((1, 2, 3), MISSING_GRAY))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"error": np.ones(3)}, r"error of shape \(3,\)"),
        ({"error": np.ones((0, 3))}, r"error of shape \(0, 3\)"),
        ({"error": np.ones((2, 2), bool)}, "bool is no map"),
        ({"error": [[-0.25, 1]]}, r"goes down to -0\.25; give its absolute value"),
        ({"error": np.ones((2, 2)), "mask": np.ones(2)}, "mask of shape"),
        ({"error": np.ones((2, 2)), "max": 0}, "max=0 must be a positive error"),
    ],
)
def test_colorize_error_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        colorize_error(**arguments)


# Contact sheets


def test_sheet_without_labels():
    red, blue = Image.new("RGB", (200, 100), "red"), Image.new("RGB", (50, 100), "blue")
    sheet = np.asarray(contact_sheet([[red, blue], [blue, None]], cell=64))
    # A column is at least half a cell wide: 64 and 32. Fitted into the cell the pictures are 64x32 and 32x64.
    for color, count in (((255, 0, 0), 64 * 32), ((0, 0, 255), 2 * 32 * 64)):
        assert (sheet == color).all(axis=-1).sum() == count
    assert (sheet == 255).all(axis=-1).sum() == sheet.shape[0] * sheet.shape[1] - 64 * 32 - 2 * 32 * 64


def test_sheet_pictures_of_every_mode():
    transparent = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    assert is_white(contact_sheet([[transparent, None]], cell=64)).all()
    deep = Image.fromarray(np.full((64, 64), 128 * 257, dtype=np.uint16))
    assert (np.asarray(contact_sheet([[deep]], cell=64)) == 128).all(axis=-1).sum() == 64 * 64


def test_labels_stay_within_their_room():
    long = "a label of several words and one_very_long_unbreakable_word_that_has_to_be_cut_somewhere"
    picture = Image.new("RGB", (128, 128), "white")
    plain = contact_sheet([[picture] * 2] * 2, cell=128)
    labelled = contact_sheet([[picture] * 2] * 2, ["first", 2 * long], ["first", long], cell=128, title=3 * long)
    assert labelled.width > plain.width and labelled.height > plain.height
    ink = ~is_white(labelled)
    assert ink.any()
    assert not (ink[:, :5].any() or ink[:, -5:].any() or ink[:5].any() or ink[-5:].any())
    left, top = labelled.width - plain.width, labelled.height - plain.height
    assert not ink[top + 16 :, left + 16 :].any()  # nothing is written over the pictures


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rows": []}, "no rows of pictures"),
        ({"rows": [[]]}, "no rows of pictures"),
        ({"rows": [Image.new("RGB", (4, 4))]}, "no rows of pictures"),
        ({"rows": [[None, None], [None]]}, "row 1 has 1 pictures where row 0 has 2"),
        ({"rows": [[np.ones((4, 4, 3))]]}, "holds a ndarray; give PIL images"),
        ({"rows": [[None]], "row_labels": ["a", "b"]}, "2 row labels for 1 rows"),
        ({"rows": [[None]], "column_labels": []}, "0 column labels for 1 columns"),
        ({"rows": [[None]], "cell": 8}, "cell=8"),
        ({"rows": [[None]], "cell": 64.0}, r"cell=64\.0"),
    ],
)
def test_contact_sheet_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet(**arguments)
