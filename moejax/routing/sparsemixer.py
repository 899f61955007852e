"""A sampled choice of one expert with a gradient to all logits: SparseMixer-v2 (arXiv 2409.12136).

As used by GRIN and by Uni-MoE-2 (arXiv 2511.12609).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moejax.routing.normalise import softmax
from moejax.routing.select import largest, pick


@jax.custom_vjp
def sparsemixer_gate(
    logits: Float[Array, "*rows e"],
    mask: Bool[Array, "*rows e"],
    chosen: Int[Array, "*rows"],
    factor: Float[Array, "*rows"],
) -> Float[Array, "*rows"]:
    """``factor * softmax(logits)[chosen]`` over the unmasked, with the gradient of factor 1.

    The backward pass is the Jacobian of the softmax, read at the chosen expert:
    ``g * w * (onehot(chosen) - softmax)``. ``factor`` does not enter it, nor gets a gradient.
    """
    return factor * pick(softmax(logits, mask), chosen[..., None])[..., 0]


def _gate_fwd(logits, mask, chosen, factor):
    return sparsemixer_gate(logits, mask, chosen, factor), (softmax(logits, mask), chosen, factor)


def _gate_bwd(residuals, g):
    probs, chosen, factor = residuals
    one_hot = jax.nn.one_hot(chosen, probs.shape[-1], dtype=probs.dtype)
    weight = (probs * one_hot).sum(axis=-1, keepdims=True)
    return g[..., None] * weight * (one_hot - probs), None, None, jnp.zeros_like(factor)


sparsemixer_gate.defvjp(_gate_fwd, _gate_bwd)


def sparsemixer_choice(
    logits: Float[Array, "s n e"],
    may: Bool[Array, "s n e"],
    gap: float,
    key: Array | None = None,
) -> tuple[Int[Array, "s n"], Float[Array, "s n"]]:
    """One expert of those that are left, and its weight; id E and weight 0 where none is left.

    Logits with ``(max - l) / max(|l|, |max|) > 2 gap`` are out of the question. With a key the
    choice is sampled from the softmax of the others, and its weight is that probability times 1
    where it is the most probable expert, else times 1 (a quarter of the time) or 1/3. Without a key
    it is the most probable one.
    """
    free = lax.stop_gradient(logits)
    top = jnp.max(jnp.where(may, free, -jnp.inf), axis=-1, keepdims=True)
    scale = jnp.maximum(jnp.abs(free), jnp.abs(top))
    near = may & (top - free <= 2 * gap * scale)
    best = largest(free, near, 1)[..., 0]
    if key is None:
        return best, sparsemixer_gate(logits, near, best, jnp.ones_like(logits[..., 0]))
    of_choice, of_factor = jax.random.split(key)
    noisy = free + jax.random.gumbel(of_choice, free.shape, free.dtype)
    chosen = largest(noisy, near, 1)[..., 0]
    whole = (chosen == best) | (jax.random.uniform(of_factor, best.shape) > 0.75)
    factor = jnp.where(whole, 1.0, 1 / 3).astype(logits.dtype)
    return chosen, sparsemixer_gate(logits, near, chosen, factor)
