"""Rows times the weight of their group, on TPU: a tile meets each group that it has rows of.

An operand may be in parts, [parts, t, width]: the gate and the other half of a gated MLP, which an
activation needs side by side.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.blocks import Blocks, Product, tiles
from pallas_kernels.grouped_matmul.tpu_steps import check_dtypes, dot, in_steps, known_sizes
from pallas_kernels.versions import out_struct, tpu_params
from pallas_kernels.visits import Visits, fetches, row_visits, visited_rows

_LANES = 128


class Epilogue(NamedTuple):
    """What is done to a tile of the product.

    Attributes:
      function: ``(products, *inputs) -> outputs``: of one product [tm, tn] for each view of the
        weight, and a block of each input. In float32.
      inputs: row arrays, [parts, t, n], or [t, 1] for one number a row.
      outputs: (parts, dtype) of each output [parts, t, n]; parts 0 is [n / tn, t, 1], a number for
        each row and tile of columns.
    """

    function: Callable
    inputs: tuple[jax.Array, ...]
    outputs: tuple[tuple[int, Any], ...]


def rows_matmul(
    x_ptk: jax.Array,
    w_edf: jax.Array,
    group_sizes: jax.Array,
    *,
    epilogue: Epilogue,
    group_offset: int = 0,
    transpose_rhs: bool = False,
    views: int = 1,
    blocks: Blocks | None = None,
    existing: jax.Array | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """``epilogue(x[r] @ w[g(r)])`` for rows sorted by group.

    Args:
      x_ptk: rows [parts, t, k / parts].
      w_edf: [e, k, views * n], or [e, views * n, k] with ``transpose_rhs``.
      group_sizes: rows of every group.
      epilogue: what follows the product.
      group_offset: of the first group with a weight.
      transpose_rhs: the weight is [e, f, d].
      views: columns of the weight that belong to one column of the epilogue.
      blocks: tile sizes; with several parts or views they divide a part of k, or n.
      existing: [t, n], to which a single output is added in place.
      interpret: as in ``pl.pallas_call``.

    Returns:
      The outputs of the epilogue; zero (or ``existing``) in rows of groups without a weight here.
    """
    check_dtypes(x_ptk, w_edf)
    if blocks is None:
        blocks = tiles("rows", _product(x_ptk, w_edf, transpose_rhs, views, epilogue, existing))
    geometry = _Geometry.of(x_ptk, w_edf, blocks, transpose_rhs, views)
    make_visits = functools.partial(
        row_visits,
        group_offset=group_offset,
        num_local=geometry.num_local,
        num_rows=geometry.rows,
        height=blocks.rows,
    )
    visits = make_visits(group_sizes)
    tm, tn = blocks.rows, blocks.outer
    row_specs = [
        pl.BlockSpec((array.shape[0], tm, tn), lambda j, v, i, g, t, s, b, e: (0, s[v], j))
        if array.ndim == 3
        else pl.BlockSpec((tm, 1), lambda j, v, i, g, t, s, b, e: (s[v], 0))
        for array in epilogue.inputs
    ]
    out_specs, out_shapes = [], []
    for parts, dtype in epilogue.outputs:
        if parts:
            shape = (parts, geometry.rows, geometry.outer)
            spec = pl.BlockSpec((parts, tm, tn), lambda j, v, i, g, t, s, b, e: (0, t[v], j))
        else:
            shape = (geometry.outer_tiles, geometry.rows, 1)
            spec = pl.BlockSpec((1, tm, 1), lambda j, v, i, g, t, s, b, e: (j, t[v], 0))
        out_specs.append(spec)
        out_shapes.append(out_struct(shape, dtype, x_ptk))
    operands = [x_ptk, *[w_edf] * views, *epilogue.inputs]
    aliases = {}
    if existing is not None:
        aliases = {len(visits) - 1 + len(operands): 0}
        operands.append(existing[None])
        row_specs.append(pl.BlockSpec((1, tm, tn), lambda j, v, i, g, t, s, b, e: (0, t[v], j)))
    outputs = pl.pallas_call(
        functools.partial(
            _rows_kernel,
            geometry=geometry,
            function=epilogue.function,
            num_inputs=len(epilogue.inputs),
            has_existing=existing is not None,
        ),
        out_shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits) - 1,
            grid=(geometry.outer_tiles, visits.count, geometry.inner_tiles),
            in_specs=[geometry.x_spec(), *geometry.w_specs(), *row_specs],
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((tm, tn), jnp.float32)] * views,
        ),
        input_output_aliases=aliases,
        compiler_params=tpu_params(
            "parallel", "arbitrary", "arbitrary", vmem_bytes=blocks.vmem_bytes
        ),
        cost_estimate=geometry.count(
            make_visits(known_sizes(group_sizes, geometry.rows)),
            sum(geometry.row_bytes(array) for array in (*operands[1 + views :], *out_shapes)),
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(*visits[:-1], *operands)
    return tuple(outputs)


def _product(x_ptk, w_edf, transpose_rhs, views, epilogue: Epilogue, existing) -> Product:
    parts, rows, width = x_ptk.shape
    wide = [array for array in epilogue.inputs if array.ndim == 3]
    column_bytes = sum(array.shape[0] * array.dtype.itemsize for array in wide)
    column_bytes += sum(number * jnp.dtype(dtype).itemsize for number, dtype in epilogue.outputs)
    column_bytes += 0 if existing is None else existing.dtype.itemsize
    sums = [number for number, _ in epilogue.outputs if number == 0]
    return Product(
        rows,
        parts * width,
        w_edf.shape[1 if transpose_rhs else 2] // views,
        w_edf.shape[0],
        parts=parts,
        views=views,
        itemsizes=(x_ptk.dtype.itemsize, w_edf.dtype.itemsize),
        column_bytes=column_bytes,
        numbers=len(epilogue.inputs) - len(wide) + len(sums),
        exact=bool(sums),
    )


class _Geometry(NamedTuple):
    rows: int
    inner: int
    outer: int
    num_local: int
    parts: int
    views: int
    transposed: bool
    itemsize: int
    w_itemsize: int
    blocks: Blocks

    @classmethod
    def of(cls, x_ptk, w_edf, blocks: Blocks, transposed: bool, views: int):
        parts, rows, width = x_ptk.shape
        num_local, inner, wide = w_edf.shape
        if transposed:
            inner, wide = wide, inner
        if inner != parts * width or wide % views:
            raise ValueError(f"rows {x_ptk.shape} do not fit the weights {w_edf.shape}")
        if (parts > 1 and width % blocks.inner) or (views > 1 and (wide // views) % blocks.outer):
            raise ValueError(f"tiles {blocks} do not divide a part")
        return cls(
            rows,
            inner,
            wide // views,
            num_local,
            parts,
            views,
            transposed,
            x_ptk.dtype.itemsize,
            w_edf.dtype.itemsize,
            blocks,
        )

    @property
    def inner_tiles(self) -> int:
        return -(-self.inner // self.blocks.inner)

    @property
    def outer_tiles(self) -> int:
        return -(-self.outer // self.blocks.outer)

    def row_bytes(self, array) -> int:
        """Bytes moved of a row array: a number for each row takes a whole row of lanes."""
        if array.shape[-1] == 1:
            passes = self.outer_tiles if array.ndim == 2 else array.shape[0]
            return passes * self.rows * _LANES * array.dtype.itemsize
        return math.prod(array.shape) * array.dtype.itemsize

    def x_spec(self) -> pl.BlockSpec:
        of_part = self.inner_tiles // self.parts

        def index(j, v, i, g, t, s, b, e):
            i = _pinned(i, self.inner_tiles, b[v], e[v])
            return i // of_part, s[v], i % of_part

        return pl.BlockSpec((None, self.blocks.rows, self.blocks.inner), index)

    def w_specs(self) -> list[pl.BlockSpec]:
        def index(j, v, i, g, t, s, b, e, view):
            i = _pinned(i, self.inner_tiles, b[v], e[v])
            j = j + view * self.outer_tiles
            return (g[v], j, i) if self.transposed else (g[v], i, j)

        tk, tn = self.blocks.inner, self.blocks.outer
        shape = (None, tn, tk) if self.transposed else (None, tk, tn)
        return [pl.BlockSpec(shape, functools.partial(index, view=i)) for i in range(self.views)]

    def count(self, visits: Visits, row_bytes: int) -> pl.CostEstimate:
        """What the kernel does for these visits; ``row_bytes`` of all that is no operand of it."""
        count, tiles = int(visits.count), self.inner_tiles
        begin, end, group, source = (
            np.repeat(np.asarray(x)[:count], tiles)
            for x in (visits.begin, visits.end, visits.group, visits.source)
        )
        step = np.where(begin < end, np.tile(np.arange(tiles), count), tiles - 1)
        x_blocks = np.tile(np.stack([source, step], axis=1), (self.outer_tiles, 1))
        w_fetches = self.outer_tiles * fetches(np.stack([group, step], axis=1))
        tm, tk, tn = self.blocks.rows, self.blocks.inner, self.blocks.outer
        wide = self.outer_tiles * tn * self.views
        rows = visited_rows(visits, tm, self.blocks.step)
        return pl.CostEstimate(
            flops=2 * rows * tiles * tk * wide,
            transcendentals=0,
            bytes_accessed=fetches(x_blocks) * tm * tk * self.itemsize
            + w_fetches * tk * tn * self.views * self.w_itemsize
            + row_bytes,
        )


def _pinned(i, tiles: int, begin, end):
    """The step along the inner dimension; the last one where nothing is computed."""
    return jnp.where(begin < end, i, tiles - 1)


def _rows_kernel(
    group, tile, source, begin, end, *refs, geometry, function, num_inputs, has_existing
):
    del group, source
    blocks, views = geometry.blocks, geometry.views
    x_ref, w_refs, refs = refs[0], refs[1 : 1 + views], refs[1 + views :]
    in_refs, refs = refs[:num_inputs], refs[num_inputs:]
    existing_ref, refs = (refs[0], refs[1:]) if has_existing else (None, refs)
    out_refs, sum_refs = refs[:-views], refs[-views:]
    v, i = pl.program_id(1), pl.program_id(2)
    top = tile[v] * blocks.rows
    low, high = begin[v] - top, end[v] - top
    contract = ((1,), (1 if geometry.transposed else 0,))

    @pl.when(i == 0)
    def _():
        for sum_ref in sum_refs:
            sum_ref[...] = jnp.zeros_like(sum_ref)

    def multiply(first: int, height: int):
        x = _columns_inside(x_ref[pl.ds(first, height), :], 1, i, geometry)
        for w_ref, sum_ref in zip(w_refs, sum_refs, strict=True):
            w = _columns_inside(w_ref[...], contract[1][0], i, geometry)
            sum_ref[pl.ds(first, height), :] += dot(x, w, contract)

    in_steps(multiply, low, high, blocks)

    def finish(first: int, height: int):
        at = pl.ds(first, height)
        rows = first + lax.broadcasted_iota(jnp.int32, (height, 1), 0)
        inside = (rows >= low) & (rows < high)
        again = (v > 0) & (tile[jnp.maximum(v - 1, 0)] == tile[v])
        outs = function(*(ref[at, :] for ref in sum_refs), *(_rows(ref, at) for ref in in_refs))
        for out, out_ref in zip(outs, out_refs, strict=True):
            before = jnp.zeros(out.shape, out_ref.dtype)
            if existing_ref is not None:
                before = existing_ref[:, at, :]
                out = out + before.astype(out.dtype)
            rest = jnp.where(again, out_ref[:, at, :], before)
            out_ref[:, at, :] = jnp.where(inside, out.astype(out_ref.dtype), rest)

    @pl.when(i == geometry.inner_tiles - 1)
    def _():
        # In steps, for what lies between the product and the outputs is as wide as float32.
        for first in range(0, blocks.rows, blocks.step):
            finish(first, blocks.step)


def _rows(ref, at):
    return ref[at, :] if len(ref.shape) == 2 else ref[:, at, :]


def _columns_inside(block, axis: int, i, geometry):
    """A block with zeros where it reaches past the end of the contracted dimension."""
    if geometry.inner % geometry.blocks.inner == 0:
        return block
    column = lax.broadcasted_iota(jnp.int32, block.shape, axis)
    return jnp.where(column < geometry.inner - i * geometry.blocks.inner, block, 0)
