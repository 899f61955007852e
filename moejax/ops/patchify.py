"""Pictures <-> a grid of flattened square patches, in numpy or JAX."""

from typing import Any

from jaxtyping import Shaped


def patchify(images: Shaped[Any, "b h w c"], patch: int) -> Shaped[Any, "b rows cols f"]:
    """[b, h, w, c] -> [b, h / patch, w / patch, patch * patch * c]; pixels row by row."""
    b, h, w, c = images.shape
    grid = images.reshape(b, h // patch, patch, w // patch, patch, c)
    return grid.swapaxes(2, 3).reshape(b, h // patch, w // patch, patch * patch * c)


def unpatchify(patches: Shaped[Any, "b rows cols f"], patch: int) -> Shaped[Any, "b h w c"]:
    """Inverse of :func:`patchify`."""
    b, rows, cols, f = patches.shape
    grid = patches.reshape(b, rows, cols, patch, patch, f // (patch * patch))
    return grid.swapaxes(2, 3).reshape(b, rows * patch, cols * patch, -1)
