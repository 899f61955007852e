"""The choice of tokens, and the few rows that a block then runs on."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

# A product of a share and a count that is this near to an integer is one: 0.55 * 20 is 11.
_ALMOST = 1e-4


class Selection(NamedTuple):
    """The tokens of each row that a block is given, in their order.

    Attributes:
      index_bc: [b, c] i32, ascending, none twice.
      kept_bc: [b, c], False where a place is left over: that token skips the block.
    """

    index_bc: Int[Array, "b c"]
    kept_bc: Bool[Array, "b c"]


def number_of(share: float, count: int, rounding: str) -> int:
    """``share * count`` rounded "down" or "up"."""
    product = share * count
    return math.floor(product + _ALMOST) if rounding == "down" else math.ceil(product - _ALMOST)


def _numbers(share: Any, counts: Array, rounding: str) -> Array:
    """The same of arrays, i32."""
    product = jnp.asarray(share, jnp.float32) * counts
    whole = jnp.floor(product + _ALMOST) if rounding == "down" else jnp.ceil(product - _ALMOST)
    return whole.astype(jnp.int32)


def choose(
    scores_bt: Float[Array, "b t"],
    competes_bt: Bool[Array, "b t"],
    share: float | Float[Array, ""],
    rounding: str,
    class_bt: Int[Array, "b t"] | None = None,
    counted_bt: Bool[Array, "b t"] | None = None,
) -> Bool[Array, "b t"]:
    """Which tokens have the highest scores: ``share`` of those that compete, in each row.

    With ``class_bt`` in each class of a row; with ``counted_bt`` the share is of those tokens, of
    whom some may not compete. Of equal scores the earlier token is taken.
    """
    b, t = scores_bt.shape
    if class_bt is None:
        class_bt = jnp.zeros((b, t), jnp.int32)
    # Those that do not compete are a class behind all others.
    last = jnp.iinfo(jnp.int32).max
    class_bt = jnp.where(competes_bt, class_bt, last)
    position_bt = lax.broadcasted_iota(jnp.int32, (b, t), 1)
    # Stable: of equal keys the earlier token comes first.
    sorted_class, _, order_bt = lax.sort(
        (class_bt, -scores_bt, position_bt), dimension=1, num_keys=2, is_stable=True
    )
    new = jnp.diff(sorted_class, axis=1, prepend=sorted_class[:, :1] - 1) != 0
    start_bt = lax.cummax(jnp.where(new, position_bt, 0), axis=1)
    after = jnp.concatenate([new[:, 1:], jnp.ones((b, 1), bool)], axis=1)
    end_bt = lax.cummin(jnp.where(after, position_bt, t), axis=1, reverse=True) + 1
    if counted_bt is None:
        counts_bt = end_bt - start_bt
    else:
        counts_bt = counted_bt.sum(axis=1, keepdims=True)
    if isinstance(share, float):
        # As Python rounds, which is how much room there is.
        table = jnp.asarray([number_of(share, count, rounding) for count in range(t + 1)])
        places_bt = table[counts_bt]
    else:
        places_bt = _numbers(share, counts_bt, rounding)
    taken = (position_bt - start_bt < places_bt) & (sorted_class < last)
    row_b1 = jnp.arange(b)[:, None]
    return jnp.zeros((b, t), bool).at[row_b1, order_bt].set(taken, unique_indices=True)


def first_come(wanted_bt: Bool[Array, "b t"], room: int | Int[Array, "b 1"]) -> Bool[Array, "b t"]:
    """The first ``room`` of the tokens that want to run, in each row."""
    return wanted_bt & (jnp.cumsum(wanted_bt, axis=1) <= room)


def select(
    kept_bt: Bool[Array, "b t"],
    room: int,
    scores_bt: Float[Array, "b t"] | None = None,
    protected_bt: Bool[Array, "b t"] | None = None,
) -> Selection:
    """``room`` tokens of each row, all that are kept among them if there is room for them.

    Else those of the lowest scores are left out; ``protected`` ones last.
    """
    b, t = kept_bt.shape
    if room >= t:
        index_bt = lax.broadcasted_iota(jnp.int32, (b, t), 1)
        return Selection(index_bt, kept_bt)
    tier_bt = kept_bt.astype(jnp.int32)
    if protected_bt is not None:
        tier_bt += kept_bt & protected_bt
    scores_bt = jnp.zeros((b, t)) if scores_bt is None else lax.stop_gradient(scores_bt)
    position_bt = lax.broadcasted_iota(jnp.int32, (b, t), 1)
    _, _, order_bt = lax.sort(
        (-tier_bt, -scores_bt, position_bt), dimension=1, num_keys=2, is_stable=True
    )
    index_bc = jnp.sort(order_bt[:, :room], axis=1)
    return Selection(index_bc, jnp.take_along_axis(kept_bt, index_bc, axis=1))


def runs_of(inside_bt: Bool[Array, "b t"], segments_bt: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """The number of the run of consecutive tokens ``inside``, from 1 on; 0 outside.

    A run ends where a segment does.
    """
    before = jnp.pad(inside_bt[:, :-1], ((0, 0), (1, 0)))
    other = jnp.diff(segments_bt, axis=1, prepend=segments_bt[:, :1]) != 0
    return jnp.where(inside_bt, jnp.cumsum(inside_bt & (~before | other), axis=1), 0)
