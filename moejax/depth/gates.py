"""From the score of a token to the weight of what a block does to it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def gate_of(name: str, score_bt: Float[Array, "b t"], scale: float = 1.0) -> Float[Array, "b t"]:
    """The weight, by the name that ``model.depth.gate`` has for it.

    "linear" is the score itself (mixture of depths, arXiv 2404.02258), "sigmoid" is ``scale *
    sigmoid`` (MoMa, arXiv 2407.21770; mixture of recursions, arXiv 2507.10524, scale 0.1),
    "tanh_norm" is ``1 + scale * tanh`` (p-MoD, scale 0.2), "softmax" is the probability of the
    second of two classes, of which the score is the difference of the logits (gamma-MoD), and
    "none" is 1.
    """
    match name:
        case "linear":
            return score_bt
        case "sigmoid":
            return scale * jax.nn.sigmoid(score_bt)
        case "tanh_norm":
            return 1.0 + scale * jnp.tanh(score_bt)
        case "softmax":
            return jax.nn.sigmoid(score_bt)
        case "none":
            return jnp.ones_like(score_bt)
    raise ValueError(f"unknown gate {name!r}")
