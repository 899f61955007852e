"""What CPU runs: one ordinary product for each row tile (:mod:`pallas_kernels.tiles`).

``lax.ragged_dot`` is a dense masked product there, at as many times the FLOPs as there are groups.
"""

import jax.numpy as jnp

from pallas_kernels.dtypes import sum_dtype
from pallas_kernels.tiles import (
    add_to_weight,
    for_each_tile,
    mask_rows,
    read_rows,
    update_rows,
    weight_of,
    zeros,
)


def local_groups(group_sizes, group_offset: int, num_local: int):
    """Sizes and first rows of the groups that have a weight here."""
    local = slice(group_offset, group_offset + num_local)
    return group_sizes[local], (jnp.cumsum(group_sizes) - group_sizes)[local]


def loop_matmul(x_td, w_edf, group_sizes, *, group_offset, transpose_rhs, out_dtype):
    subscripts = "td,fd->tf" if transpose_rhs else "td,df->tf"
    width = w_edf.shape[1] if transpose_rhs else w_edf.shape[2]

    def multiply(out_tf, tile):
        product = jnp.einsum(
            subscripts,
            read_rows(x_td, tile),
            weight_of(w_edf, tile),
            preferred_element_type=sum_dtype(x_td, w_edf),
        )
        return update_rows(out_tf, product, tile)

    num_rows = x_td.shape[0]
    sizes, starts = local_groups(group_sizes, group_offset, w_edf.shape[0])
    out_tf = zeros((num_rows, width), out_dtype, like=x_td)
    return for_each_tile(multiply, out_tf, sizes, starts, num_rows)


def loop_matmul_t(x_td, y_tf, group_sizes, *, group_offset, num_local, out_dtype):
    def add(total_edf, tile):
        rows = mask_rows(read_rows(x_td, tile), tile)
        grads = mask_rows(read_rows(y_tf, tile), tile)
        term = jnp.einsum("td,tf->df", rows, grads, preferred_element_type=total_edf.dtype)
        return add_to_weight(total_edf, term, tile)

    sizes, starts = local_groups(group_sizes, group_offset, num_local)
    shape = (num_local, x_td.shape[1], y_tf.shape[1])
    total_edf = zeros(shape, sum_dtype(x_td, y_tf), like=x_td)
    return for_each_tile(add, total_edf, sizes, starts, x_td.shape[0]).astype(out_dtype)
