"""Losses of all pairs of two sets of embeddings, some rows at a time.

``b`` rows of pictures and texts that belong together, embeddings of length one ``z`` wide. Pairs
that have the same ``ids`` are positives, all others negatives; with every id its own, only the two
of one row are. Rows of two ``clusters``, and rows that are not ``valid``, are neither.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

LOSSES = ("clip", "siglip")


class Pairs(NamedTuple):
    """Rows of pictures and their texts.

    Attributes:
      image: [b, z], of length one.
      text: [b, z], of length one.
      ids: [b] i32; what has the same id belongs together.
      clusters: [b] i32; rows are compared with those of their own cluster alone.
      valid: [b] bool; the others are left out of every sum.
    """

    image: Array
    text: Array
    ids: Array
    clusters: Array
    valid: Array


def to_unit(x: Float[Array, "b z"]) -> Float[Array, "b z"]:
    """Rows of length one; a row of zeros stays what it is."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-12))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def capped_exp(x: Float[Array, ""], cap: float) -> Float[Array, ""]:
    """``min(exp(x), cap)``, of which x can come back from above the cap.

    CLIP (arXiv 2103.00020, section 2.5) clips the parameter after each step. Here the value is
    clipped instead, and where it is, only a gradient that lowers x under descent passes.
    """
    return jnp.minimum(jnp.exp(x), cap)


def _capped_exp_forward(x, cap):
    return capped_exp(x, cap), x


def _capped_exp_backward(cap, x, gradient):
    gradient = gradient * jnp.minimum(jnp.exp(x), cap)
    return (jnp.where((jnp.exp(x) > cap) & (gradient < 0), 0, gradient),)


capped_exp.defvjp(_capped_exp_forward, _capped_exp_backward)


def pair_losses(
    rows: Pairs,
    every: Pairs,
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    *,
    kind: str,
    chunk: int = 0,
) -> tuple[Float[Array, " r"], Float[Array, " r"]]:
    """The loss of each of ``rows`` against ``every`` row of the batch, of which they are some.

    The loss of a batch is the mean over its valid rows. Logits are ``scale image . text + bias``.

    "clip": half the nats of the right text among all texts, and half of those of the right
    picture (arXiv 2103.00020, figure 3). Departure: where a row has several positives, the target
    is uniform over them, that is the mean over the positives of the nats of each, all the others
    staying in the denominator (UniCL, arXiv 2204.03610). Its least value then is the
    mean logarithm of their number, not 0. The bias has no influence.

    "siglip": ``-sum_j log sigmoid(y_ij logit_ij)`` over all texts j, y = 1 for positives and -1
    for the others (arXiv 2303.15343, equation 1).

    Args:
      rows: r of the rows, such as those of one device.
      every: all b rows.
      scale: of the products.
      bias: of the logits.
      kind: one of LOSSES.
      chunk: rows whose logits are held at a time, [chunk, b]; they are computed again in the
        backward pass. 0: all.

    Returns:
      (nats [r], and 1.0 for each picture whose likeliest text is a positive [r]).
    """
    score = _clip if kind == "clip" else _siglip

    def one(row: Pairs):
        return score(row, every, scale, bias)

    count = rows.ids.shape[0]
    if chunk and chunk < count:
        one = jax.checkpoint(one, prevent_cse=False)
        return jax.lax.map(one, rows, batch_size=chunk)
    return jax.vmap(one)(rows)


def _logits(anchor_z, other_bz, seen_b, scale, bias):
    products = jnp.einsum("z,bz->b", anchor_z, other_bz, preferred_element_type=scale.dtype)
    return jnp.where(seen_b, scale * products + bias, jnp.finfo(scale.dtype).min)


def _seen(row: Pairs, every: Pairs) -> tuple[Bool[Array, " b"], Bool[Array, " b"]]:
    """Which rows are compared with this one, and which of these are its positives."""
    seen = every.valid & (row.clusters == every.clusters)
    return seen, seen & (row.ids == every.ids)


def _clip(row: Pairs, every: Pairs, scale, bias):
    seen, positive = _seen(row, every)
    count = jnp.maximum(positive.sum(), 1)

    def nats(logits):
        return -jnp.where(positive, jax.nn.log_softmax(logits), 0).sum() / count

    texts = _logits(row.image, every.text, seen, scale, bias)
    pictures = _logits(row.text, every.image, seen, scale, bias)
    hit = positive[jnp.argmax(texts)].astype(scale.dtype)
    return (nats(texts) + nats(pictures)) / 2, hit


def _siglip(row: Pairs, every: Pairs, scale, bias):
    seen, positive = _seen(row, every)
    logits = _logits(row.image, every.text, seen, scale, bias)
    nats = jnp.where(seen, jax.nn.softplus(jnp.where(positive, -logits, logits)), 0)
    return nats.sum(), positive[jnp.argmax(logits)].astype(scale.dtype)
