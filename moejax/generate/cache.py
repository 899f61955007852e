"""The keys and values of earlier tokens, one row of slots per sequence of the batch."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


class KVCache(struct.PyTreeNode):
    """A tree of arrays, keyed as the decoder's ``rows``, and how many tokens were read.

    Each attention has its own ``{"k", "v"}`` [l, b, s, g, h], with ``"modality"`` [l, b, s] i32 in
    layers whose modalities do not see each other, and ``"filled"`` [l, b] i32, the slots that are
    in use: those of different layers may differ in length, where some tokens skip a layer.
    ``filled_b`` [b] i32 counts the tokens of each sequence, skipped or not, so rows of unequal
    length share a batch; ``position_b`` [b] i32 is the position of its next token, which is less
    where a picture counts as one (``model.latents.one_position``).
    """

    rows: dict
    filled_b: jax.Array
    position_b: jax.Array


def init_cache(model: Any, params: Any, batch_size: int, capacity: int) -> KVCache:
    """An empty cache for ``capacity`` tokens in each of ``batch_size`` rows.

    The shapes and dtypes are those of the rows that ``model`` returns for so many tokens.
    """
    token = jnp.zeros((batch_size, capacity), jnp.int32)
    batch = {name: token for name in ("tokens", "modality", "segments", "positions")}
    shapes = jax.eval_shape(lambda p: model.apply({"params": p}, batch, train=False).rows, params)

    def empty(rows: dict) -> dict:
        slots = {name: jnp.zeros(x.shape, x.dtype) for name, x in rows.items() if name != "kept"}
        return {**slots, "filled": jnp.zeros(rows["kept"].shape[:-1], jnp.int32)}

    # Two arrays, since a buffer can be donated once.
    counts = (jnp.zeros((batch_size,), jnp.int32) for _ in range(2))
    return KVCache(_map_rows(empty, shapes), *counts)


def write_rows(cache: KVCache, rows: dict, num_valid_b: jax.Array) -> KVCache:
    """Appends new rows to the slots of each sequence, in each layer those that it kept.

    Args:
      cache: is updated in place where its buffers are donated (as in the carry of a loop).
      rows: new keys and values [l, b, t, g, h], ``"modality"`` [l, b, t] where the cache has it,
        and ``"kept"`` [l, b, t] bool; or all with more axes in front.
      num_valid_b: [b] i32, tokens that were read; the rest is padding, which no layer keeps.

    A row for which there is no slot left is dropped: the caller sizes the cache.
    """

    def write(new: dict, slots: dict) -> dict:
        # Layers that are run several times have two axes of layers.
        layers = new["kept"].shape[:-2]
        flat = lambda leaf: leaf.reshape(-1, *leaf.shape[len(layers) :])
        kept_lbt, filled_lb = flat(new["kept"]), flat(slots["filled"])
        old = {name: flat(value) for name, value in slots.items() if name != "filled"}
        capacity = next(iter(old.values())).shape[2]
        # Not dynamic_update_slice: it moves a block that overruns the end over earlier slots.
        slot_lbt = filled_lb[..., None] + jnp.cumsum(kept_lbt, axis=2) - 1
        slot_lbt = jnp.where(kept_lbt, slot_lbt, capacity)
        num, b = filled_lb.shape
        at = jnp.arange(num)[:, None, None], jnp.arange(b)[:, None], slot_lbt
        done = {
            name: value.at[at].set(flat(new[name]).astype(value.dtype), mode="drop")
            for name, value in old.items()
        }
        filled_lb = jnp.minimum(filled_lb + kept_lbt.sum(axis=2), capacity)
        done["filled"] = filled_lb.astype(jnp.int32)
        return {name: value.reshape(slots[name].shape) for name, value in done.items()}

    return KVCache(
        _map_rows(write, rows, cache.rows),
        cache.filled_b + num_valid_b,
        cache.position_b + num_valid_b,
    )


def _map_rows(function: Any, rows: dict, *others: dict) -> dict:
    """``function`` of the rows of each attention, in the same nesting."""
    if "kept" in rows:
        return function(rows, *others)
    return {
        name: _map_rows(function, inner, *(other[name] for other in others))
        for name, inner in rows.items()
    }
