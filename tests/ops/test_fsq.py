"""Finite scalar quantisation: every code reachable, exact round trips, identity gradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import fsq

LEVELS = (8, 5, 5, 5)


@pytest.mark.parametrize("level", [2, 3, 4, 5, 7, 8])
def test_bound_rounds_to_exactly_the_levels(level):
    latents = jnp.linspace(-20, 20, 40_001)[:, None]
    digits = np.round(np.asarray(fsq.bound(latents, (level,))))
    # Even: one more below zero than above it; odd: symmetric.
    assert np.array_equal(np.unique(digits), np.arange(level) - level // 2)
    assert np.all(np.diff(digits[:, 0]) >= 0)


@pytest.mark.parametrize("level", [3, 4, 5, 8])
def test_zero_stays_near_zero(level):
    """Without the shift an even number of levels would send 0 to -1/2, the edge of a cell."""
    assert abs(float(fsq.bound(jnp.zeros((1, 1)), (level,))[0, 0])) < 0.05


def test_quantised_channels_are_the_paper_grid():
    latents = jax.random.normal(jax.random.key(0), (500, 4)) * 3
    channels = np.asarray(fsq.quantise(latents, LEVELS))
    assert set(np.unique(channels[:, 0])) == {i / 4 for i in range(-4, 4)}
    assert set(np.unique(channels[:, 1])) == {-1, -0.5, 0, 0.5, 1}


@pytest.mark.parametrize("levels", [LEVELS, (2, 3), (4,), (7, 6, 5, 4, 3)])
def test_codes_and_channels_round_trip(levels):
    codes = jnp.arange(fsq.num_codes(levels))
    channels = fsq.codes_to_channels(codes, levels)
    assert len({tuple(row) for row in np.asarray(channels)}) == len(codes)
    np.testing.assert_array_equal(fsq.channels_to_codes(channels, levels), codes)


def test_first_channel_varies_fastest():
    channels = np.asarray(fsq.codes_to_channels(jnp.arange(1000), LEVELS))
    grids = [(np.arange(n) - n // 2) / (n // 2) for n in reversed(LEVELS)]
    expected = np.array(list(itertools.product(*grids)))[:, ::-1]
    np.testing.assert_array_equal(channels, expected.astype(np.float32))


def test_all_codes_are_reachable_from_latents():
    assert fsq.num_codes(LEVELS) == 1000
    axes = [np.linspace(-4, 4, 41)] * 4
    latents = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 4).astype(np.float32)
    codes = jax.jit(lambda z: fsq.channels_to_codes(fsq.quantise(z, LEVELS), LEVELS))(latents)
    assert np.array_equal(np.unique(codes), np.arange(1000))


def test_gradient_is_straight_through():
    latents = jax.random.normal(jax.random.key(1), (20, 4))
    pull = jax.random.normal(jax.random.key(2), (20, 4))

    def through_rounding(z):
        return (fsq.quantise(z, LEVELS) * pull).sum()

    def without_rounding(z):
        half = jnp.asarray([[level // 2 for level in LEVELS]], z.dtype)
        return (fsq.bound(z, LEVELS) / half * pull).sum()

    grads = jax.grad(through_rounding)(latents)
    np.testing.assert_allclose(grads, jax.grad(without_rounding)(latents), rtol=1e-6)
    assert float(jnp.abs(grads).min()) > 0
    # The value itself is rounded: it does not move with a small change of the latents.
    assert jnp.array_equal(fsq.quantise(latents, LEVELS), fsq.quantise(latents + 1e-7, LEVELS))
