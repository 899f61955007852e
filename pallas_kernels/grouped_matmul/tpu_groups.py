"""Sums over the rows of each group, on TPU: the gradient of a grouped matmul's weight."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.blocks import Blocks, Product, tiles
from pallas_kernels.grouped_matmul.tpu_steps import check_dtypes, dot, in_steps, known_sizes
from pallas_kernels.versions import out_struct, tpu_params
from pallas_kernels.visits import fetches, group_visits, visited_rows


def groups_matmul(
    x_tk: jax.Array,
    y_ptn: jax.Array,
    group_sizes: jax.Array,
    *,
    num_local: int,
    out_dtype: Any,
    group_offset: int = 0,
    blocks: Blocks | None = None,
    existing: jax.Array | None = None,
    interpret: Any = False,
) -> jax.Array:
    """``out[e] = x[rows of e].T @ y[rows of e]``, zero for empty groups.

    Args:
      x_tk: rows [t, k].
      y_ptn: rows [parts, t, n / parts].
      group_sizes: rows of every group.
      num_local: groups of the result.
      out_dtype: of the result; sums are in float32.
      group_offset: the first of them.
      blocks: tile sizes; ``inner`` is that of k here, ``outer`` that of n.
      existing: [num_local, k, n], to which the sums are added in place.
      interpret: as in ``pl.pallas_call``.

    Returns:
      [num_local, k, n].
    """
    check_dtypes(x_tk, y_ptn)
    rows, inner = x_tk.shape
    parts, _, width = y_ptn.shape
    out_bytes = [jnp.dtype(out_dtype).itemsize]
    out_bytes += [] if existing is None else [existing.dtype.itemsize]
    if blocks is None:
        of = Product(
            rows,
            inner,
            parts * width,
            num_local,
            parts=parts,
            itemsizes=(x_tk.dtype.itemsize, y_ptn.dtype.itemsize),
            column_bytes=sum(out_bytes),
        )
        blocks = tiles("groups", of)
    elif parts > 1 and width % blocks.outer:
        raise ValueError(f"tiles {blocks} do not divide a part of {width}")
    tm, tk, tn = blocks.rows, blocks.inner, blocks.outer
    of_part = -(-width // tn)
    grid = (-(-inner // tk), parts * of_part)
    make_visits = functools.partial(
        group_visits,
        group_offset=group_offset,
        num_local=num_local,
        num_rows=rows,
        height=tm,
    )
    visits = make_visits(group_sizes)
    out_spec = pl.BlockSpec((None, tk, tn), lambda i, j, v, g, s, b, e: (g[v], i, j))
    in_specs = [
        pl.BlockSpec((tm, tk), lambda i, j, v, g, s, b, e: (s[v], i)),
        pl.BlockSpec((None, tm, tn), lambda i, j, v, g, s, b, e: (j // of_part, s[v], j % of_part)),
    ]
    operands, aliases = [x_tk, y_ptn], {}
    if existing is not None:
        aliases = {4 + len(operands): 0}
        operands.append(existing)
        in_specs.append(out_spec)
    out_shape = (num_local, inner, parts * width)
    return pl.pallas_call(
        functools.partial(_groups_kernel, blocks=blocks, has_existing=existing is not None),
        out_struct(out_shape, out_dtype, x_tk),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(*grid, visits.count),
            in_specs=in_specs,
            out_specs=out_spec,
            scratch_shapes=[pltpu.VMEM((tk, tn), jnp.float32)],
        ),
        input_output_aliases=aliases,
        compiler_params=tpu_params(
            "parallel", "parallel", "arbitrary", vmem_bytes=blocks.vmem_bytes
        ),
        cost_estimate=_groups_count(
            make_visits(known_sizes(group_sizes, rows)),
            blocks,
            grid,
            (x_tk.dtype.itemsize, y_ptn.dtype.itemsize),
            math.prod(out_shape) * sum(out_bytes),
        ),
        interpret=interpret,
        name="grouped_matmul_t",
    )(visits.group, visits.source, visits.begin, visits.end, *operands)


def _groups_count(visits, blocks: Blocks, grid, itemsizes, out_bytes: int) -> pl.CostEstimate:
    """What the kernel of :func:`groups_matmul` does for these visits."""
    tm, tk, tn = blocks.rows, blocks.inner, blocks.outer
    passes = math.prod(grid)
    source = np.asarray(visits.source)[: int(visits.count), None]
    # The first block of a pass is that of the last one where all rows are in one tile.
    x_fetches, y_fetches = passes * fetches(source), passes * fetches(source)
    return pl.CostEstimate(
        flops=2 * visited_rows(visits, tm, blocks.step) * passes * tk * tn,
        transcendentals=0,
        bytes_accessed=(x_fetches * tk * itemsizes[0] + y_fetches * tn * itemsizes[1]) * tm
        + out_bytes,
    )


def _groups_kernel(group, source, begin, end, x_ref, y_ref, *refs, blocks, has_existing):
    existing_ref, refs = (refs[0], refs[1:]) if has_existing else (None, refs)
    out_ref, sum_ref = refs
    v, last = pl.program_id(2), pl.num_programs(2) - 1
    top = source[v] * blocks.rows
    low, high = begin[v] - top, end[v] - top

    @pl.when((v == 0) | (group[jnp.maximum(v - 1, 0)] != group[v]))
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def add(first: int, height: int):
        rows = first + lax.broadcasted_iota(jnp.int32, (height, 1), 0)
        inside = (rows >= low) & (rows < high)
        # Rows of others, and those past the last, may hold anything: both sides are cleared.
        x, y = (jnp.where(inside, ref[pl.ds(first, height), :], 0) for ref in (x_ref, y_ref))
        sum_ref[...] += dot(x, y, ((0,), (0,)))

    in_steps(add, low, high, blocks)

    @pl.when((v == last) | (group[jnp.minimum(v + 1, last)] != group[v]))
    def _():
        out = sum_ref[...]
        if existing_ref is not None:
            out = out + existing_ref[...].astype(out.dtype)
        out_ref[...] = out.astype(out_ref.dtype)
