"""Noise on logits or tokens, in training alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.routing.plan import RouterInputs

# name -> (key, shape, dtype, experts) -> noise
NOISES: dict[str, Callable] = {
    # V-MoE, arXiv 2106.05974: a standard deviation of noise_scale / E.
    "gaussian": lambda key, shape, dtype, e: jax.random.normal(key, shape, dtype) / e,
    # The largest of softmax logits with Gumbel noise is a draw from the softmax.
    "gumbel": lambda key, shape, dtype, e: jax.random.gumbel(key, shape, dtype),
    # Gumbel-sigmoid, arXiv 2407.21770: the difference of two Gumbel variables.
    "logistic": lambda key, shape, dtype, e: jax.random.logistic(key, shape, dtype),
}
NOISE_CHOICES = ("", *NOISES)


def is_noisy(inputs: RouterInputs, kind: str) -> bool:
    """Whether noise of this kind is drawn: it is asked for, there is a key, in training."""
    return bool(kind) and inputs.train and inputs.rng is not None


def perturb(inputs: RouterInputs, kind: str, scale: float) -> Float[Array, "s n e"]:
    """``logits + scale * noise``; the logits themselves where there is none (:func:`is_noisy`)."""
    logits = inputs.logits
    if not is_noisy(inputs, kind):
        return logits
    noise = NOISES[kind](inputs.rng, logits.shape, logits.dtype, inputs.num_routed)
    return logits + scale * noise


def jitter(key: Array | None, x_snd: Float[Array, "s n d"], eps: float) -> Float[Array, "s n d"]:
    """Tokens times U(1 - eps, 1 + eps), as the scores see them (Switch, arXiv 2101.03961).

    Without a key, or with eps = 0, the tokens themselves.
    """
    if key is None or eps == 0:
        return x_snd
    dtype = jnp.promote_types(x_snd.dtype, jnp.float32)
    noise = jax.random.uniform(key, x_snd.shape, dtype, 1 - eps, 1 + eps)
    return (x_snd * noise).astype(x_snd.dtype)
