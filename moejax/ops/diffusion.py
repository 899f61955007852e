"""Gaussian diffusion and rectified flow of continuous latents, under one convention of time.

``t`` is a float in [0, 1]: at 0 there is only data, at 1 only noise, and
``x_t = a(t) x0 + b(t) eps``. Both processes have their functions here, chosen by name:

* ``"ddpm"``: the model predicts ``eps``; the cosine schedule (arXiv 2102.09672, section 3.2) on
  1,000 discrete steps, as Transfusion has it (arXiv 2408.11039).
* ``"flow"``: rectified flow, ``x_t = (1 - t) x0 + t eps``; the model predicts ``eps - x0``.

Elsewhere: DDPM papers count steps ``i = 1..T`` in the same direction, so ``t = i / T``. Stable
Diffusion 3 and BAGEL have this direction for the flow. Rectified flow and flow matching
(arXiv 2209.03003, 2210.02747) and lucidrains/transfusion-pytorch run from noise at 0 to data at 1:
their time is ``1 - t`` and their target ``x0 - eps``, the negative of the one here.

``t`` has any leading axes of the latents and is broadcast over the others: [b] or [b, t] for
latents [b, t, z]. Results have the dtype of the latents, which should be float32 or wider.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from moejax.config.diffusion import TimeSampling
from moejax.config.registry import Registry

# Steps of the discrete process.
TIMESTEPS = 1000
_OFFSET = 0.008
_MAX_BETA = 0.999


class Process(NamedTuple):
    """What sets one process apart from another.

    Attributes:
      coefficients: t -> (a, b), of the same shape, in float32.
      target: (x0, eps) -> what the model is trained to predict.
      parts: (x_t, prediction, a, b) -> (x0, eps) that the prediction implies.
      levels: number of discrete times above 0 that t is rounded to; 0 if it is continuous.
    """

    coefficients: Callable[[Array], tuple[Array, Array]]
    target: Callable[[Array, Array], Array]
    parts: Callable[[Array, Array, Array, Array], tuple[Array, Array]]
    levels: int = 0


PROCESSES: Registry[Process] = Registry("diffusion process")


def add_noise(
    process: str, x0: Float[Array, "..."], eps: Float[Array, "..."], t: Float[Array, "..."]
) -> Float[Array, "..."]:
    """``a(t) x0 + b(t) eps``; at t = 0 exactly ``x0``."""
    a, b = _coefficients(process, t, x0)
    return a * x0 + b * eps


def target(process: str, x0: Float[Array, "..."], eps: Float[Array, "..."]) -> Float[Array, "..."]:
    """What the model is trained to predict from ``x_t``, the same at every t."""
    return PROCESSES.get(process).target(x0, eps)


def predict_x0(
    process: str,
    x_t: Float[Array, "..."],
    prediction: Float[Array, "..."],
    t: Float[Array, "..."],
) -> Float[Array, "..."]:
    """The data that the model's prediction implies.

    For "ddpm" it divides by ``a(t)``, which falls to 5e-5 at t = 1: errors of the prediction grow
    by as much.
    """
    return PROCESSES.get(process).parts(x_t, prediction, *_coefficients(process, t, x_t))[0]


def step(
    process: str,
    x_t: Float[Array, "..."],
    prediction: Float[Array, "..."],
    t: Float[Array, "..."],
    s: Float[Array, "..."],
    noise: Float[Array, "..."] | None = None,
    clip: float | None = None,
) -> Float[Array, "..."]:
    """One sampler step from t to s < t, however far apart the two are.

    Without ``noise`` the deterministic one: for "ddpm" DDIM with eta = 0 (arXiv 2010.02502,
    equation 12), for "flow" Euler, ``x_t + (s - t) prediction``. With ``noise`` (standard normal)
    the sample of ``q(x_s | x_t, x0)``: for "ddpm" ancestral sampling with the posterior variance
    (arXiv 2006.11239, equation 7). At s = 0 both are the implied x0.

    Args:
      clip: bound of the absolute value of the implied x0, in units of the latents. An imperfect
        "ddpm" prediction needs it (4 is ample for latents of unit variance), since the implied x0
        is very large near t = 1.
    """
    a_t, b_t = _coefficients(process, t, x_t)
    a_s, b_s = _coefficients(process, s, x_t)
    x0, eps = PROCESSES.get(process).parts(x_t, prediction, a_t, b_t)
    if clip is not None:
        x0 = jnp.clip(x0, -clip, clip)
        eps = (x_t - a_t * x0) / b_t
    if noise is not None:
        # The share of the noise at s that is the noise at t, for the variance of the posterior
        # to be b_s^2 (1 - kept^2).
        kept = a_t * b_s / (a_s * b_t)
        eps = kept * eps + jnp.sqrt(jnp.maximum(1 - jnp.square(kept), 0)) * noise
    return a_s * x0 + b_s * eps


def time_grid(process: str, steps: int, shift: float = 1.0) -> Float[np.ndarray, " n"]:
    """The ``steps + 1`` times of a sampler, from 1 down to 0, evenly spread before the shift.

    The shift is that of :class:`TimeSampling`. Raises ValueError if the discrete process has not
    so many times.
    """
    times = _shifted(np.linspace(1.0, 0.0, steps + 1), shift)
    levels = PROCESSES.get(process).levels
    if levels:
        index = np.rint(times * levels)
        if np.any(np.diff(index) >= 0):
            raise ValueError(
                f"{process} has {levels} discrete times, which cannot give {steps} different "
                f"steps with shift {shift}"
            )
        times = index / levels
    return times.astype(np.float32)


def sample_times(
    process: str,
    rng: Key[Array, ""],
    shape: tuple[int, ...],
    options: TimeSampling | None = None,
    max_time: Any = 1.0,
) -> Float[Array, "..."]:
    """Times in (0, 1] to train at, float32; for "ddpm" one of i / 1000 for i in 1..1000.

    0 is never drawn: it is left to mark clean latents.

    Args:
      shape: of the result.
      options: the distribution; by default uniform.
      max_time: largest time, a number or an array that broadcasts to ``shape``; times are scaled
        to (0, max_time]. Transfusion caps pictures that come before their caption at 0.5.
    """
    options = options or TimeSampling()
    if options.distribution == "uniform":
        t = 1.0 - jax.random.uniform(rng, shape, jnp.float32)
    else:
        normal = jax.random.normal(rng, shape, jnp.float32)
        t = jax.nn.sigmoid(options.mean + options.std * normal)
    t = _shifted(t, options.shift) * jnp.broadcast_to(jnp.asarray(max_time, jnp.float32), shape)
    levels = PROCESSES.get(process).levels
    if levels:
        return jnp.maximum(jnp.ceil(t * levels), 1) / levels
    return jnp.maximum(t, jnp.finfo(jnp.float32).tiny)


def timestep_embedding(t: Float[Array, "..."], dim: int) -> Float[Array, "... {dim}"]:
    """Cosines, then sines, of 1000 t at ``dim // 2`` frequencies from 1 to near 1/10000 (float32).

    As in arXiv 2105.05233's code; an odd ``dim`` ends in a zero.
    """
    half = dim // 2
    frequencies = np.exp(-math.log(10_000) * np.arange(half) / max(half, 1))
    angles = 1000.0 * t.astype(jnp.float32)[..., None] * _last_axis(frequencies, t.ndim)
    zeros = jnp.zeros((*t.shape, dim - 2 * half), jnp.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles), zeros], axis=-1)


def _coefficients(process: str, t: Array, like: Array) -> tuple[Array, Array]:
    """(a, b) with the rank and the dtype of ``like``."""
    a, b = PROCESSES.get(process).coefficients(t)
    shape = t.shape + (1,) * (like.ndim - t.ndim)
    return a.reshape(shape).astype(like.dtype), b.reshape(shape).astype(like.dtype)


def _shifted(t, shift: float):
    return shift * t / (1 + (shift - 1) * t)


def _last_axis(values: np.ndarray, leading: int) -> Array:
    return jnp.asarray(values, jnp.float32).reshape(*(1,) * leading, -1)


@functools.cache
def cosine_schedule() -> tuple[np.ndarray, np.ndarray]:
    """``(sqrt(abar), sqrt(1 - abar))`` at steps 0..1000, in float64.

    ``abar_i`` is the product of ``1 - beta``, and ``beta_i = min(1 - f(i) / f(i - 1), 0.999)`` with
    ``f(i) = cos((i / T + s) / (1 + s) * pi / 2)^2``, s = 0.008 (arXiv 2102.09672, equation 17).
    """
    index = np.arange(TIMESTEPS + 1)
    f = np.square(np.cos((index / TIMESTEPS + _OFFSET) / (1 + _OFFSET) * np.pi / 2))
    beta = np.minimum(1 - f[1:] / f[:-1], _MAX_BETA)
    abar = np.concatenate([[1.0], np.cumprod(1 - beta)])
    return np.sqrt(abar), np.sqrt(1 - abar)


def _cosine_coefficients(t: Array) -> tuple[Array, Array]:
    index = jnp.round(t.astype(jnp.float32) * TIMESTEPS).astype(jnp.int32)
    a, b = (jnp.asarray(values, jnp.float32)[index] for values in cosine_schedule())
    return a, b


def _linear_coefficients(t: Array) -> tuple[Array, Array]:
    t = t.astype(jnp.float32)
    return 1 - t, t


PROCESSES.register("ddpm")(
    Process(
        coefficients=_cosine_coefficients,
        target=lambda x0, eps: eps,
        parts=lambda x_t, eps, a, b: ((x_t - b * eps) / a, eps),
        levels=TIMESTEPS,
    )
)
PROCESSES.register("flow")(
    Process(
        coefficients=_linear_coefficients,
        target=lambda x0, eps: eps - x0,
        parts=lambda x_t, velocity, a, b: (x_t - b * velocity, x_t + a * velocity),
    )
)
