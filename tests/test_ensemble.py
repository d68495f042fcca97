import torch

from mf_diffusers.modality_forcing.ensemble import ensemble_depth


def test_median_of_aligned_samples_recovers_the_depth():
    generator = torch.Generator().manual_seed(0)
    depth = torch.rand(2, 1, 24, 32, generator=generator) * 5 + 0.5
    scales = torch.tensor([0.5, 1.0, 2.0, 1.3, 0.9]).view(-1, 1, 1, 1, 1)
    samples = depth * scales * torch.exp(0.02 * torch.randn(5, 2, 1, 24, 32, generator=generator))
    # A fifth of one sample is far off: the median does not care.
    samples[0, :, :, :5] *= 10
    median, valid, uncertainty = ensemble_depth(samples, torch.ones_like(samples, dtype=torch.bool))
    ratio = median / depth
    assert valid.all()
    assert (ratio / ratio.median() - 1).abs().mean() < 0.02
    assert 0.005 < uncertainty.mean() < 0.03


def test_even_ensembles_are_unbiased_and_two_samples_have_uncertainty():
    noise = 0.1 * torch.randn(10, 1, 1, 200, 200, generator=torch.Generator().manual_seed(0))
    for size in (2, 4, 10):
        median, _, uncertainty = ensemble_depth(noise[:size].exp(), torch.ones(size, 1, 1, 200, 200, dtype=torch.bool))
        assert median.log().mean().abs() < 2e-3
        assert 0.03 < uncertainty.mean() < 0.1


def test_equal_samples_are_certain():
    depth = torch.rand(1, 1, 8, 8) + 1
    median, _, uncertainty = ensemble_depth(depth.expand(4, 1, 1, 8, 8), torch.ones(4, 1, 1, 8, 8, dtype=torch.bool))
    assert torch.allclose(median, depth) and not uncertainty.any()


def test_pixels_that_some_sample_lacks_do_not_pull_the_scale():
    depth = torch.ones(3, 1, 1, 8, 8)
    valid = torch.ones_like(depth, dtype=torch.bool)
    depth[0, ..., :6] = 1000
    valid[0, ..., :6] = False
    valid[1, ..., 0] = False
    median, median_valid, _ = ensemble_depth(depth, valid)
    assert torch.allclose(median, torch.ones(1, 1, 8, 8))
    assert not median_valid[..., 0].any() and median_valid[..., 1:].all()


def test_a_map_that_no_sample_knows_whole():
    depth = torch.rand(2, 1, 1, 4, 4) + 1
    median, valid, _ = ensemble_depth(depth, torch.zeros_like(depth, dtype=torch.bool))
    assert torch.isfinite(median).all() and not valid.any()
