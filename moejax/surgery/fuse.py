"""Chosen experts as one wide MLP: what a layer of experts is where its choice is known (MoDE).

A router that sees the noise level alone (arXiv 2412.12953, "expert caching") chooses the same
experts for all tokens at that level. Their hidden units side by side, with each expert's weight in
its second matrix, are one dense layer, and so a sampler with given noise levels runs dense models.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def fuse_experts(
    wi_edf: Float[Array, "e d _"],
    wo_efd: Float[Array, "e f d"],
    ids_k: Int[Array, " k"],
    weights_k: Float[Array, " k"],
    activation: str,
) -> tuple[Float[Array, "d _"], Float[Array, "_ d"]]:
    """The MLP ``x -> sum_k w_k E_{ids_k}(x)``: [d, k f] (twice as wide for swiglu) and [k f, d].

    Ids that are no expert add nothing: their part of the second matrix is 0.
    """
    num, d = wi_edf.shape[:2]
    none = (ids_k < 0) | (ids_k >= num)
    scale_k = jnp.where(none, 0, weights_k).astype(wo_efd.dtype)
    ids_k = jnp.where(none, 0, ids_k)
    halves = 2 if activation == "swiglu" else 1
    # Gates of all experts side by side, then what they gate.
    wi_kdgf = wi_edf[ids_k].reshape(len(ids_k), d, halves, -1)
    wi_df = wi_kdgf.transpose(1, 2, 0, 3).reshape(d, -1)
    wo_kfd = wo_efd[ids_k] * scale_k[:, None, None]
    return wi_df, wo_kfd.reshape(-1, d)
