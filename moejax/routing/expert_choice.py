"""Expert choice: each expert takes the tokens that score highest with it."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from moejax.routing import checks
from moejax.routing.normalise import KINDS, distribution, scores_of, share, softmax
from moejax.routing.perturb import NOISE_CHOICES, perturb
from moejax.routing.plan import RouterInputs, RoutingPlan, router
from moejax.routing.select import best_of_each

# Keeps a product that is a whole number but for rounding from becoming the next one.
_SLACK = 1e-4


def _check_expert_choice(num_experts: int, options: Mapping[str, Any]) -> None:
    checks.require_above_zero(options, "capacity_factor")
    checks.require_choice(options, "normalise", KINDS)
    checks.require_choice(options, "noise", NOISE_CHOICES)
    checks.require_choice(options, "rounding", ("up", "down"))
    checks.require_choice(options, "weights", ("scores", "share", "tokens"))
    checks.require_option(
        options["weights"] != "tokens" or options["causal_rule"] in ("", "none"),
        "weights",
        "'tokens' compares a token with all that the expert takes, later ones too, which no "
        "causal_rule can do without; choose 'scores' or 'share'",
    )
    checks.require_at_least(options, "noise_scale", 0)
    checks.require_option(
        options["capacity_factor"] <= num_experts,
        "capacity_factor",
        f"is the mean number of experts of a token, of which there are {num_experts}; "
        f"got {options['capacity_factor']:g}",
    )


@router(
    "expert_choice",
    causal=False,
    causal_rules=("aux_router", "threshold", "none"),
    check=_check_expert_choice,
)
def expert_choice(
    inputs: RouterInputs,
    *,
    capacity_factor: float = 1.0,
    per_modality: bool = False,
    normalise: str = "sigmoid",
    weights: str = "scores",
    noise: str = "",
    noise_scale: float = 1.0,
    rounding: str = "up",
    causal_rule: str = "",
    threshold: float = 0.5,
) -> RoutingPlan:
    """Each expert takes its share of the group's tokens, those of the highest scores.

    Zhou et al., arXiv 2202.09368 (there with softmax scores); MoMa, arXiv 2407.21770,
    is ``allowed`` with experts of one modality each: an expert then compares the tokens of that
    modality, of which it takes ``capacity_factor / E_m``. A token gets any number of experts, by
    the weights that the scores are. Of equal scores the earlier token is taken.

    Expert e takes ``capacity_factor * (tokens that may choose e) / (experts that those may choose,
    on average)``, rounded. Padding is no token.

    Args:
      inputs: see :class:`RouterInputs`.
      capacity_factor: the mean number of experts of a token.
      per_modality: tokens compete with those of their modality alone, also for experts that
        several modalities may choose; each modality has its share of each expert.
      normalise: "sigmoid" or "softmax" over the experts that a token may choose.
      weights: "scores"; a token's scores over their sum ("share"; of a token that no expert takes
        0); or for each expert the softmax of its logits over the "tokens" that it takes in a group
        (pMoE, arXiv 2306.04073): 1 / their number where all logits are equal.
      noise: on logits in training; "logistic" is Gumbel-sigmoid.
      noise_scale: multiplies the noise.
      rounding: "up", or "down": never more than capacity_factor * tokens in all.
      causal_rule: how experts are chosen without training, where later tokens must not matter:
        "aux_router" where ``sigmoid(causal_logits) > 0.5``, "threshold" where the score is above
        ``threshold``; "none" and "" choose as in training. The weights are the scores always.
      threshold: of the rule of that name.
    """
    may = inputs.may_choose()
    logits = perturb(inputs, noise, noise_scale)
    scores = scores_of(normalise, logits, may)
    max_choices = None
    if not inputs.train and causal_rule == "aux_router":
        if inputs.causal_logits is None:
            raise ValueError("causal_rule='aux_router' needs RouterInputs.causal_logits")
        selected = may & (inputs.causal_logits > 0)
    elif not inputs.train and causal_rule == "threshold":
        selected = may & (scores > threshold)
    else:
        selected = _take(inputs, may, scores, capacity_factor, per_modality, rounding)
        max_choices = _most(inputs, capacity_factor, per_modality, rounding)
    number = lax.broadcasted_iota(jnp.int32, selected.shape, 2)
    ids = jnp.where(selected, number, inputs.num_experts)
    routed = inputs.num_routed
    if weights == "tokens":
        scores = softmax(logits, selected, axis=1)
    elif weights == "share":
        scores = share(jnp.where(selected, scores, 0))
    return RoutingPlan(
        expert_ids=ids[..., :routed],
        weights=jnp.where(selected, scores, 0)[..., :routed],
        probs=distribution(normalise, inputs.logits, may),
        max_choices=max_choices,
    )


def _classes(inputs: RouterInputs, per_modality: bool) -> int:
    if per_modality and not inputs.num_modalities:
        raise ValueError("per_modality needs RouterInputs.num_modalities")
    return inputs.num_modalities if per_modality else 1


def _take(
    inputs: RouterInputs,
    may: Bool[Array, "s n e"],
    scores: Float[Array, "s n e"],
    factor: float,
    per_modality: bool,
    rounding: str,
) -> Bool[Array, "s n e"]:
    """Which tokens each expert takes, from each class of tokens that compete."""
    experts_sn = may.sum(axis=-1, keepdims=True, dtype=jnp.int32)
    selected = jnp.zeros_like(may)
    for one in range(_classes(inputs, per_modality)):
        here = may & (inputs.modality == one)[..., None] if per_modality else may
        tokens_se = here.sum(axis=1, dtype=jnp.int32)
        choices_se = jnp.where(here, experts_sn, 0).sum(axis=1)
        # Tokens over the mean number of experts that they may choose.
        share_se = tokens_se / (jnp.maximum(choices_se, 1) / jnp.maximum(tokens_se, 1))
        exact = factor * share_se
        quota = jnp.ceil(exact - _SLACK) if rounding == "up" else jnp.floor(exact + _SLACK)
        selected |= best_of_each(scores, here, quota.astype(jnp.int32))
    return selected


def _most(inputs: RouterInputs, factor: float, per_modality: bool, rounding: str) -> int:
    """A bound of the choices in one group: the quotas' sum, each rounded by less than one."""
    n, e = inputs.logits.shape[1], inputs.num_routed
    quotas = e * _classes(inputs, per_modality)
    more = quotas if rounding == "up" else quotas * _SLACK
    return min(n * e, int(factor * n + more))
