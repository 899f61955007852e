"""From noise to data by the network of a diffusion process, and classifier-free guidance.

A sampler walks down a grid of times (moejax/ops/diffusion_times.py). All of them see the network
through the x0 and eps that its output implies, and so work for every process and prediction; all
end with the implied x0 at their last step, to t = 0, which adds no noise:

* ``ddim``: the implied x0 and eps mixed anew at the next time (arXiv 2010.02502, equation 12 with
  eta = 0);
* ``ddpm``: a draw of ``q(x_s | x_t, x0)``, for "ddpm" ancestral sampling (arXiv 2006.11239), with
  the learned variance where there is one;
* ``euler``, ``heun``: the ordinary differential equation of the process in the time of its slope
  (:func:`~moejax.ops.diffusion.clock`); of "flow" and "edm" Euler's step is DDIM's, and Heun's is
  that of arXiv 2206.00364, algorithm 1;
* ``dpmpp_2m``: the two-step method in ``log(a / b)`` (arXiv 2211.01095, algorithm 2);
* ``sde``: Euler-Maruyama of the stochastic equation with the same distributions whose noise has
  the variance ``2 b`` per unit of time. That is SiT's default (arXiv 2401.08740, w = sigma), and of
  "edm" the reversed noising itself.

The step to 0 is Euler's of "flow" and "edm" as it is; for "ddpm" the implied x0 replaces it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from moejax.config.diffusion import Diffusion
from moejax.config.registry import Registry
from moejax.ops.diffusion import (
    clock,
    implied,
    kept_noise,
    learned_log_variance,
    network_input,
    path,
)

# (what the network reads [b, ..., z], the number that tells the time [b]) -> its raw output.
Network = Callable[[Array, Array], Array]


class Estimate(NamedTuple):
    """What the network makes of x_t: the implied x0 and eps, and its raw output."""

    x0: Array
    eps: Array
    output: Array


class Moment(NamedTuple):
    """What a step from t to s knows.

    Attributes:
      diffusion: the process.
      evaluate: (x, time) -> Estimate.
      x: at t.
      now: the estimate at t.
      x0_before: that of the step before; at the first step anything.
      t: of the step, and ``s`` < t where it leads.
      ratio: h / (2 h_before) of the step sizes in log(a / b); 0 at the first and the last step.
      draw: () -> standard normal numbers of each row's own.
    """

    diffusion: Diffusion
    evaluate: Callable[[Array, Array], Estimate]
    x: Array
    now: Estimate
    x0_before: Array
    t: Array
    s: Array
    ratio: Array
    draw: Callable[[], Array]


class Sampler(NamedTuple):
    """``step`` gives x at s; whether it draws noise."""

    step: Callable[[Moment], Array]
    random: bool = False


class Samples(NamedTuple):
    """What a sampler ends with, and the x0 that was implied on the way, of the steps asked for.

    Attributes:
      final: [b, ...].
      kept: [k, b, ...], in the order of ``keep``.
    """

    final: Array
    kept: Array


SAMPLERS: Registry[Sampler] = Registry("sampler")


def sample(
    diffusion: Diffusion,
    sampler: str,
    network: Network,
    noise: Float[Array, "b *rest"],
    times: Float[np.ndarray, " n"],
    key_b: Key[Array, " b"] | None = None,
    *,
    clip: float | None = None,
    keep: tuple[int, ...] = (),
) -> Samples:
    """Samples from standard normal ``noise`` down the grid ``times``, in float32.

    One program for all steps, for use inside of jit.

    Args:
      diffusion: that of training.
      sampler: a name of ``SAMPLERS``.
      network: (what it reads, the number that tells it the time [b]) -> its raw output, with the
        channels of ``noise`` first.
      noise: see :func:`row_noise`.
      times: falling, from :func:`~moejax.ops.diffusion_times.time_grid`.
      key_b: a key for each row, of samplers that draw noise: a row does not depend on the others.
      clip: bound of the absolute value of the implied x0, in units of the data. An imperfect
        "eps" needs it (4 is ample for latents of unit variance), since its x0 is very large near
        t = 1.
      keep: which steps' implied x0 are returned, from 0; the last one's is the sample.

    Raises:
      UserError: no such sampler.
      ValueError: ``key_b`` is missing, the grid does not fall, or ``keep`` names no step.
    """
    found = SAMPLERS.get(sampler, field="sampler")
    steps = len(times) - 1
    if found.random and key_b is None:
        raise ValueError(f"sampler {sampler!r} draws noise: give a key for each row")
    if steps < 1 or not np.all(np.diff(times) < 0) or times[-1] < 0:
        raise ValueError(f"a grid of times falls and ends at 0 or above, not {times}")
    if keep and not 0 <= min(keep) <= max(keep) < steps:
        raise ValueError(f"keep={keep}: there are steps 0 to {steps - 1}")
    times_n = jnp.asarray(times, jnp.float32)
    ratios_n = _ratios(diffusion, times_n)
    keep_k = jnp.asarray(keep, jnp.int32)
    noise = noise.astype(jnp.float32)

    def evaluate(x: Array, t: Array) -> Estimate:
        seen, told = network_input(diffusion, x, t)
        output = network(seen, jnp.full(len(x), told)).astype(jnp.float32)
        x0, eps = implied(diffusion, x, output, t)
        if clip is not None:
            a, b, *_ = path(diffusion, t, x)
            x0 = jnp.clip(x0, -clip, clip)
            eps = (x - a * x0) / b
        return Estimate(x0, eps, output)

    def one_step(index, carry):
        x, x0_before, kept = carry
        t, s = times_n[index], times_n[index + 1]
        now = evaluate(x, t)

        def draw():
            assert key_b is not None
            return row_noise(key_b, index + 1, x.shape[1:])

        moment = Moment(diffusion, evaluate, x, now, x0_before, t, s, ratios_n[index], draw)
        x = jnp.where(s > 0, found.step(moment), now.x0)
        here = (keep_k == index).reshape(-1, *(1,) * x.ndim)
        return x, now.x0, jnp.where(here, now.x0[None], kept)

    kept = jnp.zeros((len(keep), *noise.shape), jnp.float32)
    start = path(diffusion, times_n[0], noise).b * noise
    final, _, kept = jax.lax.fori_loop(0, steps, one_step, (start, jnp.zeros_like(noise), kept))
    return Samples(final, kept)


def row_noise(
    key_b: Key[Array, " b"], index: Any, shape: tuple[int, ...]
) -> Float[Array, "b *rest"]:
    """Standard normal numbers [b, *shape] by each row's key: 0 to begin with, then by the step."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(key_b)


def guide(
    conditional: Float[Array, "b *rest c"],
    unconditional: Float[Array, "b *rest c"],
    weight: float | Array,
    channels: int | None = None,
) -> Float[Array, "b *rest c"]:
    """Classifier-free guidance, ``uncond + w (cond - uncond)`` (arXiv 2207.12598).

    On any prediction the same, since x0 and eps follow linearly from it. In float32, and written so
    that w = 1 is the conditional bit for bit.

    Args:
      conditional: the network's output.
      unconditional: that without the condition.
      weight: w, a number or one for each row.
      channels: how many are guided, the first; the others are the conditional's. By default all.
    """
    conditional, unconditional = (x.astype(jnp.float32) for x in (conditional, unconditional))
    weight = jnp.asarray(weight, jnp.float32).reshape(-1, *(1,) * (conditional.ndim - 1))
    guided = conditional + (weight - 1.0) * (conditional - unconditional)
    if channels is None:
        return guided
    return jnp.concatenate([guided[..., :channels], conditional[..., channels:]], axis=-1)


def guided(
    network: Callable[[Array, Array, Any], Array],
    condition: Any,
    no_condition: Any,
    weight: float | Array,
    *,
    channels: int | None = None,
    interval: tuple[Any, Any] | None = None,
) -> Network:
    """The network with guidance: both branches in one call, of twice the rows.

    A row's two branches lie next to each other, so that devices that share a batch keep their rows.
    A weight that is the number 1 leaves out the branch without the condition.

    Args:
      network: (what it reads, time [b], condition) -> its raw output.
      condition: arrays with a row for each row of the data, such as labels [b].
      no_condition: the same without the condition, such as the null class.
      weight: w of :func:`guide`.
      channels: how many are guided; by default those of the data. DiT's published samples guide
        the first three of four (its README).
      interval: the lowest and the highest number that tells the time
        (:func:`~moejax.ops.diffusion.network_input`) at which guidance works (arXiv 2404.07724);
        elsewhere w is 1.
    """
    if isinstance(weight, (int, float)) and weight == 1:
        return lambda x, time_b: network(x, time_b, condition)
    paired = jax.tree.map(
        lambda yes, no: jnp.stack([yes, no], axis=1).reshape(-1, *jnp.shape(yes)[1:]),
        condition,
        no_condition,
    )

    def both(x: Array, time_b: Array) -> Array:
        rows = network(jnp.repeat(x, 2, axis=0), jnp.repeat(time_b, 2), paired)
        weight_b = jnp.broadcast_to(jnp.asarray(weight, jnp.float32), time_b.shape)
        if interval is not None:
            low, high = interval
            weight_b = jnp.where((time_b >= low) & (time_b <= high), weight_b, 1.0)
        return guide(rows[::2], rows[1::2], weight_b, channels or x.shape[-1])

    return both


def _ddim(moment: Moment) -> Array:
    """Straight to where the implied data and noise lie at the next time."""
    a, b, *_ = path(moment.diffusion, moment.s, moment.x)
    return a * moment.now.x0 + b * moment.now.eps


def _ddpm(moment: Moment) -> Array:
    """Draws from the posterior of the step, with the learned variance where there is one."""
    at_t, at_s = (path(moment.diffusion, time, moment.x) for time in (moment.t, moment.s))
    kept = kept_noise(at_t, at_s)
    std = at_s.b * jnp.sqrt(jnp.maximum(1 - jnp.square(kept), 0))
    if moment.diffusion.learned_range:
        output = moment.now.output
        std = jnp.exp(0.5 * learned_log_variance(moment.diffusion, output, moment.t, moment.s))
    mean = at_s.a * moment.now.x0 + at_s.b * kept * moment.now.eps
    return mean + std * moment.draw()


def _euler(moment: Moment) -> Array:
    """Along the slope at the time that it leaves."""
    return moment.x + _elapsed(moment) * _slope(moment.diffusion, moment.now, moment.t)


def _heun(moment: Moment) -> Array:
    """Euler's step, then once more with the mean of the slopes at both ends of it.

    The last step, whose result is not used, asks the network about t, where it has an answer.
    """
    later = jnp.where(moment.s > 0, moment.s, moment.t)
    ahead = moment.evaluate(_euler(moment), later)
    first = _slope(moment.diffusion, moment.now, moment.t)
    second = _slope(moment.diffusion, ahead, later)
    return moment.x + _elapsed(moment) * 0.5 * (first + second)


def _dpmpp_2m(moment: Moment) -> Array:
    """With the data implied by this step and the one before: second order, one call a step."""
    at_t, at_s = (path(moment.diffusion, time, moment.x) for time in (moment.t, moment.s))
    x0 = moment.now.x0 + moment.ratio * (moment.now.x0 - moment.x0_before)
    kept = at_s.b / at_t.b
    return kept * moment.x + (at_s.a - kept * at_t.a) * x0


def _sde(moment: Moment) -> Array:
    """Euler's step of the reverse equation with noise; it draws noise in each."""
    elapsed = _elapsed(moment)
    b = path(moment.diffusion, moment.t, moment.x).b
    # The score is -eps / b: with noise of variance 2 b it adds eps to the slope.
    drift = _slope(moment.diffusion, moment.now, moment.t) + moment.now.eps
    return moment.x + elapsed * drift + jnp.sqrt(-2 * b * elapsed) * moment.draw()


def _slope(diffusion: Diffusion, estimate: Estimate, t: Array) -> Array:
    _, _, da, db = path(diffusion, t, estimate.x0)
    return da * estimate.x0 + db * estimate.eps


def _elapsed(moment: Moment) -> Array:
    return clock(moment.diffusion, moment.s) - clock(moment.diffusion, moment.t)


def _ratios(diffusion: Diffusion, times_n: Array) -> Array:
    """``h_i / (2 h_(i-1))`` of each step, with ``h_i`` its size in log(a / b).

    0 at the first step, at the one after an infinite step (from t = 1 of "flow"), and to t = 0.
    """
    a, b, *_ = path(diffusion, times_n, times_n)
    sizes = jnp.diff(jnp.log(a) - jnp.log(b))
    ratios = 0.5 * sizes[1:] / sizes[:-1]
    return jnp.pad(jnp.where(jnp.isfinite(ratios), ratios, 0), (1, 0))


for _name, _sampler in {
    "ddim": Sampler(_ddim),
    "ddpm": Sampler(_ddpm, random=True),
    "euler": Sampler(_euler),
    "heun": Sampler(_heun),
    "dpmpp_2m": Sampler(_dpmpp_2m),
    "sde": Sampler(_sde, random=True),
}.items():
    SAMPLERS.register(_name)(_sampler)
