"""What the layers of experts add to any objective: losses of the routing, and its statistics."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from moejax.objectives.base import Derived, LossSums, Objective
from moejax.routing import ROUTER_LOSSES, summarise

# Values of the routing that are logged beside the losses, each the mean over the layers.
LOGGED = ("max_violation", "drop_fraction", "entropy", "experts_per_token", "null_fraction")


def with_routing(objective: Objective, model: Any) -> Objective:
    """``objective`` with the terms of ``model.moe``; as it is for a model without experts.

    Each loss of ``model.moe.losses`` is formed for each router from the sums over the whole batch,
    and added with its coefficient once for each of them (a layer has one, or one for each of its
    iterations). Logged under ``router/<name>`` is the mean over them.
    """
    moe = getattr(model, "moe", None)
    if moe is None or not moe.num_experts:
        return objective
    derived = tuple(
        Derived(f"router/{loss.name}", loss.coefficient, _LayerMean(loss.name, loss.options))
        for loss in moe.losses
    ) + tuple(
        Derived(f"router/{name}", 0.0, _Summary(name, moe.columns - moe.pool)) for name in LOGGED
    )

    def loss(outputs: Any, batch: dict, rng: jax.Array | None = None) -> LossSums:
        sums = objective.loss(outputs, batch, rng)
        statistics = dict(routings(outputs.aux))
        if not statistics:
            # Experts are asked for, and no block has any.
            return sums
        layers = sum(_layers(one) for one in statistics.values())
        scaled = tuple(
            dataclasses.replace(one, coefficient=one.coefficient * layers) for one in derived
        )
        return dataclasses.replace(sums, statistics={"routing": statistics}, derived=scaled)

    return dataclasses.replace(objective, loss=loss)


def routings(aux: dict, path: str = "") -> Iterator[tuple[str, dict]]:
    """``("segment_0/block_1/moe/router", sums)`` of each stack of routers in a model's aux."""
    for name, inner in aux.items():
        if not isinstance(inner, dict):
            continue
        here = f"{path}/{name}" if path else name
        if "statistics" in inner:
            yield here, {"statistics": inner["statistics"], "losses": inner["losses"]}
        else:
            yield from routings(inner, here)


def _layers(routing: dict) -> int:
    return jax.tree.leaves(routing["statistics"])[0].shape[0]


@dataclasses.dataclass(frozen=True)
class _LayerMean:
    """The mean over all layers of a loss of the routing."""

    name: str
    options: Any

    def __call__(self, statistics: dict[str, Any]) -> jax.Array:
        value = ROUTER_LOSSES.get(self.name).value
        layers = [
            jax.vmap(lambda sums: value(sums, **self.options))(routing["losses"][self.name])
            for routing in statistics["routing"].values()
        ]
        return jnp.concatenate(layers).mean()


@dataclasses.dataclass(frozen=True)
class _Summary:
    """The mean over all layers of a number that describes the routing.

    ``without_weights`` columns of the router are no experts with weights.
    """

    name: str
    without_weights: int

    def __call__(self, statistics: dict[str, Any]) -> jax.Array:
        def one_layer(sums):
            num_ffn = sums["chosen_me"].shape[-1] - self.without_weights
            return summarise(sums, num_ffn=num_ffn)[self.name]

        layers = [
            jax.vmap(one_layer)(routing["statistics"]) for routing in statistics["routing"].values()
        ]
        return jnp.concatenate(layers).mean()
