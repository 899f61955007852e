"""Losses of the routing: sums over the tokens first, one scalar for each layer from them later.

The sums add up over microbatches and devices, so a loss has the granularity that its docstring
says, and no other: "batch" means all tokens of the step, "group" those that were routed together.
f_e is the share of choices (before any capacity) that are e; P_e is the mean probability of e. Both
are about valid tokens and routed experts; E counts those experts. No gradient passes through f_e.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config.registry import Registry
from moejax.routing.plan import RouterInputs, RoutingPlan, keyword_defaults
from moejax.routing.select import chosen_mask

Sums = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class RouterLoss:
    """A registered loss.

    Attributes:
      function: ``(inputs, plan, **options) -> sums``.
      value_function: ``(sums, **options) -> scalar``, of one layer.
    """

    function: Callable[..., Sums]
    value_function: Callable[..., Array]

    def defaults(self) -> dict[str, Any]:
        """The options and their default values."""
        return {**keyword_defaults(self.value_function), **keyword_defaults(self.function)}

    def statistics(self, inputs: RouterInputs, plan: RoutingPlan, **options: Any) -> Sums:
        """Sums over the tokens, which add up over microbatches and devices."""
        return self.function(inputs, plan, **_accepted(self.function, options))

    def value(self, sums: Mapping[str, Array], **options: Any) -> Array:
        """The loss of one layer, without its coefficient; 0 where nothing was counted."""
        return self.value_function(sums, **_accepted(self.value_function, options))


def _accepted(function: Callable, options: Mapping[str, Any]) -> dict[str, Any]:
    names = keyword_defaults(function)
    return {name: value for name, value in options.items() if name in names}


ROUTER_LOSSES: Registry[RouterLoss] = Registry("router loss")


def router_loss(name: str, value: Callable[..., Array]) -> Callable[[Callable], Callable]:
    """Decorator: ``function`` gives the sums of the loss ``name``, ``value`` its scalar."""

    def add(function: Callable) -> Callable:
        ROUTER_LOSSES.register(name)(RouterLoss(function, value))
        return function

    return add


def over(value: Array, weight: Array) -> Array:
    """``value / weight``, and ``value`` itself (which is 0 then) where the weight is 0."""
    return value / jnp.where(weight > 0, weight, 1)


def choices(inputs: RouterInputs, plan: RoutingPlan) -> Float[Array, "s n e"]:
    """1 for each routed expert that a token chose; no gradient."""
    mask = chosen_mask(plan.chosen(), inputs.num_experts)[..., : inputs.num_routed]
    return mask.astype(plan.probs.dtype)


def probabilities(inputs: RouterInputs, plan: RoutingPlan) -> Float[Array, "s n e"]:
    """The probabilities of the routed experts."""
    return plan.probs[..., : inputs.num_routed]


def num_valid(inputs: RouterInputs, dtype) -> Float[Array, " s"]:
    """Valid tokens of each group."""
    return inputs.valid.sum(axis=1).astype(dtype)


def balance(counts: Array, probs: Array, tokens: Array) -> Array:
    """``E sum_e f_e P_e`` from sums [..., e], [..., e], [...]."""
    share = over(counts, counts.sum(axis=-1, keepdims=True))
    return counts.shape[-1] * (share * over(probs, tokens[..., None])).sum(axis=-1)


def _balance_value(sums: Mapping[str, Array]) -> Array:
    return balance(sums["counts_e"], sums["probs_e"], sums["tokens"])


@router_loss("switch", _balance_value)
def switch(inputs: RouterInputs, plan: RoutingPlan) -> Sums:
    """``E sum_e f_e P_e`` over the batch (Switch, arXiv 2101.03961, eq. 4 to 6).

    With K choices of each token f_e = count_e / (K T), so the value does not grow with K. 1 at
    uniform, E with all tokens and probability on one expert.
    """
    return {
        "counts_e": choices(inputs, plan).sum(axis=(0, 1)),
        "probs_e": probabilities(inputs, plan).sum(axis=(0, 1)),
        "tokens": num_valid(inputs, plan.probs.dtype).sum(),
    }


def _z_value(sums: Mapping[str, Array]) -> Array:
    return over(sums["squares"], sums["tokens"])


@router_loss("z", _z_value)
def z(inputs: RouterInputs, plan: RoutingPlan) -> Sums:
    """``mean_t (log sum_e exp l_te)^2`` over the batch (ST-MoE, arXiv 2202.08906, eq. 5).

    Over the experts that a token may choose. (log E)^2 with all logits 0; its minimum is 0.
    """
    may = inputs.may_choose()
    any_choice = may.any(axis=-1)
    # A token without a choice keeps finite numbers, for its gradient's sake, and counts as none.
    logits = jnp.where(may | ~any_choice[..., None], inputs.logits, -jnp.inf)
    squares = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    return {
        "squares": jnp.where(any_choice, squares, 0).sum(),
        "tokens": any_choice.sum().astype(plan.probs.dtype),
    }
