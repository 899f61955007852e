"""Row tiles that cover groups of rows: loops whose work is that of the rows that there are.

Shapes are static and the sizes of the groups are not, so a group is cut into tiles of a few fixed
sizes: as many large ones as fit, then smaller ones for what is left. A tile belongs to one group
and begins at a row of it; only the last tile of a group may reach past its end, by less than the
smallest tile. How many tiles of each size there are depends on the data: only the lengths of the
loops do, no shape.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.varying import cast_to_common_varying


class Tile(NamedTuple):
    """A tile: its group, its first row, and which of its rows are the group's ([rows] bool)."""

    group: jax.Array
    row: jax.Array
    inside: jax.Array


def tile_sizes(num_rows: int, num_groups: int) -> tuple[int, ...]:
    """Rows of the tiles, large to small.

    A product of 512 rows takes about as long a row as one of many more, one of 32 twice as long.
    The smallest tile is such that padding stays under a sixteenth of the rows, or is 8.
    """
    smallest = min(32 if 16 * 32 * num_groups <= num_rows else 8, max(num_rows, 1))
    return (*(size for size in (512, 128, 32) if smallest < size <= num_rows), smallest)


def worst_case_rows(num_rows: int, num_groups: int) -> int:
    """Rows in tiles at the most: every group's last tile holds one row of the group."""
    return num_rows + num_groups * (tile_sizes(num_rows, num_groups)[-1] - 1)


def for_each_tile(
    body: Callable[[Any, Tile], Any],
    carry: Any,
    group_sizes: jax.Array,
    starts: jax.Array,
    num_rows: int,
) -> Any:
    """``carry = body(carry, tile)`` for every tile of every group; returns the last carry.

    Args:
      body: makes the next carry. Rows of a tile that are not inside belong to others and must stay
        as they are (:func:`update_rows`), for tiles do not come in the order of rows.
      carry: arrays; inside ``shard_map`` they vary over the mesh as the body's results do.
      group_sizes: [e] rows of each group.
      starts: [e] their first rows.
      num_rows: of the arrays that the tiles are cut from.
    """
    num_groups = group_sizes.shape[0]
    sizes = tile_sizes(num_rows, num_groups)
    # What is short of a tile by less than the smallest one takes it: that is no more padding than
    # a last tile of the smallest size may have, and one tile in place of several.
    slack = sizes[-1] - 1
    rest, begin, ends = group_sizes, starts, starts + group_sizes
    larger = num_rows + slack
    for size in sizes:
        count = (rest + slack) // size
        last = jnp.cumsum(count)
        most = min(num_groups * (larger // size), (num_rows + num_groups * slack) // size)
        index = jnp.arange(most, dtype=jnp.int32)
        group = (last[None, :] <= index[:, None]).sum(axis=1, dtype=jnp.int32)
        group = jnp.minimum(group, num_groups - 1)
        first = begin[group] + (index - (last - count)[group]) * size

        def visit(i, carry, size=size, group=group, first=first, ends=ends):
            # A tile that would reach past the last row begins earlier instead.
            row = jnp.minimum(first[i], num_rows - size)
            rows = row + jnp.arange(size, dtype=jnp.int32)
            inside = (rows >= first[i]) & (rows < ends[group[i]])
            return body(carry, Tile(group[i], row, inside))

        carry = lax.fori_loop(0, last[-1], visit, carry)
        rest, begin = jnp.maximum(rest - count * size, 0), begin + count * size
        larger = size
    return carry


def zeros(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.Array:
    """Zeros that vary over the mesh, inside ``shard_map``, as ``like`` does."""
    return cast_to_common_varying(jnp.zeros(shape, dtype), like)[0]


def read_rows(x: jax.Array, tile: Tile) -> jax.Array:
    """The rows of ``x`` that the tile covers, whosever they are."""
    return lax.dynamic_slice_in_dim(x, tile.row, tile.inside.shape[0])


def update_rows(x: jax.Array, new: jax.Array, tile: Tile) -> jax.Array:
    """``x`` with ``new`` in the rows that are inside the tile."""
    merged = jnp.where(_column(tile, x.ndim), new.astype(x.dtype), read_rows(x, tile))
    return lax.dynamic_update_slice_in_dim(x, merged, tile.row, axis=0)


def mask_rows(rows: jax.Array, tile: Tile) -> jax.Array:
    """The rows of a tile, zero where they are not inside it, whatever they hold."""
    return jnp.where(_column(tile, rows.ndim), rows, 0)


def weight_of(w: jax.Array, tile: Tile) -> jax.Array:
    """``w[group of the tile]``."""
    return lax.dynamic_index_in_dim(w, tile.group, keepdims=False)


def add_to_weight(w: jax.Array, term: jax.Array, tile: Tile) -> jax.Array:
    """``w`` with ``term`` added to the tile's group."""
    return lax.dynamic_update_index_in_dim(w, weight_of(w, tile) + term, tile.group, axis=0)


def _column(tile: Tile, ndim: int) -> jax.Array:
    return tile.inside.reshape((-1,) + (1,) * (ndim - 1))
