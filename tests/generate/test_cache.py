"""The cache: rows land in their own slots, and cached decoding is the full forward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.generate.cache import KVCache, init_cache, write_rows
from moejax.generate.generate import decode, pad_prompts, prefill


def filled_with(value: float, *shape: int):
    return {"segment_0": {"k": jnp.full(shape, value)}}


def slots(cache: KVCache) -> np.ndarray:
    """[b, s] of a cache whose rows hold one number each."""
    return np.asarray(cache.rows["segment_0"]["k"])[0, :, :, 0, 0]


def test_write_rows_appends_at_each_rows_own_offset():
    cache = KVCache(filled_with(0.0, 1, 3, 5, 1, 1), jnp.array([0, 2, 4]))
    new = {"segment_0": {"k": jnp.arange(1.0, 7.0).reshape(1, 3, 2, 1, 1)}}
    cache = write_rows(cache, new, jnp.array([2, 1, 0]))
    expected = [[1, 2, 0, 0, 0], [0, 0, 3, 0, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(slots(cache), expected)
    np.testing.assert_array_equal(cache.filled_b, [2, 3, 4])


def test_write_rows_never_moves_a_block_that_overruns_the_end():
    cache = KVCache(filled_with(7.0, 1, 1, 4, 1, 1), jnp.array([3]))
    cache = write_rows(cache, filled_with(1.0, 1, 1, 3, 1, 1), jnp.array([1]))
    np.testing.assert_array_equal(slots(cache), [[7, 7, 7, 1]])


def test_leaves_may_differ_in_length_and_dtype():
    rows = {"a": jnp.zeros((1, 2, 4, 1, 1)), "b": jnp.zeros((2, 2, 6, 1, 1), jnp.bfloat16)}
    new = {"a": jnp.ones((1, 2, 1, 1, 1)), "b": jnp.ones((2, 2, 1, 1, 1))}
    cache = write_rows(KVCache(rows, jnp.array([1, 3])), new, jnp.array([1, 1]))
    assert cache.rows["b"].dtype == jnp.bfloat16
    for name in "ab":
        where = np.argwhere(np.asarray(cache.rows[name][0, :, :, 0, 0], np.float32))
        np.testing.assert_array_equal(where, [[0, 1], [1, 3]])


def test_write_rows_reuses_donated_buffers():
    cache = KVCache(filled_with(0.0, 1, 2, 8, 1, 1), jnp.array([1, 2]))
    write = jax.jit(write_rows, donate_argnums=0)
    before = cache.rows["segment_0"]["k"].unsafe_buffer_pointer()
    after = write(cache, filled_with(1.0, 1, 2, 1, 1, 1), jnp.array([1, 1]))
    assert after.rows["segment_0"]["k"].unsafe_buffer_pointer() == before


def test_init_cache_has_the_shapes_of_the_models_rows(tiny):
    cache = init_cache(tiny.model, tiny.params, batch_size=3, capacity=7)
    shapes = {leaf.shape for leaf in jax.tree.leaves(cache.rows)}
    # Repeats of the period, batch, slots, kv heads, head size.
    assert shapes == {(2 // len(tiny.model.config.block_pattern), 3, 7, 2, 8)}
    np.testing.assert_array_equal(cache.filled_b, [0, 0, 0])


@pytest.mark.parametrize("prompt_length", [1, 4, 8])
def test_prefill_and_cached_decode_equal_the_full_forward(tiny, rows, prompt_length):
    """Images inside the sequence, grouped queries, rows of unequal length."""
    full = tiny.logits(rows)
    starts = [min(len(row), prompt_length + i) for i, row in enumerate(rows)]
    tokens, lengths = pad_prompts([row[:start] for row, start in zip(rows, starts, strict=True)])
    jit = functools.partial(jax.jit, static_argnums=(0, 2))
    step = jit(decode, donate_argnums=3)
    logits, cache = jit(prefill, static_argnames="capacity")(
        tiny.model, tiny.params, tiny.vocabulary, tokens, lengths, capacity=40
    )
    compared = 0
    for step_index in range(max(map(len, rows))):
        at = [start + step_index for start in starts]
        for i, row in enumerate(rows):
            if at[i] <= len(row):
                np.testing.assert_allclose(logits[i], full[i, at[i] - 1], atol=1e-4)
                compared += 1
        active = np.array([at[i] < len(row) for i, row in enumerate(rows)])
        token = np.array([row[min(at[i], len(row) - 1)] for i, row in enumerate(rows)])
        logits, cache = step(tiny.model, tiny.params, tiny.vocabulary, cache, token, active)
    assert compared == sum(len(row) - start + 1 for row, start in zip(rows, starts, strict=True))
    np.testing.assert_array_equal(cache.filled_b, [len(row) for row in rows])
