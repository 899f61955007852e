"""Variants of training pictures: moved, shrunk and mirrored, decided once and encoded once."""

import hashlib

import numpy as np
from jaxtyping import UInt8

from moejax.data.images import place_on_white

# A variant is drawn at this share of its size, at least, and moved within the room that leaves
# and this many pixels (of 32) beyond.
MIN_SCALE = 0.85
MAX_SHIFT = 2 / 32


def variant(
    image: UInt8[np.ndarray, "... h w 3"], number: int, seed: int, mirror: bool
) -> UInt8[np.ndarray, "... h w 3"]:
    """Variant ``number`` of a square picture on white; number 0 is the picture itself.

    A function of its arguments alone, whatever else the data set holds.

    Args:
      image: the picture, or the frames of a clip: they are all changed alike.
      number: which variant.
      seed: of all variants.
      mirror: whether half of the variants are mirrored; False for what means another thing then,
        such as letters and arrows.
    """
    if number == 0:
        return image
    digest = hashlib.sha256(image.tobytes()).digest()
    rng = np.random.default_rng([seed, number, int.from_bytes(digest[:8], "little")])
    side = image.shape[-2]
    size = int(round(side * rng.uniform(MIN_SCALE, 1)))
    if mirror and rng.random() < 0.5:
        image = image[..., ::-1, :]
    reach = int(round(MAX_SHIFT * side))
    top, left = (int(at) for at in rng.integers(-reach, side - size + reach + 1, size=2))
    frames = image.reshape(-1, *image.shape[-3:])
    placed = [place_on_white(frame, size, top, left) for frame in frames]
    return np.stack(placed).reshape(image.shape)
