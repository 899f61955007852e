"""What a router is given and what it returns; the registry that configs name routers from.

A router is one function ``(inputs, *, option=default, ...) -> RoutingPlan`` with a registration
line; its keyword arguments are the options a config may set. It sees logits in routing groups
[s, n, e]: s groups of n tokens each, within which it may compare tokens. A group is one sequence,
several, or the whole batch, by the config alone and never by the mesh.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from moejax.config.registry import Registry
from moejax.errors import UserError, did_you_mean

# Fields are Any, not Array: tree functions rebuild these classes with leaves of other kinds.


@struct.dataclass
class RouterInputs:
    """What a router may look at. E = ``num_experts`` columns: experts with weights first, then
    zero, copy and constant experts, then shared ones that compete.

    Attributes:
      logits: [s, n, e] in float32 or wider; finite everywhere.
      valid: [s, n] bool, False for padding, which is never routed, counted, or compared.
      modality: [s, n] i32.
      token_ids: [s, n] i32, for routing by the token alone.
      allowed: [s, n, e] bool, experts that a token may choose; None where all are.
      select_bias: [e], added to the scores for the choice and never to the weights; None without a
        controller. Carries no gradient.
      causal_logits: [s, n, e] of the auxiliary router that decides when tokens come one by one;
        None without one.
      causal_threshold: [e], the probability of ``causal_logits`` above which it says yes; None: a
        half. Carries no gradient.
      tokens: [s, n, d], what the score saw, for losses; None for a router called by itself.
      score_params: the parameters of the score by name (moejax.routing.scores), likewise.
      rng: key, or None where nothing is to be drawn (evaluation).
      step: [] i32 of the training step, or None.
      num_ffn: how many of the columns are experts with weights.
      num_zero: how many of the columns after those are experts whose output is zero.
      num_shared: how many of the last columns are shared experts that compete with the others.
      num_modalities: modality ids are below it; losses of each modality need it.
      sequences: how many sequences, of equal length, one group holds one after the other.
      train: False when evaluating or decoding: no noise, and only causal choices.
    """

    logits: Any
    valid: Any
    modality: Any
    token_ids: Any
    allowed: Any = None
    select_bias: Any = None
    causal_logits: Any = None
    causal_threshold: Any = None
    tokens: Any = None
    score_params: Any = None
    rng: Any = None
    step: Any = None
    num_ffn: int = struct.field(pytree_node=False, default=0)
    num_zero: int = struct.field(pytree_node=False, default=0)
    num_shared: int = struct.field(pytree_node=False, default=0)
    num_modalities: int = struct.field(pytree_node=False, default=0)
    sequences: int = struct.field(pytree_node=False, default=1)
    train: bool = struct.field(pytree_node=False, default=True)

    @property
    def num_experts(self) -> int:
        return self.logits.shape[-1]

    @property
    def num_routed(self) -> int:
        """The columns that a token chooses from: all but shared experts."""
        return self.num_experts - self.num_shared

    def may_choose(self) -> jax.Array:
        """[s, n, e] bool: allowed experts of valid tokens, shared ones never."""
        allowed = jnp.broadcast_to(self.valid[..., None], self.logits.shape)
        if self.num_shared:
            allowed = allowed & (jnp.arange(self.num_experts) < self.num_routed)[None, None]
        return allowed if self.allowed is None else allowed & self.allowed


@struct.dataclass
class RoutingPlan:
    """Which experts each token goes to.

    Attributes:
      expert_ids: [s, n, k] i32; E where there is no (or no longer a) choice. No expert twice.
      weights: [s, n, k], what each expert's output is multiplied by; 0 where there is no choice.
      probs: [s, n, e], what losses and statistics are made of: for each valid token a distribution
        over the experts that it may choose, without noise; 0 for padding and for shared experts.
      shared_weights: [s, n, shared] of shared experts that compete; None where they do not.
      chosen_ids: [s, n, k], what was chosen before a capacity took some of it away; None where
        nothing was.
      statistics: sums over a group's tokens, [s, ...], that only this router can give.
      max_choices: the most choices in one group; None: n * k.
    """

    expert_ids: Any
    weights: Any
    probs: Any
    shared_weights: Any = None
    chosen_ids: Any = None
    statistics: dict[str, Any] = struct.field(default_factory=dict)
    max_choices: int | None = struct.field(pytree_node=False, default=None)

    def chosen(self) -> jax.Array:
        """[s, n, k]: the choices before any capacity, which losses are about."""
        return self.expert_ids if self.chosen_ids is None else self.chosen_ids


@struct.dataclass
class SoftPlan:
    """Every slot a mixture of tokens, every token a mixture of slots (arXiv 2308.00951).

    Attributes:
      dispatch: [s, n, e, c], for each slot a distribution over the valid tokens of the group.
      combine: [s, n, e, c], for each valid token a distribution over all slots.
    """

    dispatch: Any
    combine: Any


@dataclasses.dataclass(frozen=True)
class Router:
    """A registered router.

    Attributes:
      function: ``(inputs, **options) -> RoutingPlan | SoftPlan``.
      causal: whether a token's choice depends on itself alone. A router that is not causal is
        refused in a decoder unless its option ``causal_rule`` says how to decide without the
        tokens to come.
      causal_rules: what ``causal_rule`` may be: how a router that is not causal chooses when it
        does not train. "none" says: no other way than in training, "aux_count": by comparing
        tokens even so.
      columns: (number of experts, options) -> columns of the logits.
      biased: whether ``select_bias`` takes part in the choice.
      competing: whether it gives weights to shared experts.
      choices: (number of experts, all options) -> how many a token chooses on average, or at the
        most where that depends on the token; for the accounting of FLOPs.
      slots: all options -> slots of each expert, of a router that gives a SoftPlan; None of others.
      check: (number of experts to choose from, all options) -> None; UserError for values that
        cannot be (:func:`moejax.routing.checks.require_option`).
    """

    function: Callable[..., Any]
    causal: bool = True
    causal_rules: tuple[str, ...] = ()
    columns: Callable[[int, Mapping[str, Any]], int] = lambda experts, options: experts
    biased: bool = False
    competing: bool = False
    choices: Callable[[int, Mapping[str, Any]], float] = lambda experts, options: options.get(
        "top_k", options.get("capacity_factor", 1)
    )
    slots: Callable[[Mapping[str, Any]], int] | None = None
    check: Callable[[int, Mapping[str, Any]], None] = lambda experts, options: None

    def defaults(self) -> dict[str, Any]:
        """The options and their default values."""
        return keyword_defaults(self.function)


def keyword_defaults(function: Callable) -> dict[str, Any]:
    """The keyword-only arguments of a registered function: its options, with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def accepted(function: Callable, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``options`` that ``function`` takes by name, where several functions share them."""
    names = keyword_defaults(function)
    return {name: value for name, value in options.items() if name in names}


ROUTERS: Registry[Router] = Registry("router")


def router(name: str, **facts: Any) -> Callable[[Callable], Callable]:
    """Decorator that registers a function as the router ``name``.

    ``facts`` are the fields of :class:`Router` that are not as usual.
    """

    def add(function: Callable) -> Callable:
        ROUTERS.register(name)(Router(function, **facts))
        return function

    return add


def check_options(kind: str, defaults: Mapping[str, Any], options: Mapping[str, Any], field: str):
    """UserError naming the option that ``defaults`` does not have, or whose type is another.

    ``kind`` is what the message calls the owner of the options, such as "router 'top_k'".
    """
    for name, value in options.items():
        if name not in defaults:
            raise UserError(
                f"{field}.{name}: {kind} has no such option{did_you_mean(name, defaults)}"
            )
        wanted = type(defaults[name])
        fits = isinstance(value, wanted) and not (wanted is int and isinstance(value, bool))
        if not fits and not (wanted is float and type(value) is int):
            raise UserError(f"{field}.{name}: expected {wanted.__name__}, got {value!r}")
