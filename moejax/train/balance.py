"""Biases of routers: parameters that no gradient moves, but a controller after each step.

A bias takes part in the choice of experts and in nothing else (``model.moe.balance``). It lies
among the parameters, so that checkpoints, sampling and ``train.init_from`` have it like them; the
optimizer takes it as frozen. The controller sees the counts of the whole batch, summed over
microbatches and devices.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config.moe import SELECT_BIAS
from moejax.routing import fair_counts, update_bias
from moejax.train.leaves import named_leaves, path_name


def controlled_rules(params: Any) -> tuple[str, ...]:
    """What to add to ``optim.freeze``: a rule for the biases, where there are any."""
    rule = f"/{SELECT_BIAS}$"
    return (rule,) if any(name.endswith(f"/{SELECT_BIAS}") for name in named_leaves(params)) else ()


def make_controller(config: Any) -> Callable[[Any, dict], Any]:
    """``control(params, statistics) -> params`` with the biases moved; see LossSums.statistics."""
    moe = getattr(config.model, "moe", None)
    if moe is None or moe.balance.name == "none":
        return lambda params, statistics: params
    # What the user freezes stays, biases too.
    frozen = [re.compile(rule) for rule in config.optim.freeze if "@" not in rule]

    def one_layer(bias_e: jax.Array, counts_me: jax.Array) -> jax.Array:
        options = dict(moe.balance.options)
        if moe.balance.name == "sign" and moe.allowed:
            allowed_me = jnp.asarray(
                [[e in ids for e in range(len(bias_e))] for ids in moe.allowed]
            )
            options["target_e"] = fair_counts(counts_me, allowed_me)
        return update_bias(
            moe.balance.name,
            bias_e,
            counts_me.sum(axis=0),
            rate=moe.balance.rate,
            # Of this layer, whose block may have a number of its own.
            num_ffn=len(bias_e) - moe.weightless - moe.shared_competing,
            num_shared=moe.shared_competing,
            **options,
        )

    def move(path, leaf, statistics):
        name = path_name(path)
        if not name.endswith(f"/{SELECT_BIAS}") or any(rule.search(name) for rule in frozen):
            return leaf
        counts_lme = statistics["routing"][_routing_of(name)]["statistics"]["chosen_me"]
        return jax.vmap(one_layer)(leaf, counts_lme).astype(leaf.dtype)

    def control(params: Any, statistics: dict) -> Any:
        return jax.tree_util.tree_map_with_path(lambda p, x: move(p, x, statistics), params)

    return control


def controlled(params: Any, average: Any) -> Any:
    """``average`` with the biases of ``params``: a controlled value is not averaged."""
    take = lambda path, new, old: new if path_name(path).endswith(f"/{SELECT_BIAS}") else old
    return jax.tree_util.tree_map_with_path(take, params, average)


def _routing_of(name: str) -> str:
    """``"stack/segment_0/block_0/moe/router/select_bias_e"`` -> the key of its statistics."""
    return name.removeprefix("stack/").removesuffix(f"/{SELECT_BIAS}")
