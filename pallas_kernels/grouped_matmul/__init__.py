"""Matmul of rows sorted by group, one weight per group."""

from pallas_kernels.grouped_matmul.op import grouped_matmul

__all__ = ["grouped_matmul"]
