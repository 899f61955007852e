"""Kernels with one public function each: reference, XLA and (later) Pallas backends."""

from pallas_kernels.grouped_matmul import grouped_matmul

__all__ = ["grouped_matmul"]
