"""Experts that move towards each other after each step, until one feed-forward layer is left.

Experts Weights Averaging (EWA, arXiv 2308.06093): experts trained on random parts of the tokens are
averaged a little after every step, and into one layer at the end (moejax/surgery/dense.py).
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config.checks import require
from moejax.train.leaves import expert_axis, named_leaves, path_name


def share_experts(weights: Float[Array, "..."], beta: Any, axis: int) -> Float[Array, "..."]:
    """``W_e <- (1 - beta) W_e + beta mean_{j != e} W_j`` along ``axis``.

    The mean of all stays as it is; with ``beta = (E - 1) / E`` all become equal to it. One expert
    has no others and stays as it is.
    """
    num = weights.shape[axis]
    if num == 1:
        return weights
    towards = jnp.asarray(beta * num / (num - 1), weights.dtype)
    mean = weights.mean(axis=axis, keepdims=True)
    return (1 - towards) * weights + towards * mean


def share_rate(rate: float, ramp_steps: int, updates: Array) -> Array:
    """``beta`` after so many updates: from 0 to ``rate`` within ``ramp_steps``, then constant."""
    return rate * jnp.minimum(1.0, updates.astype(jnp.float32) / ramp_steps)


def make_sharing(config: Any, params: Any) -> Callable[[Any, Array], Any]:
    """``share(params, updates) -> params``, by ``optim.share_rate`` and ``share_steps``.

    What ``optim.freeze`` names stays as it is.

    Args:
      config: the experiment.
      params: parameters or their shapes, boxed with the logical names of their axes.

    Raises:
      UserError: there is a rate, and no parameter has experts.
    """
    optim = config.optim
    if not optim.share_rate:
        return lambda params, updates: params
    frozen = [re.compile(rule) for rule in optim.freeze if "@" not in rule]
    axes = {
        name: axis
        for name, leaf in named_leaves(params).items()
        if (axis := expert_axis(leaf)) is not None and not any(rule.search(name) for rule in frozen)
    }
    require(bool(axes), "optim.share_rate", "no parameter that is trained has experts; write 0")
    ramp = optim.share_steps or config.train.steps

    def share(params: Any, updates: Array) -> Any:
        beta = share_rate(optim.share_rate, ramp, updates)

        def one(path, leaf):
            axis = axes.get(path_name(path))
            return leaf if axis is None else share_experts(leaf, beta, axis)

        return jax.tree_util.tree_map_with_path(one, params)

    return share
