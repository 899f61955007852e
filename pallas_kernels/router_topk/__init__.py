"""Scores of a router, the top k of them, their gates and statistics, in one pass."""

from pallas_kernels.router_topk.op import RouterTopK, router_topk

__all__ = ["RouterTopK", "router_topk"]
