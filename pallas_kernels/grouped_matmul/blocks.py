"""Tile sizes of the grouped matmuls on TPU: those of the table, else those that a search finds.

The search takes those that move the fewest bytes, of all that fit into the chip's VMEM: a weight
that fits is read once for each group, rows that meet it whole are read once. Steps are such that
what is multiplied for nothing stays under a tenth of the rows.
"""

import dataclasses
import functools
from typing import NamedTuple

from pallas_kernels.tile_table import look_up, read_table, rows_per_group
from pallas_kernels.versions import target_chip, vmem_capacity

# What a tile may take of VMEM by the sum below, and what the compiler is allowed.
_SHARE, _LIMIT = 0.75, 0.9
_HEIGHTS = (512, 256, 128)
_STEPS = (128, 64, 32)
_WASTE = 0.1
_LANES = 128


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes of one kernel.

    Attributes:
      rows: of a tile.
      inner: of the contracted dimension (of the rows of the result, where rows are summed over).
      outer: columns of the result.
      step: rows multiplied at once in a tile that is not all of one group; divides ``rows``.
      vmem_bytes: that the kernel may take; None for the compiler's own limit.
    """

    rows: int
    inner: int
    outer: int
    step: int
    vmem_bytes: int | None = None

    def __post_init__(self):
        if self.rows % self.step:
            raise ValueError(f"step {self.step} does not divide rows {self.rows}")


class Product(NamedTuple):
    """A grouped product, as far as its tiles are concerned.

    Attributes:
      rows: rows.
      inner: contracted dimension; of a result over groups, its rows.
      outer: columns of the result, of one view.
      groups: groups with a weight here.
      parts: of the contracted dimension, or of the columns of a result over groups.
      views: weights for each column.
      itemsizes: of the rows and of the weight, or of the two sides of a result over groups.
      column_bytes: of all else that is read or written for each row and column, or of the result.
      numbers: arrays of one number a row.
      exact: the columns must be cut without a rest.
    """

    rows: int
    inner: int
    outer: int
    groups: int
    parts: int = 1
    views: int = 1
    itemsizes: tuple[int, int] = (2, 2)
    column_bytes: int = 2
    numbers: int = 0
    exact: bool = False


class Key(NamedTuple):
    """What an entry of the table is for: a chip, "rows" or "groups", and a :class:`Product`.

    How many groups there are is not part of it, but how many rows each has.
    """

    chip: str
    kernel: str
    rows_per_group: int
    inner: int
    outer: int
    parts: int
    views: int
    x_bytes: int
    w_bytes: int
    column_bytes: int
    numbers: int
    exact: int

    @classmethod
    def of(cls, chip: str, kernel: str, of: Product):
        return cls(
            chip,
            kernel,
            rows_per_group(of.rows, of.groups),
            *(of.inner, of.outer, of.parts, of.views, *of.itemsizes),
            *(of.column_bytes, of.numbers, int(of.exact)),
        )


TABLE: dict[Key, Blocks] = read_table("tpu", Key, Blocks)


def tiles(kernel: str, of: Product) -> Blocks:
    """Tile sizes for the chip that a program is traced for.

    Args:
      kernel: "rows" (:func:`pallas_kernels.grouped_matmul.tpu_rows.rows_matmul`) or "groups"
        (:func:`pallas_kernels.grouped_matmul.tpu_groups.groups_matmul`).
      of: the product.

    Raises:
      NotImplementedError: the table has none, and none fit.
    """
    capacity = vmem_capacity()
    search = {"rows": rows_blocks, "groups": groups_blocks}[kernel]
    key = Key.of(target_chip() or "", kernel, of)
    blocks = look_up(TABLE, key, lambda: search(of, capacity))
    return dataclasses.replace(blocks, vmem_bytes=int(_LIMIT * capacity))


@functools.cache
def rows_blocks(of: Product, capacity: int) -> Blocks:
    """Those of "rows" that the search finds.

    Raises:
      NotImplementedError: none fit.
    """
    return _best(of, capacity, _rows_bytes, _rows_vmem)


@functools.cache
def groups_blocks(of: Product, capacity: int) -> Blocks:
    """Those of "groups" that the search finds.

    Raises:
      NotImplementedError: none fit.
    """
    return _best(of, capacity, _groups_bytes, _groups_vmem)


def fits(kernel: str, of: Product, blocks: Blocks, capacity: int) -> bool:
    """Whether a tile takes no more than its share of VMEM, by the count of the search."""
    taken = {"rows": _rows_vmem, "groups": _groups_vmem}[kernel]
    return taken(of, blocks) <= _SHARE * capacity


def _best(of: Product, capacity: int, moved, taken) -> Blocks:
    over_groups = moved is _groups_bytes
    inner_parts, outer_parts = (1, of.parts) if over_groups else (of.parts, of.views)
    inners = _widths(of.inner // inner_parts, inner_parts, exact=False)
    outers = _widths(of.outer // (of.parts if over_groups else 1), outer_parts, of.exact)
    found = []
    for rows in _heights(of.rows):
        for inner in inners:
            for outer in outers:
                blocks = Blocks(rows, inner, outer, _step(of, rows))
                if taken(of, blocks) <= _SHARE * capacity:
                    found.append((moved(of, blocks), -rows, -inner, -outer, blocks))
    if not found:
        raise NotImplementedError(
            f"the tpu backend has no tiles for a grouped product of {of.inner} by {of.outer}: a "
            "dimension that is no multiple of 128 has to fit into the chip whole"
        )
    return min(found, key=lambda entry: entry[:-1])[-1]


def _heights(rows: int) -> list[int]:
    return [height for height in _HEIGHTS if height < rows] or [rows]


def _step(of: Product, rows: int) -> int:
    steps = [step for step in _STEPS if rows % step == 0]
    small = [step for step in steps if step * (of.groups - 1) <= _WASTE * of.rows]
    return (small or steps[-1:] or [rows])[0]


def _widths(width: int, parts: int, exact: bool) -> list[int]:
    """The whole width, and multiples of 128 that are less.

    One of several parts, and what is cut without a rest, only by sizes that divide it.
    """
    if parts > 1 and width % _LANES:
        return []
    widths = [size for size in range(_LANES, width, _LANES) if width % size == 0]
    if not exact and parts == 1:
        widths += [size for size in (512, 1024, 2048) if size < width and width % size]
    return [*widths, width]


def _tiles(width: int, size: int) -> int:
    return -(-width // size)


def _visits(of: Product, blocks: Blocks) -> int:
    return _tiles(of.rows, blocks.rows) + of.groups - 1


def _rows_bytes(of: Product, blocks: Blocks) -> int:
    """Bytes moved for evenly filled groups, all else left out that is the same for all tiles."""
    columns = _tiles(of.outer, blocks.outer)
    whole = of.inner <= blocks.inner
    rows = of.rows if whole else _visits(of, blocks) * blocks.rows
    weights = of.groups if whole else _visits(of, blocks)
    return (
        columns * rows * of.inner * of.itemsizes[0]
        + weights * of.inner * columns * blocks.outer * of.views * of.itemsizes[1]
        + columns * of.numbers * of.rows * _LANES * 4
    )


def _rows_vmem(of: Product, blocks: Blocks) -> int:
    tile = blocks.rows * blocks.outer
    fetched = (
        blocks.rows * blocks.inner * of.itemsizes[0]
        + blocks.inner * blocks.outer * of.views * of.itemsizes[1]
        + tile * of.column_bytes
        + of.numbers * blocks.rows * _LANES * 4
    )
    between = blocks.step * blocks.outer * 4 * (of.views + of.column_bytes)
    return 2 * fetched + tile * 4 * of.views + between


def _groups_bytes(of: Product, blocks: Blocks) -> int:
    return of.rows * (
        _tiles(of.outer, blocks.outer) * of.inner * of.itemsizes[0]
        + _tiles(of.inner, blocks.inner) * of.outer * of.itemsizes[1]
    )


def _groups_vmem(of: Product, blocks: Blocks) -> int:
    fetched = blocks.rows * (blocks.inner * of.itemsizes[0] + blocks.outer * of.itemsizes[1])
    tile = blocks.inner * blocks.outer
    return 2 * (fetched + tile * of.column_bytes) + 2 * tile * 4
