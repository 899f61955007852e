"""MLP of tokens that chose groups: gather, two grouped matmuls, weighted sum."""

from pallas_kernels.grouped_mlp.op import grouped_mlp

__all__ = ["grouped_mlp"]
