"""Portable grouped matmul: loops over row tiles on CPU, ``lax.ragged_dot`` elsewhere.

``lax.ragged_dot`` is a dense masked product on CPU (E-fold FLOPs). Here a loop visits each row
tile once for each group that it overlaps, so the work is that of one dense matmul plus at most
one tile per group. The number of visits depends on the data; only the loop's bound does, so
shapes stay static. Autodiff never sees the loop: the op has a ``custom_vjp``.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.costs import Cost, costed_jit
from pallas_kernels.grouped_matmul.reference import row_groups
from pallas_kernels.varying import cast_to_common_varying

_MAX_TILE = 512
_MIN_TILE = 16


def tile_rows(num_rows: int, num_groups: int) -> int:
    """Rows per tile: as large as keeps the worst-case padding under a sixteenth of the rows."""
    limit = max(num_rows // (16 * num_groups), _MIN_TILE)
    return min(_MAX_TILE, 1 << (limit.bit_length() - 1))


def worst_case_rows(num_rows: int, num_groups: int) -> int:
    """Rows multiplied at the most: a tile that two groups share is visited twice."""
    tile = tile_rows(num_rows, num_groups)
    return (-(-num_rows // tile) + num_groups - 1) * tile


def _pad_rows(x, tile: int):
    return jnp.pad(x, ((0, -x.shape[0] % tile), (0, 0)))


def _sum_dtype(*arrays):
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def _loop_matmul(x_td, w_edf, group_sizes, *, group_offset, transpose_rhs, out_dtype):
    num_rows, num_local = x_td.shape[0], w_edf.shape[0]
    tile = tile_rows(num_rows, num_local)
    padded = _pad_rows(x_td, tile)
    ends = jnp.cumsum(group_sizes)
    starts = (ends - group_sizes)[group_offset : group_offset + num_local]
    ends = ends[group_offset : group_offset + num_local]
    first_tile = starts // tile
    tiles = jnp.where(ends > starts, (ends - 1) // tile - first_tile + 1, 0)
    last_visit = jnp.cumsum(tiles)
    width = w_edf.shape[1] if transpose_rhs else w_edf.shape[2]
    subscripts = "td,fd->tf" if transpose_rhs else "td,df->tf"

    def visit(i, out):
        group = jnp.searchsorted(last_visit, i, side="right")
        row = (first_tile[group] + i - (last_visit[group] - tiles[group])) * tile
        rows = lax.dynamic_slice_in_dim(padded, row, tile)
        weight = lax.dynamic_index_in_dim(w_edf, group, keepdims=False)
        product = jnp.einsum(
            subscripts, rows, weight, preferred_element_type=_sum_dtype(x_td, w_edf)
        ).astype(out_dtype)
        index = row + jnp.arange(tile)
        inside = (index >= starts[group]) & (index < ends[group])
        old = lax.dynamic_slice_in_dim(out, row, tile)
        return lax.dynamic_update_slice_in_dim(
            out, jnp.where(inside[:, None], product, old), row, axis=0
        )

    # Inside shard_map the loop's carry must vary over the mesh as its body's result does.
    zeros, _ = cast_to_common_varying(jnp.zeros((padded.shape[0], width), out_dtype), padded)
    return lax.fori_loop(0, last_visit[-1], visit, zeros)[:num_rows]


def _loop_matmul_t(x_td, y_tf, group_sizes, *, group_offset, num_local, out_dtype):
    num_rows = x_td.shape[0]
    tile = tile_rows(num_rows, num_local)
    x_padded, y_padded = _pad_rows(x_td, tile), _pad_rows(y_tf, tile)
    ends = jnp.cumsum(group_sizes)[group_offset : group_offset + num_local]
    starts = ends - group_sizes[group_offset : group_offset + num_local]
    sum_dtype = _sum_dtype(x_td, y_tf)

    def one_group(_, bounds):
        start, end = bounds
        first_tile = start // tile
        tiles = jnp.where(end > start, (end - 1) // tile - first_tile + 1, 0)

        def visit(i, total):
            row = (first_tile + i) * tile
            index = row + jnp.arange(tile)
            inside = ((index >= start) & (index < end))[:, None]
            rows = jnp.where(inside, lax.dynamic_slice_in_dim(x_padded, row, tile), 0)
            grads = jnp.where(inside, lax.dynamic_slice_in_dim(y_padded, row, tile), 0)
            return total + jnp.einsum("td,tf->df", rows, grads, preferred_element_type=sum_dtype)

        zeros = jnp.zeros((x_td.shape[1], y_tf.shape[1]), sum_dtype)
        zeros, _ = cast_to_common_varying(zeros, x_td)
        return None, lax.fori_loop(0, tiles, visit, zeros).astype(out_dtype)

    return lax.scan(one_group, None, (starts, ends))[1]


def _with_rows_before(group_sizes, group_offset: int, num_local: int):
    """Sizes of the local groups, preceded by one group of all rows before them."""
    before = group_sizes[:group_offset].sum(keepdims=True)
    return jnp.concatenate([before, group_sizes[group_offset : group_offset + num_local]])


def _ragged_matmul(x_td, w_edf, group_sizes, *, group_offset, transpose_rhs, out_dtype):
    num_local = w_edf.shape[0]
    weight = jnp.swapaxes(w_edf, 1, 2) if transpose_rhs else w_edf
    sizes = group_sizes[group_offset : group_offset + num_local]
    if group_offset:
        sizes = _with_rows_before(group_sizes, group_offset, num_local)
        weight = jnp.concatenate([jnp.zeros_like(weight[:1]), weight])
    out = lax.ragged_dot(
        x_td, weight, sizes, preferred_element_type=_sum_dtype(x_td, w_edf)
    ).astype(out_dtype)
    # What ragged_dot leaves in rows that belong to no local group is not defined.
    groups = row_groups(group_sizes, x_td.shape[0]) - group_offset
    inside = (groups >= 0) & (groups < num_local)
    return jnp.where(inside[:, None], out, 0)


def _ragged_matmul_t(x_td, y_tf, group_sizes, *, group_offset, num_local, out_dtype):
    sizes = _with_rows_before(group_sizes, group_offset, num_local)
    dimensions = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    inside = row_groups(group_sizes, x_td.shape[0])[:, None] < group_sizes.shape[0]
    out = lax.ragged_dot_general(
        jnp.where(inside, x_td, 0),
        jnp.where(inside, y_tf, 0),
        sizes,
        dimensions,
        preferred_element_type=_sum_dtype(x_td, y_tf),
    )
    return out[1:].astype(out_dtype)


def grouped_matmul(x_td, w_edf, group_sizes, *, group_offset, transpose_rhs, out_dtype):
    """``out[r] = x[r] @ w[group(r) - group_offset]``, zero for rows of other groups."""
    inner, outer = w_edf.shape[1:] if not transpose_rhs else w_edf.shape[:0:-1]
    shape = _Shape(x_td.shape[0], inner, outer, w_edf.shape[0], group_sizes.shape[0])
    run = _program(
        "grouped_matmul",
        shape,
        group_offset=group_offset,
        transpose_rhs=transpose_rhs,
        out_dtype=out_dtype,
    )
    return run(x_td, w_edf, group_sizes)


def grouped_matmul_t(x_td, y_tf, group_sizes, *, group_offset, num_local, out_dtype):
    """``out[e] = x[rows of e].T @ y[rows of e]``, exactly zero for empty groups."""
    rows, inner = x_td.shape
    shape = _Shape(rows, inner, y_tf.shape[1], num_local, group_sizes.shape[0])
    options = {"group_offset": group_offset, "num_local": num_local, "out_dtype": out_dtype}
    return _program("grouped_matmul_t", shape, **options)(x_td, y_tf, group_sizes)


class _Shape(NamedTuple):
    rows: int
    inner: int
    outer: int
    num_local: int
    num_groups: int

    def name(self, kernel: str) -> str:
        sizes = f"{self.rows}x{self.inner}x{self.outer}"
        return f"moejax_{kernel}_{sizes}_{self.num_local}of{self.num_groups}"

    def cost(self) -> Cost:
        """With a part of the groups, nominal is their share of evenly filled groups."""
        per_row = 2.0 * self.inner * self.outer
        return Cost(
            nominal=per_row * self.rows * self.num_local / self.num_groups,
            visited=per_row * worst_case_rows(self.rows, self.num_local),
        )


# kernel -> (on CPU, elsewhere)
_KERNELS = {
    "grouped_matmul": (_loop_matmul, _ragged_matmul),
    "grouped_matmul_t": (_loop_matmul_t, _ragged_matmul_t),
}


@functools.cache
def _program(kernel: str, shape: _Shape, **options):
    """The jitted kernel of these shapes and static options."""
    on_cpu, elsewhere = (functools.partial(run, **options) for run in _KERNELS[kernel])

    def run(*operands):
        return lax.platform_dependent(*operands, cpu=on_cpu, default=elsewhere)

    return costed_jit(run, shape.name(kernel), shape.cost())
