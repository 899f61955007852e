"""What TPU runs: the activation and its gradient are done before a tile leaves the chip.

Of a row four things are read or written between its gather and its sum: the row, the hidden layer
that the backward needs, what the activation makes of it, and the second product.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul import tpu
from pallas_kernels.grouped_matmul.tpu_groups import groups_matmul
from pallas_kernels.grouped_matmul.tpu_rows import Epilogue, rows_matmul
from pallas_kernels.grouped_mlp import ragged
from pallas_kernels.grouped_mlp.operands import Operands
from pallas_kernels.rows.xla import gather_rows, sum_rows

_LANES = 128


def is_fused(of: Operands, activation: Callable) -> bool:
    """Whether the activation is part of the kernels: its halves must be cut at whole lanes.

    Mosaic has no error function.
    """
    wide, f = of.wi_edf.shape[2], of.wo_efd.shape[1]
    traced = jax.make_jaxpr(activation)(jax.ShapeDtypeStruct((1, wide), of.sum_dtype))
    exact = any(equation.primitive is lax.erf_p for equation in traced.jaxpr.eqns)
    return not exact and (wide == f or (wide == 2 * f and f % _LANES == 0))


def forward(of: Operands, *, activation, group_offset, keep_hidden, interpret: Any = False):
    if not is_fused(of, activation):
        multiply = functools.partial(tpu.grouped_matmul, interpret=interpret)
        options = {"activation": activation, "group_offset": group_offset}
        return ragged.forward(of, keep_hidden=keep_hidden, matmul=multiply, **options)
    parts = of.wi_edf.shape[2] // of.wo_efd.shape[1]
    dtype = of.x_td.dtype
    scale = () if of.scale is None else (of.scale[:, None],)

    def finish(*blocks):
        # As the backward will see it.
        h = jnp.stack(blocks[:parts]).astype(dtype)
        u = activation(_side_by_side(h))
        u = u * blocks[parts] if scale else u
        return (u[None], h) if keep_hidden else (u[None],)

    outputs = ((1, dtype), (parts, dtype)) if keep_hidden else ((1, dtype),)
    u_rf, *h_prf = rows_matmul(
        gather_rows(of.x_td, of.token)[None],
        of.wi_edf,
        of.group_sizes,
        epilogue=Epilogue(finish, scale, outputs),
        group_offset=group_offset,
        views=parts,
        interpret=interpret,
    )
    y_rd = tpu.grouped_matmul(
        u_rf[0],
        of.wo_efd,
        of.group_sizes,
        group_offset=group_offset,
        transpose_rhs=False,
        out_dtype=dtype,
        interpret=interpret,
    )
    return sum_rows(y_rd, of.row), h_prf[0] if keep_hidden else None


def backward(of: Operands, h_prf, dout_td, *, activation, group_offset, interpret: Any = False):
    if not is_fused(of, activation):
        return ragged.backward(
            of,
            h_prf,
            dout_td,
            activation=activation,
            group_offset=group_offset,
            matmul=functools.partial(tpu.grouped_matmul, interpret=interpret),
            matmul_t=functools.partial(tpu.grouped_matmul_t, interpret=interpret),
        )
    parts, dtype = of.wi_edf.shape[2] // of.wo_efd.shape[1], of.x_td.dtype
    if h_prf.ndim == 2:
        # Flat, as a forward kept it that had no tiles.
        h_prf = jnp.stack(jnp.split(h_prf, parts, axis=-1))
    scale = () if of.scale is None else (of.scale[:, None],)

    def finish(du, h, *scale):
        u, pullback = jax.vjp(activation, _side_by_side(h))
        scaled = (lambda x: x * scale[0]) if scale else (lambda x: x)
        dh = jnp.stack(jnp.split(pullback(scaled(du))[0], parts, axis=-1))
        dscale = (u * du).sum(axis=1, keepdims=True)[None]
        return (dh, scaled(u)[None], dscale) if scale else (dh, u[None])

    dout_rd = gather_rows(dout_td, of.token)
    sums = ((0, of.sum_dtype),) if scale else ()
    dh_prf, u_rf, *dscale = rows_matmul(
        dout_rd[None],
        of.wo_efd,
        of.group_sizes,
        epilogue=Epilogue(finish, (h_prf, *scale), ((parts, dtype), (1, dtype), *sums)),
        group_offset=group_offset,
        transpose_rhs=True,
        interpret=interpret,
    )
    multiply_t = functools.partial(
        groups_matmul,
        group_sizes=of.group_sizes,
        num_local=of.wi_edf.shape[0],
        group_offset=group_offset,
        interpret=interpret,
    )
    dwo_efd = multiply_t(u_rf[0], dout_rd[None], out_dtype=of.wo_efd.dtype)
    rows = gather_rows(of.x_td, of.token)
    dwi_edf = multiply_t(rows, dh_prf, out_dtype=of.wi_edf.dtype)
    (dx_rd,) = rows_matmul(
        dh_prf,
        of.wi_edf,
        of.group_sizes,
        epilogue=Epilogue(lambda product: (product[None],), (), ((1, dtype),)),
        group_offset=group_offset,
        transpose_rhs=True,
        interpret=interpret,
    )
    dscale = dscale[0].sum(axis=0)[:, 0] if scale else None
    return sum_rows(dx_rd[0], of.row), dwi_edf, dwo_efd, dscale


def _side_by_side(h):
    """The parts [parts, t, f] as the activation wants them, [t, parts * f], in float32."""
    return jnp.concatenate(list(h.astype(jnp.float32)), axis=-1)
