"""The plain definition: every group's product for every row, then a mask (E-fold FLOPs)."""

import jax.numpy as jnp

from pallas_kernels.dtypes import sum_dtype


def row_groups(group_sizes, num_rows: int):
    """Group of each row [t] i32; rows past the last group get ``len(group_sizes)``."""
    return jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(num_rows), side="right")


def grouped_matmul(x_td, w_edf, group_sizes, group_offset, transpose_rhs, out_dtype):
    subscripts = "td,efd->tef" if transpose_rhs else "td,edf->tef"
    every = jnp.einsum(subscripts, x_td, w_edf, preferred_element_type=sum_dtype(x_td, w_edf))
    groups = row_groups(group_sizes, x_td.shape[0])[:, None] - group_offset
    chosen = groups == jnp.arange(w_edf.shape[0])[None, :]
    return jnp.where(chosen[:, :, None], every, 0).sum(axis=1).astype(out_dtype)


def grouped_matmul_t(x_td, y_tf, group_sizes, group_offset, num_local, out_dtype):
    groups = row_groups(group_sizes, x_td.shape[0])[:, None] - group_offset
    chosen = groups == jnp.arange(num_local)[None, :]
    # Rows outside of every group may hold anything, NaN included: select, do not multiply.
    x_ted = jnp.where(chosen[:, :, None], x_td[:, None, :], 0)
    y_ted = jnp.where(chosen[:, :, None], y_tf[:, None, :], 0)
    return jnp.einsum(
        "ted,tef->edf", x_ted, y_ted, preferred_element_type=sum_dtype(x_td, y_tf)
    ).astype(out_dtype)
