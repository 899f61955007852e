"""Diffusion of continuous data: noise, what a network sees and predicts, and its training loss.

A process (:class:`~moejax.config.diffusion.Diffusion`) mixes data and noise at a time t, at which
``x_t = a(t) x0 + b(t) eps``:

* ``"flow"``: rectified flow, ``a = 1 - t`` and ``b = t``;
* ``"ddpm"``: ``a^2 + b^2 = 1`` on 1,000 discrete steps, by the cosine schedule (arXiv 2102.09672,
  section 3.2; Transfusion's) or the linear one (arXiv 2006.11239, section 4; DiT's);
* ``"edm"``: ``a = 1`` and ``b = t``, the noise level sigma (arXiv 2206.00364).

**Time has one direction here**: at 0 there is only data, and the noise grows with t, up to 1 (of
"edm" up to ``sigma_max``). Papers differ, and a network may see another number
(:func:`network_input`): with ``direction="to_data"`` it is ``1 - t``, from noise at 0 to data at 1,
and the velocity has the other sign (arXiv 2209.03003, 2210.02747, SiT); Stable Diffusion 3, BAGEL
and DiT-MoE have the direction of this module. DDPM papers count steps ``i = 1..T``: ``t = i / T``.

**A prediction** is a linear mixture of x0 and eps, from which both follow (:func:`implied`):

* ``"eps"`` and ``"x0"``;
* ``"velocity"``: the slope of the path. Of "flow" in time, ``eps - x0``; of "ddpm" in the angle
  ``atan2(b, a)``, ``a eps - b x0``, which is the v of arXiv 2202.00512;
* ``"preconditioned"``: EDM's, ``x0 = c_skip x_t + c_out prediction``. Of data and noise both of
  unit variance (x0 / sigma_data, and ``c_in x_t``) it is the negative of that v.

The loss is the squared error of the prediction whatever it is: for "preconditioned" this is EDM's
weighted error of the data, since its weight times ``c_out^2`` is 1 (table 1 there).

``t`` has any leading axes of the latents and is broadcast over the others: [b] or [b, t] for
latents [b, t, z]. Results have the dtype of the latents, which should be float32 or wider.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Array, Float

from moejax.config.diffusion import Diffusion

# Steps of the discrete process.
TIMESTEPS = 1000
_OFFSET = 0.008
_MAX_BETA = 0.999
_FIRST_BETA, _LAST_BETA = 1e-4, 0.02
# Half the distance of two values of a picture, uint8 in [-1, 1].
_HALF_BIN = 1 / 255


class Path(NamedTuple):
    """``x_t = a x0 + b eps`` at a time, and its slope ``da x0 + db eps`` in :func:`clock`."""

    a: Array
    b: Array
    da: Array
    db: Array


def path(diffusion: Diffusion, t: Float[Array, "..."], like: Float[Array, "..."]) -> Path:
    """The coefficients at t, with the rank and the dtype of ``like``."""
    wide = t.astype(jnp.float32)
    one = jnp.ones_like(wide)
    if diffusion.process == "flow":
        found = Path(1 - wide, wide, -one, one)
    elif diffusion.process == "edm":
        found = Path(one, wide, 0 * one, one)
    else:
        index = jnp.round(wide * TIMESTEPS).astype(jnp.int32)
        tables = noise_schedule(diffusion.schedule)
        a, b = (jnp.asarray(values, jnp.float32)[index] for values in tables)
        found = Path(a, b, -b, a)
    shape = t.shape + (1,) * (like.ndim - t.ndim)
    return Path(*(value.reshape(shape).astype(like.dtype) for value in found))


def clock(diffusion: Diffusion, t: Float[Array, "..."]) -> Float[Array, "..."]:
    """The time in which the slope of :class:`Path` is one: t, of "ddpm" the angle of (a, b)."""
    if diffusion.process != "ddpm":
        return t
    a, b, *_ = path(diffusion, t, t)
    return jnp.arctan2(b, a)


@functools.cache
def noise_schedule(name: str) -> tuple[np.ndarray, np.ndarray]:
    """``(sqrt(abar), sqrt(1 - abar))`` at steps 0..1000, in float64.

    ``abar_i`` is the product of ``1 - beta``. "cosine": beta is ``min(1 - f(i) / f(i - 1), 0.999)``
    with ``f(i) = cos((i / T + s) / (1 + s) * pi / 2)^2``, s = 0.008 (arXiv 2102.09672, equation
    17). "linear": beta from 1e-4 to 0.02 in equal steps (arXiv 2006.11239, section 4).
    """
    if name == "cosine":
        index = np.arange(TIMESTEPS + 1)
        f = np.square(np.cos((index / TIMESTEPS + _OFFSET) / (1 + _OFFSET) * np.pi / 2))
        beta = np.minimum(1 - f[1:] / f[:-1], _MAX_BETA)
    else:
        beta = np.linspace(_FIRST_BETA, _LAST_BETA, TIMESTEPS)
    abar = np.concatenate([[1.0], np.cumprod(1 - beta)])
    return np.sqrt(abar), np.sqrt(1 - abar)


def add_noise(
    diffusion: Diffusion,
    x0: Float[Array, "..."],
    eps: Float[Array, "..."],
    t: Float[Array, "..."],
) -> Float[Array, "..."]:
    """``a(t) x0 + b(t) eps``; at t = 0 exactly ``x0``."""
    a, b, *_ = path(diffusion, t, x0)
    return a * x0 + b * eps


def network_input(
    diffusion: Diffusion, x_t: Float[Array, "..."], t: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(what the network reads, the number that tells it the time).

    Of "flow" and "ddpm" x_t itself and t, or ``1 - t`` with ``direction="to_data"``. Of "edm"
    ``c_in x_t`` and ``c_noise = log(sigma) / 4``. A network embeds the number as it is given, by
    :func:`timestep_embedding`, whatever the process. DiT counts its steps from 0, one less than
    ``1000 t``.
    """
    if diffusion.process == "edm":
        return x_t / _total(diffusion, t, x_t), jnp.log(t) / 4
    return x_t, 1 - t if diffusion.direction == "to_data" else t


def target(
    diffusion: Diffusion,
    x0: Float[Array, "..."],
    eps: Float[Array, "..."],
    t: Float[Array, "..."],
) -> Float[Array, "..."]:
    """What the network is trained to predict at t."""
    if diffusion.predicts == "eps":
        return eps
    if diffusion.predicts == "x0":
        return x0
    _, b, da, db = path(diffusion, t, x0)
    if diffusion.predicts == "velocity":
        return _sign(diffusion) * (da * x0 + db * eps)
    total = _total(diffusion, t, x0)
    return b / total * (x0 / diffusion.sigma_data) - diffusion.sigma_data / total * eps


def implied(
    diffusion: Diffusion,
    x_t: Float[Array, "... z"],
    output: Float[Array, "... c"],
    t: Float[Array, "..."],
) -> tuple[Float[Array, "... z"], Float[Array, "... z"]]:
    """(x0, eps) that the network's raw output implies.

    Channels of the output beyond those of ``x_t`` are no prediction, and are not read.

    An error of "eps" is in x0 ``b / a`` times as large: 20,000 at t = 1 of the cosine schedule, 160
    of the linear one.
    """
    prediction = output[..., : x_t.shape[-1]]
    a, b, da, db = path(diffusion, t, x_t)
    if diffusion.predicts == "eps":
        return (x_t - b * prediction) / a, prediction
    if diffusion.predicts == "x0":
        return prediction, (x_t - a * prediction) / b
    if diffusion.predicts == "velocity":
        # The matrix (a, b; da, db) has determinant 1 in both processes.
        velocity = _sign(diffusion) * prediction
        return db * x_t - b * velocity, a * velocity - da * x_t
    total = _total(diffusion, t, x_t)
    scaled, cos, sin = x_t / total, diffusion.sigma_data / total, b / total
    x0 = diffusion.sigma_data * (cos * scaled + sin * prediction)
    return x0, sin * scaled - cos * prediction


def losses(
    diffusion: Diffusion,
    output: Float[Array, "b *rest c"],
    x0: Float[Array, "b *rest z"],
    eps: Float[Array, "b *rest z"],
    t: Float[Array, " b"],
) -> dict[str, Float[Array, " b"]]:
    """The training losses of each example, each a mean over its numbers; their sum is trained.

    ``error``: the squared error of the prediction. With ``learned_range`` also ``bound``: bits of
    the variational bound's term at t, as a function of the variance alone.

    Raises ValueError if the output has fewer channels than the process asks for.
    """
    z = x0.shape[-1]
    if output.shape[-1] < z * (1 + diffusion.learned_range):
        raise ValueError(
            f"an output of {output.shape[-1]} channels for data of {z}"
            + (", and as many for the learned range" if diffusion.learned_range else "")
        )
    examples = lambda values: values.reshape(len(values), -1).mean(axis=1)
    difference = output[..., :z] - target(diffusion, x0, eps, t)
    found = {"error": examples(jnp.square(difference))}
    if diffusion.learned_range:
        found["bound"] = examples(variational_bound(diffusion, output, x0, eps, t))
    return found


def kept_noise(at_t: Path, at_s: Path) -> Array:
    """The share of the noise at s that is the noise at t, in ``q(x_s | x_t, x0)``.

    Its mean is ``a_s x0 + b_s kept eps`` and its variance ``b_s^2 (1 - kept^2)`` (arXiv 2006.11239,
    equation 7, for any s < t of any process).
    """
    return at_t.a * at_s.b / (at_s.a * at_t.b)


def learned_log_variance(
    diffusion: Diffusion,
    output: Float[Array, "... c"],
    t: Float[Array, "..."],
    s: Float[Array, "..."],
) -> Float[Array, "... z"]:
    """The logarithm of the variance of ``p(x_s | x_t)`` that the output's second half says.

    It says where between the two bounds, as -1 to 1: the variance of ``q(x_s | x_t, x0)``, and
    that of ``q(x_t | x_s)`` (arXiv 2102.09672, equation 15).
    """
    share = (output[..., output.shape[-1] // 2 :] + 1) / 2
    at_t, at_s = path(diffusion, t, output), path(diffusion, s, output)
    high = jnp.log(_step_variance(at_t, at_s))
    return share * high + (1 - share) * _log_posterior_variance(diffusion, t, s, output)


def variational_bound(
    diffusion: Diffusion,
    output: Float[Array, "... c"],
    x0: Float[Array, "... z"],
    eps: Float[Array, "... z"],
    t: Float[Array, "..."],
) -> Float[Array, "... z"]:
    """Bits of the term of the variational bound at t, of each number (arXiv 2102.09672, eq. 4-6).

    The divergence of the model's step from ``q(x_s | x_t, x0)``, s one step before t; at s = 0 the
    code length of the data in bins of a picture's values (arXiv 2006.11239, equation 13), as DiT
    has it for latents too. The mean gets no gradient. The authors' code takes bits, and T times
    their lambda of 0.001 is 1.
    """
    s = t - 1 / TIMESTEPS
    x_t = add_noise(diffusion, x0, eps, t)
    at_t, at_s = path(diffusion, t, x0), path(diffusion, s, x0)
    kept = kept_noise(at_t, at_s)
    mean_of = lambda data, noise: at_s.a * data + at_s.b * kept * noise
    mean = jax.lax.stop_gradient(mean_of(*implied(diffusion, x_t, output, t)))
    log_variance = learned_log_variance(diffusion, output, t, s)
    true_log_variance = _log_posterior_variance(diffusion, t, s, x0)
    ratio = true_log_variance - log_variance
    square = jnp.square(mean_of(x0, eps) - mean) * jnp.exp(-log_variance)
    divergence = 0.5 * (jnp.exp(ratio) - 1 - ratio + square)
    length = -_log_bin_probability(x0, mean, jnp.exp(0.5 * log_variance))
    return jnp.where(at_s.b == 0, length, divergence) / math.log(2)


def timestep_embedding(t: Float[Array, "..."], dim: int) -> Float[Array, "... {dim}"]:
    """Cosines, then sines, of 1000 t at ``dim // 2`` frequencies from 1 to near 1/10000 (float32).

    As in arXiv 2105.05233's code; an odd ``dim`` ends in a zero.
    """
    half = dim // 2
    frequencies = np.exp(-math.log(10_000) * np.arange(half) / max(half, 1))
    angles = 1000.0 * t.astype(jnp.float32)[..., None] * _last_axis(frequencies, t.ndim)
    zeros = jnp.zeros((*t.shape, dim - 2 * half), jnp.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles), zeros], axis=-1)


def _last_axis(values: np.ndarray, leading: int) -> Array:
    return jnp.asarray(values, jnp.float32).reshape(*(1,) * leading, -1)


def _sign(diffusion: Diffusion) -> float:
    return -1.0 if diffusion.direction == "to_data" else 1.0


def _total(diffusion: Diffusion, t: Array, like: Array) -> Array:
    """The standard deviation of x_t, of "edm"."""
    return jnp.hypot(path(diffusion, t, like).b, jnp.asarray(diffusion.sigma_data, like.dtype))


def _step_variance(at_t: Path, at_s: Path) -> Array:
    """That of ``q(x_t | x_s)``: beta, where s is one step before t."""
    return jnp.square(at_t.b) - jnp.square(at_t.a / at_s.a * at_s.b)


def _log_posterior_variance(diffusion: Diffusion, t: Array, s: Array, like: Array) -> Array:
    """That of ``q(x_s | x_t, x0)``; at s = 0, where it is 0, that of the step before.

    The authors' code does so too ("clipped").
    """
    t, s = (jnp.where(s > 0, time, step / TIMESTEPS) for time, step in ((t, 2), (s, 1)))
    at_t, at_s = path(diffusion, t, like), path(diffusion, s, like)
    return jnp.log(_step_variance(at_t, at_s)) + 2 * jnp.log(at_s.b / at_t.b)


def _log_bin_probability(x: Array, mean: Array, std: Array) -> Array:
    """Of the bin around x of a normal distribution; the first and the last bin are open."""
    above, below = (x - mean + _HALF_BIN) / std, (x - mean - _HALF_BIN) / std
    inner = jnp.log(jnp.maximum(norm.cdf(above) - norm.cdf(below), 1e-12))
    last = norm.logsf(below)
    first = norm.logcdf(above)
    return jnp.where(x < -0.999, first, jnp.where(x > 0.999, last, inner))
