"""Places of an expert, and who has none where more tokens choose it than it has places."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from moejax.errors import UserError, did_you_mean
from moejax.routing.normalise import share
from moejax.routing.plan import RouterInputs, RoutingPlan
from moejax.routing.select import pick, rank_within

# The key is that of the layer, which noise is drawn from too.
_DRAW = 2
POLICIES = ("order", "priority", "weight", "recycle")


def expert_capacity(
    tokens: int, k: int | float, factor: float, experts: int, multiple: int = 1
) -> int:
    """``ceil(tokens * k * factor / experts)``, then up to a multiple.

    V-MoE (arXiv 2106.05974) has multiples of 4, which raises small capacities.
    """
    return _round_up(tokens * k * factor / experts, multiple)


def heterogeneous_capacity(
    tokens: int,
    k: int | float,
    factor: float,
    num_ffn: int,
    num_null: int,
    tau: float,
    multiple: int = 1,
) -> tuple[int, ...]:
    """Places of each expert: those with weights have tau times those of experts without.

    MoE++, arXiv 2410.07348: ``factor * tau * T / (tau * num_ffn + num_null)`` and
    ``factor * T / (...)``. T is read as the number of choices, tokens * k: with the number of
    tokens nearly half of the choices would be dropped.
    """
    unit = factor * tokens * k / (tau * num_ffn + num_null)
    places = (_round_up(tau * unit, multiple), _round_up(unit, multiple))
    return (places[0],) * num_ffn + (places[1],) * num_null


def _round_up(value: float, multiple: int) -> int:
    # 1.1 * 110 is above 121 in binary.
    return math.ceil(math.ceil(round(value, 6)) / multiple) * multiple


def limit_capacity(
    plan: RoutingPlan,
    inputs: RouterInputs,
    capacity: int | Sequence[int],
    policy: str,
    rng: Array | None = None,
    *,
    renormalise: bool = False,
) -> RoutingPlan:
    """The plan with at most ``capacity`` choices of an expert in each group.

    Dropped choices get id E and weight 0; ``chosen_ids`` keeps what there was. All first choices
    come before all second ones (V-MoE, arXiv 2106.05974).

    Args:
      plan: of a router; a token's choices stand in order of preference.
      inputs: what the router saw.
      capacity: places of each expert, or of every expert.
      policy: who is kept. "order": the earlier token. "priority": the token with the larger first
        weight (batch priority routing). "weight": whatever its rank, the choice with the larger
        weight (Uni-MoE-2's ``probs``). "recycle": by order, then what is dropped goes to places
        that are left, drawn at random, with the probability of the new expert for a weight
        (Hunyuan-Large, arXiv 2411.02265); a choice stays dropped where the place drawn is of an
        expert that the token may not choose or already has.
      rng: for "recycle"; without it the places are taken in the order of the experts.
      renormalise: what is left of a token's weights has the sum that all had.
    """
    if policy not in POLICIES:
        raise UserError(f"model.moe.capacity: no policy {policy!r}{did_you_mean(policy, POLICIES)}")
    e, k = inputs.num_experts, plan.expert_ids.shape[-1]
    places = (capacity,) * inputs.num_routed if isinstance(capacity, int) else tuple(capacity)
    # Shared experts and "no choice" have none.
    places_e = jnp.asarray((*places, *(0,) * (e + 1 - len(places))), jnp.int32)

    ids = plan.expert_ids
    chosen = ids < e
    taken = chosen & (_buffer_rank(plan, policy) < places_e[ids])
    new_ids, weights = jnp.where(taken, ids, e), jnp.where(taken, plan.weights, 0)
    if policy == "recycle":
        found = _recycle(new_ids, chosen & ~taken, places, rng, e)
        found = _allowed_once(found, new_ids, inputs.may_choose())
        weights = jnp.where(found < e, pick(plan.probs, found), weights)
        new_ids = jnp.where(found < e, found, new_ids)
    if renormalise:
        weights = share(weights) * plan.weights.sum(axis=-1, keepdims=True)
    most = ids.shape[1] * k if plan.max_choices is None else plan.max_choices
    return dataclasses.replace(
        plan,
        expert_ids=new_ids,
        weights=weights,
        chosen_ids=plan.chosen(),
        max_choices=min(most, sum(places)),
    )


def _buffer_rank(plan: RoutingPlan, policy: str) -> Int[Array, "s n k"]:
    """The place of each choice in the queue of its expert."""
    s, n, k = plan.expert_ids.shape
    flat = lambda values: jnp.swapaxes(values, 1, 2).reshape(s, k * n)
    keys = {
        "order": (),
        "recycle": (),
        "priority": (
            flat(lax.broadcasted_iota(jnp.int32, (s, n, k), 2)),
            -flat(jnp.broadcast_to(plan.weights[..., :1], (s, n, k))),
        ),
        "weight": (-flat(plan.weights),),
    }[policy]
    rank = rank_within(flat(plan.expert_ids), *lax.stop_gradient(keys))
    return jnp.swapaxes(rank.reshape(s, k, n), 1, 2)


def _recycle(
    kept_ids: Int[Array, "s n k"],
    dropped: Bool[Array, "s n k"],
    places: tuple[int, ...],
    rng: Array | None,
    e: int,
) -> Int[Array, "s n k"]:
    """A free place for each dropped choice, in order; E for the others and where none is free."""
    s, n, k = dropped.shape
    expert = jnp.asarray([i for i, c in enumerate(places) for _ in range(c)], jnp.int32)
    number = jnp.asarray([j for c in places for j in range(c)], jnp.int32)
    used_se = jax.nn.one_hot(kept_ids, e, dtype=jnp.int32).sum(axis=(1, 2))
    free = number[None] >= used_se[:, expert]
    shape = (s, len(expert))
    if rng is None:
        order = lax.broadcasted_iota(jnp.float32, shape, 1)
    else:
        order = jax.random.uniform(jax.random.fold_in(rng, _DRAW), shape)
    # Free places first, shuffled; what follows them is nobody's.
    listed = jnp.broadcast_to(expert[None], shape)
    taken, _, listed = lax.sort(((~free).astype(jnp.int32), order, listed), num_keys=2)
    listed = jnp.where(taken == 0, listed, e)

    waiting = jnp.swapaxes(dropped, 1, 2).reshape(s, k * n)
    turn = jnp.cumsum(waiting, axis=-1) - 1
    found = jnp.take_along_axis(listed, jnp.clip(turn, 0, len(expert) - 1), axis=-1)
    found = jnp.where(waiting & (turn < len(expert)), found, e)
    return jnp.swapaxes(found.reshape(s, k, n), 1, 2)


def _allowed_once(found, kept_ids, may: Bool[Array, "s n e"]) -> Int[Array, "s n k"]:
    """``found`` without experts that a token may not choose or has already."""
    e, k = may.shape[-1], found.shape[-1]
    good = pick(may.astype(jnp.int32), found) > 0
    good &= ~(found[..., None] == kept_ids[..., None, :]).any(axis=-1)
    earlier = jnp.tril(jnp.ones((k, k), bool), -1)
    good &= ~((found[..., None] == found[..., None, :]) & earlier[None, None]).any(axis=-1)
    return jnp.where(good, found, e)
