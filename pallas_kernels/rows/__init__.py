"""Rows copied into the order of their groups, and summed back into tokens."""

from pallas_kernels.rows.op import combine_rows, dispatch_rows
from pallas_kernels.rows.sort import SortedGroups, sort_by_group

__all__ = ["SortedGroups", "combine_rows", "dispatch_rows", "sort_by_group"]
