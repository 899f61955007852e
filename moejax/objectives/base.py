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


@dataclasses.dataclass(frozen=True)
class Derived:
    """A value that is no ratio of two sums, but a function of many.

    Attributes:
      name: of the value.
      coefficient: of the value in the total; 0 where it is only logged.
      function: ``LossSums.statistics -> scalar``.
    """

    name: str
    coefficient: float
    function: Callable[[dict[str, Any]], jax.Array]


@struct.dataclass
class LossSums:
    """Named sums with the weights to divide them by, all float32 scalars (or wider).

    ``coefficients`` names the terms that are trained; the others are only logged. ``statistics``
    are sums of any shape, of which ``derived`` makes further terms: they too are the same however
    a batch is cut into microbatches.
    """

    # Any, not Array: tree functions rebuild this class with leaves of other kinds.
    sums: dict[str, Any]
    weights: dict[str, Any]
    coefficients: tuple[tuple[str, float], ...] = struct.field(pytree_node=False)
    statistics: dict[str, Any] = struct.field(default_factory=dict)
    derived: tuple[Derived, ...] = struct.field(pytree_node=False, default=())

    def __add__(self, other: "LossSums") -> "LossSums":
        assert self.coefficients == other.coefficients and self.derived == other.derived
        return jax.tree.map(jnp.add, self, other)

    def mean(self, name: str) -> jax.Array:
        """Sum over weight; 0 where nothing was counted."""
        weight = self.weights[name]
        return self.sums[name] / jnp.where(weight > 0, weight, 1)

    def means(self) -> dict[str, jax.Array]:
        return {name: self.mean(name) for name in self.sums}

    def total(self) -> jax.Array:
        """The scalar to minimise."""
        terms = [c * self.mean(name) for name, c in self.coefficients]
        terms += [
            d.coefficient * d.function(self.statistics) for d in self.derived if d.coefficient
        ]
        return sum(terms, jnp.zeros(()))

    def derived_values(self) -> dict[str, jax.Array]:
        return {derived.name: derived.function(self.statistics) for derived in self.derived}


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
