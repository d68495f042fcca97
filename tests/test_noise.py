import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy import integrate, stats

from mf_diffusers.modality_forcing.noise import (
    add_noise,
    logit_normal_mode,
    sample_logit_normal,
    sample_plateau_logit_normal,
    shift_timestep,
    velocity_from_clean,
)


def logit_normal_density(t, mu, sigma):
    return stats.norm.pdf(np.log(t / (1 - t)), mu, sigma) / (t * (1 - t))


def plateau_density(t, mu, sigma):
    mode = logit_normal_mode(mu, sigma)
    return np.where(t < mode, logit_normal_density(t, mu, sigma), logit_normal_density(mode, mu, sigma))


@pytest.mark.parametrize(("mu", "sigma"), [(1.1, 1.0), (0.0, 1.0), (-0.5, 0.7), (1.1, 2.0), (0.3, 1.6)])
def test_mode_is_the_highest_point_above_which_the_density_falls(mu, sigma):
    mode = logit_normal_mode(mu, sigma)
    t = np.linspace(1e-4, 1 - 1e-4, 200001)
    density = logit_normal_density(t, mu, sigma)
    assert (np.diff(density[t > mode]) <= 0).all()
    assert logit_normal_density(mode, mu, sigma) == pytest.approx(density[t > mode - 1e-3].max(), rel=1e-4)


def test_published_mode():
    assert logit_normal_mode(1.1) == pytest.approx(0.861, abs=5e-4)


@pytest.mark.parametrize(("mu", "sigma"), [(1.1, 1.0), (0.0, 1.4)])
def test_samplers_match_their_densities(mu, sigma):
    t = np.linspace(1e-6, 1 - 1e-6, 100001)
    for sample, density in (
        (sample_logit_normal, logit_normal_density),
        (sample_plateau_logit_normal, plateau_density),
    ):
        drawn = sample((100_000,), mu, sigma, generator=torch.Generator().manual_seed(0)).numpy()
        assert drawn.dtype == np.float32 and drawn.min() > 0 and drawn.max() <= 1
        cumulative = integrate.cumulative_trapezoid(density(t, mu, sigma), t, initial=0)
        result = stats.kstest(drawn, lambda x: np.interp(x, t, cumulative / cumulative[-1]))  # noqa: B023
        assert result.pvalue > 0.01


def test_shift_is_the_schedulers_shift():
    t = torch.linspace(1, 0.02, 50)
    for log2_alpha in (-5, -1, 0, 5):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0**log2_alpha)
        scheduler.set_timesteps(sigmas=t.numpy())
        assert torch.allclose(scheduler.sigmas[:-1], shift_timestep(t.double(), 2.0**log2_alpha).float(), atol=2e-6)
    assert shift_timestep(torch.tensor([0.0, 1.0]), 32.0).tolist() == [0.0, 1.0]
    for log2_alpha in (-1000, -60, 60, 1000):
        assert torch.isfinite(shift_timestep(t.double(), 2.0**log2_alpha)).all()
    there_and_back = shift_timestep(shift_timestep(t.double(), 32.0), 1 / 32)
    assert torch.allclose(there_and_back, t.double(), atol=1e-12)


def test_velocity_from_clean():
    clean, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, 3, 4)
    timestep = torch.tensor([0.7, 0.05])
    noisy = add_noise(clean, noise, timestep)
    assert torch.allclose(velocity_from_clean(noisy, clean, timestep), noise - clean, atol=1e-5)
    # Below the floor the division is by the floor.
    noisy = add_noise(clean, noise, torch.tensor(0.01))
    assert torch.allclose(velocity_from_clean(noisy, clean, torch.tensor(0.01)), (noise - clean) * 0.2, atol=1e-5)
    assert math.isfinite(velocity_from_clean(clean, clean, torch.tensor(0.0)).sum())
