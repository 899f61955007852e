"""Normalisation in float32, with one scale for all tokens or one for each modality."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def rms_normalise(x: Float[Array, "*rows d"], eps: float) -> Float[Array, "*rows d"]:
    """``x / sqrt(mean(x^2) + eps)`` over the last axis, in float32 or wider."""
    x = _wide(x)
    return x * lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + eps)


def layer_normalise(x: Float[Array, "*rows d"], eps: float) -> Float[Array, "*rows d"]:
    """``(x - mean) / sqrt(var + eps)`` over the last axis, in float32 or wider."""
    x = _wide(x)
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred * lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + eps)


def normalise(kind: str, x: Float[Array, "*rows d"], eps: float) -> Float[Array, "*rows d"]:
    """The norm of that kind, "rms" or "layer", in float32 or wider."""
    return rms_normalise(x, eps) if kind == "rms" else layer_normalise(x, eps)


def select_by_modality(
    table_md: Float[Array, "m d"], modality_bt: Int[Array, "b t"]
) -> Float[Array, "_ _ d"]:
    """Row ``modality[b, t]`` of the table for each token ([1, 1, d] if it has one row).

    A sum of masked rows, not an indexed read: its gradient is then a masked reduction instead of
    a scatter of every token into M rows.
    """
    num = table_md.shape[0]
    if num == 1:
        return table_md[None]
    here = (modality_bt[None] == jnp.arange(num)[:, None, None])[..., None]
    return jnp.where(here, table_md[:, None, None, :], 0).sum(axis=0)
