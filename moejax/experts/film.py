"""Experts that are a scale and a shift of shared features."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def film_mlp(
    x_btd: Float[Array, "b t d"],
    weights_bte: Float[Array, "b t e"],
    base_dz: Float[Array, "d z"],
    scale_ed: Float[Array, "e d"],
    shift_ed: Float[Array, "e d"],
    wi_df: Float[Array, "d f"],
    wo_fd: Float[Array, "f d"],
) -> Float[Array, "b t d"]:
    """``adaptor(sum_e w_e (scale_e * h + shift_e))`` with ``h = gelu(x A) * (x B)``.

    MoFME (arXiv 2312.16610): experts are affine maps, so their sum costs what one of them does.

    Args:
      x_btd: tokens, after the norm.
      weights_bte: of each expert, 0 of those that a token did not choose.
      base_dz: A and B side by side, z = 2 d.
      scale_ed: of each expert.
      shift_ed: of each expert.
      wi_df: of the adaptor, an MLP with GELU that all experts share.
      wo_fd: of the adaptor.
    """
    gate_btd, up_btd = jnp.split(jnp.einsum("btd,dz->btz", x_btd, base_dz), 2, axis=-1)
    features_btd = jax.nn.gelu(gate_btd) * up_btd
    scale_btd = jnp.einsum("bte,ed->btd", weights_bte, scale_ed)
    shift_btd = jnp.einsum("bte,ed->btd", weights_bte, shift_ed)
    hidden_btf = jnp.einsum("btd,df->btf", features_btd * scale_btd + shift_btd, wi_df)
    return jnp.einsum("btf,fd->btd", jax.nn.gelu(hidden_btf), wo_fd)
