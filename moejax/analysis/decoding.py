"""What one token costs when a sequence is drawn token by token, from the config alone."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from moejax.analysis.flops import TokenFlops
from moejax.analysis.params import ParamTable, abstract_params
from moejax.config import Config
from moejax.generate.cache import init_cache


@dataclasses.dataclass(frozen=True)
class DecodeCost:
    """Of one token of one sequence.

    Attributes:
      flops: of the last token of a full row, which meets ``data.sequence_length`` keys.
      mean_flops: of the mean token of that row, which meets half as many.
      cache_bytes: the keys and values of a full row.
      weight_bytes: the active parameters in ``model.dtype``: what a lone sequence reads for each.
    """

    flops: float
    mean_flops: float
    cache_bytes: int
    weight_bytes: int


def decode_cost(
    model: Any, config: Config, flops: TokenFlops | None, table: ParamTable
) -> DecodeCost | None:
    """None for a model that draws no tokens (or pictures as latents), or without a formula."""
    if config.model.name != "decoder" or config.model.latents.channels or flops is None:
        return None
    params = abstract_params(model, config)
    length = config.data.sequence_length
    cache = jax.eval_shape(lambda p: init_cache(model, p, 1, length).rows, params)
    slots = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(cache)
        if path[-1] != jax.tree_util.DictKey("filled")
    ]
    return DecodeCost(
        flops=flops.forward,
        mean_flops=flops.causal,
        cache_bytes=sum(math.prod(x.shape) * x.dtype.itemsize for x in slots),
        weight_bytes=table.active * jnp.dtype(config.model.dtype).itemsize,
    )
