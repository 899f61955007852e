"""Losses as sums and weights, so that they add up over microbatches and devices."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from moejax.config.registry import Registry

# name -> function(config.objective, config.model) -> objective: an Objective, or its loss alone
OBJECTIVES: Registry[Callable] = Registry("objective")


@struct.dataclass
class LossSums:
    """Named sums with the weights to divide them by, all float32 scalars (or wider).

    ``coefficients`` names the terms that are trained; the others are only logged.
    """

    # Any, not Array: tree functions rebuild this class with leaves of other kinds.
    sums: dict[str, Any]
    weights: dict[str, Any]
    coefficients: tuple[tuple[str, float], ...] = struct.field(pytree_node=False)

    def __add__(self, other: "LossSums") -> "LossSums":
        assert self.coefficients == other.coefficients
        return jax.tree.map(jnp.add, self, other)

    def mean(self, name: str) -> jax.Array:
        """Sum over weight; 0 where nothing was counted."""
        weight = self.weights[name]
        return self.sums[name] / jnp.where(weight > 0, weight, 1)

    def means(self) -> dict[str, jax.Array]:
        return {name: self.mean(name) for name in self.sums}

    def total(self) -> jax.Array:
        """The scalar to minimise."""
        return sum((c * self.mean(name) for name, c in self.coefficients), jnp.zeros(()))


def _as_it_is(batch: dict, rng: jax.Array) -> dict:
    del rng
    return batch


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a model is trained for; called as its loss.

    Attributes:
      loss: (outputs, batch, rng) -> LossSums.
      prepare: (batch, rng) -> the batch that the model sees, such as one with noise added; what
        the loss needs of it goes into the batch too. Runs inside the step, before the model.
    """

    loss: Callable[..., LossSums]
    prepare: Callable[[dict, jax.Array], dict] = _as_it_is

    def __call__(self, outputs: Any, batch: dict, rng: jax.Array | None = None) -> LossSums:
        return self.loss(outputs, batch, rng)
