"""Losses as sums and weights, so that they add up over microbatches and devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from moejax.config.registry import Registry

# name -> function(config.objective, config.model) -> objective;
# an objective is (outputs, batch, rng) -> LossSums
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
