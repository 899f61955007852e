"""Times that training draws, and grids of samplers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.diffusion import Diffusion, TimeSampling
from moejax.errors import UserError
from moejax.ops.diffusion_times import quantile_times, sample_times, time_grid

FLOW, DDPM = Diffusion("flow"), Diffusion("ddpm")


@pytest.fixture(params=["ddpm", "flow"])
def process(request):
    return request.param


def edm(distribution, mean, std, **fields):
    return Diffusion("edm", times=TimeSampling(distribution, mean, std), **fields)


def test_time_grid():
    for diffusion in (FLOW, DDPM):
        for steps in (1, 25, 250, 1000):
            grid = time_grid(diffusion, steps)
            assert grid.shape == (steps + 1,) and grid.dtype == np.float32
            assert grid[0] == 1 and grid[-1] == 0 and np.all(np.diff(grid) < 0)
    np.testing.assert_array_equal(time_grid(DDPM, 4), np.float32([1, 0.75, 0.5, 0.25, 0]))
    # Seven steps do not divide 1,000: each time is one of the thousand.
    np.testing.assert_allclose(
        time_grid(DDPM, 7), [1, 0.857, 0.714, 0.571, 0.429, 0.286, 0.143, 0], rtol=1e-6
    )
    shifted = time_grid(FLOW, 4, shift=3.0)
    np.testing.assert_allclose(shifted, [1, 0.9, 0.75, 0.5, 0], rtol=1e-6)
    with pytest.raises(ValueError, match="ddpm has 1000 discrete times"):
        time_grid(DDPM, 1001)


def test_grids_of_noise_levels():
    """EDM's equation 5 for three steps, and equal ratios; both end with a step to 0."""
    diffusion = edm("log_normal", -1.2, 1.2)
    first, last = 80 ** (1 / 7), 0.002 ** (1 / 7)
    expected = [80, ((first + last) / 2) ** 7, 0.002, 0]
    np.testing.assert_allclose(time_grid(diffusion, 3), expected, rtol=1e-5)
    np.testing.assert_allclose(time_grid(diffusion, 3, rho=1.0)[1], 40.001, rtol=1e-5)
    even = time_grid(diffusion, 3, "exponential")
    np.testing.assert_allclose(even, [80, 0.4, 0.002, 0], rtol=1e-5)
    np.testing.assert_allclose(time_grid(diffusion, 1), [80, 0])
    with pytest.raises(UserError, match="'uniform' is not one of process 'edm'; use rho or"):
        time_grid(diffusion, 3, "uniform")
    with pytest.raises(UserError, match="'rho' is not one of process 'flow'; use uniform"):
        time_grid(FLOW, 3, "rho")


def test_ddpm_times_are_uniform_over_the_steps():
    count = 200_000
    t = np.asarray(sample_times(DDPM, jax.random.key(0), (count,)), np.float64)
    index = np.rint(t * 1000).astype(int)
    np.testing.assert_allclose(t, index / 1000, rtol=1e-6)
    counts = np.bincount(index, minlength=1001)
    assert counts[0] == 0 and len(counts) == 1001
    # Six standard deviations of a count of 200.
    assert np.abs(counts[1:] - 200).max() < 6 * math.sqrt(200)


def test_flow_times_are_uniform():
    t = np.asarray(sample_times(FLOW, jax.random.key(0), (400, 250)))
    assert t.shape == (400, 250) and t.dtype == np.float32
    assert t.min() > 0 and t.max() <= 1
    counts = np.histogram(t, bins=10, range=(0, 1))[0]
    np.testing.assert_allclose(counts, 10_000, rtol=0.05)


# Shares of a normal distribution below -1, 0 and 1 standard deviations.
SHARES = jnp.asarray([0.15865525, 0.5, 0.84134475])


def test_logit_normal_times(process):
    times = TimeSampling("logit_normal", mean=-0.5, std=1.2)
    found = quantile_times(Diffusion(process, times=times), SHARES)
    # For "ddpm" rounded up to the next thousandth.
    expected = [1 / (1 + math.exp(0.5 - 1.2 * z)) for z in (-1.0, 0.0, 1.0)]
    np.testing.assert_allclose(found, expected, atol=1e-3 if process == "ddpm" else 1e-6)
    ends = quantile_times(Diffusion(process, times=times), jnp.asarray([2.0**-24, 1.0]))
    assert np.all(np.asarray(ends) > 0) and np.all(np.asarray(ends) <= 1)


def test_times_of_edm_are_noise_levels():
    """log(sigma) normal, or logistic between the two ends: quantiles by hand."""
    diffusion = edm("log_normal", -1.2, 1.2)
    found = quantile_times(diffusion, SHARES)
    np.testing.assert_allclose(found, np.exp([-2.4, -1.2, 0.0]), rtol=1e-5)
    assert np.isfinite(quantile_times(diffusion, jnp.ones(1))).all()
    # With ends so far that they cut nothing off, then with some that halve each tail.
    wide = edm("log_logistic", math.log(0.5), 0.5, sigma_min=1e-9, sigma_max=1e9)
    quarters = jnp.asarray([0.25, 0.5, 0.75])
    expected = 0.5 * np.exp(0.5 * np.log([1 / 3, 1, 3]))
    np.testing.assert_allclose(quantile_times(wide, quarters), expected, rtol=1e-5)
    low, high = (float(x) for x in expected[[0, 2]])
    cut = edm("log_logistic", math.log(0.5), 0.5, sigma_min=low, sigma_max=high)
    found = quantile_times(cut, jnp.asarray([1e-6, 0.5, 1.0]))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    drawn = sample_times(cut, jax.random.key(0), (1000,))
    assert low <= float(drawn.min()) and float(drawn.max()) <= high * 1.0001


def test_shift_moves_every_time(process):
    share = jnp.linspace(0.001, 1, 500)
    shifted = quantile_times(Diffusion(process, times=TimeSampling(shift=3.0)), share)
    np.testing.assert_allclose(shifted, 3 * share / (1 + 2 * share), atol=0.001)


def test_largest_time_of_each_picture(process):
    limit = jnp.asarray([[1.0], [0.5], [0.001]])
    t = sample_times(Diffusion(process), jax.random.key(0), (3, 20_000), max_time=limit)
    largest = np.asarray(t).max(axis=1)
    np.testing.assert_allclose(largest, [1, 0.5, 0.001], rtol=0.01)
    assert np.asarray(t).min() > 0
    np.testing.assert_allclose(np.asarray(t)[1].mean(), 0.25, atol=0.005)
