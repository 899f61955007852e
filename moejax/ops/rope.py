"""Rotary position embedding (arXiv 2104.09864), pairs (i, i + h/2) as in Llama."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def apply_rope(
    x_btnh: Float[Array, "b t n h"], positions_bt: Int[Array, "b t"], theta: float
) -> Float[Array, "b t n h"]:
    """Rotates each head by the token's own position; angles in float32 or wider."""
    half = x_btnh.shape[-1] // 2
    dtype = jnp.promote_types(x_btnh.dtype, jnp.float32)
    inverse_wavelength = theta ** (-jnp.arange(half, dtype=dtype) / half)
    angle = positions_bt[:, :, None, None].astype(dtype) * inverse_wavelength[None, None, None]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = x_btnh[..., :half].astype(dtype), x_btnh[..., half:].astype(dtype)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_btnh.dtype)
