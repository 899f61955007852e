"""The "denoising" evaluator: the error of the picture objective at fixed noise and times.

Of objective "transfusion":

* ``image/loss``: the mean squared error per latent number, each picture once at a time drawn as in
  training, by a fixed key: the same noise and times at every evaluation and for every model;
* ``image/gaussian_loss``: that of the best linear guess for latents that are independent standard
  normals, at the same times: what is known without looking at any picture.

Of objective "diffusion":

* ``image/loss``: the mean squared error of the prediction per number, at times distributed as in
  training. Each picture is looked at with its label and its text, once in each quarter of these
  times, at a time and with noise that depend on its number alone;
* ``image/loss_quarter_1`` to ``_4``: the mean over each quarter, of the least noise first;
* ``image/bound``: bits per number and step of the variational bound, where the range is learned.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.config.diffusion import Diffusion, DiffusionConfig
from moejax.config.schema import Config
from moejax.errors import UserError
from moejax.objectives.diffusion import QUARTERS, clean_pictures, noisy_batch
from moejax.objectives.transfusion import patch_weights
from moejax.ops import diffusion
from moejax.ops.diffusion_times import quantile_times
from moejax.train.evaluate import EVALUATORS, EvalContext


@EVALUATORS.register("denoising")
def denoising(context: EvalContext) -> dict[str, float]:
    """See the module docstring. Needs the objective of a model that denoises."""
    if context.config.objective.name == "diffusion":
        return _pictures(context)
    process = context.config.objective.diffusion
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
    if config.objective.name not in ("transfusion", "diffusion"):
        raise UserError(
            f"eval.metrics: 'denoising' needs objective.name=transfusion or diffusion, not "
            f"{config.objective.name!r}"
        )


def _metric_names(config: Config) -> list[str]:
    if config.objective.name != "diffusion":
        return ["image/loss", "image/gaussian_loss"]
    quarters = [f"image/loss_quarter_{quarter + 1}" for quarter in range(QUARTERS)]
    return ["image/loss", *quarters, *(["image/bound"] if config.objective.learned_range else [])]


denoising.metric_names = _metric_names
denoising.check = _check


def _score(model, objective, process: Diffusion, params: Any, batch: dict, key: jax.Array):
    """Sums over the patches that count: (squared error, that of the Gaussian guess, patches)."""
    batch = objective.prepare(batch, key)
    predicted = model.apply({"params": params}, batch, train=False).denoised
    weights = patch_weights(batch).astype(predicted.dtype)
    error = jnp.square(predicted - batch["denoise_target"]).mean(axis=-1)
    gaussian = gaussian_loss(process, batch["times"])
    return (error * weights).sum(), (gaussian * weights).sum(), weights.sum()


def gaussian_loss(process: Diffusion, times: Float[Array, "..."]) -> Float[Array, "..."]:
    """The least mean squared error of a linear guess of the target from ``x_t``, for x0 ~ N(0, 1).

    ``x_t = a x0 + b eps`` and the target ``c x0 + e eps`` have covariance ``ac + be``; what that
    leaves of the target's variance is ``c^2 + e^2 - (ac + be)^2 / (a^2 + b^2)``.
    """
    one, zero = jnp.ones_like(times), jnp.zeros_like(times)
    a, b, *_ = diffusion.path(process, times, times)
    c, e = (diffusion.target(process, *parts, times) for parts in ((one, zero), (zero, one)))
    return c**2 + e**2 - jnp.square(a * c + b * e) / (a**2 + b**2)


def _pictures(context: EvalContext) -> dict[str, float]:
    """Those of objective "diffusion"."""
    config = context.config
    score = context.program(
        "denoising",
        functools.partial(
            _score_pictures, context.model, config.objective, config.model.num_classes
        ),
    )
    sums: dict[str, np.ndarray] = {}
    for _, batch in context.batches():
        found = [score(context.params, batch, quarter) for quarter in range(QUARTERS)]
        for quarter, values in enumerate(jax.device_get(found)):
            for name, value in values.items():
                sums.setdefault(name, np.zeros(QUARTERS))[quarter] += value
    # Each picture counts once in each quarter.
    by_quarter = {name: values / sums["pictures"] for name, values in sums.items()}
    values = {"image/loss": float(by_quarter["error"].mean())}
    for quarter, value in enumerate(by_quarter["error"]):
        values[f"image/loss_quarter_{quarter + 1}"] = float(value)
    if "bound" in by_quarter:
        values["image/bound"] = float(by_quarter["bound"].mean())
    return values


def noisy_pictures(
    config: DiffusionConfig, num_classes: int, batch: dict, part: int | Int[Array, ""], parts: int
) -> tuple[dict, Float[Array, "b h w z"], Float[Array, "b h w z"], Float[Array, " b"]]:
    """Each picture once in one of ``parts`` equal parts of the times that training draws.

    The time within the part and the noise depend on the picture's number alone.

    Returns:
      (the batch that the model reads, x0, eps, times [b]).
    """
    x0 = clean_pictures(batch)
    rows = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(0), number))(batch["index"])

    def draw(key):
        time_key, noise_key = jax.random.split(jax.random.fold_in(key, part))
        share = 1 - jax.random.uniform(time_key)
        return share, jax.random.normal(noise_key, x0.shape[1:])

    share, eps = jax.vmap(draw)(rows)
    times = quantile_times(config, (part + share) / parts)
    return noisy_batch(batch, config, num_classes, x0, eps, times), x0, eps, times


def _score_pictures(model, config, num_classes: int, params: Any, batch: dict, quarter):
    """Sums over the pictures that count, of each loss, and how many ``pictures``."""
    batch, x0, eps, times = noisy_pictures(config, num_classes, batch, quarter, QUARTERS)
    output = model.apply({"params": params}, batch, train=False).prediction
    found = diffusion.losses(config, output.astype(jnp.float32), x0, eps, times)
    weights = batch["weights"].astype(jnp.float32)
    sums = {name: (values * weights).sum() for name, values in found.items()}
    return {**sums, "pictures": weights.sum()}
