"""Which row tile meets which group, in what order: the grid of the Pallas grouped matmuls.

Rows are cut into tiles of equal height wherever groups begin; a tile that several groups share is
visited once for each. Blocks of a Pallas grid may only be revisited one visit after the other, so
the visits of a tile (or, where a block of a group is written, of a group) follow each other. How
many visits there are depends on the data, their greatest number does not.

Given sizes as a numpy array the list is made by numpy: what a kernel is said to cost is counted
from the list that it runs.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class Visits(NamedTuple):
    """Arrays [visits] i32 of the grid, of jax or numpy, and how many of them count.

    Attributes:
      group: local group whose weight is met.
      tile: row tile that is written, or read where groups are written.
      source: row tile whose rows are read; that of a neighbour where nothing is computed, so that
        nothing is fetched.
      begin: first row of the group; ``begin == end`` where nothing is computed.
      end: one past its last.
      count: visits that count, [] i32.
    """

    group: Any
    tile: Any
    source: Any
    begin: Any
    end: Any
    count: Any


def most_visits(num_rows: int, num_local: int, height: int) -> int:
    """Of :func:`row_visits` and :func:`group_visits`: each group but one may begin in a tile."""
    return -(-num_rows // height) + num_local - 1


def row_visits(group_sizes, *, group_offset: int, num_local: int, num_rows: int, height: int):
    """Visits of every row tile, by row: those that no local group touches are visited once."""
    xp = _library(group_sizes)
    begin, end, first, touched = _local(group_sizes, group_offset, num_local, height)
    tiles = -(-num_rows // height)
    some = end[-1] > begin[0]
    low = xp.where(some, begin[0] // height, tiles)
    high = xp.where(some, -(-end[-1] // height), tiles)
    filled = end > begin

    def column(before, of_groups, after):
        ends = (xp.reshape(xp.asarray(x, np.int32), (1,)) for x in (before, after))
        return xp.concatenate([next(ends), of_groups, next(ends)])

    segment, index = _segments(
        column(low, touched, tiles - high), most_visits(num_rows, num_local, height)
    )
    tile = column(0, first, high)[segment] + index
    nearest = (xp.argmax(filled), num_local - 1 - xp.argmax(filled[::-1]))
    groups = xp.arange(num_local, dtype=np.int32)
    return Visits(
        group=column(nearest[0], groups, nearest[1])[segment],
        tile=xp.minimum(tile, tiles - 1),
        source=xp.clip(tile, xp.minimum(low, tiles - 1), xp.clip(high - 1, 0, tiles - 1)),
        begin=column(0, begin, 0)[segment],
        end=column(0, end, 0)[segment],
        count=(low + touched.sum() + tiles - high).astype(np.int32),
    )


def group_visits(group_sizes, *, group_offset: int, num_local: int, num_rows: int, height: int):
    """Visits of every local group, by group: empty ones are visited once, computing nothing."""
    begin, end, first, touched = _local(group_sizes, group_offset, num_local, height)
    xp = _library(group_sizes)
    touched = xp.maximum(touched, 1)
    segment, index = _segments(touched, most_visits(num_rows, num_local, height))
    tile = xp.minimum(first[segment] + index, -(-num_rows // height) - 1)
    return Visits(
        group=segment,
        tile=tile,
        source=tile,
        begin=begin[segment],
        end=end[segment],
        count=touched.sum().astype(np.int32),
    )


def visited_rows(visits: Visits, height: int, step: int) -> int:
    """Rows that the visits multiply: all of a tile that lies in one group, else whole steps."""
    count = int(visits.count)
    begin, end, tile = (np.asarray(x)[:count] for x in (visits.begin, visits.end, visits.tile))
    low = np.maximum(begin, tile * height)
    high = np.minimum(end, (tile + 1) * height)
    steps = -(-(high - tile * height) // step) - (low - tile * height) // step
    return int(np.where(high > low, steps * step, 0).sum())


def fetches(blocks: np.ndarray) -> int:
    """How often a pipeline fetches, given which block each step of its grid asks for."""
    blocks = np.asarray(blocks)
    return int(1 + np.any(blocks[1:] != blocks[:-1], axis=-1).sum()) if len(blocks) else 0


def even_sizes(num_rows: int, num_groups: int) -> np.ndarray:
    """The sizes of evenly filled groups, which what a kernel costs is stated for."""
    return np.diff(np.arange(num_groups + 1) * num_rows // num_groups).astype(np.int32)


def _library(group_sizes):
    return np if isinstance(group_sizes, np.ndarray) else jnp


def _local(group_sizes, group_offset: int, num_local: int, height: int):
    """First row, end, first tile and number of tiles of each local group, [num_local] i32."""
    xp = _library(group_sizes)
    ends = xp.cumsum(group_sizes).astype(np.int32)
    local = slice(group_offset, group_offset + num_local)
    begin, end = (ends - group_sizes)[local].astype(np.int32), ends[local]
    first = begin // height
    return begin, end, first, xp.where(end > begin, (end - 1) // height - first + 1, 0)


def _segments(counts, most: int):
    """Of each of ``most`` visits its segment, and its number in there."""
    xp = _library(counts)
    ends = xp.cumsum(counts).astype(np.int32)
    visit = xp.arange(most, dtype=np.int32)
    segment = (ends[None, :] <= visit[:, None]).sum(axis=1).astype(np.int32)
    segment = xp.minimum(segment, len(counts) - 1)
    return segment, visit - (ends - counts)[segment]
