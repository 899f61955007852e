"""Experts of places: a word's expert sees the patches that the word is about (RAPHAEL).

The space-MoE of arXiv 2305.18295, of which neither code nor all details are public.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


def attention_masks(
    attention_btp: Float[Array, "b t p"], threshold: float = 0.2
) -> Bool[Array, "b t p"]:
    """Where a word's attention is above ``threshold`` times its largest over the patches.

    A word without any attention has an empty mask.
    """
    return attention_btp > threshold * attention_btp.max(axis=-1, keepdims=True)


def space_moe(
    x_bpd: Float[Array, "b p d"],
    masks_btp: Bool[Array, "b t p"],
    logits_bte: Float[Array, "b t e"],
    valid_bt: Bool[Array, "b t"],
    experts: Callable[[Array], Array],
    *,
    outside: bool = True,
) -> Float[Array, "b p d"]:
    """``mean_i E_{r(i)}(x * M_i)`` over the words i, ``r(i)`` the expert of the largest logit.

    An expert sees one patch at a time, and zeros where the mask is; all experts are run once on all
    patches, whatever the number of words. The order of the words is of no account.

    Args:
      x_bpd: patches.
      masks_btp: the patches of each word (:func:`attention_masks`).
      logits_bte: of the gate, from the words. Their gradient is that of the softmax in the choice's
        place (straight-through), which is ours: the choice itself has none.
      valid_bt: False for words that are padding. A row without words gets 0.
      experts: [b, p, d] -> [b, p, e, d], what each expert makes of each patch.
      outside: whether a word adds to patches outside of its mask what its expert makes of zeros, as
        the formula has it; else nothing.
    """
    e = logits_bte.shape[-1]
    probs_bte = jax.nn.softmax(logits_bte)
    choice_bte = jax.nn.one_hot(logits_bte.argmax(axis=-1), e, dtype=probs_bte.dtype)
    choice_bte = choice_bte + (probs_bte - lax.stop_gradient(probs_bte))
    words_b = jnp.maximum(valid_bt.sum(axis=-1), 1).astype(probs_bte.dtype)
    share_bte = jnp.where(valid_bt[..., None], choice_bte / words_b[:, None, None], 0)
    inside_bpe = jnp.einsum("bte,btp->bpe", share_bte, masks_btp.astype(share_bte.dtype))
    inside_bpe = inside_bpe.astype(x_bpd.dtype)
    out_bpd = jnp.einsum("bpe,bped->bpd", inside_bpe, experts(x_bpd))
    if not outside:
        return out_bpd
    of_zeros_ed = experts(jnp.zeros_like(x_bpd[:1, :1]))[0, 0]
    outside_bpe = share_bte.sum(axis=1)[:, None].astype(x_bpd.dtype) - inside_bpe
    return out_bpd + jnp.einsum("bpe,ed->bpd", outside_bpe, of_zeros_ed)
