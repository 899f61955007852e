"""What each kernel costs, for programs whose loops have data-dependent lengths.

A kernel runs inside a ``jax.jit`` whose name is a key of ``COSTS``; the FLOP counter looks the
name up instead of guessing the trip count of the loop inside. The name holds the shapes, because
partial evaluation (of a scanned layer, say) gives the call other operands than it was made with.
"""

import dataclasses
from collections.abc import Callable

import jax


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs of one call: ``nominal`` by the mathematics, ``visited`` with padding at the worst."""

    nominal: float
    visited: float


# name of the jit -> what one call of it costs
COSTS: dict[str, Cost] = {}


def costed_jit(function: Callable, name: str, cost: Cost) -> Callable:
    """``jax.jit(function)`` under ``name``, with its cost on record."""
    COSTS[name] = cost
    function.__name__ = name
    return jax.jit(function)
