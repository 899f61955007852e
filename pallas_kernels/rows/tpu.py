"""Rows gathered and summed on TPU: one copy for each row, many under way at once.

A sum of one row is a gather, so this is the one kernel of dispatch and combine. While a block of
rows is summed, the copies of the next are under way. A copy moves whole tiles of memory: a row of
d numbers is a tile of its own, [sublanes, d / sublanes], in float32 of 8 sublanes and in bfloat16
of 16. Bringing a row-major matrix into that form is a copy that XLA makes (see
experiments/kernels).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.versions import out_struct, tpu_params, vmem_capacity

_LANES = 128
# Rows of a block, if they fit.
_BLOCK = 256
# Of VMEM: for the rows that are under way, and what the compiler is allowed.
_SHARE, _LIMIT = 0.4, 0.9
# Indices that the scalar memory holds, 4 bytes each, with room for the rest.
_MOST_INDICES = 192 * 1024


def gather_rows(x_td, token, scale=None, *, interpret: Any = False):
    """``scale[r] * x[token[r]]``, zero where the token is not in [0, t)."""
    weight = None if scale is None else scale[:, None]
    return weighted_rows(x_td, token[:, None], weight, interpret=interpret)


def sum_rows(y_rd, row, gates=None, *, interpret: Any = False):
    """``sum_j gates[t, j] * y[row[t, j]]`` over the choices whose row is less than rows."""
    return weighted_rows(y_rd, row, gates, interpret=interpret)


def weighted_rows(
    x_nd: jax.Array, index_rk: jax.Array, weight_rk: jax.Array | None, *, interpret: Any = False
) -> jax.Array:
    """``out[r] = sum_j weight[r, j] * x[index[r, j]]``, in float32, in the order of j.

    Args:
      x_nd: rows, float32 or bfloat16, of a multiple of 1,024 or 2,048 numbers.
      index_rk: which rows; those that are not in [0, n) count as zero.
      weight_rk: by default 1.
      interpret: as in ``pl.pallas_call``.

    Raises:
      NotImplementedError: rows of another type or width, or too many of them.
    """
    (n, d), (rows, k) = x_nd.shape, index_rk.shape
    tile = row_tile(x_nd)
    if rows * k > _MOST_INDICES:
        raise NotImplementedError(
            f"the tpu backend holds {_MOST_INDICES:,} row indices, not {rows * k:,}"
        )
    block = block_rows(rows, 2 * k * d * x_nd.dtype.itemsize)
    steps = -(-rows // block)
    inside = (index_rk >= 0) & (index_rk < n)
    # Rows past the last are asked for as well, for the last block may be cut off.
    index = jnp.pad(jnp.where(inside, index_rk, 0), ((0, steps * block - rows), (0, 0)))
    weight = inside.astype(jnp.float32)
    if weight_rk is not None:
        weight = jnp.where(inside, weight_rk.astype(jnp.float32), 0)
    out = pl.pallas_call(
        lambda *refs: _kernel(*refs, block=block, k=k, steps=steps),
        out_struct((rows, *tile), x_nd.dtype, x_nd),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(steps,),
            in_specs=[
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec((block, k), lambda i, index: (i, 0)),
                pl.BlockSpec((block, k), lambda i, index: (i, 0)),
            ],
            out_specs=pl.BlockSpec((block, *tile), lambda i, index: (i, 0, 0)),
            scratch_shapes=[
                pltpu.VMEM((2, k, block, *tile), x_nd.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=tpu_params("arbitrary", vmem_bytes=int(_LIMIT * vmem_capacity())),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * k * d,
            transcendentals=0,
            bytes_accessed=row_bytes(rows, k, d, x_nd.dtype.itemsize),
        ),
        interpret=interpret,
        name="weighted_rows",
    )(index.reshape(-1), x_nd.reshape(n, *tile), inside.astype(jnp.int32), weight)
    return out.reshape(rows, d)


def row_bytes(rows: int, k: int, d: int, itemsize: int) -> int:
    """Bytes that the kernel moves: k rows read for each that is written, masks and weights."""
    return (rows * k + rows) * d * itemsize + 2 * rows * max(k, _LANES) * 4


def row_tile(x_nd) -> tuple[int, int]:
    """A row as a tile of memory.

    Raises:
      NotImplementedError: rows of another type or width than can be one.
    """
    sublanes = {jnp.dtype(jnp.float32): 8, jnp.dtype(jnp.bfloat16): 16}.get(x_nd.dtype)
    if sublanes is None or x_nd.shape[1] % (sublanes * _LANES):
        raise NotImplementedError(
            f"the tpu backend copies rows of float32 (a multiple of 1,024 numbers) or bfloat16 "
            f"(2,048), not of {x_nd.dtype} ({x_nd.shape[1]:,})"
        )
    return sublanes, x_nd.shape[1] // sublanes


def block_rows(rows: int, bytes_of_row: int) -> int:
    """Rows of a block of which each takes so many bytes of VMEM: a power of two, at least 8."""
    most = max(_SHARE * vmem_capacity() / bytes_of_row, 8)
    return min(_BLOCK, 2 ** int(math.log2(most)), max(8, 2 ** math.ceil(math.log2(rows))))


def _kernel(index, x_ref, inside_ref, weight_ref, out_ref, rows_ref, done, *, block, k, steps):
    i = pl.program_id(0)

    def copy(step, row, j):
        slot = step % 2
        at = index[(step * block + row) * k + j]
        return pltpu.make_async_copy(x_ref.at[at], rows_ref.at[slot, j, row], done.at[slot])

    def each(step, act):
        def one(row, carry):
            for j in range(k):
                act(copy(step, row, j))
            return carry

        lax.fori_loop(0, block, one, 0)

    pl.when(i == 0)(lambda: each(i, lambda started: started.start()))
    pl.when(i + 1 < steps)(lambda: each(i + 1, lambda started: started.start()))
    each(i, lambda started: started.wait())
    total = jnp.zeros(out_ref.shape, jnp.float32)
    for j in range(k):
        column = (slice(None), slice(j, j + 1), None)
        rows = rows_ref[i % 2, j].astype(jnp.float32) * weight_ref[...][column]
        # What a row of nobody holds is not read: it may be no number.
        total += jnp.where(inside_ref[...][column] > 0, rows, 0)
    out_ref[...] = total.astype(out_ref.dtype)
