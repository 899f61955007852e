"""Grouped matmul on TPU (Mosaic), with what follows it done before a tile leaves the chip.

One kernel multiplies rows, the other sums over them. Their grids are the lists of
:mod:`pallas_kernels.visits`. Where all of a tile is one group's it is multiplied in one piece, else
in steps, so that padding is that of a step while weights are read once for a whole tile.
"""

from pallas_kernels.grouped_matmul.tpu_groups import groups_matmul
from pallas_kernels.grouped_matmul.tpu_rows import Epilogue, rows_matmul


def grouped_matmul(
    x_td, w_edf, group_sizes, *, group_offset, transpose_rhs, out_dtype, existing=None, interpret
):
    """``out[r] = x[r] @ w[group(r) - group_offset]``, zero for rows of other groups."""
    (out,) = rows_matmul(
        x_td[None],
        w_edf,
        group_sizes,
        epilogue=Epilogue(lambda product: (product[None],), (), ((1, out_dtype),)),
        group_offset=group_offset,
        transpose_rhs=transpose_rhs,
        existing=existing,
        interpret=interpret,
    )
    return out[0]


def grouped_matmul_t(
    x_td, y_tf, group_sizes, *, group_offset, num_local, out_dtype, existing=None, interpret
):
    """``out[e] = x[rows of e].T @ y[rows of e]``, exactly zero for empty groups."""
    return groups_matmul(
        x_td,
        y_tf[None],
        group_sizes,
        num_local=num_local,
        out_dtype=out_dtype,
        group_offset=group_offset,
        existing=existing,
        interpret=interpret,
    )
