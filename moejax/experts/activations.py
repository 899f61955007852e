"""What lies between the two matrices of an expert."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from moejax.ops.untied import swiglu

# name -> function on the last axis. ``swiglu`` halves it: wi holds gate and up side by side.
ACTIVATIONS: dict[str, Callable] = {"swiglu": swiglu, "gelu": jax.nn.gelu}


def activation_named(name: str) -> Callable:
    """The function of that name; ValueError if there is none."""
    if name not in ACTIVATIONS:
        raise ValueError(f"no activation {name!r}: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def activate(h: Float[Array, "*rows _"], activation: str) -> Float[Array, "*rows _"]:
    """The activation of that name on the last axis."""
    return activation_named(activation)(h)
