"""What blocks that tokens skip add to any objective: the losses of their routers, and counts."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config.trunk import AROUND_OTHERS, TrunkConfig
from moejax.objectives.base import Derived, LossSums, Objective

# Logged beside the losses, each the mean over the blocks: tokens that were chosen of those that
# compete, tokens that the causal rule would take, and those of which it says what was chosen.
COUNTS = {"chosen": "chosen", "decided": "decided", "agreement": "agreeing"}


def with_depth(objective: Objective, model: Any) -> Objective:
    """``objective`` with the terms of ``model.depth`` and ``model.recursion``.

    The losses are summed over the blocks that have them, and logged as their mean.
    """
    if not isinstance(model, TrunkConfig) or not set(AROUND_OTHERS) & model.base_kinds():
        return objective
    depth, recursion = model.depth, model.recursion
    of_decisions = tuple(
        Derived(f"depth/{name}", 0.0, _Mean("sums", _Ratio(key))) for name, key in COUNTS.items()
    )
    if depth.learns_to_decide:
        term = _Mean("sums", _Ratio("cross_entropy"))
        of_decisions += (Derived("depth/causal", depth.causal_loss, term),)
    of_steps = (
        Derived("depth/balance", recursion.balance_loss, _Mean("recursion", _balance)),
        Derived("depth/z", recursion.z_loss, _Mean("recursion", _z)),
        Derived("depth/steps", 0.0, _Mean("recursion", _steps)),
    )

    def loss(outputs: Any, batch: dict, rng: jax.Array | None = None) -> LossSums:
        sums = objective.loss(outputs, batch, rng)
        found = dict(depth_sums(outputs.aux))
        derived = ()
        for key, terms in (("sums", of_decisions), ("recursion", of_steps)):
            blocks = sum(_count(one[key]) for one in found.values() if key in one)
            if blocks:
                derived += tuple(
                    dataclasses.replace(term, coefficient=term.coefficient * blocks)
                    for term in terms
                )
        if not derived:
            return sums
        statistics = {**sums.statistics, "depth": found}
        return dataclasses.replace(sums, statistics=statistics, derived=sums.derived + derived)

    return dataclasses.replace(objective, loss=loss)


def depth_sums(aux: dict, path: str = "") -> Iterator[tuple[str, dict]]:
    """``("segment_0/block_1", sums)`` of each stack of blocks that tokens skip."""
    for name, inner in aux.items():
        if not isinstance(inner, dict):
            continue
        here = f"{path}/{name}" if path else name
        if name == "depth":
            yield path, {key: sums for key, sums in inner.items() if key != "kept"}
        else:
            yield from depth_sums(inner, here)


def _count(sums: dict[str, Any]) -> int:
    return sums["count"].size


@dataclasses.dataclass(frozen=True)
class _Mean:
    """The mean over all routers of a function of one router's sums."""

    key: str
    function: Callable[[dict[str, Any]], jax.Array]

    def __call__(self, statistics: dict[str, Any]) -> jax.Array:
        found = [one[self.key] for one in statistics["depth"].values() if self.key in one]
        return jnp.concatenate([self.function(sums).reshape(-1) for sums in found]).mean()


@dataclasses.dataclass(frozen=True)
class _Ratio:
    """A sum over the number of tokens that competed; 0 where none did."""

    name: str

    def __call__(self, sums: dict[str, Any]) -> jax.Array:
        return sums[self.name] / jnp.maximum(sums["count"], 1)


def _balance(sums: dict[str, Any]) -> jax.Array:
    """``N sum_i f_i P_i`` of the shares and mean probabilities of N numbers of steps."""
    count = jnp.maximum(sums["count"], 1)[..., None]
    steps = sums["chosen_r"].shape[-1]
    return steps * (sums["chosen_r"] / count * sums["probs_r"] / count).sum(axis=-1)


def _z(sums: dict[str, Any]) -> jax.Array:
    return sums["z"] / jnp.maximum(sums["count"], 1)


def _steps(sums: dict[str, Any]) -> jax.Array:
    """The mean number of steps of a token."""
    steps = jnp.arange(1, sums["chosen_r"].shape[-1] + 1, dtype=sums["chosen_r"].dtype)
    return sums["chosen_r"] @ steps / jnp.maximum(sums["count"], 1)
