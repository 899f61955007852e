"""Capacities over training steps and over layers, and which weights a recursive layer has."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def warmed_up(capacity: float, step: Int[Array, ""], warmup_steps: int) -> Float[Array, ""]:
    """From 1 to ``capacity`` over the first steps, by half a cosine (arXiv 2507.10524, code)."""
    done = jnp.minimum(step / max(warmup_steps, 1), 1.0)
    return capacity + (1.0 - capacity) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))


def shifted_cosine_decay(
    num_layers: int, shift: float = 0.5, dense_above: float = 0.85, least: float = 0.15
) -> tuple[float, ...]:
    """Share of the tokens that each layer keeps: ``0.5 cos(pi l / (L - 1)) + shift`` (p-MoD).

    A layer that would keep more than ``dense_above`` keeps all, none keeps less than ``least``.
    """
    last = max(num_layers - 1, 1)
    shares = (0.5 * math.cos(math.pi * layer / last) + shift for layer in range(num_layers))
    return tuple(_clipped(share, dense_above, least) for share in shares)


def linear_decay(
    num_layers: int, shift: float = 0.5, dense_above: float = 0.85, least: float = 0.15
) -> tuple[float, ...]:
    """As :func:`shifted_cosine_decay`, with ``0.5 - l / (L - 1) + shift``."""
    last = max(num_layers - 1, 1)
    shares = (0.5 - layer / last + shift for layer in range(num_layers))
    return tuple(_clipped(share, dense_above, least) for share in shares)


def _clipped(share: float, dense_above: float, least: float) -> float:
    return 1.0 if share > dense_above else max(share, least)


def recursion_indices(num_layers: int, steps: int, sharing: str) -> tuple[int, ...]:
    """The number of the weights of each layer (arXiv 2507.10524, table 1).

    Args:
      num_layers: L, layers that are run.
      steps: N, times that shared weights are run.
      sharing: "cycle" (l mod L/N), "sequence" (l div N), or the same between a first and a last
        layer with weights of their own: "middle_cycle", "middle_sequence".

    Raises:
      ValueError: steps do not divide the layers that share, or an unknown sharing.
    """
    middle = sharing.startswith("middle_")
    shared = num_layers - 2 if middle else num_layers
    kind = sharing.removeprefix("middle_")
    if kind not in ("cycle", "sequence"):
        raise ValueError(f"unknown sharing {sharing!r}: cycle, sequence, middle_cycle, ...")
    if shared <= 0 or shared % steps:
        raise ValueError(f"{steps} steps do not divide the {shared} layers that share weights")
    own = shared // steps
    inner = [layer % own if kind == "cycle" else layer // steps for layer in range(shared)]
    if not middle:
        return tuple(inner)
    return (0, *(1 + index for index in inner), num_layers - 1)
