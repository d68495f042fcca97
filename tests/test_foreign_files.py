"""Kinds of files that were misread once: for each the test of the kind, and siblings that it tries."""

import pytest
import test_depth_files as depth_files
import test_frames as frames
import test_hostile_models as hostile_models
import test_lora as lora
import test_pictures as pictures


KINDS = {
    "a background that is written as depth": (
        depth_files.test_a_background_is_missing_and_said,
        ["half floats 65504", "float max", "clip plane 1000", "int16 32767", "millimetres 65535"],
    ),
    "depth that looks like one": (
        depth_files.test_depth_stays_however_often_the_farthest_repeats,
        ["a far wall", "sky clamped at 80 m", "a sensor at the end of its range", "three outliers"],
    ),
    "16 bits in several equal channels": (
        depth_files.test_16_bits_are_read_whole,
        ["PNG, gray and alpha", "PNG, four equal", "TIFF, RGB in planes", "TIFF, RGB, LZW"],
    ),
    "logarithmic PNG": (depth_files.test_logarithmic_png, ["gray", "RGB", "chunks at the end"]),
    "depth among the channels of an EXR": (
        depth_files.test_the_depth_among_the_channels_of_an_exr,
        ["Z beside colours", "depth.Z (Nuke)", "ViewLayer.Depth.Z (Blender)", "View Layer.Depth.V"],
    ),
    "headers of PFM": (depth_files.test_pfm_headers, list(depth_files.HEADERS)[:4]),
    "arrays of NumPy": (depth_files.test_arrays_of_all_types, list(depth_files.ARRAYS)[:4]),
    "more than there is memory for": (
        depth_files.test_what_would_not_fit_into_memory_is_refused_by_its_header,
        list(depth_files.LARGER_THAN_MEMORY)[:3],
    ),
    "names of a LoRA's layers": (
        lora.test_every_spelling_makes_the_same_change,
        ["DiffSynth", "PEFT, with its name", "ai-toolkit, with alpha", "OneTrainer", "LyCORIS", "kohya"],
    ),
    "a LoRA of which a part has no place": (
        lora.test_what_does_not_load_whole_does_not_load,
        ["another model's keys", "kohya's text encoder", "DoRA", "whole differences"],
    ),
    "colours of another profile": (
        pictures.test_colors_are_converted_by_their_profile,
        ["prophoto.png", "p3.webp", "linear.tif", "palette.png"],
    ),
    "a profile that does not fit": (
        pictures.test_a_profile_that_does_not_fit_is_left_out_and_said_so,
        ["garbage", "gray", "truncated"],
    ),
    "inks": (pictures.test_inks_are_converted_by_their_profile, ["cmyk.tif", "deflate.tif", "progressive.jpg"]),
    "gray with a profile": (
        pictures.test_grays_are_converted_by_their_profile,
        ["gray16.png", "gray16.tif", "opaque.png"],
    ),
    "orientation of pictures": (pictures.test_pictures_are_turned_upright, ["2", "5", "7", "webp", "avif", "mpo"]),
    "orientation of a TIFF": (pictures.test_a_lying_tiff_has_its_decoded_size, ["5", "7", "8", "CMYK", "tiff_lzw"]),
    "depth of a picture that is turned": (frames.test_depth_is_turned_along_with_its_picture, ["2", "4", "8", "webp"]),
    "models that are damaged or absurd": (
        hostile_models.test_one_line_names_the_culprit,
        list(hostile_models.CASES)[:60],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_tried_on_its_siblings(kind):
    test, siblings = KINDS[kind]
    assert len(siblings) >= 3
    missing = set(siblings) - tried_by(test)
    assert not missing, f"{test.__name__} tries no {missing}"


def tried_by(test) -> set[str]:
    """What the parameters of a test are called."""
    return {name for mark in test.pytestmark for name in names(mark)}


def names(mark) -> list[str]:
    if "ids" in mark.kwargs:
        return list(mark.kwargs["ids"])
    return [str(value[0] if isinstance(value, tuple) else value) for value in mark.args[1]]
