"""Variants of training pictures: moved, shrunk and mirrored, decided once and encoded once."""

import hashlib

import numpy as np
from jaxtyping import UInt8

# A variant is drawn at this share of its size, at least, and moved within the room that leaves
# and this many pixels (of 32) beyond.
MIN_SCALE = 0.85
MAX_SHIFT = 2 / 32


def variant(
    image: UInt8[np.ndarray, "h w 3"], number: int, seed: int, mirror: bool
) -> UInt8[np.ndarray, "h w 3"]:
    """Variant ``number`` of a square picture on white; number 0 is the picture itself.

    A function of its arguments alone, whatever else the data set holds.

    Args:
      image: the picture.
      number: which variant.
      seed: of all variants.
      mirror: whether half of the variants are mirrored; False for what means another thing then,
        such as letters and arrows.
    """
    if number == 0:
        return image
    from PIL import Image

    digest = hashlib.sha256(image.tobytes()).digest()
    rng = np.random.default_rng([seed, number, int.from_bytes(digest[:8], "little")])
    side = image.shape[0]
    size = int(round(side * rng.uniform(MIN_SCALE, 1)))
    if mirror and rng.random() < 0.5:
        image = image[:, ::-1]
    smaller = Image.fromarray(np.ascontiguousarray(image)).resize(
        (size, size), Image.Resampling.LANCZOS
    )
    reach = int(round(MAX_SHIFT * side))
    top, left = rng.integers(-reach, side - size + reach + 1, size=2)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(smaller, (int(left), int(top)))
    return np.asarray(canvas)
