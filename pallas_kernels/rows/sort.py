"""The stable sort of small integers, and its inverse: what a dispatch is made of."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.varying import cast_to_common_varying


class SortedGroups(NamedTuple):
    """A stable sort by group.

    Attributes:
      order: entry ``order[r]`` is the r-th in the order of groups.
      inverse: entry i is the ``inverse[i]``-th.
      sizes: entries of each group.
    """

    order: Int[Array, " n"]
    inverse: Int[Array, " n"]
    sizes: Int[Array, " groups"]


def sort_by_group(groups: Int[Array, " n"], num_groups: int) -> SortedGroups:
    """Sorts entries by group; those that are not in [0, num_groups) come last, in their order."""
    n = groups.shape[0]
    inside = (groups >= 0) & (groups < num_groups)
    groups = jnp.where(inside, groups, num_groups).astype(jnp.int32)
    # A sort of two arrays gives each the type of its input: inside shard_map both must vary.
    index, groups = cast_to_common_varying(jnp.arange(n, dtype=jnp.int32), groups)
    if (num_groups + 1) * n < 2**31:
        # Group and place in one number: a sort of single integers is several times as fast on CPU
        # as one that carries a value along, and all of them differ, so it need not be stable.
        order = lax.sort(groups * n + index, is_stable=False) % n
    else:
        order = lax.sort((groups, index), num_keys=1, is_stable=True)[1]
    inverse = lax.platform_dependent(order, index, cpu=_scattered, default=_sorted)
    sizes = (groups[None, :] == jnp.arange(num_groups, dtype=jnp.int32)[:, None]).sum(
        axis=1, dtype=jnp.int32
    )
    return SortedGroups(order, inverse, sizes)


def _scattered(order: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.zeros_like(order).at[order].set(index, unique_indices=True)


def _sorted(order: jax.Array, index: jax.Array) -> jax.Array:
    return lax.sort((order, index), num_keys=1, is_stable=False)[1]
