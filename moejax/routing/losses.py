"""Losses of the routing: sums over the tokens first, one scalar for each layer from them later.

The sums add up over microbatches and devices, so a loss has the granularity that its docstring
says and no other: "batch" means all tokens of the step, "group" those that were routed together, a
sequence the tokens of one row. In the formulas f_e is the share of choices (before any capacity)
that are e, P_e the mean probability of e, E the number of experts that can be chosen. Padding is in
none of them. No gradient passes through f_e.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.config.registry import Registry
from moejax.routing.plan import RouterInputs, RoutingPlan, accepted, keyword_defaults
from moejax.routing.select import chosen_mask

Sums = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class RouterLoss:
    """A registered loss.

    Attributes:
      function: ``(inputs, plan, **options) -> sums``.
      value_function: ``(sums, **options) -> scalar``, of one layer.
      choices: the values that an option may have, for options that are names.
    """

    function: Callable[..., Sums]
    value_function: Callable[..., Array]
    choices: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def defaults(self) -> dict[str, Any]:
        """The options and their default values."""
        return {**keyword_defaults(self.value_function), **keyword_defaults(self.function)}

    def statistics(self, inputs: RouterInputs, plan: RoutingPlan, **options: Any) -> Sums:
        """Sums over the tokens, which add up over microbatches and devices."""
        return self.function(inputs, plan, **accepted(self.function, options))

    def value(self, sums: Mapping[str, Array], **options: Any) -> Array:
        """The loss of one layer, without its coefficient; 0 where nothing was counted."""
        return self.value_function(sums, **accepted(self.value_function, options))


ROUTER_LOSSES: Registry[RouterLoss] = Registry("router loss")


def router_loss(
    name: str, value: Callable[..., Array], **choices: tuple[str, ...]
) -> Callable[[Callable], Callable]:
    """Decorator: the function gives the sums of the loss ``name``, and ``value`` its scalar."""

    def add(function: Callable) -> Callable:
        ROUTER_LOSSES.register(name)(RouterLoss(function, value, choices))
        return function

    return add


def over(value: Array, weight: Array) -> Array:
    """``value / weight``; ``value`` itself, which is 0 then, where the weight is 0."""
    return value / jnp.where(weight > 0, weight, 1)


def choices(inputs: RouterInputs, ids: Int[Array, "s n k"]) -> Float[Array, "s n e"]:
    """1 for each expert among a token's ids; shared experts have no column."""
    mask = chosen_mask(ids, inputs.num_experts)[..., : inputs.num_routed]
    return mask.astype(inputs.logits.dtype)


def probabilities(inputs: RouterInputs, plan: RoutingPlan) -> Float[Array, "s n e"]:
    """Probabilities of the experts; shared ones have no column."""
    return plan.probs[..., : inputs.num_routed]


def num_valid(inputs: RouterInputs, plan: RoutingPlan) -> Float[Array, " s"]:
    """Valid tokens of each group."""
    return inputs.valid.sum(axis=1).astype(plan.probs.dtype)


def of_modality(inputs: RouterInputs, plan: RoutingPlan) -> Float[Array, "s n m"]:
    """1 for the modality of each valid token."""
    if not inputs.num_modalities:
        raise ValueError("losses of each modality need RouterInputs.num_modalities")
    member = jax.nn.one_hot(inputs.modality, inputs.num_modalities, dtype=plan.probs.dtype)
    return member * inputs.valid[..., None]


def _z_value(sums: Mapping[str, Array]) -> Array:
    return over(sums["squares"], sums["tokens"])


@router_loss("z", _z_value)
def z(inputs: RouterInputs, plan: RoutingPlan) -> Sums:
    """``mean_t (log sum_e exp l_te)^2`` over the batch (ST-MoE, arXiv 2202.08906, eq. 5).

    Over the experts that a token may choose. (log E)^2 where all logits are 0; its minimum is 0.
    """
    may = inputs.may_choose()
    counted = may.any(axis=-1)
    # Tokens that choose nothing keep finite numbers, for the gradient's sake, and are not counted.
    logits = jnp.where(may | ~counted[..., None], inputs.logits, -jnp.inf)
    squares = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    return {
        "squares": jnp.where(counted, squares, 0).sum(),
        "tokens": counted.sum().astype(plan.probs.dtype),
    }


def _causal_router_value(sums: Mapping[str, Array]) -> Array:
    return over(sums["cross_entropy"], sums["pairs"])


@router_loss("causal_router", _causal_router_value)
def causal_router(inputs: RouterInputs, plan: RoutingPlan) -> Sums:
    """Binary cross-entropy of ``causal_logits`` against the choice that saw all tokens.

    MoMa, arXiv 2407.21770. The mean over the batch's pairs of a token and an expert
    that it may choose. Its targets are integers, so nothing reaches the main router. log 2 where
    all causal logits are 0, 0 at best. Only in training: elsewhere the choice may be the causal
    router's own.
    """
    dtype = plan.probs.dtype
    if inputs.causal_logits is None or not inputs.train:
        return {"cross_entropy": jnp.zeros((), dtype), "pairs": jnp.zeros((), dtype)}
    may = inputs.may_choose()
    target = chosen_mask(plan.chosen(), inputs.num_experts)
    logits = inputs.causal_logits
    cross_entropy = jax.nn.softplus(jnp.where(target, -logits, logits))
    return {
        "cross_entropy": jnp.where(may, cross_entropy, 0).sum(),
        "pairs": may.sum().astype(dtype),
    }
