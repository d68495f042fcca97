"""Every permutation of what is given and what is made: each modality whole, in part, as a start, or not at all."""

import numpy as np
import PIL.Image
import pytest
import torch
from tiny import close_depth, make_dit_pipeline, make_pipeline
from tiny_z_image import make_z_image_pipeline

from mf_diffusers.modality_forcing.backbones import BACKBONES
from mf_diffusers.modality_forcing.completion import log_correction
from mf_diffusers.modality_forcing.depth_processor import DepthProcessor, shrink


SIZE = (24, 40)
IMAGES = np.random.default_rng(0).random((2, *SIZE, 3), dtype=np.float32)
DEPTHS = 2 + 3 * np.random.default_rng(1).random((2, *SIZE), dtype=np.float32)
HIDDEN = np.zeros(SIZE, np.float32)
HIDDEN[8:20, 12:32] = 1
SPARSE = np.random.default_rng(2).random((2, *SIZE)) < 0.05

WHOLE_IMAGE, PART_OF_IMAGE, START_IMAGE = (
    {"image": IMAGES} | more for more in ({}, {"mask_image": HIDDEN}, {"strength": 0.6})
)
WHOLE_DEPTH, PART_OF_DEPTH, START_DEPTH = (
    {"depth": DEPTHS} | more for more in ({}, {"depth_mask": SPARSE}, {"depth_strength": 0.6})
)
NOTHING: dict = {}
ROWS = [  # image, depth, is an image made, is depth made
    (NOTHING, NOTHING, True, True),
    (WHOLE_IMAGE, NOTHING, False, True),
    (WHOLE_IMAGE, PART_OF_DEPTH, False, True),
    (WHOLE_IMAGE, START_DEPTH, False, True),
    (NOTHING, WHOLE_DEPTH, True, False),
    (NOTHING, PART_OF_DEPTH, True, True),
    (PART_OF_IMAGE, NOTHING, True, True),
    (PART_OF_IMAGE, WHOLE_DEPTH, True, False),
    (PART_OF_IMAGE, PART_OF_DEPTH, True, True),
    (PART_OF_IMAGE | START_IMAGE, NOTHING, True, True),
    (START_IMAGE, NOTHING, True, True),
    (START_IMAGE, WHOLE_DEPTH, True, False),
    (START_IMAGE, PART_OF_DEPTH, True, True),
    (START_IMAGE, START_DEPTH, True, True),
]


@pytest.fixture(scope="module", params=[make_pipeline, make_z_image_pipeline, make_dit_pipeline], ids=list(BACKBONES))
def pipe(request):
    pipeline = request.param()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_to_config(default_depth_steps=2)
    return pipeline


def call(pipe, seeds=(0, 1), **inputs):
    inputs = {"prompt": ["a cat", "a dog"], "num_inference_steps": 3, "output_type": "np"} | inputs
    if "image" not in inputs and "depth" not in inputs:
        inputs |= {"height": SIZE[0], "width": SIZE[1]}
    return pipe(generator=[torch.Generator().manual_seed(seed) for seed in seeds], **inputs)


@pytest.mark.parametrize(("image", "depth", "makes_image", "makes_depth"), ROWS)
def test_what_is_made(pipe, image, depth, makes_image, makes_depth):
    output = call(pipe, **image, **depth)
    assert (output.images is not None) == makes_image
    assert (output.depth is not None) == makes_depth
    if makes_image:
        assert output.images.shape == (2, *SIZE, 3) and np.isfinite(output.images).all()
    if makes_depth:
        assert output.depth.shape == (2, *SIZE) and (output.depth > 0).all()
        assert np.isfinite(output.depth).all()
    if "mask_image" in image:
        shown = HIDDEN == 0
        assert np.abs(output.images[:, shown] - IMAGES[:, shown]).max() < 1e-6
        assert np.abs(output.images[:, ~shown] - IMAGES[:, ~shown]).max() > 0.1
    if "depth_mask" in depth:
        assert np.array_equal(output.depth[SPARSE], DEPTHS[SPARSE])
        assert output.depth_mask[SPARSE].all()


@pytest.mark.parametrize(("image", "depth"), [row[:2] for row in ROWS])
def test_a_batch_is_its_singles(pipe, image, depth):
    both = call(pipe, **image, **depth)
    for i, prompt in enumerate(["a cat", "a dog"]):
        inputs = {name: value[i] if np.ndim(value) > 2 else value for name, value in (image | depth).items()}
        one = call(pipe, seeds=[i], prompt=prompt, **inputs)
        if both.images is not None:
            assert np.allclose(one.images[0], both.images[i], atol=1e-4)
        if both.depth is not None:
            assert close_depth(one.depth[0], both.depth[i], atol=5e-3)  # random weights magnify what rounding does


def test_nothing_left_to_make(pipe):
    with pytest.raises(ValueError, match="nothing is left to make"):
        call(pipe, **WHOLE_IMAGE, **WHOLE_DEPTH)


def test_what_is_hidden_does_not_show_through(pipe):
    other = np.where(HIDDEN[..., None] > 0, 1 - IMAGES, IMAGES)
    ours = call(pipe, **PART_OF_IMAGE).images
    assert np.allclose(ours, call(pipe, image=other, mask_image=HIDDEN).images, atol=1e-5)
    unknown = np.where(SPARSE, DEPTHS, 7.0)
    assert close_depth(
        call(pipe, **WHOLE_IMAGE, **PART_OF_DEPTH).depth,
        call(pipe, **WHOLE_IMAGE, depth=unknown, depth_mask=SPARSE).depth,
    )


def test_completed_depth_has_the_unit_of_what_was_given(pipe):
    metres = call(pipe, **WHOLE_IMAGE, **PART_OF_DEPTH).depth
    millimetres = call(pipe, **WHOLE_IMAGE, depth=1000 * DEPTHS, depth_mask=SPARSE).depth
    assert close_depth(metres, millimetres / 1000, atol=1e-4)


def test_every_way_to_say_that_depth_is_missing(pipe):
    expected = call(pipe, **WHOLE_IMAGE, **PART_OF_DEPTH).depth
    for missing in (0, -1, np.nan, np.inf):
        assert np.array_equal(call(pipe, **WHOLE_IMAGE, depth=np.where(SPARSE, DEPTHS, missing)).depth, expected)


@pytest.mark.parametrize("inputs", [START_IMAGE, WHOLE_IMAGE | START_DEPTH])
def test_strength_runs_from_the_given_to_the_new(pipe, inputs):
    name = "depth_strength" if "depth" in inputs else "strength"
    part = "depth" if "depth" in inputs else "images"

    def made(strength):
        return getattr(call(pipe, **inputs | {name: strength, "num_inference_steps": 10}), part)

    new = made(1.0)
    distances = [
        np.abs(np.log(made(strength) / new) if part == "depth" else made(strength) - new).mean()
        for strength in (0.1, 0.5, 0.9)
    ]
    assert distances[0] > distances[1] > distances[2] > 0


def test_steps_that_strength_leaves(pipe):
    steps = []
    call(
        pipe,
        image=IMAGES,
        strength=0.5,
        num_inference_steps=8,
        callback_on_step_end=lambda pipe, step, timestep, tensors: steps.append(timestep.item()) or {},
    )
    assert len(steps) == 4 and steps[0] < 1000


def test_masks_of_every_kind(pipe):
    expected = call(pipe, **PART_OF_IMAGE).images
    picture = PIL.Image.fromarray((255 * HIDDEN).astype(np.uint8))
    for mask in (
        picture,
        picture.convert("RGB"),
        [picture, picture],
        HIDDEN > 0,
        (255 * HIDDEN).astype(np.uint8),
        torch.tensor(HIDDEN),
        torch.tensor(HIDDEN)[None, None],
        HIDDEN[..., None],
        torch.tensor(HIDDEN)[None, ..., None],
        np.stack([HIDDEN, HIDDEN]),
    ):
        assert np.array_equal(call(pipe, image=IMAGES, mask_image=mask).images, expected)


def test_a_gray_mask_blends(pipe):
    hard = call(pipe, **PART_OF_IMAGE).images
    soft = call(pipe, image=IMAGES, mask_image=0.75 * HIDDEN).images
    assert np.allclose(soft, IMAGES + 0.75 * HIDDEN[..., None] * (hard - IMAGES), atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"mask_image": HIDDEN}, "`mask_image` is about `image`: give both"),
        ({"strength": 0.5}, "`strength` is about `image`"),
        ({"depth_strength": 0.5}, "`depth_strength` is about `depth`"),
        ({"image": IMAGES, "mask_image": HIDDEN[1:]}, "a mask of the size of the image"),
        ({"image": IMAGES, "mask_image": 0 * HIDDEN}, "hides nothing"),
        ({"image": IMAGES, "mask_image": 3 * HIDDEN}, r"values in \[0, 1\]"),
        ({"image": IMAGES, "mask_image": "mask.png"}, "must be a PIL image, an array"),
        ({"image": IMAGES, "mask_image": HIDDEN[:0]}, "has no pixel"),
        ({"image": IMAGES, "strength": 0}, "leaves everything as it is"),
        ({"image": IMAGES, "strength": 1.5}, "`strength` must be a number from 0 to 1, got 1.5"),
        ({"image": IMAGES, "strength": "half"}, "got 'half'"),
        ({"image": IMAGES, "mask_image": HIDDEN, "prompt": None}, "Give a `prompt`"),
        ({"image": IMAGES, "depth": DEPTHS[:, 1:], "strength": 0.5}, "at one size"),
        ({"image": IMAGES, "depth": DEPTHS, "mask_image": HIDDEN, "num_refinement_steps": 2}, "the depth is given"),
        ({"image": IMAGES, "depth": DEPTHS, "mask_image": HIDDEN, "ensemble_size": 2}, "the depth is given"),
        ({"image": IMAGES, "depth": np.stack([*DEPTHS, DEPTHS[0]]), "strength": 0.5}, "do not go together"),
    ],
)
def test_bad_input(pipe, inputs, message):
    with pytest.raises(ValueError, match=message):
        call(pipe, **inputs)


# Sparse depth at another size


def test_no_measurement_is_lost_in_shrinking():
    generator = torch.Generator().manual_seed(0)
    valid = torch.rand(2, 1, 90, 120, generator=generator) < 0.003
    depth = torch.where(valid, 1 + torch.rand(2, 1, 90, 120, generator=generator), 0.0)
    small, known = shrink(depth, valid, (30, 40))
    cells = torch.nn.functional.max_pool2d(valid.float(), 3) > 0
    assert torch.equal(known, cells)
    nearest = -torch.nn.functional.max_pool2d(torch.where(valid, -depth, -torch.inf), 3)
    middle = valid[..., 1::3, 1::3]
    assert torch.equal(small[known & ~middle], nearest[known & ~middle])


def test_dense_depth_shrinks_to_the_pixels_in_the_middle():
    depth = 1 + torch.rand(1, 1, 33, 47, generator=torch.Generator().manual_seed(0))
    small, known = shrink(depth, depth > 0, (16, 24))
    assert known.all()
    assert torch.equal(small, torch.nn.functional.interpolate(depth, (16, 24), mode="nearest-exact"))


def test_sparse_points_reach_the_model_at_a_smaller_size():
    depth = torch.zeros(1, 1, 64, 64)
    depth[..., 5::16, 3::16] = 2.0
    _, valid, _ = DepthProcessor(patch_size=4).encode(depth, None, 16, 16)
    assert valid.sum() == 16


# Completion


def smooth_depth(size=(48, 64)) -> torch.Tensor:
    rows, columns = torch.meshgrid(*(torch.linspace(0, 1, n) for n in size), indexing="ij")
    return (2 + 3 * rows + (columns > 0.5))[None, None]


def test_completion_finds_the_scale_in_spite_of_outliers():
    truth = smooth_depth()
    valid = torch.rand(truth.shape, generator=torch.Generator().manual_seed(0)) < 0.05
    known = torch.where(valid, truth, 0.0)
    known.view(-1)[valid.flatten().nonzero()[:3, 0]] *= 20
    completed = truth / 7 * log_correction(truth / 7, known, valid).exp()
    assert ((completed / truth).log().abs() < 0.05).float().mean() > 0.9


def test_completion_corrects_what_the_made_depth_gets_wrong():
    truth = smooth_depth()
    made = truth / 3 * (1 + 0.3 * torch.sin(torch.arange(64.0) / 10))
    errors = []
    for share in (0.002, 0.01, 0.05):
        valid = torch.rand(truth.shape, generator=torch.Generator().manual_seed(0)) < share
        completed = made * log_correction(made, torch.where(valid, truth, 0.0), valid).exp()
        errors.append((completed / truth).log().abs().mean().item())
    scaled = made * (truth / made).median()
    errors.insert(0, (scaled / truth).log().abs().mean().item())
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 0.2 * errors[0]


def test_no_seam_around_a_hole():
    truth = smooth_depth()
    valid = torch.ones(truth.shape, dtype=torch.bool)
    valid[..., 12:36, 8:28] = False
    made = truth / 3 * 1.25
    made[..., :20] *= 1.1
    completed = torch.where(valid, truth, made * log_correction(made, truth * valid, valid).exp())
    rows = torch.arange(13, 35)
    jump = (completed[..., rows, 8] / completed[..., rows, 7]).log().abs()
    assert jump.max() < 0.03


def test_large_holes_are_filled_without_edges():
    """Neighbours far apart come and go on the way through a hole; nothing jumps where they do."""
    truth = (0.3 * torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))).exp()
    valid = torch.ones(truth.shape, dtype=torch.bool)
    valid[..., 16:48, 16:48] = False
    inside = log_correction(torch.ones_like(truth), truth * valid, valid)[0, 0, 22:42, 22:42]
    assert max(inside.diff(dim=d).abs().max().item() for d in (0, 1)) < 0.19
