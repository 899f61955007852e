"""What TPU and GPU run: ``lax.ragged_dot``, with what it leaves undefined set to zero."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.dtypes import sum_dtype
from pallas_kernels.grouped_matmul.reference import row_groups


def _with_rows_before(group_sizes, group_offset: int, num_local: int):
    """Sizes of the local groups, preceded by one group of all rows before them."""
    before = group_sizes[:group_offset].sum(keepdims=True)
    return jnp.concatenate([before, group_sizes[group_offset : group_offset + num_local]])


def ragged_matmul(x_td, w_edf, group_sizes, *, group_offset, transpose_rhs, out_dtype):
    num_local = w_edf.shape[0]
    weight = jnp.swapaxes(w_edf, 1, 2) if transpose_rhs else w_edf
    sizes = group_sizes[group_offset : group_offset + num_local]
    if group_offset:
        sizes = _with_rows_before(group_sizes, group_offset, num_local)
        weight = jnp.concatenate([jnp.zeros_like(weight[:1]), weight])
    out = lax.ragged_dot(x_td, weight, sizes, preferred_element_type=sum_dtype(x_td, w_edf)).astype(
        out_dtype
    )
    # What ragged_dot leaves in rows that belong to no local group is not defined.
    groups = row_groups(group_sizes, x_td.shape[0]) - group_offset
    inside = (groups >= 0) & (groups < num_local)
    return jnp.where(inside[:, None], out, 0)


def ragged_matmul_t(x_td, y_tf, group_sizes, *, group_offset, num_local, out_dtype):
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
        preferred_element_type=sum_dtype(x_td, y_tf),
    )
    return out[1:].astype(out_dtype)
