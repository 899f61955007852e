"""Token choice: each token takes the k experts with the largest scores."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from moejax.routing import checks
from moejax.routing.normalise import KINDS, distribution, scores_of, share, sinkhorn
from moejax.routing.perturb import NOISE_CHOICES, is_noisy, perturb
from moejax.routing.plan import RouterInputs, RoutingPlan, router
from moejax.routing.select import chosen_mask, largest, pick, two_largest, weigh


def _check_top_k(num_experts: int, options: Mapping[str, Any]) -> None:
    checks.require_top_k(options, num_experts)
    checks.require_choice(options, "normalise", KINDS)
    checks.require_choice(options, "noise", NOISE_CHOICES)
    checks.require_choice(options, "group_score", ("max", "top2"))
    checks.require_above_zero(options, "scale")
    checks.require_at_least(options, "noise_scale", 0)
    checks.require_shares(options)
    checks.require_option(
        options["normalise_first"] or options["normalise"] == "softmax",
        "normalise_first",
        f"{options['normalise']} scores are the same before and after the choice; leave it True",
    )
    groups, kept = options["num_groups"], options["top_groups"]
    checks.require_option(
        groups >= 1 and num_experts % groups == 0,
        "num_groups",
        f"{groups} groups cannot be made of {num_experts} experts; choose a divisor",
    )
    checks.require_option(
        1 <= kept <= groups, "top_groups", f"must be from 1 to num_groups={groups}, got {kept}"
    )
    checks.require_option(
        options["top_k"] <= kept * (num_experts // groups),
        "top_groups",
        f"{kept} groups of {num_experts // groups} experts have fewer than top_k="
        f"{options['top_k']}; raise it",
    )
    checks.require_option(
        not options["random_second"] or options["top_k"] == 2,
        "random_second",
        f"is about the second of two experts; set model.moe.top_k=2 (it is {options['top_k']})",
    )


@router("top_k", biased=True, competing=True, check=_check_top_k)
def top_k(
    inputs: RouterInputs,
    *,
    top_k: int = 2,
    normalise: str = "softmax",
    normalise_first: bool = True,
    renormalise: bool = False,
    scale: float = 1.0,
    noise: str = "",
    noise_scale: float = 1.0,
    noisy_weights: bool = True,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    random_second: bool = False,
    renormalise_after_zero: bool = False,
) -> RoutingPlan:
    """The k experts of the largest scores; of equal scores the lower id.

    With its defaults V-MoE and DeepSeekMoE (arXiv 2106.05974, 2401.06066): softmax over all, then
    top-k, weights as they are, which sum to less than 1. ``renormalise`` makes them sum to 1.
    DeepSeek-V3 (arXiv 2412.19437, eq. 12 to 16): sigmoid, renormalise, scale=2.5, num_groups=8,
    top_groups=4, group_score="top2"; ``inputs.select_bias`` takes part in the choice alone.
    MoDE (arXiv 2412.12953): noise="gumbel" with noisy_weights=False and renormalise draws k experts
    from the softmax in training, without putting them back.

    Args:
      inputs: see :class:`RouterInputs`.
      top_k: experts of a token.
      normalise: "softmax", "sigmoid", or "identity": logits as they are (ProMoE, arXiv 2510.24711).
      normalise_first: False takes the softmax over the chosen logits alone (sum 1).
      renormalise: weights over their sum.
      scale: multiplies the weights.
      noise: on logits in training: "gaussian" (noise_scale / E), "gumbel" or "logistic". The choice
        sees it, ``probs`` do not.
      noise_scale: multiplies the noise.
      noisy_weights: whether the weights see the noise too.
      num_groups: experts in equal groups of neighbours, of which a token uses ``top_groups``.
      top_groups: see there.
      group_score: a group's best score, or the sum of its "top2".
      random_second: the second expert is kept with probability min(1, 2 w_2 / (w_1 + w_2)) in
        training (GShard, arXiv 2006.16668, algorithm 1).
      renormalise_after_zero: experts that give 0 get weight 0 and the others of the token are
        divided by what is left, as in the code of MoE++ (its paper, arXiv 2410.07348, does not).
    """
    may = inputs.may_choose()
    logits = perturb(inputs, noise, noise_scale)
    scores = scores_of(normalise, logits, may) if normalise_first else logits
    biased = scores if inputs.select_bias is None else scores + inputs.select_bias[None, None]
    allowed = may
    if num_groups > 1:
        allowed &= _best_groups(biased, may, inputs.num_routed, num_groups, top_groups, group_score)
    ids = largest(biased, allowed, top_k)
    weights, shared_weights = weigh(
        inputs,
        logits if noisy_weights else inputs.logits,
        ids,
        kind=normalise,
        normalise_first=normalise_first,
        renormalise=renormalise,
    )
    if random_second and inputs.train and inputs.rng is not None:
        ids, weights = _drop_second(inputs.rng, ids, weights, inputs.num_experts)
    if renormalise_after_zero:
        first = inputs.num_ffn
        weights = share(jnp.where((ids >= first) & (ids < first + inputs.num_zero), 0, weights))
    statistics = {}
    if noise == "gaussian" and is_noisy(inputs, noise):
        deviation = noise_scale / inputs.num_routed
        statistics["wins_se"] = _wins(inputs.logits, logits, may, top_k, deviation)
    return RoutingPlan(
        expert_ids=ids,
        weights=weights * scale,
        probs=distribution(normalise, inputs.logits, may),
        shared_weights=None if shared_weights is None else shared_weights * scale,
        statistics=statistics,
    )


def _best_groups(
    scores: Float[Array, "s n e"],
    may: Bool[Array, "s n e"],
    routed: int,
    groups: int,
    kept: int,
    how: str,
) -> Bool[Array, "s n e"]:
    """The experts of the ``kept`` groups with the largest group scores."""
    s, n, e = scores.shape
    masked = jnp.where(may, scores, -jnp.inf)[..., :routed]
    of_group, second = two_largest(masked.reshape(s, n, groups, routed // groups))
    if how == "top2":
        # A group with one expert that may be chosen counts by that one.
        of_group = of_group + jnp.where(jnp.isfinite(second), second, 0)
    ids = largest(of_group, jnp.isfinite(of_group), kept)
    experts = jnp.repeat(chosen_mask(ids, groups), routed // groups, axis=-1)
    # Shared experts are in no group.
    return jnp.pad(experts, ((0, 0), (0, 0), (0, e - routed)))


def _drop_second(rng: Array, ids, weights, none: int):
    second = share(weights)[..., 1]
    # The key itself is that of the noise.
    key = jax.random.fold_in(rng, 1)
    kept = jax.random.uniform(key, second.shape, second.dtype) < 2 * second
    kept = jnp.stack([jnp.ones_like(kept), kept], axis=-1)
    return jnp.where(kept, ids, none), jnp.where(kept, weights, 0)


def _wins(
    clean: Float[Array, "s n e"],
    noisy: Float[Array, "s n e"],
    may: Bool[Array, "s n e"],
    k: int,
    deviation: float,
) -> Float[Array, "s e"]:
    """Sums over tokens of the probability that with new noise e would be among the k largest.

    ``1 - Phi((kth largest noisy logit - logit) / deviation)``, arXiv 2106.05974.
    """
    threshold = pick(noisy, largest(noisy, may, k)[..., -1:])
    wins = 1 - jax.scipy.stats.norm.cdf((threshold - clean) / deviation)
    # With no more than k experts to choose from, all win.
    wins = jnp.where(may.sum(axis=-1, keepdims=True) > k, wins, 1)
    return jnp.where(may, wins, 0).sum(axis=1)


def _check_sinkhorn(num_experts: int, options: Mapping[str, Any]) -> None:
    checks.require_top_k(options, num_experts)
    checks.require_choice(options, "normalise", KINDS)
    checks.require_shares(options)
    checks.require_above_zero(options, "temperature")
    checks.require_at_least(options, "iterations", 1)
    checks.require_above_zero(options, "scale")


@router(
    "sinkhorn",
    causal=False,
    causal_rules=("scores", "none"),
    competing=True,
    check=_check_sinkhorn,
)
def sinkhorn_choice(
    inputs: RouterInputs,
    *,
    top_k: int = 1,
    normalise: str = "softmax",
    renormalise: bool = False,
    scale: float = 1.0,
    temperature: float = 1.0,
    iterations: int = 30,
    causal_rule: str = "",
) -> RoutingPlan:
    """The k largest entries of each row of the group's balanced plan (arXiv 2401.15969).

    No gradient passes through the plan: the weights are the ordinary scores of what it chose, as
    in BlackMamba (arXiv 2402.01771: sigmoid, temperature=0.5, and plain scores in generation).

    Args:
      inputs: see :class:`RouterInputs`.
      top_k: experts of a token.
      normalise: what the weights are: "softmax", "sigmoid" or "identity".
      renormalise: weights over their sum.
      scale: multiplies the weights.
      temperature: of the plan (:func:`moejax.routing.normalise.sinkhorn`).
      iterations: of its scaling of columns and rows.
      causal_rule: without training: "scores" takes the largest scores, which need no other token;
        "none" and "" choose as in training.
    """
    may = inputs.may_choose()
    wanted = inputs.logits
    if inputs.train or causal_rule != "scores":
        wanted = sinkhorn(lax.stop_gradient(inputs.logits), may, temperature, iterations)
    ids = largest(wanted, may, top_k)
    weights, shared_weights = weigh(
        inputs, inputs.logits, ids, kind=normalise, renormalise=renormalise
    )
    return RoutingPlan(
        expert_ids=ids,
        weights=weights * scale,
        probs=distribution(normalise, inputs.logits, may),
        shared_weights=None if shared_weights is None else shared_weights * scale,
    )
