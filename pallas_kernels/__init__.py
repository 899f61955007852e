"""Kernels with one public function each: reference, XLA and (later) Pallas backends."""

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_mlp import grouped_mlp
from pallas_kernels.rows import combine_rows, dispatch_rows, sort_by_group

__all__ = ["combine_rows", "dispatch_rows", "grouped_matmul", "grouped_mlp", "sort_by_group"]
