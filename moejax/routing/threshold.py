"""The threshold of the auxiliary router: how sure it was of the last token that an expert took.

DiffMoE (arXiv 2503.14487), by its public code: experts that chose from a whole batch in training
choose without one in sampling, each where its probability is above a threshold of its own.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moejax.routing.losses import Sums, over
from moejax.routing.plan import RouterInputs, RoutingPlan
from moejax.routing.select import best_of_each, chosen_mask


def last_taken(inputs: RouterInputs, plan: RoutingPlan) -> Sums:
    """Of an expert that takes k tokens, the k-th largest probability of the auxiliary router.

    Returns:
      ``last_e``, summed over the groups in which an expert takes any, and the number of those,
      ``groups_e``. No gradient passes.
    """
    taken = chosen_mask(plan.chosen(), inputs.num_experts)
    count_se = taken.sum(axis=1, dtype=jnp.int32)
    probs = jax.nn.sigmoid(lax.stop_gradient(inputs.causal_logits))
    best = best_of_each(probs, inputs.may_choose(), count_se)
    last_se = jnp.where(best, probs, jnp.inf).min(axis=1)
    some_se = count_se > 0
    return {
        "last_e": jnp.where(some_se, last_se, 0).sum(axis=0),
        "groups_e": some_se.sum(axis=0).astype(probs.dtype),
    }


def move_threshold(
    threshold_e: Float[Array, " e"], sums: Mapping[str, Array], decay: float
) -> Float[Array, " e"]:
    """``decay * threshold + (1 - decay) * mean`` of :func:`last_taken`; as it is where none took.

    The code takes the mean over devices, each of which is a group; a mean over groups is the same
    on any mesh.
    """
    mean_e = over(sums["last_e"], sums["groups_e"])
    moved_e = decay * threshold_e + (1 - decay) * mean_e.astype(threshold_e.dtype)
    return jnp.where(sums["groups_e"] > 0, moved_e, threshold_e)
