"""Experts on slots: every slot is a mixture of tokens, every token a mixture of slots."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.experts.activations import activate


def soft_mlp(
    x_snd: Float[Array, "s n d"],
    dispatch_snec: Float[Array, "s n e c"],
    combine_snec: Float[Array, "s n e c"],
    wi_edf: Float[Array, "e d _"],
    wo_efd: Float[Array, "e _ d"],
    activation: str = "swiglu",
) -> Float[Array, "s n d"]:
    """Soft MoE (arXiv 2308.00951, eq. 1 to 3): slots are filled, run and mixed back."""
    slots = jnp.einsum("snd,snec->escd", x_snd, dispatch_snec)
    hidden = activate(jnp.einsum("escd,edf->escf", slots, wi_edf), activation)
    out = jnp.einsum("escf,efd->escd", hidden, wo_efd)
    return jnp.einsum("escd,snec->snd", out, combine_snec)
