"""The keys and values of earlier tokens, one row of slots per sequence of the batch."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


class KVCache(struct.PyTreeNode):
    """A tree of [l, b, s, g, h] arrays, keyed as the decoder's ``rows``, and how full it is.

    ``filled_b`` [b] i32: slots in use; a token's slot is its place in its own sequence, so rows of
    unequal length share a batch. Leaves of different segments of the stack may differ in s.
    """

    rows: dict
    filled_b: jax.Array


def init_cache(model: Any, params: Any, batch_size: int, capacity: int) -> KVCache:
    """An empty cache of ``capacity`` slots for each of ``batch_size`` rows.

    The shapes and dtypes are those of the rows that ``model`` returns for one token.
    """
    token = jnp.zeros((batch_size, 1), jnp.int32)
    batch = {name: token for name in ("tokens", "modality", "segments", "positions")}
    shapes = jax.eval_shape(lambda p: model.apply({"params": p}, batch, train=False).rows, params)

    def empty(leaf):
        layers, rows, _, *head = leaf.shape
        return jnp.zeros((layers, rows, capacity, *head), leaf.dtype)

    return KVCache(jax.tree.map(empty, shapes), jnp.zeros((batch_size,), jnp.int32))


def write_rows(cache: KVCache, rows: dict, num_valid_b: jax.Array) -> KVCache:
    """Appends the first ``num_valid_b[b]`` of the t new rows of each sequence to its slots.

    Args:
      cache: is updated in place where its buffers are donated (as in the carry of a loop).
      rows: new keys and values, leaves [l, b, t, g, h].
      num_valid_b: [b] i32; the rows after these are padding, and are not written.

    A row for which there is no slot left is dropped: the caller sizes the cache.
    """

    def write(slots, new):
        capacity, length = slots.shape[2], new.shape[2]
        step_t = jnp.arange(length)[None, :]
        # Not dynamic_update_slice: it moves a block that overruns the end over earlier slots.
        slot_bt = jnp.where(
            step_t < num_valid_b[:, None], cache.filled_b[:, None] + step_t, capacity
        )
        row_b1 = jnp.arange(slots.shape[1])[:, None]
        return slots.at[:, row_b1, slot_bt].set(new.astype(slots.dtype), mode="drop")

    return KVCache(jax.tree.map(write, cache.rows, rows), cache.filled_b + num_valid_b)
