"""Biases of routers: parameters that no gradient moves, but a controller after each step.

A bias takes part in the choice of experts (``model.moe.balance``), or of a token's number of steps
(``model.recursion.balance``), and in nothing else; so does the threshold of an auxiliary router
(``model.moe.causal_router_decay``). They lie among the parameters, so that
checkpoints, sampling and ``train.init_from`` have them too; the optimizer takes them as frozen.
Controllers see sums over the whole batch, its microbatches and devices.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config.depth import STEP_BIAS, RecursionConfig
from moejax.config.moe import CAUSAL_THRESHOLD, SELECT_BIAS, MoEConfig
from moejax.routing import fair_counts, move_threshold, update_bias
from moejax.train.leaves import named_leaves, path_name

_BIASES = (SELECT_BIAS, STEP_BIAS, CAUSAL_THRESHOLD)


def controlled_rules(params: Any) -> tuple[str, ...]:
    """What to add to ``optim.freeze``: rules for the biases, where there are any."""
    found = {name.rpartition("/")[2] for name in named_leaves(params)}
    return tuple(f"/{bias}$" for bias in _BIASES if bias in found)


def make_controller(config: Any) -> Callable[[Any, dict], Any]:
    """``control(params, statistics) -> params`` with the biases moved; see LossSums.statistics."""
    moe = getattr(config.model, "moe", None)
    recursion = getattr(config.model, "recursion", None)
    moved: dict[str, Callable] = {}
    if moe is not None and moe.balance.name != "none":
        moved[SELECT_BIAS] = functools.partial(_of_experts, moe)
    if moe is not None and moe.causal_router_decay:
        moved[CAUSAL_THRESHOLD] = functools.partial(_of_causal_router, moe)
    if recursion is not None and recursion.balance.name != "none":
        moved[STEP_BIAS] = functools.partial(_of_steps, recursion)
    if not moved:
        return lambda params, statistics: params
    # What the user freezes stays, biases too.
    frozen = [re.compile(rule) for rule in config.optim.freeze if "@" not in rule]

    def move(path, leaf, statistics):
        name = path_name(path)
        # "stack/segment_0/block_0/moe/router/select_bias_e": statistics have the middle as a key.
        router, _, bias = name.removeprefix("stack/").rpartition("/")
        if bias not in moved or any(rule.search(name) for rule in frozen):
            return leaf
        return moved[bias](leaf, statistics, router).astype(leaf.dtype)

    def control(params: Any, statistics: dict) -> Any:
        return jax.tree_util.tree_map_with_path(lambda p, x: move(p, x, statistics), params)

    return control


def _of_experts(moe: MoEConfig, bias_le: jax.Array, statistics: dict, router: str) -> jax.Array:
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

    return jax.vmap(one_layer)(bias_le, statistics["routing"][router]["statistics"]["chosen_me"])


def _of_causal_router(
    moe: MoEConfig, threshold_le: jax.Array, statistics: dict, router: str
) -> jax.Array:
    one_layer = functools.partial(move_threshold, decay=moe.causal_router_decay)
    return jax.vmap(one_layer)(threshold_le, statistics["routing"][router]["statistics"])


def _of_steps(
    recursion: RecursionConfig, bias_lr: jax.Array, statistics: dict, block: str
) -> jax.Array:
    name, rate = recursion.balance.name, recursion.balance.rate
    one_layer = functools.partial(update_bias, name, rate=rate)
    return jax.vmap(one_layer)(bias_lr, statistics["depth"][block]["recursion"]["chosen_r"])


def controlled(params: Any, average: Any) -> Any:
    """``average`` with the biases of ``params``: a controlled value is not averaged."""
    is_bias = lambda path: path_name(path).rpartition("/")[2] in _BIASES
    take = lambda path, new, old: new if is_bias(path) else old
    return jax.tree_util.tree_map_with_path(take, params, average)
