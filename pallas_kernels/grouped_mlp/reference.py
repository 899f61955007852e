"""The plain definition, from the references of its parts."""

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.rows import combine_rows, dispatch_rows


def grouped_mlp(x_td, wi_edf, wo_efd, token, row, group_sizes, gates, *, activation, group_offset):
    options = {"group_offset": group_offset, "backend": "reference"}
    rows = dispatch_rows(x_td, token, row, backend="reference")
    h_rf = grouped_matmul(rows, wi_edf, group_sizes, **options)
    y_rd = grouped_matmul(activation(h_rf), wo_efd, group_sizes, **options)
    return combine_rows(y_rd, token, row, gates, backend="reference")
