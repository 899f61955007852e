"""Routers whose tokens choose as many experts as they need: top-p, and above a threshold."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.routing import checks
from moejax.routing.normalise import KINDS, distribution, scores_of, share, softmax
from moejax.routing.plan import RouterInputs, RoutingPlan, router
from moejax.routing.select import largest, pick, weigh
from moejax.routing.sparsemixer import sparsemixer_choice


def _check_top_p(num_experts: int, options: Mapping[str, Any]) -> None:
    checks.require_top_k(options, num_experts)
    checks.require_option(
        0 <= options["top_p"] <= 1, "top_p", f"must be from 0 to 1, got {options['top_p']:g}"
    )
    checks.require_choice(options, "estimator", ("softmax", "sparsemixer"))
    checks.require_at_least(options, "gap", 0)


@router("top_p", competing=True, check=_check_top_p)
def top_p(
    inputs: RouterInputs,
    *,
    top_k: int = 2,
    top_p: float = 0.7,
    estimator: str = "softmax",
    gap: float = 0.01,
) -> RoutingPlan:
    """The fewest experts whose probabilities sum to ``top_p``, at least one, at most ``top_k``.

    Dynamic capacity of Uni-MoE-2.0-Omni (arXiv 2511.12609). The number of experts is counted on
    the softmax over all that the token may choose, experts of zero output among them. Shared
    experts compete: the softmax over the chosen and the shared logits gives the latter their
    weights, and the former their total.

    Args:
      inputs: see :class:`RouterInputs`.
      top_k: the most experts of a token.
      top_p: the probability to reach.
      estimator: "softmax" takes the most probable experts, with weights by that softmax.
        "sparsemixer" takes one after the other (:func:`sparsemixer_choice`), sampled in training,
        and shares out their total by the weights of those steps.
      gap: of "sparsemixer": logits further than twice this share from the largest are left out.
    """
    may = inputs.may_choose()
    probs = softmax(inputs.logits, may)
    ids = largest(inputs.logits, may, top_k)
    ranked = pick(probs, ids)
    before = jnp.cumsum(ranked, axis=-1) - ranked
    first = jnp.arange(top_k) == 0
    wanted = (before < top_p) | first[None, None]
    if estimator == "softmax":
        ids = jnp.where(wanted, ids, inputs.num_experts)
        weights, shared_weights = weigh(inputs, inputs.logits, ids, normalise_first=False)
        return RoutingPlan(ids, weights, probs, shared_weights)
    ids, steps = _one_by_one(inputs, may, top_k, gap)
    ids = jnp.where(wanted, ids, inputs.num_experts)
    steps = jnp.where(ids < inputs.num_experts, steps, 0)
    weights, shared_weights = weigh(inputs, inputs.logits, ids, normalise_first=False)
    weights = share(steps) * weights.sum(axis=-1, keepdims=True)
    return RoutingPlan(ids, weights, probs, shared_weights)


def _one_by_one(
    inputs: RouterInputs, may: Bool[Array, "s n e"], steps: int, gap: float
) -> tuple[Int[Array, "s n k"], Float[Array, "s n k"]]:
    """The experts of each step of SparseMixer and their weights, before they are shared out."""
    rng = inputs.rng if inputs.train else None
    ids, weights = [], []
    for step in range(steps):
        key = None if rng is None else jax.random.fold_in(rng, step)
        chosen, weight = sparsemixer_choice(inputs.logits, may, gap, key)
        may = may & ~jax.nn.one_hot(chosen, inputs.num_experts, dtype=bool)
        ids.append(chosen)
        weights.append(weight)
    return jnp.stack(ids, axis=-1), jnp.stack(weights, axis=-1)


def _check_threshold(num_experts: int, options: Mapping[str, Any]) -> None:
    checks.require_top_k(options, num_experts)
    checks.require_choice(options, "normalise", KINDS)
    checks.require_shares(options)
    value = options["threshold"]
    checks.require_option(0 <= value < 1, "threshold", f"must be from 0 to below 1, got {value:g}")


@router("threshold", competing=True, check=_check_threshold)
def threshold(
    inputs: RouterInputs,
    *,
    top_k: int = 2,
    threshold: float = 0.1,
    normalise: str = "softmax",
    renormalise: bool = False,
    dense_in_training: bool = False,
) -> RoutingPlan:
    """The experts whose score is above ``threshold``, the largest ``top_k`` of them; maybe none.

    DS-MoE (arXiv 2404.05567) is ``dense_in_training``, with top_k = E there: all experts in
    training, those with p_e > epsilon afterwards. EvoMoE's gate (arXiv 2112.14397) has p_e > 0.001.
    The weights are the scores, or with ``renormalise`` their shares.
    """
    may = inputs.may_choose()
    scores = scores_of(normalise, inputs.logits, may)
    ids = largest(scores, may, top_k)
    if not (dense_in_training and inputs.train):
        ids = jnp.where(pick(scores, ids) > threshold, ids, inputs.num_experts)
    weights, shared_weights = weigh(
        inputs, inputs.logits, ids, kind=normalise, renormalise=renormalise
    )
    probs = distribution(normalise, inputs.logits, may)
    return RoutingPlan(ids, weights, probs, shared_weights)
