"""What each kernel costs, for programs whose loops have data-dependent lengths.

A kernel runs inside a ``jax.jit`` whose name is a key of ``COSTS``; the FLOP counter looks the
name up instead of guessing the trip count of the loop inside.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs of one call: ``nominal`` by the mathematics, ``visited`` with padding at the worst."""

    nominal: float
    visited: float


# name of the jit -> function (input avals, output avals) -> Cost
COSTS: dict[str, Callable[[Sequence[Any], Sequence[Any]], Cost]] = {}
