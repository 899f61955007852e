"""Which token may come next: a small state machine for each row of a batch.

Outside of an image: text, EOS, or BOI while images may be opened. After BOI: exactly
``codes_per_image`` image codes, then EOI. Nothing else is ever generated. Where pictures are
latents, which are denoised and not written, a row is done at BOI.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from moejax.data.vocabulary import BOI, EOI, EOS, Vocabulary


class Grammar(struct.PyTreeNode):
    """What a continuation may hold. Numbers, not shapes: one program serves all.

    Attributes:
      text: whether text may be written outside of images; without it a closed image is followed by
        EOS, or by the next image.
      images: how many images may be opened, beside one that the prompt leaves open.
      min_text: EOS is not allowed before so many tokens (where ``text`` is).
    """

    text: bool | jax.Array = True
    images: int | jax.Array = 0
    min_text: int | jax.Array = 0


IMAGE_ONLY = Grammar(text=False)
TEXT_ONLY = Grammar(min_text=1)


class Progress(struct.PyTreeNode):
    """Where each row stands.

    Attributes:
      codes_b: [b] i32, codes of the image that is open; -1 outside of images.
      images_b: [b] i32, images that may still be opened.
      done_b: [b] bool, EOS was written (or BOI, where pictures are latents).
    """

    codes_b: jax.Array
    images_b: jax.Array
    done_b: jax.Array


def progress_of_prompt(
    vocabulary: Vocabulary,
    grammar: Grammar,
    tokens_bt: Int[Array, "b t"],
    length_b: Int[Array, " b"],
) -> Progress:
    """The state after the first ``length_b`` tokens of each row."""
    index_t = jnp.arange(tokens_bt.shape[1])[None, :]
    valid_bt = index_t < length_b[:, None]

    def last(token: int):
        return jnp.where(valid_bt & (tokens_bt == token), index_t, -1).max(axis=1)

    opened_b = last(BOI)
    since_bt = valid_bt & (index_t > opened_b[:, None])
    codes_b = (since_bt & vocabulary.is_image(tokens_bt)).sum(axis=1, dtype=jnp.int32)
    return Progress(
        codes_b=jnp.where(opened_b > last(EOI), codes_b, -1),
        images_b=jnp.full(length_b.shape, grammar.images, jnp.int32),
        done_b=last(EOS) >= 0,
    )


def allowed_tokens(
    vocabulary: Vocabulary,
    grammar: Grammar,
    progress: Progress,
    written: int | jax.Array,
    remaining: int | jax.Array,
    size: int,
) -> Bool[Array, "b v"]:
    """Mask over the ``size`` ids of the model's logits; at least one is allowed in every row.

    Args:
      vocabulary: where the ids of each modality lie.
      grammar: what may be written.
      progress: of each row.
      written: tokens that each row has written so far.
      remaining: tokens that each row may still write, this one included; an image is only opened
        if it can be closed within them.
      size: columns of the mask.
    """
    id_v = jnp.arange(size)[None, :]
    is_code_v = vocabulary.is_code(id_v)
    is_text_v = (id_v >= vocabulary.text_offset) & (id_v < vocabulary.image_offset)
    room = remaining >= vocabulary.codes_per_image + 2
    may_open_b = (progress.images_b > 0) & room
    may_end = jnp.logical_not(grammar.text) | (written >= grammar.min_text)
    outside_bv = (
        (is_text_v & grammar.text)
        | ((id_v == BOI) & may_open_b[:, None])
        | ((id_v == EOS) & may_end)
    )
    full_b = progress.codes_b >= vocabulary.codes_per_image
    inside_bv = jnp.where(full_b[:, None], id_v == EOI, is_code_v)
    return jnp.where((progress.codes_b < 0)[:, None], outside_bv, inside_bv)


def advance(vocabulary: Vocabulary, progress: Progress, token_b: Int[Array, " b"]) -> Progress:
    """The state after one more token of each row; a row that is done stays as it is."""
    opens_b = token_b == BOI
    codes_b = progress.codes_b + vocabulary.is_image(token_b)
    codes_b = jnp.where(opens_b, 0, jnp.where(token_b == EOI, -1, codes_b))
    done_b = token_b == EOS
    if not vocabulary.image_codes:
        done_b |= opens_b
    moved = Progress(codes_b, progress.images_b - opens_b, done_b)
    return jax.tree.map(lambda old, new: jnp.where(progress.done_b, old, new), progress, moved)
