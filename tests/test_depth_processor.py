import numpy as np
import pytest
import torch

from mf_diffusers import DepthProcessor
from mf_diffusers.modality_forcing.depth_processor import contract, uncontract


@pytest.fixture
def processor():
    return DepthProcessor(patch_size=4)


def random_depth(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 9 + 1


def test_contraction():
    depth = torch.tensor([0.0, 0.5, 1.0, 2.0, 100.0, float("inf")])
    assert torch.allclose(contract(depth), torch.tensor([0.0, 0.5, 1.0, 1.5, 1.99, 2.0]))
    assert torch.allclose(uncontract(contract(depth[:5])), depth[:5], rtol=1e-5)


@pytest.mark.parametrize(("largest", "tolerance"), [(30, 1e-5), (100, 1e-4)])
def test_round_trip(processor, largest, tolerance):
    # Most pixels near 1, a few as far as `largest` times the mean.
    depth = torch.ones(2, 1, 400, 400)
    depth[:, :, 0, :50] = torch.linspace(0.01, largest * 1.02, 50)
    depth[1] *= 1234.5
    tokens, valid, scale = processor.preprocess(depth)
    assert tokens.shape == (2, 10000, 16) and valid.all()
    assert (depth / scale.view(2, 1, 1, 1)).amax() >= largest
    again, again_valid = processor.postprocess(tokens, 400, 400, scale=scale)
    assert again_valid.all()
    assert ((again - depth) / depth).abs().max() <= tolerance


def test_scale_is_the_mean_of_each_map_over_its_valid_pixels(processor):
    depth = random_depth(2, 1, 8, 12)
    depth[0, 0, :4] = 0
    _, _, scale = processor.preprocess(depth)
    assert torch.allclose(scale, torch.stack([depth[0, 0, 4:].mean(), depth[1].mean()]))
    alone, _, _ = processor.preprocess(depth[1:])
    assert torch.equal(processor.preprocess(depth)[0][1:], alone)


@pytest.mark.parametrize("missing", [0.0, -3.0, float("nan"), float("inf"), float("-inf")])
def test_missing_pixels_are_noise(processor, missing):
    depth = random_depth(8, 12)
    hole = torch.zeros(8, 12, dtype=torch.bool)
    hole[2:6, 3:9] = True
    tokens, valid, scale = processor.preprocess(torch.where(hole, missing, depth), generator=torch.manual_seed(0))
    assert torch.equal(valid[0, 0], ~hole)
    assert scale == pytest.approx(depth[~hole].mean().item())
    noise = torch.randn(1, 1, 8, 12, generator=torch.manual_seed(0))
    assert torch.equal(processor.unpatchify(tokens, 8, 12)[0, 0][hole], noise[0, 0][hole])
    masked, _, _ = processor.preprocess(depth, mask=~hole, generator=torch.manual_seed(0))
    assert torch.equal(masked, tokens)


def test_infinite_depth_is_known_where_the_processor_says_so():
    processor = DepthProcessor(patch_size=4, far=30.0, infinite_depth=True)
    depth = random_depth(8, 12)
    depth[:3] = float("inf")
    depth[7] = 0
    mask = torch.ones(8, 12, dtype=torch.bool)
    mask[0] = False
    tokens, valid, scale = processor.preprocess(depth, mask=mask)
    assert torch.equal(valid[0, 0], mask & (depth > 0))
    assert scale == pytest.approx(depth[3:7].mean().item())  # of what is finite
    assert (processor.unpatchify(tokens, 8, 12)[0, 0, 1:3] == 2).all()
    made, made_valid = processor.postprocess(tokens, 8, 12, scale=scale)
    assert not made_valid[0, 0, 1:3].any()
    assert torch.allclose(made[0, 0, 1:3], 30 * scale)
    assert torch.allclose(made[0, 0, 3:7], depth[3:7], rtol=1e-4)
    sky = processor.normalize(torch.full((1, 1, 8, 12), float("inf")))
    assert (sky[0] == 2).all() and sky[1].all() and sky[2] == 1


def test_a_map_without_depth_is_noise_alone(processor):
    tokens, valid, scale = processor.preprocess(torch.zeros(8, 8), generator=torch.manual_seed(0))
    assert not valid.any() and scale == 1
    assert torch.equal(tokens, processor.patchify(torch.randn(1, 1, 8, 8, generator=torch.manual_seed(0))))


def test_noise_comes_from_the_generator_of_each_map(processor):
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    tokens, _, _ = processor.preprocess(torch.zeros(2, 1, 8, 8), generator=generators)
    alone, _, _ = processor.preprocess(torch.zeros(8, 8), generator=torch.Generator().manual_seed(2))
    assert torch.equal(tokens[1:], alone)


def test_patches_are_row_major(processor):
    ramp = torch.arange(8 * 12.0).view(1, 1, 8, 12)
    tokens = processor.patchify(ramp)
    assert torch.equal(tokens[0, 1].view(4, 4), ramp[0, 0, :4, 4:8])
    assert torch.equal(tokens[0, 3].view(4, 4), ramp[0, 0, 4:, :4])
    assert torch.equal(processor.unpatchify(tokens, 8, 12), ramp)


def test_resampling_invents_no_depth(processor):
    depth = torch.where(random_depth(37, 53) > 5, 10.0, 1.0)
    tokens, _, scale = processor.preprocess(depth, height=24, width=32)
    values = processor.postprocess(tokens, 24, 32)[0] * scale
    assert torch.isclose(values, torch.tensor(10.0)).logical_or(torch.isclose(values, torch.tensor(1.0))).all()


def test_any_tokens_give_finite_positive_depth(processor):
    tokens = torch.tensor([-5.0, 0.0, 1e-4, 0.5, 1.0, 1.5, 1.9995, 2.0, 2.5, float("nan"), 1e30, 1.0, 1, 1, 1, 1])
    depth, valid = processor.postprocess(tokens.view(1, 1, 16), 4, 4)
    assert torch.isfinite(depth).all() and depth.min() >= 1e-3 and depth.max() <= 1000.5
    assert valid.flatten()[:11].tolist() == [False, False, False, True, True, True, False, False, False, False, False]
    resized, _ = processor.postprocess(torch.full((1, 1, 16), 2.0), 4, 4, output_size=(7, 9))
    assert resized.shape == (1, 1, 7, 9) and torch.isfinite(resized).all()


def test_save_and_load(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert DepthProcessor.from_pretrained(tmp_path).config.patch_size == 4


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        (torch.ones(3, 8, 8, 8), "must have shape"),
        (torch.ones(1, 3, 8, 8), "must have shape"),
        (np.ones((0, 8)), "a pixel"),
        (np.ones(8), "must have shape"),
        ("depth.png", "got <class 'str'>"),
        ([torch.ones(8, 8), torch.ones(8, 12)], "share one size"),
        (torch.ones(9, 8), "multiples of 4"),
        (np.ones((8, 12, 3)), "must have shape"),
        (np.ones((8, 12), dtype=bool), "a mask goes into"),
        (np.ones((8, 12), dtype=complex), "numeric array"),
        ([], "holds no depth map"),
    ],
)
def test_bad_input(processor, depth, message):
    with pytest.raises(ValueError, match=message):
        processor.preprocess(depth)


def test_arrays_of_every_kind(processor):
    depth = np.random.default_rng(0).integers(1, 1000, (2, 8, 12))
    expected = torch.from_numpy(depth).float()[:, None]
    for array in (
        depth.astype(np.uint16),
        depth.astype(">f4"),
        depth[..., None],
        depth.astype(np.float64),
        list(depth),
    ):
        assert torch.equal(processor.to_tensor(array), expected)
    assert torch.equal(processor.to_tensor(depth[0, ..., None]), expected[:1])
    masked = np.ma.masked_array(depth[0].astype(np.float32), mask=depth[0] > 500)
    assert torch.equal(processor.preprocess(masked)[1][0, 0], torch.from_numpy(depth[0] <= 500))


def test_masks_of_every_kind(processor):
    mask = np.random.default_rng(0).random((8, 12)) > 0.5
    expected = torch.from_numpy(mask)[None, None]
    for one in (
        mask,
        mask.astype(np.uint16),
        255 * mask.astype(np.uint8),
        mask[None, ..., None],
        torch.from_numpy(mask),
    ):
        assert torch.equal(processor.mask_to_tensor(one), expected)
    # One mask serves every map of a batch.
    _, valid, _ = processor.preprocess(torch.ones(3, 1, 8, 12), mask)
    assert torch.equal(valid, expected.expand(3, -1, -1, -1))


def test_units_do_not_overflow(processor):
    depth = random_depth(8, 8)
    tokens, _, scale = processor.preprocess(depth)
    huge, _, huge_scale = processor.preprocess(depth * 1e37)
    assert torch.allclose(huge, tokens, atol=1e-5) and torch.isclose(huge_scale / 1e37, scale)


def test_prediction_with_sky_feeds_back_through_its_mask(processor):
    tokens = processor.preprocess(random_depth(8, 8))[0]
    sky = processor.patchify(
        torch.cat([torch.full((1, 1, 2, 8), 2.5), processor.unpatchify(tokens, 8, 8)[:, :, 2:]], dim=2)
    )
    depth, valid = processor.postprocess(sky, 8, 8)
    again, again_valid, _ = processor.preprocess(depth, valid, generator=torch.manual_seed(0))
    assert torch.equal(again_valid, valid) and not valid[:, :, :2].any()
    foreground = processor.unpatchify(again, 8, 8)[valid]
    assert 0.3 < foreground.mean() < 1.5


def test_tokens_that_do_not_fit(processor):
    with pytest.raises(ValueError, match="do not make a depth map of 8x8"):
        processor.postprocess(torch.ones(1, 3, 16), 8, 8)


WIDE = np.linspace(1, 2, 12).reshape(3, 4)


@pytest.mark.parametrize(
    "depth, maps",
    [
        (torch.tensor(WIDE)[..., None], 1),  # (H, W, 1): one map, not H maps one pixel wide
        (torch.tensor(WIDE)[None, ..., None], 1),
        (torch.tensor(WIDE).expand(5, 3, 4)[..., None], 5),
        (torch.tensor(WIDE)[None, None], 1),
        (WIDE[..., None], 1),
        (WIDE.astype(np.longdouble), 1),
        (WIDE.astype(np.float16), 1),
        (WIDE.astype(">f4"), 1),
        ([torch.tensor(WIDE)[..., None], WIDE.astype(np.longdouble)], 2),
    ],
)
def test_one_map_in_all_its_shapes_and_types(depth, maps):
    tensor = DepthProcessor().to_tensor(depth)
    assert tensor.shape == (maps, 1, 3, 4)
    np.testing.assert_allclose(tensor[-1, 0], WIDE, rtol=1e-3)


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.uint16, np.uint32, np.uint64])
def test_whole_numbers_of_all_sizes(kind):
    levels = np.array([[1, 30000, 2], [0, 5, 6]], dtype=kind)
    assert np.array_equal(DepthProcessor().to_tensor(levels)[0, 0], levels)


def test_masked_pixels_are_missing_in_lists_too():
    masked = np.ma.masked_equal(np.array([[7, 2], [3, 4]]), 7)
    for depth in (masked, [masked, np.ones((2, 2))], masked[..., None]):
        valid = DepthProcessor(patch_size=2).normalize(DepthProcessor().to_tensor(depth))[1]
        assert valid[0, 0].tolist() == [[False, True], [True, True]]


def test_masks_of_one_map_in_the_shape_of_a_picture():
    assert DepthProcessor().mask_to_tensor(torch.ones(3, 4, 1)).shape == (1, 1, 3, 4)
