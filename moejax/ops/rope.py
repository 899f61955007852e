"""Rotary position embedding (arXiv 2104.09864), pairs (i, i + h/2) as in Llama."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def apply_rope(
    x_btnh: Float[Array, "b t n h"], positions_bt: Int[Array, "b t *axes"], theta: float
) -> Float[Array, "b t n h"]:
    """Rotates each head by the token's own position; angles in float32 or wider.

    Positions of several axes, [b, t, a] (row and column of a patch), rotate an a-th of the head
    each, with the wavelengths of a head of that size (axial RoPE, arXiv 2403.13298); 2 a divides h.
    """
    if positions_bt.ndim == 2:
        return _rotate(x_btnh, positions_bt, theta)
    parts = jnp.split(x_btnh, positions_bt.shape[-1], axis=-1)
    rotated = [_rotate(part, positions_bt[..., i], theta) for i, part in enumerate(parts)]
    return jnp.concatenate(rotated, axis=-1)


def _rotate(x_btnh, positions_bt, theta: float):
    half = x_btnh.shape[-1] // 2
    dtype = jnp.promote_types(x_btnh.dtype, jnp.float32)
    inverse_wavelength = theta ** (-jnp.arange(half, dtype=dtype) / half)
    angle = positions_bt[:, :, None, None].astype(dtype) * inverse_wavelength[None, None, None]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = x_btnh[..., :half].astype(dtype), x_btnh[..., half:].astype(dtype)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_btnh.dtype)
