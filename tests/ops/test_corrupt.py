"""Noise has the deviation that it says, whatever the batch; a blur keeps what it spreads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.corrupt import add_noise, blur, blur_kernel

KEY = jax.random.key(0)


def test_noise():
    grey = jnp.full((6, 32, 32, 3), 128, jnp.uint8)
    index = jnp.arange(6)
    noisy = np.asarray(add_noise(KEY, grey, index, 16.0), np.float64)
    assert noisy.mean() == pytest.approx(128, abs=0.5)
    assert noisy.std() == pytest.approx(16, rel=0.03)
    assert np.abs(np.corrcoef(noisy.reshape(6, -1)) - np.eye(6)).max() < 0.1
    # By its number, in any batch.
    alone = add_noise(KEY, grey[:2], jnp.asarray([4, 1]), 16.0)
    np.testing.assert_array_equal(alone, noisy[[4, 1]])
    white = np.asarray(add_noise(KEY, jnp.full_like(grey, 255), index, 64.0))
    assert white.dtype == np.uint8 and white.max() == 255 and white.min() > 0
    other = add_noise(jax.random.key(1), grey, index, 16.0)
    assert not np.array_equal(other, noisy)


def test_blur_kernel_has_its_deviation():
    for sigma in (1.0, 2.5):
        kernel = blur_kernel(sigma)
        places = np.arange(len(kernel)) - len(kernel) // 2
        assert kernel.sum() == pytest.approx(1)
        assert (kernel * places**2).sum() == pytest.approx(sigma**2, rel=0.01)


def test_blur():
    image = np.zeros((1, 21, 21, 3), np.uint8)
    image[0, 10, 10, 1] = 250
    got = np.asarray(blur(jnp.asarray(image), 1.0))
    kernel = blur_kernel(1.0)
    expected = np.round(250 * np.outer(kernel, kernel))
    np.testing.assert_allclose(got[0, 6:15, 6:15, 1], expected, atol=1)
    assert not got[..., [0, 2]].any()
    flat = jnp.full((1, 8, 8, 3), 77, jnp.uint8)
    np.testing.assert_array_equal(blur(flat, 3.0), flat)
