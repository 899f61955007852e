"""The "denoising" evaluator: the error of the picture objective at fixed noise and times.

* ``image/loss``: the mean squared error per latent number, each picture once at a time drawn as in
  training, by a fixed key: the same noise and times at every evaluation and for every model;
* ``image/gaussian_loss``: that of the best linear guess for latents that are independent standard
  normals, at the same times: what is known without looking at any picture.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config.schema import Config
from moejax.errors import UserError
from moejax.objectives.transfusion import patch_weights
from moejax.ops import diffusion
from moejax.train.evaluate import EVALUATORS, EvalContext


@EVALUATORS.register("denoising")
def denoising(context: EvalContext) -> dict[str, float]:
    """See the module docstring. Needs a model of latents and the transfusion objective."""
    process = context.config.objective.process
    score = context.program(
        "denoising", functools.partial(_score, context.model, context.objective, process)
    )
    error = gaussian = count = 0.0
    for index, (_, batch) in enumerate(context.batches()):
        found = jax.device_get(score(context.params, batch, jax.random.key(index)))
        error, gaussian, count = (
            total + float(value)
            for total, value in zip((error, gaussian, count), found, strict=True)
        )
    return {"image/loss": error / count, "image/gaussian_loss": gaussian / count}


def _check(config: Config) -> None:
    if config.objective.name != "transfusion":
        raise UserError(
            f"eval.metrics: 'denoising' needs objective.name=transfusion, not "
            f"{config.objective.name!r}"
        )


denoising.metric_names = lambda config: ["image/loss", "image/gaussian_loss"]
denoising.check = _check


def _score(model, objective, process: str, params: Any, batch: dict, key: jax.Array):
    """Sums over the patches that count: (squared error, that of the Gaussian guess, patches)."""
    batch = objective.prepare(batch, key)
    predicted = model.apply({"params": params}, batch, train=False).denoised
    weights = patch_weights(batch).astype(predicted.dtype)
    error = jnp.square(predicted - batch["denoise_target"]).mean(axis=-1)
    gaussian = gaussian_loss(process, batch["times"])
    return (error * weights).sum(), (gaussian * weights).sum(), weights.sum()


def gaussian_loss(process: str, times: jax.Array) -> jax.Array:
    """The least mean squared error of a linear guess of the target from ``x_t``, for x0 ~ N(0, 1).

    ``x_t = a x0 + b eps`` and the target ``c x0 + e eps`` have covariance ``ac + be``; what that
    leaves of the target's variance is ``c^2 + e^2 - (ac + be)^2 / (a^2 + b^2)``.
    """
    one, zero = jnp.ones_like(times), jnp.zeros_like(times)
    a = diffusion.add_noise(process, one, zero, times)
    b = diffusion.add_noise(process, zero, one, times)
    c, e = diffusion.target(process, one, zero), diffusion.target(process, zero, one)
    return c**2 + e**2 - jnp.square(a * c + b * e) / (a**2 + b**2)
