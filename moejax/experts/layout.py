"""The physical order of (token, expert) pairs on one device: rows sorted by expert."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


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
    flat = expert_ids.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    inverse = jnp.argsort(order).astype(jnp.int32).reshape(t, k)
    chosen = flat.reshape(t, k) < num_experts
    counts = (flat[:, None] == jnp.arange(num_experts)[None]).sum(axis=0, dtype=jnp.int32)
    return DispatchLayout(
        token=order[:rows] // k,
        row=jnp.where(chosen & (inverse < rows), inverse, rows),
        group_sizes=counts,
    )
