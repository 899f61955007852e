"""Augmentation only moves values about: shape, range and blank pictures stay."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.ops.augment import LUMA, MAX_SHIFT, augment_images, jitter, mixup


def test_pictures_of_one_colour_keep_their_values():
    colour = jnp.asarray([-1.0, 0.0, 0.5])
    images = jnp.broadcast_to(colour[None, None, None], (64, 8, 8, 3))
    changed = np.asarray(augment_images(jax.random.key(0), images))
    assert changed.shape == images.shape
    np.testing.assert_array_equal(np.sort(changed, axis=-1), np.asarray(images))
    # About three in four keep the order of their channels.
    kept = (changed == np.asarray(images)).all(axis=(1, 2, 3)).mean()
    assert 0.55 < kept < 0.95


def test_moves_stay_within_the_limit_and_differ():
    images = np.zeros((256, 17, 17, 3), np.float32)
    images[:, 8, 8] = 1
    changed = np.asarray(augment_images(jax.random.key(1), jnp.asarray(images)))
    places = np.argwhere(changed[..., 0] == 1)
    assert len(places) == 256
    assert np.abs(places[:, 1:] - 8).max() == MAX_SHIFT
    assert len(np.unique(places[:, 1:], axis=0)) == (2 * MAX_SHIFT + 1) ** 2
    assert set(np.unique(changed)) == {0.0, 1.0}


def test_same_key_same_pictures():
    images = jax.random.uniform(jax.random.key(2), (4, 8, 8, 3))
    first = augment_images(jax.random.key(3), images)
    np.testing.assert_array_equal(first, augment_images(jax.random.key(3), images))
    assert not np.array_equal(first, augment_images(jax.random.key(4), images))


def drawn_pictures(rows=64):
    return jax.random.randint(jax.random.key(5), (rows, 4, 4, 3), 60, 160).astype(jnp.uint8)


def grey(images):
    return np.asarray(images, np.float64) @ np.asarray(LUMA)


def test_jitter_of_strength_zero_changes_nothing():
    images = drawn_pictures()
    np.testing.assert_array_equal(jitter(jax.random.key(0), images, 0.0, 0.0, 0.0), images)


def test_brightness_is_one_factor_for_each_picture():
    images = drawn_pictures()
    changed = np.asarray(jitter(jax.random.key(0), images, 0.4, 0.0, 0.0), np.float64)
    factor = changed / np.asarray(images)
    assert factor.std(axis=(1, 2, 3)).max() < 0.01
    means = factor.mean(axis=(1, 2, 3))
    assert 0.6 <= means.min() < 0.7 and 1.3 < means.max() <= 1.41


def test_contrast_keeps_the_mean_grey_and_saturation_that_of_each_pixel():
    images = drawn_pictures()
    before = grey(images)
    harder = np.asarray(jitter(jax.random.key(0), images, 0.0, 0.3, 0.0))
    np.testing.assert_allclose(grey(harder).mean(axis=(1, 2)), before.mean(axis=(1, 2)), atol=0.6)
    spread = grey(harder).std(axis=(1, 2)) / before.std(axis=(1, 2))
    assert 0.68 < spread.min() < 0.8 and 1.2 < spread.max() < 1.33
    richer = np.asarray(jitter(jax.random.key(0), images, 0.0, 0.0, 0.3))
    np.testing.assert_allclose(grey(richer), before, atol=0.6)
    assert np.abs(richer.astype(int) - np.asarray(images)).max() > 5
    # Pure grey has no colour to change.
    flat = jnp.full((4, 2, 2, 3), 90, jnp.uint8)
    np.testing.assert_array_equal(jitter(jax.random.key(0), flat, 0.0, 0.0, 1.0), flat)


def test_mixup():
    """Greys 0, 1, ..., so that each mixed picture tells both of its parts and their shares."""
    count = 200
    images = jnp.broadcast_to(
        jnp.arange(count, dtype=jnp.uint8)[:, None, None, None], (count, 2, 2, 3)
    )
    may = jnp.arange(count) % 10 > 0
    mixed, other, share = jax.jit(mixup, static_argnums=3)(jax.random.key(0), images, may, 1.0)
    mixed, other, share = (np.asarray(x) for x in (mixed, other, share))
    assert mixed.dtype == np.uint8
    expected = share * np.arange(count) + (1 - share) * other
    np.testing.assert_allclose(mixed[:, 0, 0, 0], expected, atol=0.51)
    assert (mixed == mixed[:, :1, :1, :1]).all()
    alone = ~np.asarray(may) | ~np.asarray(may)[other]
    assert (share[alone] == 1).all() and share.min() >= 0.5
    # Beta(1, 1) is even, and so the larger of two shares is even in [1/2, 1].
    assert share[~alone].mean() == np.clip(share[~alone].mean(), 0.7, 0.8)
    assert sorted(other) == list(range(count))
    # A large alpha mixes halves.
    halves = np.asarray(mixup(jax.random.key(0), images, may, 1000.0)[2])
    assert halves[~alone].max() < 0.56
