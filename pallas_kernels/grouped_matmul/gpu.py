"""Grouped matmul on NVIDIA GPUs of the Hopper generation (Mosaic GPU).

The grid is the list of :mod:`pallas_kernels.visits` times the tiles of columns, shared out among
the multiprocessors. A tile that several groups share is multiplied whole for each of them; what is
stored of it are the group's own rows.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.tile_table import look_up, read_table, rows_per_group
from pallas_kernels.versions import gpu_kernel, target_chip, transposed
from pallas_kernels.visits import Visits, row_visits


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes of one kernel.

    Attributes:
      rows: of a tile of the result.
      outer: columns of a tile of the result.
      inner: of the contracted dimension, multiplied at once.
      steps: tiles that are under way at once.
      columns: tiles of columns that neighbouring tiles of rows take together, for the cache.
    """

    rows: int = 128
    outer: int = 128
    inner: int = 64
    steps: int = 4
    columns: int = 4


class Key(NamedTuple):
    """What an entry of the table is for.

    Attributes:
      chip: "h100" or "h200".
      kernel: "rows", "rows transposed" (the weight is) or "groups".
      rows_per_group: as the table counts them.
      inner: contracted dimension; of "groups", rows of the result.
      outer: columns of the result.
      out_bytes: of a number of the result.
    """

    chip: str
    kernel: str
    rows_per_group: int
    inner: int
    outer: int
    out_bytes: int


TABLE: dict[Key, Blocks] = read_table("gpu", Key, Blocks)


def _tiles(kernel: str, rows: int, groups: int, inner: int, outer: int, out_dtype) -> Blocks:
    """Those of the table for the chip that a program is traced for, else the default."""
    per_group, out_bytes = rows_per_group(rows, groups), jnp.dtype(out_dtype).itemsize
    key = Key(target_chip() or "", kernel, per_group, inner, outer, out_bytes)
    return look_up(TABLE, key, Blocks)


def grouped_matmul(
    x_td,
    w_edf,
    group_sizes,
    *,
    group_offset,
    transpose_rhs,
    out_dtype,
    blocks: Blocks | None = None,
    interpret: Any = False,
):
    """``out[r] = x[r] @ w[group(r) - group_offset]``, zero for rows of other groups."""
    rows, inner = x_td.shape
    num_local = w_edf.shape[0]
    outer = w_edf.shape[1 if transpose_rhs else 2]
    _check(x_td, w_edf, (inner, outer))
    if blocks is None:
        kernel = "rows transposed" if transpose_rhs else "rows"
        blocks = _tiles(kernel, rows, num_local, inner, outer, out_dtype)
    tm, tn, tk = blocks.rows, blocks.outer, blocks.inner
    visits = row_visits(
        group_sizes,
        group_offset=group_offset,
        num_local=num_local,
        num_rows=rows,
        height=tm,
    )
    grid = (len(visits.group), pl.cdiv(outer, tn))

    def body(count, group, tile, begin, end, low, high, x, w, out):
        def visit(v, j):
            top = tile[v] * tm

            def product(total):
                def step(_, x_tile, w_tile):
                    w_tile = transposed(w_tile) if transpose_rhs else w_tile
                    plgpu.wgmma(total, x_tile, w_tile)

                w_block = (tn, tk) if transpose_rhs else (tk, tn)
                w_index = (lambda i: (j, i)) if transpose_rhs else (lambda i: (i, j))

                @pl.when(begin[v] < end[v])
                def _():
                    plgpu.emit_pipeline(
                        step,
                        grid=(pl.cdiv(inner, tk),),
                        in_specs=[
                            plgpu.BlockSpec((tm, tk), lambda i: (tile[v], i), delay_release=1),
                            plgpu.BlockSpec(w_block, w_index, delay_release=1),
                        ],
                        max_concurrent_steps=blocks.steps,
                    )(x, w.at[group[v]])

                return total[...]

            total = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((tm, tn)))
            row = lax.broadcasted_iota(jnp.int32, (tm, tn), 0)
            inside = (row >= begin[v] - top) & (row < end[v] - top)
            total = jnp.where(inside, total, 0.0)

            @functools.partial(pl.run_scoped, stored=plgpu.SMEM((tm, tn), out.dtype))
            def _(stored):
                stored[...] = total.astype(out.dtype)
                plgpu.commit_smem()
                first = jnp.maximum(low[v] - top, 0)
                _store_rows(
                    stored,
                    out.at[:, pl.ds(j * tn, tn)],
                    first,
                    jnp.minimum(high[v] - top, tm) - first,
                    top,
                )

        @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="sm")
        def each(loop):
            v, j = plgpu.planar_snake(loop.index[0], grid, 1, blocks.columns)
            pl.when(v < count[0])(lambda: visit(v, j))

    return gpu_kernel(
        body,
        jax.ShapeDtypeStruct((rows, outer), out_dtype),
        x_td,
        name="grouped_matmul",
        interpret=interpret,
    )(visits.count[None], *visits[:2], *visits[3:5], *_stored(visits, tm), x_td, w_edf)


def grouped_matmul_t(
    x_td,
    y_tf,
    group_sizes,
    *,
    group_offset,
    num_local,
    out_dtype,
    blocks: Blocks | None = None,
    interpret: Any = False,
):
    """``out[e] = x[rows of e].T @ y[rows of e]``, exactly zero for empty groups."""
    (rows, inner), outer = x_td.shape, y_tf.shape[1]
    _check(x_td, y_tf, (inner, outer))
    if blocks is None:
        blocks = _tiles("groups", rows, num_local, inner, outer, out_dtype)
    tm, tn, tk = blocks.rows, blocks.outer, blocks.inner
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    local = slice(group_offset, group_offset + num_local)
    begin, end = (ends - group_sizes)[local], ends[local]
    first = begin // tk
    tiles = jnp.where(end > begin, -(-end // tk) - first, 0)
    grid = (pl.cdiv(inner, tm), pl.cdiv(outer, tn))

    def body(begin, end, first, tiles, x, y, out):
        def sums(group, i, j):
            def product(total):
                def step(index, x_tile, y_tile):
                    (at,) = index
                    top = (first[group] + at) * tk

                    # Rows of others, and those past the last, may hold anything.
                    @pl.when((top < begin[group]) | (top + tk > end[group]))
                    def _():
                        for ref in (x_tile, y_tile):
                            row = top + lax.broadcasted_iota(jnp.int32, ref.shape, 0)
                            inside = (row >= begin[group]) & (row < end[group])
                            ref[...] = jnp.where(inside, ref[...], 0)
                        plgpu.commit_smem()

                    plgpu.wgmma(total, transposed(x_tile), y_tile)

                transforms = _transforms(tk, x_td.dtype)
                of_x = plgpu.BlockSpec(
                    (tk, tm), lambda r: (first[group] + r, i), delay_release=1, **transforms
                )
                of_y = plgpu.BlockSpec(
                    (tk, tn), lambda r: (first[group] + r, j), delay_release=1, **transforms
                )

                @pl.when(tiles[group] > 0)
                def _():
                    plgpu.emit_pipeline(
                        step,
                        grid=(tiles[group],),
                        in_specs=[of_x, of_y],
                        max_concurrent_steps=blocks.steps,
                    )(x, y)

                return total[...]

            total = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((tm, tn)))

            @functools.partial(pl.run_scoped, stored=plgpu.SMEM((tm, tn), out.dtype))
            def _(stored):
                stored[...] = total.astype(out.dtype)
                plgpu.commit_smem()
                to = out.at[group, pl.ds(i * tm, tm), pl.ds(j * tn, tn)]
                plgpu.copy_smem_to_gmem(stored, to)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @plgpu.nd_loop((num_local, grid[0] * grid[1]), collective_axes="sm")
        def each(loop):
            group, tile = loop.index
            sums(group, *plgpu.planar_snake(tile, grid, 1, blocks.columns))

    return gpu_kernel(
        body,
        jax.ShapeDtypeStruct((num_local, inner, outer), out_dtype),
        x_td,
        name="grouped_matmul_t",
        interpret=interpret,
    )(begin, end, first, tiles, x_td, y_tf)


def _transforms(width: int, dtype) -> dict[str, Any]:
    """How a tile of so many rows lies in shared memory, to be multiplied transposed."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(width * size * 8)
    tiling = plgpu.TilingTransform((8, swizzle // size))
    return {"transforms": (tiling, plgpu.SwizzleTransform(swizzle))}


def _stored(visits: Visits, height: int):
    """First row and end of what each visit stores: its rows, and those of nobody beside them."""
    count, index = visits.count, jnp.arange(len(visits.tile))
    before = (index == 0) | (visits.tile != jnp.roll(visits.tile, 1))
    after = (index == count - 1) | (visits.tile != jnp.roll(visits.tile, -1))
    top = visits.tile * height
    low = jnp.where(before, top, visits.begin)
    return low, jnp.where(after, top + height, visits.end)


def _store_rows(stored, out, first, count, top) -> None:
    """Copies ``count`` rows from ``first`` on: sizes of copies are static, so by powers of two."""
    size = stored.shape[0]
    while size:
        rest = first

        @pl.when(count & size != 0)
        def _(size=size, rest=rest):
            plgpu.copy_smem_to_gmem(stored.at[pl.ds(rest, size)], out.at[pl.ds(top + rest, size)])

        first = first + (count & size)
        size //= 2
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _check(x, w, widths: tuple[int, ...]) -> None:
    if x.dtype != w.dtype or x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"the gpu backend multiplies bfloat16 or float16, not {x.dtype} by {w.dtype}"
        )
    if any(width % 8 for width in widths):
        raise NotImplementedError(
            f"the gpu backend takes widths that are multiples of 8, not {widths}"
        )
