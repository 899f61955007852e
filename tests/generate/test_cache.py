"""The cache: rows land in their own slots, and cached decoding is the full forward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.generate.cache import KVCache, init_cache, write_rows
from moejax.generate.generate import decode, pad_prompts, prefill


def a_cache(value: float, filled_b: list[int], slots: int) -> KVCache:
    """One layer of one number a row."""
    filled_b, position_b = jnp.array(filled_b), jnp.array(filled_b)
    rows = {"k": jnp.full((1, len(filled_b), slots, 1, 1), value), "filled": filled_b[None]}
    return KVCache({"segment_0": rows}, filled_b, position_b)


def new_rows(values: list[list[float]], kept: list[list[bool]]) -> dict:
    k = jnp.array(values)[None, :, :, None, None]
    return {"segment_0": {"k": k, "kept": jnp.array(kept)[None]}}


def slots(cache: KVCache) -> np.ndarray:
    """[b, s] of a cache whose rows hold one number each."""
    return np.asarray(cache.rows["segment_0"]["k"])[0, :, :, 0, 0]


def test_write_rows_appends_at_each_rows_own_offset():
    new = new_rows([[1.0, 2], [3, 4], [5, 6]], [[True, True], [True, False], [False, False]])
    cache = write_rows(a_cache(0.0, [0, 2, 4], 5), new, jnp.array([2, 1, 0]))
    expected = [[1, 2, 0, 0, 0], [0, 0, 3, 0, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(slots(cache), expected)
    np.testing.assert_array_equal(cache.filled_b, [2, 3, 4])
    np.testing.assert_array_equal(cache.position_b, [2, 3, 4])
    np.testing.assert_array_equal(cache.rows["segment_0"]["filled"], [[2, 3, 4]])


def test_write_rows_leaves_no_slot_for_what_a_layer_skipped():
    new = new_rows([[1.0, 2, 3, 4], [5, 6, 7, 8]], [[False, True, False, True], [True] * 4])
    cache = write_rows(a_cache(0.0, [1, 0], 4), new, jnp.array([4, 4]))
    np.testing.assert_array_equal(slots(cache), [[0, 2, 4, 0], [5, 6, 7, 8]])
    np.testing.assert_array_equal(cache.rows["segment_0"]["filled"], [[3, 4]])
    np.testing.assert_array_equal(cache.filled_b, [5, 4])


def test_write_rows_never_moves_a_block_that_overruns_the_end():
    new = new_rows([[1.0, 2, 3]], [[True, True, True]])
    cache = write_rows(a_cache(7.0, [3], 4), new, jnp.array([3]))
    np.testing.assert_array_equal(slots(cache), [[7, 7, 7, 1]])
    np.testing.assert_array_equal(cache.rows["segment_0"]["filled"], [[4]])


def test_layers_may_differ_in_length_and_dtype():
    a, b = a_cache(0.0, [1, 3], 4).rows["segment_0"], a_cache(0.0, [0, 2], 6).rows["segment_0"]
    b["k"] = b["k"].astype(jnp.bfloat16)
    ones = new_rows([[1.0], [1]], [[True], [True]])["segment_0"]
    read_b = jnp.array([1, 3])
    cache = KVCache({"a": a, "b": {"inner": b}}, read_b, read_b)
    cache = write_rows(cache, {"a": ones, "b": {"inner": ones}}, jnp.array([1, 1]))
    a, b = cache.rows["a"], cache.rows["b"]["inner"]
    assert b["k"].dtype == jnp.bfloat16
    for rows, expected in ((a, [[0, 1], [1, 3]]), (b, [[0, 0], [1, 2]])):
        where = np.argwhere(np.asarray(rows["k"][0, :, :, 0, 0], np.float32))
        np.testing.assert_array_equal(where, expected)


def test_write_rows_reuses_donated_buffers():
    cache = a_cache(0.0, [1, 2], 8)
    write = jax.jit(write_rows, donate_argnums=0)
    before = cache.rows["segment_0"]["k"].unsafe_buffer_pointer()
    after = write(cache, new_rows([[1.0], [1]], [[True], [True]]), jnp.array([1, 1]))
    assert after.rows["segment_0"]["k"].unsafe_buffer_pointer() == before


def test_init_cache_has_the_shapes_of_the_models_rows(tiny):
    cache = init_cache(tiny.model, tiny.params, batch_size=3, capacity=7)
    shapes = {leaf.shape for leaf in jax.tree.leaves(cache.rows) if leaf.ndim == 5}
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
