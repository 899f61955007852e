"""What CPU runs: for each row tile, everything from the gather to the last product.

What lies between the steps of a tile stays in the cache, and only the rows of the hidden layer
(with gradients) and of the output are written out. The tiles are small enough for that and large
enough for a matmul; see :mod:`pallas_kernels.tiles`.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.dtypes import sum_dtype
from pallas_kernels.grouped_matmul.loop import local_groups
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
    dtype, (num_rows,) = sum_dtype(x_td, wi_edf), token.shape

    def run(carry, tile):
        y_rd, h_rf = carry
        x_rows = gather_rows(x_td, read_rows(token, tile))
        h_rows = _dot("td,df->tf", x_rows, weight_of(wi_edf, tile), dtype)
        u_rows = _scaled(activation(h_rows), scale, tile).astype(x_td.dtype)
        y_rows = _dot("tf,fd->td", u_rows, weight_of(wo_efd, tile), dtype)
        h_rf = update_rows(h_rf, h_rows, tile) if keep_hidden else None
        return update_rows(y_rd, y_rows, tile), h_rf

    y_rd = zeros((num_rows, x_td.shape[1]), x_td.dtype, like=x_td)
    h_rf = zeros((num_rows, wi_edf.shape[2]), x_td.dtype, like=x_td) if keep_hidden else None
    groups = local_groups(group_sizes, group_offset, wi_edf.shape[0])
    y_rd, h_rf = for_each_tile(run, (y_rd, h_rf), *groups, num_rows)
    return sum_rows(y_rd, row), h_rf


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
    dtype, (num_rows,), nobody = sum_dtype(x_td, wi_edf), token.shape, x_td.shape[0]

    def run(carry, tile):
        dx_rd, dwi_edf, dwo_efd, dscale = carry
        # Zeros in the rows of others: the gradients of weights sum over all rows of the tile.
        tokens = jnp.where(tile.inside, read_rows(token, tile), nobody)
        x_rows, dout_rows = gather_rows(x_td, tokens), gather_rows(dout_td, tokens)
        u_rows, pullback = jax.vjp(activation, read_rows(h_rf, tile).astype(dtype))
        du_rows = _dot("td,fd->tf", dout_rows, weight_of(wo_efd, tile), dtype)
        if scale is not None:
            dscale = update_rows(dscale, (u_rows * du_rows).sum(axis=1), tile)
        (dh_rows,) = pullback(_scaled(du_rows, scale, tile))
        dh_rows = mask_rows(dh_rows, tile).astype(x_td.dtype)
        u_rows = mask_rows(_scaled(u_rows, scale, tile), tile).astype(x_td.dtype)
        dwo = _dot("tf,td->fd", u_rows, dout_rows, dtype)
        dwi = _dot("td,tf->df", x_rows, dh_rows, dtype)
        dx_rows = _dot("tf,df->td", dh_rows, weight_of(wi_edf, tile), dtype)
        return (
            update_rows(dx_rd, dx_rows, tile),
            add_to_weight(dwi_edf, dwi, tile),
            add_to_weight(dwo_efd, dwo, tile),
            dscale,
        )

    carry = (
        zeros((num_rows, x_td.shape[1]), x_td.dtype, like=x_td),
        zeros(wi_edf.shape, dtype, like=x_td),
        zeros(wo_efd.shape, dtype, like=x_td),
        None if scale is None else zeros((num_rows,), dtype, like=x_td),
    )
    groups = local_groups(group_sizes, group_offset, wi_edf.shape[0])
    dx_rd, dwi_edf, dwo_efd, dscale = for_each_tile(run, carry, *groups, num_rows)
    dx_td = sum_rows(dx_rd, row)
    return dx_td, dwi_edf.astype(wi_edf.dtype), dwo_efd.astype(wo_efd.dtype), dscale


def _dot(subscripts, a, b, dtype):
    return jnp.einsum(subscripts, a, b, preferred_element_type=dtype)


def _scaled(rows, scale, tile):
    return rows if scale is None else rows * read_rows(scale, tile)[:, None]
