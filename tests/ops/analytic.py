"""Networks that know the data's distribution: the exact posterior mean, as each process asks it."""

import jax
import jax.numpy as jnp

from moejax.config.diffusion import Diffusion, TimeSampling
from moejax.ops.diffusion import path, target

EDM_TIMES = TimeSampling("log_normal", -1.2, 1.2)
EVERY = {
    "flow": Diffusion("flow"),
    "flow_to_data": Diffusion("flow", direction="to_data"),
    "flow_x0": Diffusion("flow", prediction="x0", direction="to_data"),
    "cosine_eps": Diffusion("ddpm"),
    "cosine_x0": Diffusion("ddpm", prediction="x0"),
    "linear_eps": Diffusion("ddpm", schedule="linear"),
    "linear_v": Diffusion("ddpm", schedule="linear", prediction="velocity"),
    "edm": Diffusion("edm", sigma_data=0.7, times=EDM_TIMES),
}


def network_of(diffusion: Diffusion, posterior_mean):
    """A network for samplers, of ``posterior_mean(x_t [b, z], a, b) -> x0 [b, z]``."""

    def network(seen, told_b):
        told = told_b[0]
        if diffusion.process == "edm":
            t = jnp.exp(4 * told)
            x_t = seen * jnp.sqrt(t**2 + diffusion.sigma_data**2)
        else:
            t = 1 - told if diffusion.direction == "to_data" else told
            x_t = seen
        a, b, *_ = path(diffusion, t, x_t)
        x0 = posterior_mean(x_t, a, b)
        return target(diffusion, x0, (x_t - a * x0) / b, t)

    return network


def gaussian(mean, std):
    """The posterior mean of data of N(mean, std^2)."""
    return lambda x, a, b: mean + a * std**2 * (x - a * mean) / (a**2 * std**2 + b**2)


def mixture(weights_k, means_kz, stds_k):
    """That of a mixture of normal distributions."""

    def posterior_mean(x, a, b):
        spread_k = (a * stds_k[None]) ** 2 + b**2
        away_bkz = x[:, None] - a[..., None] * means_kz[None]
        z = means_kz.shape[1]
        log_share = jnp.log(weights_k)[None] - 0.5 * z * jnp.log(spread_k)
        log_share -= 0.5 * jnp.square(away_bkz).sum(axis=-1) / spread_k
        share_bk = jax.nn.softmax(log_share, axis=1)
        each = means_kz[None] + (a * stds_k[None] ** 2 / spread_k)[..., None] * away_bkz
        return (share_bk[..., None] * each).sum(axis=1)

    return posterior_mean
