"""How pictures are drawn by a diffusion process, whatever model it is of."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from moejax.config.checks import require
from moejax.config.diffusion import Diffusion
from moejax.errors import UserError
from moejax.ops.diffusion import network_input
from moejax.ops.diffusion_times import time_grid
from moejax.ops.samplers import SAMPLERS

# How far an implied data point may lie from 0: pixels are in [-1, 1], latents have unit variance.
PIXEL_CLIP, LATENT_CLIP = 1.0, 4.0


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How pictures are drawn.

    Attributes:
      sampler: of moejax.ops.samplers.
      steps: of the sampler.
      spacing: of its times (moejax.ops.diffusion_times.time_grid); "" is the process's own.
      shift: of its times; above 1 it stays longer where there is much noise. 1 for "edm".
      guidance: weight w of ``uncond + w (cond - uncond)``.
      interval: lowest and highest time t (moejax/ops/diffusion.py, whatever the network is told) at
        which guidance works (arXiv 2404.07724); None: all.
    """

    sampler: str = "ddim"
    steps: int = 50
    spacing: str = ""
    shift: float = 1.0
    guidance: float = 1.0
    interval: tuple[float, float] | None = None

    def times(self, diffusion: Diffusion) -> np.ndarray:
        """The grid of the sampler, [steps + 1], falling."""
        return time_grid(diffusion, self.steps, self.spacing, self.shift)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Pictures, and what they looked like on the way.

    Attributes:
      pictures: [n, h, w, 3] uint8.
      kept: [k, n, h, w, 3] uint8, the implied pictures at the steps that were asked for.
      times: [k], the times of these steps.
    """

    pictures: UInt8[np.ndarray, "n h w 3"]
    kept: UInt8[np.ndarray, "k n h w 3"]
    times: Float[np.ndarray, " k"]


def check_drawing(drawing: Drawing, diffusion: Diffusion) -> Drawing:
    """UserError naming the flag for what cannot be; returns ``drawing``."""
    SAMPLERS.get(drawing.sampler, field="--sampler")
    require(drawing.steps >= 1, "--denoise-steps", f"must be positive, got {drawing.steps}")
    check_guidance(drawing.guidance)
    shift = drawing.shift
    require(0 < shift < math.inf, "--shift", f"must be positive and finite, got {shift}")
    require(
        diffusion.process != "edm" or shift == 1,
        "--shift",
        "leave it 1 for 'edm', whose times are noise levels (--spacing)",
    )
    if drawing.interval is not None:
        low, high = drawing.interval
        require(
            0 <= low < high,
            "--guidance-interval",
            f"need 0 <= the lower time < the higher one, got {low} and {high}",
        )
    try:
        drawing.times(diffusion)
    except UserError as error:
        raise UserError(f"--spacing: {error}") from error
    except ValueError as error:
        raise UserError(f"--denoise-steps: {error}") from error
    return drawing


def check_guidance(weight: float) -> None:
    """UserError naming the flag for a weight that cannot be."""
    require(0 <= weight < math.inf, "--guidance", f"must be 0 or more, got {weight}")


def each_of(name: str, values: Any, count: int) -> np.ndarray:
    """One of the values for each of ``count`` pictures; UserError if there are more or fewer."""
    values = np.asarray(values)
    if values.shape not in ((), (count,)):
        raise UserError(f"{name}: {count} pictures, and {len(values)} of these; give one for each")
    return np.broadcast_to(values, (count,))


def told_of(diffusion: Diffusion, interval: tuple[float, float] | None) -> tuple | None:
    """Times, as the lowest and the highest number by which the network is told of them."""
    if interval is None:
        return None
    times = jnp.asarray(interval, jnp.float32)
    _, told = network_input(diffusion, times, times)
    return told.min(), told.max()
