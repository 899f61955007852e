"""Kernels with one public function each: reference, XLA and (later) Pallas backends."""

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.rows import combine_rows, dispatch_rows

__all__ = ["combine_rows", "dispatch_rows", "grouped_matmul"]
