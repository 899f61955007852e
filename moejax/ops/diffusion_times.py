"""Times of a diffusion process: those that training draws, and those that a sampler goes through.

Times are those of moejax/ops/diffusion.py: 0 is data, and noise grows with them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from moejax.config.diffusion import Diffusion
from moejax.errors import UserError
from moejax.ops.diffusion import TIMESTEPS

SPACINGS = ("uniform", "rho", "exponential")
# EDM's, of its spacing (arXiv 2206.00364, table 1).
RHO = 7.0


def quantile_times(
    diffusion: Diffusion, share: Float[Array, "..."], max_time: Any = 1.0
) -> Float[Array, "..."]:
    """The time below which training draws this share of its times, float32.

    For "ddpm" one of i / 1000 for i in 1..1000. 0 never occurs: it is left to mark clean latents.

    Args:
      diffusion: its ``times`` say how they are distributed.
      share: in (0, 1].
      max_time: largest time, a number or an array that broadcasts to ``share``; times are scaled
        to (0, max_time]. Transfusion caps pictures that come before their caption at 0.5.
    """
    times = diffusion.times
    share = share.astype(jnp.float32)
    if times.distribution == "uniform":
        t = share
    elif times.distribution == "log_logistic":
        low, high = (
            jax.nn.sigmoid((jnp.log(sigma) - times.mean) / times.std)
            for sigma in (diffusion.sigma_min, diffusion.sigma_max)
        )
        inner = low + share * (high - low)
        t = jnp.exp(times.mean + times.std * jax.scipy.special.logit(inner))
    else:
        # The largest number below 1: the quantile of 1 is infinite.
        normal = jax.scipy.special.ndtri(jnp.minimum(share, 1 - 2.0**-24))
        along = jax.nn.sigmoid if times.distribution == "logit_normal" else jnp.exp
        t = along(times.mean + times.std * normal)
    if diffusion.process == "edm":
        return t
    t = _shifted(t, times.shift) * jnp.broadcast_to(jnp.asarray(max_time, jnp.float32), t.shape)
    if diffusion.process == "ddpm":
        return jnp.maximum(jnp.ceil(t * TIMESTEPS), 1) / TIMESTEPS
    return jnp.maximum(t, jnp.finfo(jnp.float32).tiny)


def sample_times(
    diffusion: Diffusion, rng: Key[Array, ""], shape: tuple[int, ...], max_time: Any = 1.0
) -> Float[Array, "..."]:
    """Times to train at, distributed as ``diffusion.times`` says (:func:`quantile_times`)."""
    share = 1.0 - jax.random.uniform(rng, shape, jnp.float32)
    return quantile_times(diffusion, share, max_time)


def time_grid(
    diffusion: Diffusion, steps: int, spacing: str = "", shift: float = 1.0, rho: float = RHO
) -> Float[np.ndarray, " n"]:
    """The ``steps + 1`` times of a sampler, from the most noise down to 0.

    Args:
      diffusion: the process.
      steps: > 0.
      spacing: of "flow" and "ddpm" ``uniform``: evenly from 1 to 0, then shifted as in
        :class:`~moejax.config.diffusion.TimeSampling`. Of "edm" ``rho``: evenly in
        ``sigma^(1 / rho)`` from ``sigma_max`` to ``sigma_min``, then 0 (arXiv 2206.00364, equation
        5), or ``exponential``: evenly in ``log(sigma)``, as MoDE has it. "" is the first of them.
      shift: of ``uniform``.
      rho: of ``rho``.

    Raises:
      UserError: a spacing that is not the process's.
      ValueError: the discrete process has not so many times.
    """
    fitting = SPACINGS[1:] if diffusion.process == "edm" else SPACINGS[:1]
    spacing = spacing or fitting[0]
    if spacing not in fitting:
        raise UserError(
            f"spacing {spacing!r} is not one of process {diffusion.process!r}; use "
            + " or ".join(fitting)
        )
    down = np.linspace(1.0, 0.0, steps + 1)
    if spacing == "uniform":
        times = _shifted(down, shift)
    else:
        low, high = diffusion.sigma_min, diffusion.sigma_max
        down = np.linspace(1.0, 0.0, steps)
        if spacing == "rho":
            low, high = low ** (1 / rho), high ** (1 / rho)
            levels = (low + down * (high - low)) ** rho
        else:
            levels = low * (high / low) ** down
        times = np.append(levels, 0.0)
    if diffusion.process == "ddpm":
        index = np.rint(times * TIMESTEPS)
        if np.any(np.diff(index) >= 0):
            raise ValueError(
                f"ddpm has {TIMESTEPS} discrete times, which cannot give {steps} different "
                f"steps with shift {shift}"
            )
        times = index / TIMESTEPS
    return times.astype(np.float32)


def _shifted(t, shift: float):
    return shift * t / (1 + (shift - 1) * t)
