"""Reconstruction of pictures by an autoencoder."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config.schema import AutoencodeConfig, FSQAutoencoderConfig
from moejax.objectives.base import OBJECTIVES, LossSums


def image_errors(
    target: Float[Array, "b h w c"], reconstruction: Float[Array, "b h w c"]
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """(mean absolute, mean squared) error over the values of each picture."""
    error = reconstruction - target
    return jnp.abs(error).mean(axis=(1, 2, 3)), jnp.square(error).mean(axis=(1, 2, 3))


@OBJECTIVES.register("autoencode")
def autoencode(config: AutoencodeConfig, model: FSQAutoencoderConfig):
    """``l1 * |error| + l2 * error^2``, of pictures in [-1, 1], averaged over values and pictures.

    Finite scalar quantisation needs no other term: no codebook and no commitment loss
    (arXiv 2309.15505, section 3).
    """
    del model

    def objective(outputs, batch, rng=None) -> LossSums:
        del rng
        l1, l2 = image_errors(outputs.target, outputs.reconstruction)
        weights = batch["weights"].astype(l1.dtype)
        return LossSums(
            sums={"l1": (l1 * weights).sum(), "l2": (l2 * weights).sum()},
            weights={"l1": weights.sum(), "l2": weights.sum()},
            coefficients=(("l1", config.l1), ("l2", config.l2)),
        )

    return objective
