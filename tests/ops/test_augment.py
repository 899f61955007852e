"""Augmentation only moves values about: shape, range and blank pictures stay."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.ops.augment import MAX_SHIFT, augment_images


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
