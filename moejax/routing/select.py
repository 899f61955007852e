"""Steps that routers share: the largest of a row, reading by id, ranks, weights of a choice."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from moejax.routing.normalise import scores_of, share, softmax
from moejax.routing.plan import RouterInputs


def largest(
    scores: Float[Array, "*rows e"], mask: Bool[Array, "*rows e"], k: int
) -> Int[Array, "*rows k"]:
    """Ids of the k largest unmasked scores, largest first; E where there are no more.

    Of equal scores the lower id comes first.
    """
    values, ids = lax.top_k(jnp.where(mask, lax.stop_gradient(scores), -jnp.inf), k)
    return jnp.where(values > -jnp.inf, ids, scores.shape[-1])


def two_largest(
    values: Float[Array, "*rows e"],
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """The largest and the second of each row; -inf for the second of one.

    ``lax.top_k`` with k = 2, taken apart, is compiled to a sort of the whole row on CPU.
    """
    best = jnp.argmax(values, axis=-1)
    others = jnp.where(jax.nn.one_hot(best, values.shape[-1], dtype=bool), -jnp.inf, values)
    return values.max(axis=-1), others.max(axis=-1)


def pick(values: Num[Array, "*rows e"], ids: Int[Array, "*rows k"]) -> Num[Array, "*rows k"]:
    """``values[..., ids]``, 0 where an id is E.

    A sum of masked values: the gradient of an indexed read would be a scatter.
    """
    here = jax.nn.one_hot(ids, values.shape[-1], dtype=bool)
    return jnp.where(here, values[..., None, :], 0).sum(axis=-1)


def chosen_mask(ids: Int[Array, "*rows k"], num_experts: int) -> Bool[Array, "*rows e"]:
    """True for each expert that is among the row's ids."""
    return jax.nn.one_hot(ids, num_experts, dtype=bool).any(axis=-2)


def best_of_each(
    scores: Float[Array, "s n e"], mask: Bool[Array, "s n e"], count_se: Int[Array, "s e"]
) -> Bool[Array, "s n e"]:
    """True for the ``count`` largest unmasked scores of each column; of equal ones the earlier.

    By bisection over the bits of a float, which are in the order of the numbers once those of
    negative ones are turned round: a tenth to a thirtieth of the time of a sort on CPU, and on a
    mesh a few sums instead of a gather.
    """
    bits = scores.dtype.itemsize * 8
    word = jnp.dtype(f"uint{bits}")
    sign = word.type(1 << (bits - 1))
    # -0.0 is 0.0. No number has the key 0 of masked places.
    keys = lax.bitcast_convert_type(lax.stop_gradient(jnp.where(scores == 0, 0, scores)), word)
    keys = jnp.where(mask, jnp.where(keys >= sign, ~keys, keys | sign), word.type(0))
    count = jnp.minimum(count_se, mask.sum(axis=1, dtype=count_se.dtype))[:, None]
    number = lambda chosen: chosen.sum(axis=1, keepdims=True, dtype=count.dtype)

    def next_bit(i, state):
        least, _, before = state
        bit = word.type(1) << jnp.maximum(bits - 1 - i, 0).astype(word)
        last = jnp.maximum(i - bits, 0).astype(word)
        candidate = jnp.where(i < bits, least | bit, least + last)
        reached = keys >= candidate
        least = jnp.where((i < bits) & (number(reached) >= count), candidate, least)
        return least, before, reached

    # The largest key that ``count`` of the column reach (any where none is wanted); two more rounds
    # say who reaches it, and who is above it. Not after the loop, where a compiler may make the
    # scores anew, with another last bit than those that were counted.
    nobody = jnp.zeros_like(mask)
    begin = (jnp.zeros_like(keys[:, :1]), nobody, nobody)
    _, reached, above = lax.fori_loop(0, bits + 2, next_bit, begin)
    equal = reached & ~above & mask
    room = count - number(above)
    return (above | (equal & (jnp.cumsum(equal, axis=1, dtype=count.dtype) <= room))) & (count > 0)


def rank_within(
    class_n: Int[Array, "*rows n"], *keys: Float[Array, "*rows n"] | Int[Array, "*rows n"]
) -> Int[Array, "*rows n"]:
    """Each element's rank (0 first) among those of its class, by ascending keys, then by place."""
    last = class_n.ndim - 1
    place = lax.broadcasted_iota(jnp.int32, class_n.shape, last)
    by_class, *_, source = lax.sort((class_n, *keys, place), num_keys=1 + len(keys))
    starts = jnp.concatenate(
        [jnp.ones_like(by_class[..., :1], bool), by_class[..., 1:] != by_class[..., :-1]], axis=-1
    )
    rank = place - lax.cummax(jnp.where(starts, place, 0), axis=last)
    # Back to where each came from: a second sort, where an indexed write would be a scatter.
    return lax.sort((source, rank), num_keys=1)[1]


def weigh(
    inputs: RouterInputs,
    logits: Float[Array, "s n e"],
    ids: Int[Array, "s n k"],
    *,
    kind: str = "softmax",
    normalise_first: bool = True,
    renormalise: bool = False,
) -> tuple[Float[Array, "s n k"], Float[Array, "s n c"] | None]:
    """Weights of the chosen experts, and of shared experts where those compete.

    Args:
      inputs: of the router.
      logits: with noise, where there is any.
      ids: the choice.
      kind: "softmax", "sigmoid" or "identity".
      normalise_first: scores among all experts that a token may choose; else a softmax over the
        chosen ones alone. Shared experts that compete are among them in both cases.
      renormalise: divide by the sum over the chosen and the shared ones.
    """
    shared = inputs.num_shared
    of_shared = logits[..., inputs.num_routed :]
    valid = jnp.broadcast_to(inputs.valid[..., None], of_shared.shape)
    if normalise_first:
        mask = inputs.may_choose()
        if shared:
            mask = jnp.concatenate([mask[..., : inputs.num_routed], valid], axis=-1)
        scores = scores_of(kind, logits, mask)
        weights = jnp.concatenate([pick(scores, ids), scores[..., inputs.num_routed :]], axis=-1)
    else:
        values = jnp.concatenate([pick(logits, ids), of_shared], axis=-1)
        weights = softmax(values, jnp.concatenate([ids < inputs.num_experts, valid], axis=-1))
    if renormalise:
        weights = share(weights)
    k = ids.shape[-1]
    return weights[..., :k], weights[..., k:] if shared else None


def one_hot_plan_probs(ids: Int[Array, "s n 1"], like: Array) -> Float[Array, "s n e"]:
    """The probabilities of a router that leaves no doubt: 1 for the choice."""
    return jax.nn.one_hot(ids[..., 0], like.shape[-1], dtype=like.dtype)
