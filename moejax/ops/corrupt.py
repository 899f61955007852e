"""Damage of a known strength to pictures: noise and blur, inside of jit."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

# The kernel of the blur ends at so many standard deviations.
REACH = 4


def add_noise(
    rng: Key[Array, ""], images: UInt8[Array, "b h w c"], index_b: Int[Array, " b"], std: float
) -> UInt8[Array, "b h w c"]:
    """Gaussian noise of ``std`` grey levels (of 255) on each value, rounded and clipped.

    The noise of a picture follows from ``rng`` and its number in ``index_b``, whatever the batch;
    that of another ``std`` is the same, scaled.
    """
    shape = images.shape[1:]
    draw = lambda index: jax.random.normal(jax.random.fold_in(rng, index), shape)
    return _rounded(images.astype(jnp.float32) + std * jax.vmap(draw)(index_b))


def blur(images: UInt8[Array, "b h w c"], sigma: float) -> UInt8[Array, "b h w c"]:
    """A Gaussian of ``sigma`` pixels along both axes, the edge repeated; rounded."""
    kernel = blur_kernel(sigma)
    pixels = images.astype(jnp.float32)
    for axis in (1, 2):
        reach, end = len(kernel) // 2, pixels.shape[axis]
        pad = [(reach, reach) if i == axis else (0, 0) for i in range(4)]
        padded = jnp.pad(pixels, pad, mode="edge")
        shifted = [jax.lax.slice_in_dim(padded, i, i + end, axis=axis) for i in range(len(kernel))]
        pixels = jnp.tensordot(
            jnp.asarray(kernel, jnp.float32), jnp.stack(shifted), axes=1, precision="highest"
        )
    return _rounded(pixels)


def blur_kernel(sigma: float) -> Float[np.ndarray, " k"]:
    """The Gaussian at whole pixels, of sum 1."""
    reach = int(np.ceil(REACH * sigma))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return weights / weights.sum()


def _rounded(pixels: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)
