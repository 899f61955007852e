"""The physical order of (token, expert) pairs on one device: rows sorted by expert."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.rows import sort_by_group


def gates_by_expert(
    expert_ids: Int[Array, "*rows k"], gates: Float[Array, "*rows k"], num_experts: int
) -> Float[Array, "*rows e"]:
    """The weight of each expert for a token, 0 of those that it did not choose."""
    chosen = jax.nn.one_hot(expert_ids, num_experts, dtype=bool)
    return jnp.where(chosen, gates[..., None], 0).sum(axis=-2)


class DispatchLayout(NamedTuple):
    """Rows sorted by expert; rows past ``group_sizes.sum()`` belong to nobody.

    Attributes:
      token: sorted row r holds token ``token[r]``.
      row: choice k of token t lies in sorted row ``row[t, k]``; ``rows`` (one past the end) where
        the token has no such choice.
      group_sizes: rows of each expert.
    """

    token: Int[Array, " rows"]
    row: Int[Array, "t k"]
    group_sizes: Int[Array, " e"]


def dispatch_layout(
    expert_ids: Int[Array, "t k"], num_experts: int, max_rows: int | None = None
) -> DispatchLayout:
    """The stable sort of all choices by expert.

    Args:
      expert_ids: chosen experts; ids that are not in [0, num_experts) are no choice and get no row.
      num_experts: experts that have weights here.
      max_rows: the most choices there can be, where that is known to be fewer than t * k (as with
        expert choice). More than that is a mistake of the caller and loses rows.
    """
    t, k = expert_ids.shape
    rows = min(max_rows or t * k, t * k)
    by_expert = sort_by_group(expert_ids.reshape(-1), num_experts)
    inverse = by_expert.inverse.reshape(t, k)
    has_row = (expert_ids >= 0) & (expert_ids < num_experts) & (inverse < rows)
    return DispatchLayout(
        token=by_expert.order[:rows] // k,
        row=jnp.where(has_row, inverse, rows),
        group_sizes=by_expert.sizes,
    )
