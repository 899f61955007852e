"""The loss that ties the prototypes of a cosine score to the tokens that chose them."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.routing.balance_losses import PER
from moejax.routing.losses import Sums, choices, over, router_loss
from moejax.routing.plan import RouterInputs, RoutingPlan
from moejax.routing.scores import unit_length


def contrast(
    prototypes_ed: Float[Array, "*rows e d"],
    sums_ed: Float[Array, "*rows e d"],
    counts_e: Float[Array, "*rows e"],
    temperature: float,
) -> Float[Array, "*rows"]:
    """``-mean_i log softmax_j(cos(m_i, mu_j) / temperature)_i`` over prototypes with tokens.

    ``mu_j`` is the mean of the tokens that chose j, of which ``sums_ed`` are the sums. 0 with fewer
    than two such prototypes.
    """
    used = counts_e > 0
    # A mean's length is of no account, and so the sum will do.
    logits = jnp.einsum(
        "...id,...jd->...ij",
        unit_length(prototypes_ed, -1),
        unit_length(sums_ed, -1),
        precision="highest",
    )
    both = used[..., :, None] & used[..., None, :]
    logits = jnp.where(both, logits / temperature, -jnp.inf)
    # Rows of prototypes without tokens keep finite numbers, for the gradient's sake.
    logits = jnp.where(used[..., :, None], logits, 0)
    own = jnp.diagonal(logits, axis1=-2, axis2=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - own
    number = used.sum(axis=-1)
    mean = over(jnp.where(used, losses, 0).sum(axis=-1), number.astype(losses.dtype))
    return jnp.where(number > 1, mean, 0)


def _value(sums: Mapping[str, Array], *, temperature: float = 0.07) -> Array:
    if "values" in sums:
        return over(sums["values"], sums["groups"])
    return contrast(sums["prototypes_ed"], sums["sums_ed"], sums["counts_e"], temperature)


@router_loss("contrastive", _value, per=PER)
def contrastive(
    inputs: RouterInputs, plan: RoutingPlan, *, per: str = "batch", temperature: float = 0.07
) -> Sums:
    """Each prototype shall be nearest to the mean of its own tokens: over the batch, or groups.

    ProMoE's routing contrastive loss (arXiv 2510.24711): :func:`contrast` of the prototypes of the
    score "cosine" and the tokens that chose them, each of its k choices counting. Its gradient
    reaches both. log V where all V prototypes, or means, are equal; near 0 where prototypes are
    their own tokens' mean, at right angles to the others, and the temperature is low. With
    ``per="group"`` (as the authors have it where experts choose) it is the mean over the groups in
    which tokens chose a prototype. Experts that have no prototype take no part.
    """
    if inputs.tokens is None or "prototype_mde" not in (inputs.score_params or {}):
        raise ValueError("the loss 'contrastive' needs tokens and the prototypes of the score")
    wide = plan.probs.dtype
    prototypes_ed = inputs.score_params["prototype_mde"][0].T.astype(wide)
    chosen = choices(inputs, plan.chosen())[..., : prototypes_ed.shape[0]]
    sums_sed = jnp.einsum(
        "sne,snd->sed",
        chosen.astype(inputs.tokens.dtype),
        inputs.tokens,
        precision="highest",
        preferred_element_type=wide,
    )
    counts_se = chosen.sum(axis=1)
    if per == "batch":
        # For each token the prototype that it chose: a sum as the others are, and by cosine as good
        # as the prototype itself.
        counts_e = counts_se.sum(axis=0)
        return {
            "prototypes_ed": counts_e[:, None] * prototypes_ed,
            "sums_ed": sums_sed.sum(axis=0),
            "counts_e": counts_e,
        }
    prototypes_sed = jnp.broadcast_to(prototypes_ed[None], sums_sed.shape)
    values_s = contrast(prototypes_sed, sums_sed, counts_se, temperature)
    return {
        "values": values_s.sum(),
        "groups": (counts_se > 0).any(axis=-1).sum().astype(values_s.dtype),
    }
