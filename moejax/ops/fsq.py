"""Finite scalar quantisation (arXiv 2309.15505): codes without a learned codebook.

Each of the z channels is squashed into a fixed number of levels and rounded; the product of the
levels is the size of the implied codebook (8 * 5 * 5 * 5 = 1,000).
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# Keeps the squashed value strictly inside the outermost rounding cell (Appendix A.1).
_EPS = 1e-3


def num_codes(levels: tuple[int, ...]) -> int:
    """Size of the implied codebook."""
    return math.prod(levels)


def _channel_axis(values: list[int] | list[float], like: Array, dtype) -> Array:
    """``values`` along the last axis, with the rank of ``like``."""
    return jnp.asarray(values, dtype).reshape(*(1,) * (like.ndim - 1), -1)


def _half_widths(levels: tuple[int, ...], like: Array, dtype) -> Array:
    return _channel_axis([level // 2 for level in levels], like, dtype)


def bound(latents: Float[Array, "*rows z"], levels: tuple[int, ...]) -> Float[Array, "*rows z"]:
    """Squashes channel i into an interval that rounds to exactly ``levels[i]`` integers.

    An odd number of levels is symmetric about 0. An even one is moved by half a step, so that the
    integers are ``-L/2 .. L/2 - 1``, and its input is shifted so that a latent of 0 stays near 0
    (Appendix A.1, which uses ``tan`` for this shift).
    """
    halves = [(level - 1) * (1 - _EPS) / 2 for level in levels]
    offsets = [0.5 if level % 2 == 0 else 0.0 for level in levels]
    shifts = [math.tan(offset / half) for offset, half in zip(offsets, halves, strict=True)]
    half, offset, shift = (
        _channel_axis(values, latents, latents.dtype) for values in (halves, offsets, shifts)
    )
    return jnp.tanh(latents + shift) * half - offset


def round_straight_through(x: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Rounds to the nearest integer; the gradient is that of the identity."""
    return x + lax.stop_gradient(jnp.round(x) - x)


def quantise(latents: Float[Array, "*rows z"], levels: tuple[int, ...]) -> Float[Array, "*rows z"]:
    """Latents -> quantised channels scaled to [-1, 1]."""
    rounded = round_straight_through(bound(latents, levels))
    return rounded / _half_widths(levels, latents, latents.dtype)


def channels_to_codes(
    channels: Float[Array, "*rows z"], levels: tuple[int, ...]
) -> Int[Array, "*rows"]:
    """Quantised channels in [-1, 1] -> code in [0, num_codes); the first channel varies fastest."""
    half = _half_widths(levels, channels, channels.dtype)
    digits = jnp.round(channels * half + half).astype(jnp.int32)
    return (digits * _basis(levels, digits)).sum(axis=-1)


def codes_to_channels(
    codes: Int[Array, "*rows"], levels: tuple[int, ...], dtype=jnp.float32
) -> Float[Array, "*rows z"]:
    """Inverse of :func:`channels_to_codes`. Codes outside [0, num_codes) are not checked."""
    codes = codes[..., None]
    digits = codes // _basis(levels, codes) % _channel_axis(list(levels), codes, codes.dtype)
    half = _half_widths(levels, codes, dtype)
    return (digits.astype(dtype) - half) / half


def _basis(levels: tuple[int, ...], like: Array) -> Array:
    return _channel_axis([math.prod(levels[:i]) for i in range(len(levels))], like, like.dtype)
