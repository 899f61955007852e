"""Reconstruction of pictures by an autoencoder."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config.schema import (
    AutoencodeConfig,
    AutoencoderConfig,
    KLAutoencoderConfig,
    require,
)
from moejax.objectives.base import OBJECTIVES, LossSums


def image_errors(
    target: Float[Array, "b h w c"], reconstruction: Float[Array, "b h w c"]
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """(mean absolute, mean squared) error over the values of each picture."""
    error = reconstruction - target
    return jnp.abs(error).mean(axis=(1, 2, 3)), jnp.square(error).mean(axis=(1, 2, 3))


@OBJECTIVES.register("autoencode")
def autoencode(config: AutoencodeConfig, model: AutoencoderConfig):
    """``l1 * |error| + l2 * error^2``, of pictures in [-1, 1], averaged over values and pictures.

    Finite scalar quantisation needs no other term: no codebook and no commitment loss
    (arXiv 2309.15505, section 3). A model with a posterior adds ``kl`` times its divergence from
    the standard normal in nats per latent number (arXiv 2112.10752, section 3.1).

    Raises UserError if ``objective.kl`` is asked of a model without a posterior.
    """
    posterior = isinstance(model, KLAutoencoderConfig)
    require(
        posterior or config.kl == 0,
        "objective.kl",
        f"model {model.name!r} has no posterior; use model.name=kl_autoencoder or 0",
    )

    def objective(outputs, batch, rng=None) -> LossSums:
        del rng
        l1, l2 = image_errors(outputs.target, outputs.reconstruction)
        terms = {"l1": l1, "l2": l2}
        if posterior:
            terms["kl"] = outputs.kl
        weights = batch["weights"].astype(l1.dtype)
        return LossSums(
            sums={name: (values * weights).sum() for name, values in terms.items()},
            weights={name: weights.sum() for name in terms},
            coefficients=tuple((name, getattr(config, name)) for name in terms),
        )

    return objective
