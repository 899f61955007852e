"""Pictures as grids of latent vectors, cut into the patches that are tokens."""

from typing import Protocol

import numpy as np
from jaxtyping import Float


class LatentCodec(Protocol):
    """A frozen image autoencoder without a quantiser (moejax.models.tokenizer has one)."""

    @property
    def channels(self) -> int: ...

    @property
    def grid(self) -> tuple[int, int]: ...

    @property
    def version(self) -> str: ...

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 [n, h, w, 3] -> f32 [n, grid cells in rows, channels], of unit variance."""
        ...

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """f32 [n, grid cells in rows, channels] -> uint8 [n, h, w, 3]."""
        ...


class PatchCodec:
    """A latent codec whose tokens are patches of k x k latents (Transfusion, arXiv 2408.11039).

    ``encode`` gives [n, codes_per_image, k * k * channels]; patches in rows, and so within each.
    """

    num_codes = 0

    def __init__(self, codec: LatentCodec, patch: int):
        height, width = codec.grid
        if height % patch or width % patch:
            raise ValueError(f"patches of {patch} do not cut a grid of {height} x {width}")
        self.codec, self.patch = codec, patch
        self.grid = height // patch, width // patch
        self.codes_per_image = self.grid[0] * self.grid[1]
        self.size = patch * patch * codec.channels
        self.version = f"{codec.version}/{patch}"

    def encode(self, images: np.ndarray) -> Float[np.ndarray, "n p z"]:
        latents = np.asarray(self.codec.encode(images), np.float32)
        rows, columns = self.grid
        k = self.patch
        cells = latents.reshape(len(latents), rows, k, columns, k, -1).swapaxes(2, 3)
        return cells.reshape(len(latents), self.codes_per_image, self.size)

    def decode(self, patches: Float[np.ndarray, "n p z"]) -> np.ndarray:
        rows, columns = self.grid
        k = self.patch
        patches = np.asarray(patches, np.float32)
        cells = patches.reshape(len(patches), rows, columns, k, k, -1).swapaxes(2, 3)
        return self.codec.decode(cells.reshape(len(patches), rows * columns * k * k, -1))
