"""Every expert on every token: the plain definition of an expert MLP, at e times the FLOPs."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.experts.activations import activate
from moejax.experts.layout import gates_by_expert


def dense_mlp(
    x_td: Float[Array, "t d"],
    wi_edf: Float[Array, "e d _"],
    wo_efd: Float[Array, "e f d"],
    expert_ids: Int[Array, "t k"],
    gates: Float[Array, "t k"],
    activation: str,
) -> Float[Array, "t d"]:
    """``sum_e w[t, e] * FFN_e(x[t])``, where w holds a token's gates by expert."""
    weights_te = gates_by_expert(expert_ids, gates, wi_edf.shape[0])
    hidden_tef = activate(jnp.einsum("td,edf->tef", x_td, wi_edf), activation)
    # Times the gate before the last product, so that [t, e, d] is never held.
    gated_tef = (hidden_tef * weights_te[:, :, None]).astype(x_td.dtype)
    return jnp.einsum("tef,efd->td", gated_tef, wo_efd)
