"""What TPU and GPU run: the same steps over all rows at once, by ``lax.ragged_dot``."""

import functools

import jax

from pallas_kernels.dtypes import sum_dtype
from pallas_kernels.grouped_matmul.ragged import ragged_matmul, ragged_matmul_t
from pallas_kernels.rows.xla import gather_rows, sum_rows


def forward(
    x_td,
    wi_edf,
    wo_efd,
    token,
    row,
    group_sizes,
    scale,
    *,
    activation,
    group_offset,
    keep_hidden,
):
    multiply = functools.partial(
        ragged_matmul,
        group_sizes=group_sizes,
        group_offset=group_offset,
        transpose_rhs=False,
        out_dtype=x_td.dtype,
    )
    h_rf = multiply(gather_rows(x_td, token), wi_edf)
    u_rf = activation(h_rf.astype(sum_dtype(x_td, wi_edf)))
    y_rd = multiply(_scaled(u_rf, scale).astype(x_td.dtype), wo_efd)
    return sum_rows(y_rd, row), h_rf if keep_hidden else None


def backward(
    x_td,
    wi_edf,
    wo_efd,
    token,
    row,
    group_sizes,
    scale,
    h_rf,
    dout_td,
    *,
    activation,
    group_offset,
):
    dtype = sum_dtype(x_td, wi_edf)
    multiply = functools.partial(
        ragged_matmul, group_sizes=group_sizes, group_offset=group_offset, transpose_rhs=True
    )
    multiply_t = functools.partial(
        ragged_matmul_t,
        group_sizes=group_sizes,
        group_offset=group_offset,
        num_local=wi_edf.shape[0],
    )
    dout_rd = gather_rows(dout_td, token)
    u_rf, pullback = jax.vjp(activation, h_rf.astype(dtype))
    du_rf = multiply(dout_rd, wo_efd, out_dtype=dtype)
    dscale = None if scale is None else (u_rf * du_rf).sum(axis=1)
    dh_rf = pullback(_scaled(du_rf, scale))[0].astype(x_td.dtype)
    u_rf = _scaled(u_rf, scale).astype(x_td.dtype)
    dwo_efd = multiply_t(u_rf, dout_rd, out_dtype=wo_efd.dtype)
    dwi_edf = multiply_t(gather_rows(x_td, token), dh_rf, out_dtype=wi_edf.dtype)
    dx_td = sum_rows(multiply(dh_rf, wi_edf, out_dtype=x_td.dtype), row)
    return dx_td, dwi_edf, dwo_efd, dscale


def _scaled(rows, scale):
    return rows if scale is None else rows * scale[:, None]
