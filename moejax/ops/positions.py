"""Where the patches of a picture lie."""

import numpy as np
from jaxtyping import Float, Int


def grid_positions(rows: int, columns: int) -> Int[np.ndarray, "p 2"]:
    """(row, column) of each patch, row by row."""
    return np.indices((rows, columns), np.int32).reshape(2, -1).T


def sincos_table(
    positions: Int[np.ndarray, "p a"], width: int, longest: float = 10_000.0
) -> Float[np.ndarray, "p {width}"]:
    """A vector for each place: sines and cosines of its coordinates, an a-th of the width for each.

    Wavelengths are ``2 pi longest^(i / n)`` for i = 0, ..., n - 1, with n = width / (2 a), which
    has to be a whole number (MoCo v3, arXiv 2104.02057, section 4).
    """
    axes = positions.shape[1]
    if width % (2 * axes):
        raise ValueError(f"positions of {axes} axes do not fill a width of {width}")
    number = width // (2 * axes)
    angle = positions[:, :, None] / longest ** (np.arange(number) / number)
    table = np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)
    return table.reshape(len(positions), width).astype(np.float32)
