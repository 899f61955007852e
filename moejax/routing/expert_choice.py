"""Expert choice: each expert takes the tokens that score highest with it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from moejax.routing import checks
from moejax.routing.normalise import KINDS, distribution, scores_of
from moejax.routing.perturb import NOISE_CHOICES, perturb
from moejax.routing.plan import RouterInputs, RoutingPlan, router
from moejax.routing.select import rank_within

# Keeps a product that is a whole number but for rounding from becoming the next one.
_SLACK = 1e-4


def _check_expert_choice(num_experts: int, options: Mapping[str, Any]) -> None:
    checks.require_above_zero(options, "capacity_factor")
    checks.require_choice(options, "normalise", KINDS)
    checks.require_choice(options, "noise", NOISE_CHOICES)
    checks.require_choice(options, "rounding", ("up", "down"))
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
      noise: on logits in training; "logistic" is Gumbel-sigmoid.
      noise_scale: multiplies the noise.
      rounding: "up", or "down": never more than capacity_factor * tokens in all.
      causal_rule: how experts are chosen without training, where later tokens must not matter:
        "aux_router" where ``sigmoid(causal_logits) > 0.5``, "threshold" where the score is above
        ``threshold``; "none" and "" choose as in training. The weights are the scores always.
      threshold: of the rule of that name.
    """
    may = inputs.may_choose()
    scores = scores_of(normalise, perturb(inputs, noise, noise_scale), may)
    max_choices = None
    if not inputs.train and causal_rule == "aux_router":
        if inputs.causal_logits is None:
            raise ValueError("causal_rule='aux_router' needs RouterInputs.causal_logits")
        selected = may & (inputs.causal_logits > 0)
    elif not inputs.train and causal_rule == "threshold":
        selected = may & (scores > threshold)
    else:
        selected = _take(inputs, may, scores, capacity_factor, per_modality, rounding)
        max_choices = _most(inputs, capacity_factor, per_modality)
    number = lax.broadcasted_iota(jnp.int32, selected.shape, 2)
    ids = jnp.where(selected, number, inputs.num_experts)
    routed = inputs.num_routed
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
    scores,
    factor: float,
    per_modality: bool,
    rounding: str,
) -> Bool[Array, "s n e"]:
    classes = _classes(inputs, per_modality)
    class_sn = inputs.modality if per_modality else jnp.zeros_like(inputs.modality)
    member_snm = jax.nn.one_hot(class_sn, classes, dtype=scores.dtype)
    may_sne = may.astype(scores.dtype)
    # Tokens of each class that may choose each expert, and how many experts those may choose.
    tokens_sme = jnp.einsum("snm,sne->sme", member_snm, may_sne)
    experts_sme = jnp.einsum(
        "snm,sne,sn->sme", member_snm, may_sne, may_sne.sum(axis=-1), precision="highest"
    )
    mean_sme = experts_sme / jnp.where(tokens_sme > 0, tokens_sme, 1)
    exact = factor * tokens_sme / jnp.where(mean_sme > 0, mean_sme, 1)
    quota_sme = jnp.ceil(exact - _SLACK) if rounding == "up" else jnp.floor(exact + _SLACK)
    quota_sne = jnp.einsum("snm,sme->sne", member_snm, quota_sme, precision="highest")

    # Tokens that may not choose an expert are a class of their own, which takes no place.
    class_sne = jnp.where(may, class_sn[..., None], classes)
    by_expert = lambda values: jnp.swapaxes(values, 1, 2)
    rank = rank_within(by_expert(class_sne), -by_expert(lax.stop_gradient(scores)))
    return may & (by_expert(rank) < quota_sne)


def _most(inputs: RouterInputs, factor: float, per_modality: bool) -> int:
    """A bound of the choices in one group: the quotas' sum, each rounded by less than one."""
    n, e = inputs.logits.shape[1], inputs.num_routed
    return min(n * e, int(factor * n) + e * _classes(inputs, per_modality))
