"""Pictures inside of packed sequences: which tokens they are, and their patches apart."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def picture_starts(image_id_bt: Int[Array, "b t"], count: int) -> Int[Array, "b i"]:
    """Where pictures 1 to ``count`` of each row begin; t for those that are not there."""
    length = image_id_bt.shape[1]
    numbers_i = jnp.arange(1, count + 1)
    is_of_bit = image_id_bt[:, None, :] == numbers_i[None, :, None]
    return jnp.where(is_of_bit, jnp.arange(length)[None, None], length).min(axis=-1)


def take_pictures(
    values_btz: Float[Array, "b t z"], start_bi: Int[Array, "b i"], patches: int
) -> Float[Array, "b i p z"]:
    """The patches of each picture; a picture that is not there gets the row's last tokens."""
    b, i = start_bi.shape
    at_bip = jnp.minimum(
        start_bi[..., None] + jnp.arange(patches)[None, None], values_btz.shape[1] - 1
    )
    taken = jnp.take_along_axis(values_btz, at_bip.reshape(b, -1, 1), axis=1)
    return taken.reshape(b, i, patches, -1)


def place_pictures(
    pictures_bipz: Float[Array, "b i p z"],
    image_id_bt: Int[Array, "b t"],
    start_bi: Int[Array, "b i"],
) -> Float[Array, "b t z"]:
    """Each patch at its token, zeros elsewhere: the inverse of :func:`take_pictures`."""
    b, i, p, z = pictures_bipz.shape
    slot_bt = jnp.maximum(image_id_bt - 1, 0)
    patch_bt = jnp.arange(image_id_bt.shape[1])[None] - jnp.take_along_axis(
        start_bi, slot_bt, axis=1
    )
    at_bt = slot_bt * p + jnp.clip(patch_bt, 0, p - 1)
    flat = pictures_bipz.reshape(b, i * p, z)
    placed = jnp.take_along_axis(flat, at_bt[..., None], axis=1)
    return jnp.where(image_id_bt[..., None] > 0, placed, 0)


def per_token(values_bi: Float[Array, "b i"], image_id_bt: Int[Array, "b t"]) -> Array:
    """The value of each token's picture, [b, t]; 0 outside of pictures."""
    taken = jnp.take_along_axis(values_bi, jnp.maximum(image_id_bt - 1, 0), axis=1)
    return jnp.where(image_id_bt > 0, taken, 0)


def text_follows(
    is_text_bt: Bool[Array, "b t"], segments_bt: Int[Array, "b t"]
) -> Bool[Array, "b t"]:
    """Whether a text token comes later in a token's segment; segments are in one piece."""
    count_bt = jnp.cumsum(is_text_bt, axis=1)
    ends_bt = jnp.pad(
        segments_bt[:, 1:] != segments_bt[:, :-1], ((0, 0), (0, 1)), constant_values=True
    )
    # Counts only grow, so that the smallest at an end to the right is that of the nearest end.
    at_ends_bt = jnp.where(ends_bt, count_bt, is_text_bt.shape[1] + 1)
    return lax.cummin(at_ends_bt, axis=1, reverse=True) > count_bt


def max_pictures(length: int, patches: int) -> int:
    """The most pictures that a row of ``length`` tokens holds, BOI, EOI, BOS and EOS beside each.

    At least one: a row that is a picture alone, as in sampling.
    """
    return max(1, length // (patches + 4))


def patch_numbers(image_id_bt: Int[Array, "b t"], segments_bt: Int[Array, "b t"]) -> Array:
    """The number of each patch in its picture, [b, t] from 0; 0 outside of pictures."""
    index_bt = jnp.broadcast_to(jnp.arange(image_id_bt.shape[1])[None], image_id_bt.shape)
    first_bt = (_left(image_id_bt) != image_id_bt) | (_left(segments_bt) != segments_bt)
    start_bt = lax.cummax(jnp.where(first_bt, index_bt, 0), axis=1)
    return jnp.where(image_id_bt > 0, index_bt - start_bt, 0)


def one_position_each(
    positions_bt: Int[Array, "b t"],
    image_id_bt: Int[Array, "b t"],
    segments_bt: Int[Array, "b t"],
) -> Int[Array, "b t"]:
    """Positions in which a picture counts as one token, which all its patches stand for.

    Args:
      positions_bt: where each patch counts.
      image_id_bt: the picture of each token, 0 for none.
      segments_bt: packed sequences, each counted for itself.
    """
    passed_bt = jnp.cumsum(patch_numbers(image_id_bt, segments_bt) > 0, axis=1)
    starts_bt = _left(segments_bt) != segments_bt
    before_bt = lax.cummax(jnp.where(starts_bt, passed_bt, 0), axis=1)
    return (positions_bt - passed_bt + before_bt).astype(positions_bt.dtype)


def _left(values_bt: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """The value of the token before; -1 for the first."""
    return jnp.pad(values_bt[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
