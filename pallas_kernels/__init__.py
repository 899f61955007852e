"""Kernels with one public function each: reference, XLA and Pallas backends."""

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_mlp import grouped_mlp
from pallas_kernels.router_topk import RouterTopK, router_topk
from pallas_kernels.rows import combine_rows, dispatch_rows, sort_by_group
from pallas_kernels.tokens import gather_tokens, scatter_tokens

__all__ = [
    "RouterTopK",
    "combine_rows",
    "dispatch_rows",
    "gather_tokens",
    "grouped_matmul",
    "grouped_mlp",
    "router_topk",
    "scatter_tokens",
    "sort_by_group",
]
