"""Patches: order of the grid and of the pixels in a patch, and the way back."""

import numpy as np

from moejax.ops.patchify import patchify, unpatchify


def test_order_of_patches_and_pixels():
    image = np.arange(4 * 6 * 1).reshape(1, 4, 6, 1)
    patches = patchify(image, 2)
    assert patches.shape == (1, 2, 3, 4)
    assert patches[0, 0, 0].tolist() == [0, 1, 6, 7]
    assert patches[0, 0, 2].tolist() == [4, 5, 10, 11]
    assert patches[0, 1, 0].tolist() == [12, 13, 18, 19]


def test_round_trip():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), np.uint8)
    np.testing.assert_array_equal(unpatchify(patchify(images, 4), 4), images)
