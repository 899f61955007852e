"""What CPU runs: for each row tile, everything from the gather to the last product.

What lies between the steps of a tile stays in the cache, and only the rows of the hidden layer
(with gradients) and of the output are written out. The tiles are small enough for that and large
enough for a matmul; see :mod:`pallas_kernels.tiles`.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.loop import local_groups
from pallas_kernels.grouped_mlp.operands import Operands
from pallas_kernels.rows.xla import gather_rows, sum_rows
from pallas_kernels.tiles import (
    add_to_weight,
    for_each_tile,
    mask_rows,
    read_rows,
    update_rows,
    weight_of,
    zeros,
)


def forward(of: Operands, *, activation, group_offset, keep_hidden):
    dtype, x_td = of.sum_dtype, of.x_td

    def run(carry, tile):
        y_rd, h_rf = carry
        x_rows = gather_rows(x_td, read_rows(of.token, tile))
        h_rows = _dot("td,df->tf", x_rows, weight_of(of.wi_edf, tile), dtype)
        u_rows = _scaled(activation(h_rows), of.scale, tile).astype(x_td.dtype)
        y_rows = _dot("tf,fd->td", u_rows, weight_of(of.wo_efd, tile), dtype)
        h_rf = update_rows(h_rf, h_rows, tile) if keep_hidden else None
        return update_rows(y_rd, y_rows, tile), h_rf

    y_rd = zeros((of.num_rows, x_td.shape[1]), x_td.dtype, like=x_td)
    h_rf = zeros((of.num_rows, of.wi_edf.shape[2]), x_td.dtype, like=x_td) if keep_hidden else None
    groups = local_groups(of.group_sizes, group_offset, of.wi_edf.shape[0])
    y_rd, h_rf = for_each_tile(run, (y_rd, h_rf), *groups, of.num_rows)
    return sum_rows(y_rd, of.row), h_rf


def backward(of: Operands, h_rf, dout_td, *, activation, group_offset):
    dtype, x_td, nobody = of.sum_dtype, of.x_td, of.x_td.shape[0]

    def run(carry, tile):
        dx_rd, dwi_edf, dwo_efd, dscale = carry
        # Zeros in the rows of others: the gradients of weights sum over all rows of the tile.
        tokens = jnp.where(tile.inside, read_rows(of.token, tile), nobody)
        x_rows, dout_rows = gather_rows(x_td, tokens), gather_rows(dout_td, tokens)
        u_rows, pullback = jax.vjp(activation, read_rows(h_rf, tile).astype(dtype))
        du_rows = _dot("td,fd->tf", dout_rows, weight_of(of.wo_efd, tile), dtype)
        if of.scale is not None:
            dscale = update_rows(dscale, (u_rows * du_rows).sum(axis=1), tile)
        (dh_rows,) = pullback(_scaled(du_rows, of.scale, tile))
        dh_rows = mask_rows(dh_rows, tile).astype(x_td.dtype)
        u_rows = mask_rows(_scaled(u_rows, of.scale, tile), tile).astype(x_td.dtype)
        dwo = _dot("tf,td->fd", u_rows, dout_rows, dtype)
        dwi = _dot("td,tf->df", x_rows, dh_rows, dtype)
        dx_rows = _dot("tf,df->td", dh_rows, weight_of(of.wi_edf, tile), dtype)
        return (
            update_rows(dx_rd, dx_rows, tile),
            add_to_weight(dwi_edf, dwi, tile),
            add_to_weight(dwo_efd, dwo, tile),
            dscale,
        )

    carry = (
        zeros((of.num_rows, x_td.shape[1]), x_td.dtype, like=x_td),
        zeros(of.wi_edf.shape, dtype, like=x_td),
        zeros(of.wo_efd.shape, dtype, like=x_td),
        None if of.scale is None else zeros((of.num_rows,), dtype, like=x_td),
    )
    groups = local_groups(of.group_sizes, group_offset, of.wi_edf.shape[0])
    dx_rd, dwi_edf, dwo_efd, dscale = for_each_tile(run, carry, *groups, of.num_rows)
    dx_td = sum_rows(dx_rd, of.row)
    return dx_td, dwi_edf.astype(of.wi_edf.dtype), dwo_efd.astype(of.wo_efd.dtype), dscale


def _dot(subscripts, a, b, dtype):
    return jnp.einsum(subscripts, a, b, preferred_element_type=dtype)


def _scaled(rows, scale, tile):
    return rows if scale is None else rows * read_rows(scale, tile)[:, None]
