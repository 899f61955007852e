"""The lists of visits: every row of a group once, every tile written, blocks revisited in a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.visits import (
    even_sizes,
    fetches,
    group_visits,
    most_visits,
    row_visits,
    visited_rows,
)


@st.composite
def cases(draw):
    sizes = np.array(draw(st.lists(st.integers(0, 40), min_size=1, max_size=6)), np.int32)
    rows = max(1, int(sizes.sum()) + draw(st.integers(0, 30)))
    first = draw(st.integers(0, len(sizes) - 1))
    count = draw(st.integers(1, len(sizes) - first))
    return sizes, rows, first, count, draw(st.sampled_from([4, 8, 32]))


def counted(visits):
    return [np.asarray(field)[: int(visits.count)] for field in visits[:-1]]


@given(cases())
def test_rows_of_local_groups_are_met_once(case):
    sizes, rows, first, count, height = case
    options = {"group_offset": first, "num_local": count, "num_rows": rows, "height": height}
    visits = row_visits(sizes, **options)
    assert int(visits.count) <= most_visits(rows, count, height) == len(visits.group)
    group, tile, source, begin, end = counted(visits)
    owner = np.full(rows, -1)
    for g, t, low, high in zip(group, tile, begin, end, strict=True):
        met = np.arange(max(low, t * height), min(high, (t + 1) * height))
        assert np.all(owner[met] == -1)
        owner[met] = g
    expected = np.repeat(np.arange(len(sizes)), sizes) - first
    expected = np.where((expected >= 0) & (expected < count), expected, -1)
    np.testing.assert_array_equal(owner[: len(expected)], expected)
    assert np.all(owner[len(expected) :] == -1)
    # Every tile is written, and its visits follow each other.
    np.testing.assert_array_equal(np.unique(tile), np.arange(-(-rows // height)))
    assert np.all(np.diff(tile) >= 0)
    # Nothing is read where nothing is computed but what a neighbour reads.
    computed = begin < end
    np.testing.assert_array_equal(source[computed], tile[computed])
    if computed.any():
        assert set(source) == set(source[computed]) and set(group) == set(group[computed])


@given(cases())
def test_every_local_group_is_visited_in_order(case):
    sizes, rows, first, count, height = case
    options = {"group_offset": first, "num_local": count, "num_rows": rows, "height": height}
    visits = group_visits(sizes, **options)
    assert int(visits.count) <= most_visits(rows, count, height)
    group, tile, _, begin, end = counted(visits)
    np.testing.assert_array_equal(np.unique(group), np.arange(count))
    assert np.all(np.diff(group) >= 0)
    assert np.all((tile >= 0) & (tile * height < rows))
    met = np.minimum(end, (tile + 1) * height) - np.maximum(begin, tile * height)
    total = np.bincount(group, np.maximum(met, 0), minlength=count)
    np.testing.assert_array_equal(total, sizes[first : first + count])


def test_traced_lists_are_those_of_numpy():
    options = {"group_offset": 1, "num_local": 3, "num_rows": 70, "height": 16}
    for sizes in ([9, 20, 0, 17, 5], [0, 0, 0, 0, 0], [70, 0, 0, 0, 0], [0, 0, 0, 1, 69]):
        for make in (row_visits, group_visits):
            traced = jax.jit(lambda sizes, make=make: make(sizes, **options))(jnp.array(sizes))
            plain = make(np.array(sizes, np.int32), **options)
            for ours, expected in zip(counted(traced), counted(plain), strict=True):
                np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
    "sizes, rows",
    [
        ([64, 64], 64 + 64),
        # They share the second tile of 32 rows: the first has 28 of it, the second 4.
        ([60, 68], (32 + 32) + (16 + 64)),
        ([1, 0], 16),
        ([0, 0], 0),
    ],
)
def test_rows_that_are_multiplied(sizes, rows):
    """Whole tiles, else steps of 16 rows."""
    options = {"group_offset": 0, "num_local": 2, "num_rows": 128, "height": 32}
    assert visited_rows(row_visits(np.array(sizes, np.int32), **options), 32, 16) == rows


def test_a_block_that_stays_is_fetched_once():
    assert fetches(np.array([[0, 1], [0, 1], [1, 1], [1, 1], [0, 1]])) == 3
    np.testing.assert_array_equal(even_sizes(10, 4), [2, 3, 2, 3])
