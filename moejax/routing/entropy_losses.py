"""Losses of entropies: how sure tokens are, how far experts are shared out, and between whom."""

import math
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

from moejax.errors import UserError
from moejax.routing.losses import (
    Sums,
    num_valid,
    of_modality,
    over,
    probabilities,
    router_loss,
)
from moejax.routing.normalise import entropy
from moejax.routing.plan import RouterInputs, RoutingPlan


def _probs_by_modality(inputs: RouterInputs, plan: RoutingPlan, modality: int = -1) -> Sums:
    """Sums of one modality, or of each (-1); the others count nothing."""
    member = of_modality(inputs, plan)
    if modality >= 0:
        member = member * (jnp.arange(inputs.num_modalities) == modality)[None, None]
    probs = probabilities(inputs, plan)
    return {
        "probs_me": jnp.einsum("snm,sne->me", member, probs, precision="highest"),
        "entropy_m": jnp.einsum("snm,sn->m", member, entropy(probs), precision="highest"),
        "tokens_m": member.sum(axis=(0, 1)),
    }


def _mutual_information_value(sums: Mapping[str, Array]) -> Array:
    mean = over(sums["probs_e"], sums["tokens"])
    return over(sums["entropy"], sums["tokens"]) - entropy(mean)


@router_loss("mutual_information", _mutual_information_value)
def mutual_information(inputs: RouterInputs, plan: RoutingPlan) -> Sums:
    """``mean_t H(p_t) - H(mean_t p_t)`` over the batch (DS-MoE, arXiv 2404.05567).

    Less the mutual information of token and expert: 0 where all tokens have one distribution
    (uniform or not), -log E at best, each token sure and all experts used alike.
    """
    probs = probabilities(inputs, plan)
    return {
        "probs_e": probs.sum(axis=(0, 1)),
        "entropy": entropy(probs).sum(),
        "tokens": num_valid(inputs, plan).sum(),
    }


def _modality_information_value(sums: Mapping[str, Array]) -> Array:
    present_m = (sums["tokens_m"] > 0).astype(sums["probs_me"].dtype)
    weight_m = over(present_m, present_m.sum())
    given_me = over(sums["probs_me"], sums["tokens_m"][:, None])
    return (weight_m * entropy(given_me)).sum() - entropy((weight_m[:, None] * given_me).sum(0))


@router_loss("modality_information", _modality_information_value)
def modality_information(inputs: RouterInputs, plan: RoutingPlan) -> Sums:
    """``-sum_m sum_e P(m) p(e|m) log(p(e|m) / P(e))`` over the batch.

    Mod-Squad, arXiv 2212.08066, with modalities for tasks: less the mutual information
    of modality and expert, each modality that has tokens counting the same. 0 where all have one
    distribution, -log M where no expert serves two.
    """
    return _probs_by_modality(inputs, plan)


def _local_value(sums: Mapping[str, Array]) -> Array:
    return over(sums["entropy_m"], sums["tokens_m"]).sum()


@router_loss("entropy_local", _local_value)
def entropy_local(inputs: RouterInputs, plan: RoutingPlan, *, modality: int = -1) -> Sums:
    """``mean_t H(p_t)`` of a modality's tokens over the batch: tokens shall be sure.

    LIMoE, arXiv 2206.02770. 0 at best, log E at uniform; summed over all modalities unless
    ``modality`` names one.
    """
    return _probs_by_modality(inputs, plan, modality)


def _global_value(
    sums: Mapping[str, Array], *, min_experts: float = 0.0, min_experts_each: tuple = ()
) -> Array:
    entropy_m = entropy(over(sums["probs_me"], sums["tokens_m"][:, None]))
    least = min_experts_each or (min_experts,) * len(entropy_m)
    if any(least):
        if len(least) != len(entropy_m):
            raise UserError(
                f"model.moe.losses: entropy_global.min_experts_each={min_experts_each}: give one "
                f"number for each of {len(entropy_m)} modalities"
            )
        # 0 experts are always used.
        threshold_m = jnp.asarray([math.log(max(count, 1)) for count in least])
        missing = jnp.maximum(threshold_m - entropy_m, 0)
        return jnp.where(sums["tokens_m"] > 0, missing, 0).sum()
    return -entropy_m.sum()


@router_loss("entropy_global", _global_value)
def entropy_global(inputs: RouterInputs, plan: RoutingPlan, *, modality: int = -1) -> Sums:
    """``-H(mean_t p_t)`` of a modality's tokens over the batch: together they shall use many.

    LIMoE, arXiv 2206.02770. With ``min_experts`` it is ``max(0, log(min_experts) - H)``: no
    pressure once as many experts are used as that, and 0 at uniform if E is no less. Without it,
    -log E at uniform, its minimum, and 0 where all use one expert. Summed over all modalities
    unless ``modality`` names one; ``min_experts_each`` has a threshold for each of them (0: none,
    and no pressure).
    """
    return _probs_by_modality(inputs, plan, modality)
