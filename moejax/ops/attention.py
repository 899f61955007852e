"""Masks, and attention over the whole interleaved sequence."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def multimodal_mask(
    segments_bt: Int[Array, "b t"], image_id_bt: Int[Array, "b t"] | None = None
) -> Bool[Array, "b t t"]:
    """True where token t may look at token s: not later, same packed segment, not padding.

    With ``image_id_bt`` (0 outside of pictures) the tokens of one picture see each other in both
    directions as well; BOI, EOI and other pictures are causal (Transfusion, arXiv 2408.11039).
    """
    length = segments_bt.shape[1]
    seen = (jnp.arange(length)[:, None] >= jnp.arange(length)[None, :])[None]
    if image_id_bt is not None:
        one_image = image_id_bt[:, :, None] == image_id_bt[:, None, :]
        seen = seen | (one_image & (image_id_bt > 0)[:, None, :])
    same = segments_bt[:, :, None] == segments_bt[:, None, :]
    return seen & same & (segments_bt > 0)[:, None, :]


def cached_mask(
    mask_bts: Bool[Array, "b t n"],
    valid_bt: Bool[Array, "b t"],
    filled_b: Int[Array, " b"],
    slots: int,
) -> Bool[Array, "b t s"]:
    """``mask_bts`` over the new tokens, with the first ``filled[b]`` slots of a cache in front.

    For decoding, where what lies in a row's slots came before all of its new tokens.
    """
    filled = jnp.arange(slots)[None, None, :] < filled_b[:, None, None]
    return jnp.concatenate([filled & valid_bt[:, :, None], mask_bts], axis=-1)


def put_rows(
    old_btgh: Float[Array, "b t g h"],
    new_bcgh: Float[Array, "b c g h"],
    index_bc: Int[Array, "b c"],
    kept_bc: Bool[Array, "b c"],
) -> Float[Array, "b t g h"]:
    """Keys or values of a row with those of some tokens, the ones that are kept, in their place."""
    b, t = old_btgh.shape[:2]
    place_bc = jnp.where(kept_bc, index_bc, t)
    return old_btgh.at[jnp.arange(b)[:, None], place_bc].set(new_bcgh, mode="drop")


def attend(
    q_btnh: Float[Array, "b t n h"],
    k_bsgh: Float[Array, "b s g h"],
    v_bsgh: Float[Array, "b s g h"],
    mask_bts: Bool[Array, "b t s"],
    block: int = 0,
) -> Float[Array, "b t n h"]:
    """Softmax attention with grouped queries; n / g queries share a key/value head.

    Logits and softmax in float32 or wider. A token that may look at nothing (padding) gets the
    mean of all values: finite, and nobody reads it.

    With a ``block`` that divides t, so many queries at a time: logits are held for one block only,
    and computed again in the backward pass.
    """
    b, t, n, h = q_btnh.shape
    if not block or block >= t or t % block:
        return _attend(q_btnh, k_bsgh, v_bsgh, mask_bts)
    blocks = lambda x: x.reshape(b, t // block, block, *x.shape[2:]).swapaxes(0, 1)
    one = jax.checkpoint(lambda qm: _attend(qm[0], k_bsgh, v_bsgh, qm[1]), prevent_cse=False)
    out = jax.lax.map(one, (blocks(q_btnh), blocks(mask_bts)))
    return out.swapaxes(0, 1).reshape(b, t, n, h)


def attend_with_maps(
    q_btnh: Float[Array, "b t n h"],
    k_bsgh: Float[Array, "b s g h"],
    v_bsgh: Float[Array, "b s g h"],
    mask_bts: Bool[Array, "b t s"],
) -> tuple[Float[Array, "b t n h"], Float[Array, "b n t s"]]:
    """What :func:`attend` returns and what :func:`attention_maps` does, from one softmax."""
    weights_bgnts = _weights(q_btnh, k_bsgh, mask_bts)
    b, g, shared, t, s = weights_bgnts.shape
    return _summed(weights_bgnts, v_bsgh), weights_bgnts.reshape(b, g * shared, t, s)


def attention_maps(
    q_btnh: Float[Array, "b t n h"], k_bsgh: Float[Array, "b s g h"], mask_bts: Bool[Array, "b t s"]
) -> Float[Array, "b n t s"]:
    """The weights by which :func:`attend` sums the values, in float32 or wider.

    For looking at them: self-attention need not hold them all. The row of a token that may look at
    nothing is uniform.
    """
    b, t, n, _ = q_btnh.shape
    return _weights(q_btnh, k_bsgh, mask_bts).reshape(b, n, t, k_bsgh.shape[1])


def _attend(q_btnh, k_bsgh, v_bsgh, mask_bts):
    return _summed(_weights(q_btnh, k_bsgh, mask_bts), v_bsgh)


def _summed(weights_bgnts, v_bsgh):
    """The values by weights of [b, g, n / g, t, s]; [b, t, n, h]."""
    b, g, shared, t, s = weights_bgnts.shape
    h = v_bsgh.shape[-1]
    v = v_bsgh.transpose(0, 2, 1, 3).reshape(b * g, s, h)
    weights = weights_bgnts.astype(v.dtype).reshape(b * g, shared * t, s)
    out = jnp.einsum("brs,bsh->brh", weights, v).reshape(b, g, shared, t, h)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, g * shared, h)


def _weights(q_btnh, k_bsgh, mask_bts):
    """[b, g, n / g, t, s]."""
    b, t, n, h = q_btnh.shape
    s, g = k_bsgh.shape[1:3]
    wide = jnp.promote_types(q_btnh.dtype, jnp.float32)
    # One batch axis and plain matrices: CPU backends are twice as fast on them as on einsums with
    # two batch axes.
    rows = n // g * t
    q = q_btnh.reshape(b, t, g, n // g, h).transpose(0, 2, 3, 1, 4).reshape(b * g, rows, h)
    k = k_bsgh.transpose(0, 2, 1, 3).reshape(b * g, s, h)
    logits = jnp.einsum("brh,bsh->brs", q, k, preferred_element_type=wide)
    logits = logits.reshape(b, g, n // g, t, s) * h**-0.5
    logits = jnp.where(mask_bts[:, None, None], logits, jnp.finfo(wide).min)
    return jax.nn.softmax(logits, axis=-1)
