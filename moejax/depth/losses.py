"""How well a score that sees no later token tells who is chosen with them in sight."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class DecisionSums(NamedTuple):
    """Sums over the tokens that could be chosen; divide by ``count``.

    Attributes:
      cross_entropy: of the sigmoid of the score against who was chosen, in nats.
      agreeing: tokens for which the decision is what was chosen.
      chosen: tokens that were chosen.
      decided: tokens that the decision takes.
      count: tokens.
    """

    cross_entropy: Float[Array, ""]
    agreeing: Float[Array, ""]
    chosen: Float[Array, ""]
    decided: Float[Array, ""]
    count: Float[Array, ""]


def decision_sums(
    score_bt: Float[Array, "b t"],
    chosen_bt: Bool[Array, "b t"],
    competes_bt: Bool[Array, "b t"],
    threshold: float = 0.5,
) -> DecisionSums:
    """The binary cross-entropy of mixture of depths (arXiv 2404.02258, section 3.5), and counts.

    The gradient goes to the score alone.
    """
    wide = score_bt.astype(jnp.promote_types(score_bt.dtype, jnp.float32))
    target = chosen_bt.astype(wide.dtype)
    nats = jax.nn.softplus(wide) - target * wide
    decided_bt = jax.nn.sigmoid(wide) > threshold
    total = lambda values: jnp.where(competes_bt, values, 0).sum().astype(wide.dtype)
    return DecisionSums(
        cross_entropy=total(nats),
        agreeing=total(decided_bt == chosen_bt),
        chosen=total(chosen_bt),
        decided=total(decided_bt),
        count=competes_bt.sum().astype(wide.dtype),
    )
