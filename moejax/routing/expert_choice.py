"""Expert choice: each expert takes the tokens that score highest with it."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.nn import sigmoid
from jaxtyping import Array, Bool, Int

from moejax.routing import checks
from moejax.routing.normalise import KINDS, distribution, scores_of, share, sinkhorn, softmax
from moejax.routing.perturb import NOISE_CHOICES, perturb
from moejax.routing.plan import RouterInputs, RoutingPlan, router
from moejax.routing.select import best_of_each
from moejax.routing.transport import sparse_transport

# What experts choose by, where it is not the scores.
PLANS = ("sinkhorn", "sparse")

# Keeps a product that is a whole number but for rounding from becoming the next one.
_SLACK = 1e-4


def _check_expert_choice(num_experts: int, options: Mapping[str, Any]) -> None:
    checks.require_above_zero(options, "capacity_factor")
    checks.require_choice(options, "normalise", KINDS)
    checks.require_choice(options, "noise", NOISE_CHOICES)
    checks.require_choice(options, "rounding", ("up", "down"))
    checks.require_choice(options, "weights", ("scores", "share", "tokens", "plan"))
    checks.require_option(
        options["weights"] in ("scores", "share") or options["causal_rule"] in ("", "none"),
        "weights",
        f"{options['weights']!r} compares a token with others, later ones too, which no "
        "causal_rule can do without; choose 'scores' or 'share'",
    )
    checks.require_option(
        options["weights"] != "share" or options["normalise"] != "identity",
        "weights",
        "scores of normalise='identity' may be negative, and have no shares; choose 'scores'",
    )
    checks.require_option(
        options["weights"] != "plan" or bool(options["plan"]),
        "weights",
        f"'plan' weighs by a plan; choose one of {', '.join(PLANS)} in plan",
    )
    checks.require_at_least(options, "noise_scale", 0)
    checks.require_choice(options, "plan", ("", *PLANS))
    checks.require_above_zero(options, "temperature")
    checks.require_at_least(options, "iterations", 1)
    checks.require_above_zero(options, "learning_rate")
    checks.require_option(
        options["capacity_factor"] <= num_experts,
        "capacity_factor",
        f"is the mean number of experts of a token, of which there are {num_experts}; "
        f"got {options['capacity_factor']:g}",
    )


@router(
    "expert_choice",
    causal=False,
    causal_rules=("aux_router", "threshold", "aux_count", "none"),
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
    plan: str = "",
    temperature: float = 1.0,
    iterations: int = 20,
    learning_rate: float = 0.01,
    causal_rule: str = "",
    threshold: float = 0.5,
) -> RoutingPlan:
    """Each expert takes its share of the group's tokens, those of the highest scores.

    Zhou et al., arXiv 2202.09368 (there with softmax scores); MoMa, arXiv 2407.21770,
    is ``allowed`` with experts of one modality each: an expert then compares the tokens of that
    modality, of which it takes ``capacity_factor / E_m``. A token gets any number of experts, by
    the weights that the scores are. Of equal scores the earlier token is taken. EC-DiT, arXiv
    2410.02098, has softmax scores and compares the patches of one picture, DiffMoE, arXiv
    2503.14487, those of the whole batch.

    Expert e takes ``capacity_factor * (tokens that may choose e) / (experts that those may choose,
    on average)``, rounded. Padding is no token.

    With a ``plan`` an expert takes the tokens of which the plan gives it most (arXiv 2401.15969):
    a plan knows that each token has as much to give as any other, so that tokens are left out more
    rarely. Weights are the scores even so, and no gradient passes through the plan, unless
    ``weights`` is "plan".

    Args:
      inputs: see :class:`RouterInputs`.
      capacity_factor: the mean number of experts of a token.
      per_modality: tokens compete with those of their modality alone, also for experts that
        several modalities may choose; each modality has its share of each expert.
      normalise: "sigmoid" or "softmax" over the experts that a token may choose, or "identity".
      weights: "scores"; a token's scores over their sum ("share"; of a token that no expert takes
        0); for each expert the softmax of its logits over the "tokens" that it takes in a group
        (pMoE, arXiv 2306.04073): 1 / their number where all logits are equal; or the entries of
        the "plan".
      noise: on logits in training; "logistic" is Gumbel-sigmoid.
      noise_scale: multiplies the noise.
      rounding: "up", or "down": never more than capacity_factor * tokens in all.
      plan: "sinkhorn", the balanced plan of the logits (:func:`moejax.routing.normalise.sinkhorn`);
        "sparse", the plan of the scores in which an expert has no more tokens than it takes
        (:func:`moejax.routing.transport.sparse_transport`); "": the scores themselves.
      temperature: how strongly the plan is evened out: the weight of its entropy ("sinkhorn") or of
        half of its squares ("sparse").
      iterations: of the algorithm that makes the plan.
      learning_rate: of the plan "sparse".
      causal_rule: how experts are chosen without training, where later tokens must not matter:
        "aux_router" where ``sigmoid(causal_logits) > causal_threshold``, "threshold" where the
        score is above ``threshold``. "aux_count" (DiffMoE's code) asks the auxiliary router only
        how many tokens of the group an expert takes, and so still compares them; "none" and ""
        choose as in training.
      threshold: of the rule of that name.
    """
    may = inputs.may_choose()
    logits = perturb(inputs, noise, noise_scale)
    scores = scores_of(normalise, logits, may)
    weight_sne, max_choices = scores, None
    if not inputs.train and causal_rule == "aux_router":
        selected = may & _foreseen(inputs)
    elif not inputs.train and causal_rule == "aux_count":
        number_se = (may & _foreseen(inputs)).sum(axis=1, dtype=jnp.int32)
        selected = best_of_each(scores, may, number_se)
    elif not inputs.train and causal_rule == "threshold":
        selected = may & (scores > threshold)
    else:
        # What the plan is made of; it chooses, and has a gradient only where it weighs.
        seen = (logits, scores) if weights == "plan" else lax.stop_gradient((logits, scores))
        preference = {
            "": lambda here, quota_se: scores,
            "sinkhorn": lambda here, quota_se: sinkhorn(seen[0], here, temperature, iterations),
            "sparse": lambda here, quota_se: sparse_transport(
                seen[1],
                here,
                quota_se,
                gamma=temperature,
                iterations=iterations,
                learning_rate=learning_rate,
            ),
        }[plan]
        selected, preferred = jnp.zeros_like(may), jnp.zeros_like(scores)
        for here, quota_se in _competing(inputs, may, capacity_factor, per_modality, rounding):
            wanted = preference(here, quota_se)
            # A sparse plan has no more entries than that; what is 0 in it goes nowhere.
            taken = wanted > 0 if plan == "sparse" else best_of_each(wanted, here, quota_se)
            selected, preferred = selected | taken, preferred + jnp.where(taken, wanted, 0)
        weight_sne = preferred if weights == "plan" else scores
        max_choices = _most(inputs, capacity_factor, per_modality, rounding)
    number = lax.broadcasted_iota(jnp.int32, selected.shape, 2)
    ids = jnp.where(selected, number, inputs.num_experts)
    routed = inputs.num_routed
    if weights == "tokens":
        weight_sne = softmax(logits, selected, axis=1)
    elif weights == "share":
        weight_sne = share(jnp.where(selected, scores, 0))
    return RoutingPlan(
        expert_ids=ids[..., :routed],
        weights=jnp.where(selected, weight_sne, 0)[..., :routed],
        probs=distribution(normalise, inputs.logits, may),
        max_choices=max_choices,
    )


def _foreseen(inputs: RouterInputs) -> Bool[Array, "s n e"]:
    """Where the auxiliary router says yes."""
    if inputs.causal_logits is None:
        raise ValueError("causal_rule: the auxiliary router needs RouterInputs.causal_logits")
    if inputs.causal_threshold is None:
        return inputs.causal_logits > 0
    return sigmoid(inputs.causal_logits) > inputs.causal_threshold[None, None]


def _classes(inputs: RouterInputs, per_modality: bool) -> int:
    if per_modality and not inputs.num_modalities:
        raise ValueError("per_modality needs RouterInputs.num_modalities")
    return inputs.num_modalities if per_modality else 1


def _competing(
    inputs: RouterInputs,
    may: Bool[Array, "s n e"],
    factor: float,
    per_modality: bool,
    rounding: str,
) -> Iterator[tuple[Bool[Array, "s n e"], Int[Array, "s e"]]]:
    """Each class of tokens that compete, and how many of them each expert takes."""
    experts_sn = may.sum(axis=-1, keepdims=True, dtype=jnp.int32)
    for one in range(_classes(inputs, per_modality)):
        here = may & (inputs.modality == one)[..., None] if per_modality else may
        tokens_se = here.sum(axis=1, dtype=jnp.int32)
        choices_se = jnp.where(here, experts_sn, 0).sum(axis=1)
        # Tokens over the mean number of experts that they may choose.
        share_se = tokens_se / (jnp.maximum(choices_se, 1) / jnp.maximum(tokens_se, 1))
        exact = factor * share_se
        quota = jnp.ceil(exact - _SLACK) if rounding == "up" else jnp.floor(exact + _SLACK)
        yield here, quota.astype(jnp.int32)


def _most(inputs: RouterInputs, factor: float, per_modality: bool, rounding: str) -> int:
    """A bound of the choices in one group: the quotas' sum, each rounded by less than one."""
    n, e = inputs.logits.shape[1], inputs.num_routed
    quotas = e * _classes(inputs, per_modality)
    more = quotas if rounding == "up" else quotas * _SLACK
    return min(n * e, int(factor * n + more))
