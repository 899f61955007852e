"""From logits to a token: guidance, masks, temperature, top-k, top-p. All in float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moejax.errors import UserError


class Sampling(struct.PyTreeNode):
    """How tokens are drawn. Numbers, not shapes: changing them compiles nothing.

    Attributes:
      temperature: 0 takes the likeliest token.
      top_k: keep so many of the likeliest tokens; 0 keeps all.
      top_p: keep the likeliest tokens that together reach this probability; 1 keeps all.
      guidance: weight w of ``uncond + w (cond - uncond)``; 1 is the conditional model alone.
    """

    temperature: float | jax.Array = 1.0
    top_k: int | jax.Array = 0
    top_p: float | jax.Array = 1.0
    guidance: float | jax.Array = 1.0


def check_sampling(sampling: Sampling) -> Sampling:
    """UserError naming the flag for a value that means nothing; returns ``sampling``."""
    rules = (
        ("temperature", sampling.temperature >= 0, "must be 0 (greedy) or more"),
        ("top-k", sampling.top_k >= 0, "must be 0 (off) or more"),
        ("top-p", 0 < sampling.top_p <= 1, "must be in (0, 1]"),
        ("guidance", 0 <= sampling.guidance < float("inf"), "must be 0 or more"),
    )
    for name, holds, message in rules:
        if not holds:
            value = getattr(sampling, name.replace("-", "_"))
            raise UserError(f"--{name}: {message}, got {value}")
    return sampling


def guide(
    cond_bv: Float[Array, "b v"], uncond_bv: Float[Array, "b v"], weight: float | jax.Array
) -> Float[Array, "b v"]:
    """Classifier-free guidance on log-probabilities: ``uncond + w (cond - uncond)``.

    arXiv 2207.12598 as used for tokens. Written so that w = 1 is the conditional bit for bit.
    """
    cond, uncond = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (cond_bv, uncond_bv))
    return cond + (weight - 1.0) * (cond - uncond)


def mask_logits(
    logits_bv: Float[Array, "b v"], allowed_bv: Bool[Array, "b v"]
) -> Float[Array, "b v"]:
    """-inf where a token is not allowed."""
    return jnp.where(allowed_bv, logits_bv, -jnp.inf)


def top_k_filter(logits_bv: Float[Array, "b v"], k: int | jax.Array) -> Float[Array, "b v"]:
    """-inf for all but the ``k`` largest; equals of the k-th stay, too."""
    return _keep_from_threshold(logits_bv, lambda keep: keep.sum(axis=-1) >= k)


def top_p_filter(logits_bv: Float[Array, "b v"], p: float | jax.Array) -> Float[Array, "b v"]:
    """-inf outside of the smallest set of likeliest tokens whose probabilities sum to ``p``.

    Nucleus sampling, arXiv 1904.09751; the token that crosses ``p`` is inside, and so are its
    equals.
    """
    probs_bv = jax.nn.softmax(logits_bv)
    return _keep_from_threshold(
        logits_bv, lambda keep: jnp.where(keep, probs_bv, 0).sum(axis=-1) >= p
    )


def _keep_from_threshold(
    logits_bv: Float[Array, "b v"], enough: Callable[[jax.Array], jax.Array]
) -> Float[Array, "b v"]:
    """Keeps all logits from the largest threshold on for which ``enough(keep_bv)`` holds.

    If it holds for none, all are kept. The threshold is found bit by bit: 32 passes over v, which
    on CPU take about a tenth of the time of a sort.
    """
    # -0.0 becomes 0.0; then unsigned integers in the order of the floats.
    bits = lax.bitcast_convert_type(logits_bv.astype(jnp.float32) + 0.0, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order_bv = jnp.where(bits >= sign, ~bits, bits | sign)

    def try_bit(i, threshold_b):
        higher_b = threshold_b | (sign >> i.astype(jnp.uint32))
        return jnp.where(enough(order_bv >= higher_b[:, None]), higher_b, threshold_b)

    threshold_b = lax.fori_loop(0, 32, try_bit, jnp.zeros(logits_bv.shape[:1], jnp.uint32))
    return jnp.where(order_bv >= threshold_b[:, None], logits_bv, -jnp.inf)


def choose(
    key_b: jax.Array, logits_bv: Float[Array, "b v"], sampling: Sampling
) -> Int[Array, " b"]:
    """One token per row: temperature, then top-k, then top-p, then a draw with the row's own key.

    A row's token depends on its key and its logits only. ``sampling.guidance`` is not read here.
    """
    logits_bv = logits_bv.astype(jnp.float32)

    def draw(logits_bv):
        logits_bv = logits_bv / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
        # Branches, not selects: a filter that is off costs nothing.
        logits_bv = lax.cond(
            jnp.asarray(sampling.top_k) > 0,
            lambda x: top_k_filter(x, sampling.top_k),
            lambda x: x,
            logits_bv,
        )
        logits_bv = lax.cond(
            jnp.asarray(sampling.top_p) < 1,
            lambda x: top_p_filter(x, sampling.top_p),
            lambda x: x,
            logits_bv,
        )
        return jax.vmap(jax.random.categorical)(key_b, logits_bv)

    return lax.cond(
        jnp.asarray(sampling.temperature) > 0,
        draw,
        lambda logits_bv: jnp.argmax(logits_bv, axis=-1),
        logits_bv,
    ).astype(jnp.int32)


def row_keys(seed: int, row_b) -> jax.Array:
    """A key for each row, from the seed and the row's own number: [b] keys."""
    key = jax.random.key(seed)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.asarray(row_b, jnp.uint32))
