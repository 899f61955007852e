"""From tokens to logits; noise; the pool of several layers' experts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import (
    SCORES,
    add_previous,
    jitter,
    modality_attributes,
    open_experts,
    pool_mask,
)
from moejax.routing.perturb import perturb

S, N, D, E, M = 2, 6, 8, 5, 2
X = jax.random.normal(jax.random.key(0), (S, N, D))
MODALITY = jnp.tile(jnp.asarray([0, 1, 1], jnp.int32), (S, 2))


def make(name, m, **options):
    shapes = SCORES.get(name).shapes(D, E, m, **options)
    keys = jax.random.split(jax.random.key(1), len(shapes))
    return {
        name: init(key, shape, jnp.float32) + 0.1 * jax.random.normal(key, shape)
        for key, (name, (shape, init)) in zip(keys, shapes.items(), strict=True)
    }


@pytest.fixture(params=list(SCORES))
def name(request):
    return request.param


def read(name):
    """What the score looks at: tokens, or eight attributes of them."""
    return X


def test_shapes_have_a_modality_axis(name):
    for m in (1, 3):
        for shape, _ in SCORES.get(name).shapes(D, E, m).values():
            assert shape[0] == m


def test_one_set_of_parameters_for_each_modality(name):
    """With equal sets it is the shared score; else each token reads its own."""
    shared = make(name, 1)
    both = jax.tree.map(lambda p: jnp.concatenate([p, p]), shared)
    apply = SCORES.get(name).apply
    np.testing.assert_allclose(apply(both, X, MODALITY), apply(shared, X, MODALITY), rtol=1e-5)
    own = make(name, M)
    logits = apply(own, X, MODALITY)
    assert logits.shape == (S, N, E) and logits.dtype == jnp.float32
    for m in range(M):
        alone = apply(jax.tree.map(lambda p, m=m: p[m : m + 1], own), X, MODALITY)
        here = np.asarray(m == MODALITY)
        np.testing.assert_allclose(logits[here], alone[here], rtol=1e-5, atol=1e-6)
    # A token of one modality sends nothing to the parameters of the other.
    text = (MODALITY == 0)[..., None]
    gradient = jax.grad(lambda p: jnp.where(text, apply(p, X, MODALITY), 0).sum())(own)
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf[1], 0)
        assert np.abs(leaf[0]).max() > 0


def test_bfloat16_tokens_have_float32_logits(name):
    params = make(name, M)
    logits = SCORES.get(name).apply(params, X.astype(jnp.bfloat16), MODALITY)
    assert logits.dtype == jnp.float32
    exact = SCORES.get(name).apply(params, X.astype(jnp.bfloat16).astype(jnp.float32), MODALITY)
    np.testing.assert_allclose(logits, exact, rtol=1e-6)


def test_linear_and_mlp_by_hand():
    params = make("linear", 1)
    logits = SCORES.get("linear").apply(params, X, MODALITY)
    np.testing.assert_allclose(
        logits, np.asarray(X) @ np.asarray(params["router_mde"][0]), rtol=1e-4, atol=1e-5
    )
    params = make("mlp", 1, hidden=3)
    wi, wo = (np.asarray(params[key][0]) for key in ("router_wi_mdf", "router_wo_mfe"))
    assert wi.shape == (D, 3)
    tanh = SCORES.get("mlp").apply(params, X, MODALITY)
    np.testing.assert_allclose(tanh, np.tanh(np.asarray(X) @ wi) @ wo, rtol=1e-4, atol=1e-5)
    gelu = SCORES.get("mlp").apply(params, X, MODALITY, activation="gelu")
    assert np.abs(gelu - tanh).max() > 1e-3
    assert SCORES.get("mlp").shapes(D, E)["router_wi_mdf"][0] == (1, D, 8 * E)


def test_cosine_is_blind_to_lengths():
    params = make("cosine", 1)
    apply = SCORES.get("cosine").apply
    logits = apply(params, X, MODALITY)
    assert np.abs(logits).max() <= 1
    np.testing.assert_allclose(apply(params, 7 * X, MODALITY), logits, atol=1e-5)
    longer = {"prototype_mde": 3 * params["prototype_mde"]}
    np.testing.assert_allclose(apply(longer, X, MODALITY), logits, atol=1e-5)
    np.testing.assert_allclose(apply(params, X, MODALITY, temperature=0.1), 10 * logits, rtol=1e-5)
    shapes = SCORES.get("cosine").shapes(D, E, M, learn_scale=True, temperature=0.5)
    scale = shapes["scale_m"][1](jax.random.key(0), (M,), jnp.float32)
    np.testing.assert_array_equal(scale, 2)
    both = {**params, "scale_m": jnp.asarray([1.0, 4.0])}
    factor = np.where(np.asarray(MODALITY) == 0, 1, 4)[..., None]
    np.testing.assert_allclose(apply(both, X, MODALITY), factor * logits, rtol=1e-5)


def test_equal_attributes_have_equal_logits():
    params = make("attributes", 1, attributes=3)
    of = modality_attributes(MODALITY, 3)
    logits = SCORES.get("attributes").apply(params, of, MODALITY)
    for m in range(M):
        rows = np.asarray(logits)[np.asarray(m == MODALITY)]
        np.testing.assert_array_equal(rows, np.broadcast_to(rows[:1], rows.shape))
    assert np.abs(logits[0, 0] - logits[0, 1]).max() > 1e-3


def test_gating_residual():
    logits, previous = jnp.ones((S, N, E)), jax.random.normal(jax.random.key(3), (S, N, E))
    weight = jax.random.normal(jax.random.key(4), (E, E))
    np.testing.assert_array_equal(add_previous(logits, None, weight), logits)
    np.testing.assert_array_equal(add_previous(logits, previous, 0 * weight), logits)
    np.testing.assert_allclose(
        add_previous(logits, previous, weight),
        1 + np.asarray(previous) @ np.asarray(weight),
        rtol=1e-4,
        atol=1e-5,
    )
    gradient = jax.grad(lambda p: add_previous(logits, p, weight).sum())(previous)
    assert np.abs(gradient).min() > 0


@pytest.mark.parametrize(
    "kind, variance, mean",
    [
        ("gaussian", 1 / 36, 0),
        ("logistic", math.pi**2 / 3, 0),
        ("gumbel", math.pi**2 / 6, np.euler_gamma),
    ],
)
def test_noise_has_the_moments_it_should(make_inputs, kind, variance, mean):
    inputs = make_inputs(s=2, n=20_000, padding=0, rng=jax.random.key(0))
    noise = np.asarray(perturb(inputs, kind, 1.0) - inputs.logits, np.float64)
    assert noise.mean() == pytest.approx(mean, abs=0.01)
    assert noise.var() == pytest.approx(variance, rel=0.02)
    double = np.asarray(perturb(inputs, kind, 2.0) - inputs.logits)
    np.testing.assert_allclose(double[0, :5], 2 * noise[0, :5], atol=1e-5)


def test_noise_is_off_without_key_training_or_name(make_inputs):
    noisy = make_inputs(rng=jax.random.key(0))
    for inputs, kind in (
        (dataclasses.replace(noisy, rng=None), "gumbel"),
        (dataclasses.replace(noisy, train=False), "gumbel"),
        (noisy, ""),
    ):
        assert perturb(inputs, kind, 1.0) is inputs.logits


def test_jitter_is_multiplicative():
    moved = jitter(jax.random.key(0), X, 0.01)
    ratio = np.asarray(moved / X)
    assert ratio.min() >= 0.99 - 1e-5 and ratio.max() <= 1.01 + 1e-5 and np.ptp(ratio) > 0.01
    assert jitter(None, X, 0.01) is X and jitter(jax.random.key(0), X, 0.0) is X
    assert jitter(jax.random.key(0), X.astype(jnp.bfloat16), 0.01).dtype == jnp.bfloat16


def test_schedule_of_the_pool():
    """Four experts in each of three layers, opened from step 10 to 18: one a step."""
    counts = [
        int(open_experts(jnp.asarray(t), 4, 3, (10, 18))) for t in (0, 10, 11, 13, 17, 18, 99)
    ]
    assert counts == [4, 4, 5, 7, 11, 12, 12]
    odd = [int(open_experts(jnp.asarray(t), 4, 2, (0, 3))) for t in range(5)]
    assert odd == [4, 5, 6, 8, 8]
    assert int(open_experts(jnp.asarray(10**6), 4, 1, (0, 10))) == 4


@pytest.mark.parametrize("own", [0, 2])
def test_own_experts_are_never_masked(own):
    steps = (10, 18)
    for step, rng in ((0, None), (13, None), (13, jax.random.key(0)), (13, jax.random.key(1))):
        mask = pool_mask(jnp.asarray(step), 4, 3, own, steps, rng)
        assert mask[own * 4 : own * 4 + 4].all()
        assert int(mask.sum()) == int(open_experts(jnp.asarray(step), 4, 3, steps))
    draws = [pool_mask(jnp.asarray(13), 4, 3, own, steps, jax.random.key(i)) for i in (0, 1)]
    assert (draws[0] != draws[1]).any()
    assert pool_mask(jnp.asarray(18), 4, 3, own, steps, None).all()
