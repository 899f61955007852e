"""Tiles cover every row of every group once, within the padding that they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.tiles import for_each_tile, read_rows, tile_sizes, update_rows, worst_case_rows


@pytest.mark.parametrize(
    "rows, groups, expected",
    [
        (8192, 8, (512, 128, 32)),
        (32768, 64, (512, 128, 32)),
        (600, 3, (512, 128, 32, 8)),
        (600, 1, (512, 128, 32)),
        (100, 3, (32, 8)),
        (8, 3, (8,)),
        (3, 2, (3,)),
    ],
)
def test_sizes(rows, groups, expected):
    assert tile_sizes(rows, groups) == expected


@jax.jit
def visits(group_sizes, starts):
    """(group of each row by the tiles, how often each is visited, rows of all tiles)."""
    rows = 600

    def visit(carry, tile):
        owner, times, total = carry
        size = tile.inside.shape[0]
        owner = update_rows(owner, jnp.broadcast_to(tile.group, (size,)), tile)
        times = update_rows(times, read_rows(times, tile) + 1, tile)
        return owner, times, total + size

    carry = (jnp.full(rows, -1, jnp.int32), jnp.zeros(rows, jnp.int32), 0)
    return for_each_tile(visit, carry, group_sizes, starts, rows)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 600), min_size=3, max_size=3).filter(lambda s: sum(s) <= 600))
def test_every_row_once(sizes):
    starts = np.cumsum(sizes) - sizes
    owner, times, total = visits(jnp.array(sizes, jnp.int32), jnp.array(starts, jnp.int32))
    unused = 600 - sum(sizes)
    np.testing.assert_array_equal(owner, np.repeat([0, 1, 2, -1], [*sizes, unused]))
    np.testing.assert_array_equal(times, np.repeat([1, 0], [sum(sizes), unused]))
    assert total <= sum(sizes) + 3 * (tile_sizes(600, 3)[-1] - 1)
    assert total <= worst_case_rows(600, 3)
