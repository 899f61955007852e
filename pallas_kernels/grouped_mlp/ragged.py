"""The same steps over all rows at once, by ``lax.ragged_dot`` or another grouped matmul."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.ragged import ragged_matmul, ragged_matmul_t
from pallas_kernels.grouped_mlp.operands import Operands
from pallas_kernels.rows.xla import gather_rows, sum_rows


def forward(of: Operands, *, activation, group_offset, keep_hidden, matmul=ragged_matmul):
    multiply = functools.partial(
        matmul,
        group_sizes=of.group_sizes,
        group_offset=group_offset,
        transpose_rhs=False,
        out_dtype=of.x_td.dtype,
    )
    h_rf = multiply(gather_rows(of.x_td, of.token), of.wi_edf)
    u_rf = activation(h_rf.astype(of.sum_dtype))
    y_rd = multiply(_scaled(u_rf, of.scale).astype(of.x_td.dtype), of.wo_efd)
    return sum_rows(y_rd, of.row), h_rf if keep_hidden else None


def backward(
    of: Operands,
    h_rf,
    dout_td,
    *,
    activation,
    group_offset,
    matmul=ragged_matmul,
    matmul_t=ragged_matmul_t,
):
    dtype = of.sum_dtype
    if h_rf.ndim == 3:
        # In parts, as a fused forward kept it for a backward that had no tiles.
        h_rf = jnp.concatenate(list(h_rf), axis=-1)
    multiply = functools.partial(
        matmul, group_sizes=of.group_sizes, group_offset=group_offset, transpose_rhs=True
    )
    multiply_t = functools.partial(
        matmul_t,
        group_sizes=of.group_sizes,
        group_offset=group_offset,
        num_local=of.wi_edf.shape[0],
    )
    dout_rd = gather_rows(dout_td, of.token)
    u_rf, pullback = jax.vjp(activation, h_rf.astype(dtype))
    du_rf = multiply(dout_rd, of.wo_efd, out_dtype=dtype)
    dscale = None if of.scale is None else (u_rf * du_rf).sum(axis=1)
    dh_rf = pullback(_scaled(du_rf, of.scale))[0].astype(of.x_td.dtype)
    u_rf = _scaled(u_rf, of.scale).astype(of.x_td.dtype)
    dwo_efd = multiply_t(u_rf, dout_rd, out_dtype=of.wo_efd.dtype)
    dwi_edf = multiply_t(gather_rows(of.x_td, of.token), dh_rf, out_dtype=of.wi_edf.dtype)
    dx_td = sum_rows(multiply(dh_rf, of.wi_edf, out_dtype=of.x_td.dtype), of.row)
    return dx_td, dwi_edf, dwo_efd, dscale


def _scaled(rows, scale):
    return rows if scale is None else rows * scale[:, None]
