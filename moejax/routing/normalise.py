"""From logits to scores: softmax, sigmoid, as they are, Sinkhorn's plan; masked places get 0."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

KINDS = ("softmax", "sigmoid", "identity")


def softmax(
    logits: Float[Array, "*rows e"], mask: Bool[Array, "*rows e"], axis: int = -1
) -> Float[Array, "*rows e"]:
    """Softmax over the places where ``mask`` is True; all 0 where there are none.

    Values and gradients are finite whatever stands in masked places, infinities too.
    """
    top = jnp.max(jnp.where(mask, logits, -jnp.inf), axis=axis, keepdims=True)
    top = lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    # The inner `where` keeps masked values out of the gradient, the outer one out of the sum.
    unnormalised = jnp.where(mask, jnp.exp(jnp.where(mask, logits - top, 0)), 0)
    total = unnormalised.sum(axis=axis, keepdims=True)
    return unnormalised / jnp.where(total > 0, total, 1)


def sigmoid(
    logits: Float[Array, "*rows e"], mask: Bool[Array, "*rows e"]
) -> Float[Array, "*rows e"]:
    """Each expert's score for itself."""
    return jnp.where(mask, jax.nn.sigmoid(jnp.where(mask, logits, 0)), 0)


def scores_of(
    kind: str, logits: Float[Array, "*rows e"], mask: Bool[Array, "*rows e"]
) -> Float[Array, "*rows e"]:
    """Scores by the name of the function; "identity" takes the logits, which may be negative."""
    if kind == "identity":
        return jnp.where(mask, logits, 0)
    return {"softmax": softmax, "sigmoid": sigmoid}[kind](logits, mask)


def share(values: Float[Array, "*rows e"]) -> Float[Array, "*rows e"]:
    """Values that are not negative over their sum; all 0 where the sum is."""
    total = values.sum(axis=-1, keepdims=True)
    return values / jnp.where(total > 0, total, 1)


def entropy(probs: Float[Array, "*rows e"]) -> Float[Array, "*rows"]:
    """``-sum p log p`` in nats."""
    positive = jnp.where(probs > 0, probs, 1)
    return -(jnp.where(probs > 0, probs, 0) * jnp.log(positive)).sum(axis=-1)


def distribution(
    kind: str, logits: Float[Array, "*rows e"], mask: Bool[Array, "*rows e"]
) -> Float[Array, "*rows e"]:
    """The softmax of the logits, or their sigmoids over the sum of these (arXiv 2412.19437)."""
    return share(sigmoid(logits, mask)) if kind == "sigmoid" else softmax(logits, mask)


def sinkhorn(
    logits: Float[Array, "s n e"],
    mask: Bool[Array, "s n e"],
    temperature: float = 1.0,
    iterations: int = 30,
) -> Float[Array, "s n e"]:
    """The balanced plan nearest to ``exp(logits / temperature)`` (arXiv 2401.15969).

    Columns and rows are scaled in turn, rows last. The rows of tokens that may choose sum to 1.
    The columns of a group sum to what each expert would get if every token gave all experts that
    it may choose the same: (tokens) / E where all may choose all. Iterated in logarithms.
    """
    wanted_se = share(mask.astype(logits.dtype)).sum(axis=1, keepdims=True)
    log_wanted = jnp.log(jnp.where(wanted_se > 0, wanted_se, 1))
    start = jnp.where(mask, logits / temperature, -jnp.inf)

    def scale(_, plan):
        plan = plan - _log_sum(plan, axis=1) + log_wanted
        return plan - _log_sum(plan, axis=-1)

    return jnp.exp(lax.fori_loop(0, iterations, scale, start))


def _log_sum(plan, axis):
    """logsumexp; 0, with a gradient of 0, where everything is masked."""
    there = jnp.isfinite(plan).any(axis=axis, keepdims=True)
    total = jax.nn.logsumexp(jnp.where(there, plan, 0), axis=axis, keepdims=True)
    return jnp.where(there, total, 0)
