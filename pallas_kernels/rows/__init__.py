"""Rows copied into the order of their groups, and summed back into tokens."""

from pallas_kernels.rows.op import combine_rows, dispatch_rows

__all__ = ["combine_rows", "dispatch_rows"]
