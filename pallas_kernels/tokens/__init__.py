"""Some tokens of each sequence taken out, and added back: what adaptive depth is made of."""

from pallas_kernels.tokens.op import gather_tokens, scatter_tokens

__all__ = ["gather_tokens", "scatter_tokens"]
