"""Norms, RoPE, masks and attention against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.attention import attend, attention_maps, cached_mask, multimodal_mask
from moejax.ops.norms import layer_normalise, rms_normalise, select_by_modality
from moejax.ops.positions import grid_positions, sincos_table
from moejax.ops.rope import apply_rope
from moejax.ops.untied import modality_layout, permute_rows


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_norms_have_unit_scale():
    x = 3 + 2 * normal(0, 4, 50)
    np.testing.assert_allclose(jnp.square(rms_normalise(x, 0.0)).mean(axis=-1), 1, rtol=1e-5)
    centred = layer_normalise(x, 0.0)
    np.testing.assert_allclose(centred.mean(axis=-1), 0, atol=1e-6)
    np.testing.assert_allclose(centred.std(axis=-1), 1, rtol=1e-5)
    assert rms_normalise(x.astype(jnp.bfloat16), 0.0).dtype == jnp.float32


def test_scales_by_modality_and_their_gradient():
    table, modality = normal(0, 3, 5), jnp.array([[0, 2, 2], [1, 0, 2]])
    chosen = select_by_modality(table, modality)
    np.testing.assert_array_equal(chosen, table[modality])
    cotangent = normal(1, 2, 3, 5)
    gradient = jax.grad(lambda t: (select_by_modality(t, modality) * cotangent).sum())(table)
    expected = np.zeros((3, 5))
    np.add.at(expected, np.asarray(modality), np.asarray(cotangent))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_rope_turns_products_into_functions_of_the_distance():
    q, k = normal(0, 1, 1, 1, 8), normal(1, 1, 1, 1, 8)

    def product(i, j):
        at = lambda x, p: apply_rope(x, jnp.array([[p]]), 10_000.0)
        return float((at(q, i) * at(k, j)).sum())

    assert product(7, 3) == pytest.approx(product(104, 100), rel=1e-4)
    assert product(7, 3) != pytest.approx(product(7, 4), rel=1e-2)
    np.testing.assert_array_equal(apply_rope(q, jnp.array([[0]]), 10_000.0), q)


def test_multimodal_mask_by_hand():
    mask = multimodal_mask(jnp.array([[1, 1, 2, 2, 0]]))[0].astype(int)
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(mask, expected)


def test_cached_mask_by_hand():
    segments = jnp.array([[1, 1], [1, 0]])
    new = multimodal_mask(segments)
    mask = cached_mask(new, segments > 0, jnp.array([2, 0]), 3).astype(int)
    np.testing.assert_array_equal(mask[0], [[1, 1, 0, 1, 0], [1, 1, 0, 1, 1]])
    np.testing.assert_array_equal(mask[1], [[0, 0, 0, 1, 0], [0, 0, 0, 0, 0]])


def test_attention_with_grouped_queries_by_loops():
    q, k, v = normal(0, 2, 5, 4, 8), normal(1, 2, 6, 2, 8), normal(2, 2, 6, 2, 8)
    mask = jnp.arange(6)[None, None] <= jnp.arange(5)[None, :, None] + jnp.zeros((2, 1, 1))
    got = attend(q, k, v, mask)
    for b in range(2):
        for t in range(5):
            for n in range(4):
                seen = slice(0, t + 1)
                logits = np.asarray(k[b, seen, n // 2]) @ np.asarray(q[b, t, n]) / np.sqrt(8)
                weights = np.exp(logits - logits.max())
                expected = weights / weights.sum() @ np.asarray(v[b, seen, n // 2])
                np.testing.assert_allclose(got[b, t, n], expected, atol=1e-5)


def test_maps_are_the_weights_of_the_values():
    q, k, v = normal(0, 2, 5, 4, 8), normal(1, 2, 5, 2, 8), normal(2, 2, 5, 2, 8)
    mask = multimodal_mask(jnp.array([[1, 1, 1, 2, 2], [1, 1, 1, 1, 1]]))
    maps = attention_maps(q, k, mask)
    assert maps.shape == (2, 4, 5, 5)
    assert (np.asarray(maps)[~np.broadcast_to(mask[:, None], maps.shape)] == 0).all()
    out = np.einsum("bnts,bsnh->btnh", maps, np.repeat(v, 2, axis=2))
    np.testing.assert_allclose(out, attend(q, k, v, mask), atol=1e-6)


def test_a_token_that_sees_nothing_stays_finite_in_value_and_gradient():
    q = normal(0, 1, 3, 2, 4)
    mask = jnp.zeros((1, 3, 3), bool)
    value, gradient = jax.value_and_grad(lambda q: attend(q, q, q, mask).sum())(q)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_layout_sorts_stably_and_counts():
    modality = jnp.array([[1, 0, 2, 1], [0, 0, 2, 1]])
    layout = modality_layout(modality, 3)
    np.testing.assert_array_equal(layout.order[0], [1, 4, 5, 0, 3, 7, 2, 6])
    np.testing.assert_array_equal(layout.order[0][layout.inverse[0]], np.arange(8))
    np.testing.assert_array_equal(layout.group_sizes[0], [3, 3, 2])


def test_permutation_gradient_is_a_gather():
    """Exact, and without the scatter that autodiff of an indexed read would make."""
    order = jnp.array([3, 0, 2, 1])
    inverse = jnp.argsort(order)
    x, cotangent = normal(0, 4, 2), normal(1, 4, 2)
    loss = lambda x: (permute_rows(x, order, inverse) * cotangent).sum()
    np.testing.assert_array_equal(jax.grad(loss)(x), cotangent[inverse])
    assert "scatter" not in str(jax.make_jaxpr(jax.grad(loss))(x))


def test_attention_in_blocks_of_queries_is_the_same():
    q, k, v = normal(0, 2, 6, 4, 8), normal(1, 2, 6, 2, 8), normal(2, 2, 6, 2, 8)
    mask = multimodal_mask(jnp.array([[1, 1, 1, 2, 2, 0]] * 2))
    cotangent = normal(3, 2, 6, 4, 8)

    @functools.partial(jax.jit, static_argnums=0)
    def run(block):
        out, pullback = jax.vjp(lambda *qkv: attend(*qkv, mask, block), q, k, v)
        return out, pullback(cotangent)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), run(2), run(0)
    )
    assert "scan" in str(jax.make_jaxpr(lambda q: attend(q, k, v, mask, 2))(q))


def test_rope_of_two_axes_is_that_of_each_in_a_half():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 5, 2, 8)), jnp.float32)
    places = jnp.asarray(rng.integers(0, 9, (1, 5, 2)), jnp.int32)
    both = apply_rope(x, places, 100.0)
    halves = [apply_rope(x[..., 4 * i : 4 * i + 4], places[..., i], 100.0) for i in (0, 1)]
    np.testing.assert_allclose(both, jnp.concatenate(halves, axis=-1), rtol=1e-6)
    # What queries and keys have in common depends on how far they lie apart alone.
    moved = apply_rope(x, places + jnp.asarray([3, 7])[None, None], 100.0)
    products = lambda v: jnp.einsum("btnh,bsnh->bnts", v, v)
    np.testing.assert_allclose(products(moved), products(both), atol=1e-4)
    assert np.abs(products(both) - products(x)).max() > 0.1


def test_sincos_table_by_hand():
    table = sincos_table(grid_positions(2, 3), 8)
    angles = lambda place: (place, place / 100)
    for number, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]):
        expected = [
            f(a) for place in (row, column) for f in (np.sin, np.cos) for a in angles(place)
        ]
        np.testing.assert_allclose(table[number], expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="2 axes do not fill a width of 6"):
        sincos_table(grid_positions(2, 2), 6)
