"""What routing did, as sums over tokens, and the figures that a log shows."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.routing.normalise import entropy
from moejax.routing.plan import RouterInputs, RoutingPlan, SoftPlan
from moejax.routing.select import chosen_mask, two_largest


def by_modality(
    inputs: RouterInputs, values_sne: Float[Array, "s n e"], num_modalities: int
) -> Float[Array, "m e"]:
    """Sums over the tokens of each modality; padding counts for none."""
    member = jax.nn.one_hot(inputs.modality, num_modalities, dtype=values_sne.dtype)
    member = member * inputs.valid[..., None]
    return jnp.einsum("snm,sne->me", member, values_sne, precision="highest")


def routing_statistics(
    inputs: RouterInputs, plan: RoutingPlan | SoftPlan, num_modalities: int
) -> dict[str, Array]:
    """Sums that add up over microbatches, devices and steps; no gradient passes.

    Returns:
      ``tokens_m``; ``chosen_me`` and ``kept_me``, choices before and after any capacity (for a
      SoftPlan the weight with which tokens mix each expert's slots); ``probs_me``; ``entropy``, in
      nats, and ``margin``, the largest probability less the second, over all tokens.
    """
    inputs, plan = jax.lax.stop_gradient((inputs, plan))
    e, dtype = inputs.num_experts, inputs.logits.dtype
    if isinstance(plan, SoftPlan):
        chosen = kept = probs = plan.combine.sum(axis=-1)
    else:
        kept = chosen_mask(plan.expert_ids, e).astype(dtype)
        chosen = chosen_mask(plan.chosen(), e).astype(dtype)
        probs = plan.probs
    ones = jnp.ones((*inputs.valid.shape, 1), dtype)
    valid = inputs.valid.astype(dtype)
    first, second = two_largest(probs)
    return {
        "tokens_m": by_modality(inputs, ones, num_modalities)[:, 0],
        "chosen_me": by_modality(inputs, chosen, num_modalities),
        "kept_me": by_modality(inputs, kept, num_modalities),
        "probs_me": by_modality(inputs, probs, num_modalities),
        "entropy": (entropy(probs) * valid).sum(),
        "margin": ((first - jnp.maximum(second, 0)) * valid).sum(),
    }


def summarise(sums: Mapping[str, Array], *, num_ffn: int) -> dict[str, Array]:
    """The figures of one layer, from :func:`routing_statistics`.

    Args:
      sums: of one layer.
      num_ffn: experts with weights, the first columns.

    Returns:
      ``load`` [e], the share of all choices that each expert has; ``load_by_modality`` [m, e], for
      each modality; ``max_violation``, the largest count of an expert with weights over the mean of
      those, less 1; ``drop_fraction`` of choices that a capacity took away; ``null_fraction`` of
      choices without weights; ``experts_per_token``, experts with weights that a token runs;
      ``entropy`` and ``margin`` of a token's probabilities, on average. 0 where nothing counted.
    """
    chosen_me, kept_me = sums["chosen_me"], sums["kept_me"]
    chosen_e, kept_e = chosen_me.sum(axis=0), kept_me.sum(axis=0)
    tokens, choices = sums["tokens_m"].sum(), chosen_e.sum()
    ffn_e = chosen_e[:num_ffn]
    return {
        "load": _over(chosen_e, choices),
        "load_by_modality": _over(chosen_me, chosen_me.sum(axis=-1, keepdims=True)),
        "max_violation": jnp.where(choices > 0, _over(ffn_e.max(), ffn_e.mean()) - 1, 0),
        "drop_fraction": _over(choices - kept_e.sum(), choices),
        "null_fraction": _over(chosen_e[num_ffn:].sum(), choices),
        "experts_per_token": _over(kept_e[:num_ffn].sum(), tokens),
        "entropy": _over(sums["entropy"], tokens),
        "margin": _over(sums["margin"], tokens),
    }


def _over(value, weight):
    return value / jnp.where(weight > 0, weight, 1)
