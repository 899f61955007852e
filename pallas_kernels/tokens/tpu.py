"""Tokens gathered and added back on TPU, by copies of rows (:mod:`pallas_kernels.rows.tpu`).

What is added goes into the memory of ``base``: the tokens that were not taken are never touched.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.rows.tpu import block_rows, gather_rows, row_tile
from pallas_kernels.versions import out_struct, tpu_params, vmem_capacity

_LIMIT = 0.9


def gather_tokens(x_btd, index_bc, *, interpret: Any = False):
    """``x[b, index[b, c]]``."""
    b, t, d = x_btd.shape
    rows = gather_rows(x_btd.reshape(b * t, d), _flat(index_bc, t), interpret=interpret)
    return rows.reshape(b, index_bc.shape[1], d)


def scatter_tokens(base_btd, update_bcd, index_bc, weight_bc, *, interpret: Any = False):
    """``base`` with ``weight * update`` added at ``index``, in the memory of ``base``."""
    (b, t, d), c = base_btd.shape, index_bc.shape[1]
    tile, size = row_tile(base_btd.reshape(b * t, d)), base_btd.dtype.itemsize
    rows = b * c
    block = block_rows(rows, 3 * d * size)
    steps = -(-rows // block)
    index = jnp.pad(_flat(index_bc, t), (0, steps * block - rows), constant_values=-1)
    weight = jnp.ones((b, c)) if weight_bc is None else weight_bc
    out = pl.pallas_call(
        lambda *refs: _kernel(*refs, block=block),
        out_struct((b * t, *tile), base_btd.dtype, base_btd),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(steps,),
            in_specs=[
                pl.BlockSpec((block, *tile), lambda i, index: (i, 0, 0)),
                pl.BlockSpec((block, 1), lambda i, index: (i, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((block, *tile), base_btd.dtype),
                pltpu.SemaphoreType.DMA(()),
            ],
        ),
        input_output_aliases={3: 0},
        compiler_params=tpu_params("arbitrary", vmem_bytes=int(_LIMIT * vmem_capacity())),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * d, transcendentals=0, bytes_accessed=3 * rows * d * size
        ),
        interpret=interpret,
        name="scatter_tokens",
    )(
        index,
        update_bcd.astype(base_btd.dtype).reshape(rows, *tile),
        weight.reshape(rows, 1).astype(jnp.float32),
        base_btd.reshape(b * t, *tile),
    )
    return out.reshape(b, t, d)


def _flat(index_bc, t: int) -> jax.Array:
    """The rows of the tokens in [b * t, d]."""
    first = jnp.arange(index_bc.shape[0], dtype=jnp.int32)[:, None] * t
    return (index_bc.astype(jnp.int32) + first).reshape(-1)


def _kernel(index, update_ref, weight_ref, base_ref, out_ref, rows_ref, done, *, block):
    del base_ref  # It is the memory of the output.
    i = pl.program_id(0)

    def each(act):
        def one(row, carry):
            at = index[i * block + row]
            pl.when(at >= 0)(lambda: act(at, row))
            return carry

        lax.fori_loop(0, block, one, 0)

    fetch = lambda at, row: pltpu.make_async_copy(out_ref.at[at], rows_ref.at[row], done)
    store = lambda at, row: pltpu.make_async_copy(rows_ref.at[row], out_ref.at[at], done)
    each(lambda at, row: fetch(at, row).start())
    each(lambda at, row: fetch(at, row).wait())
    added = update_ref[...].astype(jnp.float32) * weight_ref[...][:, :, None]
    rows_ref[...] = (rows_ref[...].astype(jnp.float32) + added).astype(rows_ref.dtype)
    each(lambda at, row: store(at, row).start())
    each(lambda at, row: store(at, row).wait())
