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
X = np.random.default_rng(0).normal(size=(S, N, D)).astype(np.float32)
MODALITY = np.tile(np.int32([0, 1, 1]), (S, 2))


def make(name, m, **options):
    """Parameters of the right shapes."""
    draw = np.random.default_rng(1)
    shapes = SCORES.get(name).shapes(D, E, m, **options)
    return {key: draw.normal(size=shape).astype(np.float32) for key, (shape, _) in shapes.items()}


@pytest.fixture(params=list(SCORES))
def name(request):
    return request.param


@pytest.fixture
def apply(run):
    return lambda name, params, x=X, **options: run(
        SCORES.get(name).apply, params, x, MODALITY, **options
    )


def test_shapes_have_a_modality_axis(name):
    for m in (1, 3):
        for shape, init in SCORES.get(name).shapes(D, E, m).values():
            assert shape[0] == m and callable(init)


def test_a_linear_score_may_begin_uniform():
    (shape, init) = SCORES.get("linear").shapes(D, 64, M, init="uniform")["router_mde"]
    drawn = np.asarray(init(jax.random.key(0), shape, jnp.float32)) * math.sqrt(D)
    assert drawn.min() > -1 and drawn.max() < 1
    assert drawn.std() == pytest.approx(1 / math.sqrt(3), rel=0.05)
    assert abs(drawn.mean()) < 0.05


def test_one_set_of_parameters_for_each_modality(name, apply, run):
    """With equal sets it is the shared score; else each token reads its own."""
    # Attributes are read in the tokens' place: as many as the tokens have numbers.
    options = {"attributes": D} if name == "attributes" else {}
    shared = make(name, 1, **options)
    both = jax.tree.map(lambda p: np.concatenate([p, p]), shared)
    np.testing.assert_allclose(apply(name, both), apply(name, shared), rtol=1e-4, atol=1e-5)
    own = make(name, M, **options)
    logits = apply(name, own)
    assert logits.shape == (S, N, E) and logits.dtype == np.float32
    for m in range(M):
        alone = apply(name, jax.tree.map(lambda p, m=m: p[m : m + 1], own))
        here = m == MODALITY
        np.testing.assert_allclose(logits[here], alone[here], rtol=1e-4, atol=1e-5)
    # Text sends nothing to the parameters of the other modality.
    text = (MODALITY == 0)[..., None]

    def of_text(params):
        logits = SCORES.get(name).apply(params, jnp.asarray(X), jnp.asarray(MODALITY))
        return jnp.where(text, logits, 0).sum()

    for leaf in jax.tree.leaves(run(jax.grad(of_text), own)):
        np.testing.assert_array_equal(leaf[1], 0)
        assert np.abs(leaf[0]).max() > 0


def test_bfloat16_tokens_have_float32_logits(name, apply):
    params = make(name, M)
    short = X.astype(jnp.bfloat16)
    logits = apply(name, params, short)
    assert logits.dtype == np.float32
    exact = apply(name, params, short.astype(np.float32))
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-5)


def test_linear_and_mlp_by_hand(apply):
    params = make("linear", 1)
    expected = X @ params["router_mde"][0]
    np.testing.assert_allclose(apply("linear", params), expected, rtol=1e-4, atol=1e-5)
    params = make("mlp", 1, hidden=3)
    wi, wo = (params[key][0] for key in ("router_wi_mdf", "router_wo_mfe"))
    assert wi.shape == (D, 3)
    tanh = apply("mlp", params)
    np.testing.assert_allclose(tanh, np.tanh(X @ wi) @ wo, rtol=1e-4, atol=1e-5)
    gelu = apply("mlp", params, activation="gelu")
    assert np.abs(gelu - tanh).max() > 1e-3
    shape, init = SCORES.get("mlp").shapes(D, E, wi_std=0.5)["router_wi_mdf"]
    assert shape == (1, D, 8 * E)
    assert init(jax.random.key(0), (1, 40, 40)).std() == pytest.approx(0.5, rel=0.05)


def test_cosine_is_blind_to_lengths(apply):
    params = make("cosine", M)
    logits = apply("cosine", params)
    assert np.abs(logits).max() <= 1
    np.testing.assert_allclose(apply("cosine", params, 7 * X), logits, atol=1e-5)
    longer = {"prototype_mde": 3 * params["prototype_mde"]}
    np.testing.assert_allclose(apply("cosine", longer), logits, atol=1e-5)
    np.testing.assert_allclose(apply("cosine", params, temperature=0.1), 10 * logits, rtol=1e-5)
    shapes = SCORES.get("cosine").shapes(D, E, M, learn_scale=True, temperature=0.5)
    scale = shapes["scale_m"][1](jax.random.key(0), (M,), jnp.float32)
    np.testing.assert_array_equal(scale, 2)
    both = {**params, "scale_m": np.float32([1, 4])}
    factor = np.where(MODALITY == 0, 1, 4)[..., None]
    np.testing.assert_allclose(apply("cosine", both), factor * logits, rtol=1e-5)


def test_equal_attributes_have_equal_logits(apply, run):
    of = run(modality_attributes, MODALITY, num=3)
    logits = apply("attributes", make("attributes", 1, attributes=3), of)
    for m in range(M):
        rows = logits[m == MODALITY]
        np.testing.assert_array_equal(rows, np.broadcast_to(rows[:1], rows.shape))
    assert np.abs(logits[0, 0] - logits[0, 1]).max() > 1e-3


def test_attributes_by_hand(apply):
    params = make("attributes", 1, attributes=D)
    hidden = np.asarray(jax.nn.gelu(X @ params["attribute_mzd"][0]))
    hidden = (hidden - hidden.mean(-1, keepdims=True)) / hidden.std(-1, keepdims=True)
    expected = hidden @ params["router_mde"][0]
    np.testing.assert_allclose(apply("attributes", params), expected, rtol=1e-3, atol=1e-3)


def test_gating_residual(run):
    draw = np.random.default_rng(3)
    previous, weight = (np.float32(draw.normal(size=shape)) for shape in ((S, N, E), (E, E)))
    logits = np.ones((S, N, E), np.float32)
    np.testing.assert_array_equal(run(add_previous, logits, None, weight), logits)
    np.testing.assert_array_equal(run(add_previous, logits, previous, 0 * weight), logits)
    both = run(add_previous, logits, previous, weight)
    np.testing.assert_allclose(both, 1 + previous @ weight, rtol=1e-4, atol=1e-5)
    of_previous = lambda p: add_previous(jnp.asarray(logits), p, jnp.asarray(weight)).sum()
    assert np.abs(run(jax.grad(of_previous), previous)).min() > 0


@pytest.mark.parametrize(
    "kind, variance, mean",
    [
        ("gaussian", 1 / 36, 0),
        ("logistic", math.pi**2 / 3, 0),
        ("gumbel", math.pi**2 / 6, np.euler_gamma),
    ],
)
def test_noise_has_the_moments_it_should(run, make_inputs, kind, variance, mean):
    """Gumbel-sigmoid's is logistic: mean 0, variance pi^2 / 3."""
    inputs = make_inputs(n=20_000, padding=0, rng=jax.random.key(0))
    noise = np.float64(run(perturb, inputs, kind=kind, scale=2.0) - inputs.logits) / 2
    assert noise.mean() == pytest.approx(mean, abs=0.01)
    assert noise.var() == pytest.approx(variance, rel=0.02)


def test_noise_is_off_without_key_training_or_name(make_inputs):
    noisy = jax.tree.map(jnp.asarray, make_inputs(rng=jax.random.key(0)))
    for inputs, kind in (
        (dataclasses.replace(noisy, rng=None), "gumbel"),
        (dataclasses.replace(noisy, train=False), "gumbel"),
        (noisy, ""),
    ):
        assert perturb(inputs, kind, 1.0) is inputs.logits


def test_jitter_is_multiplicative(run):
    x, key = jnp.asarray(X), jax.random.key(0)
    ratio = run(jitter, key, X, eps=0.01) / X
    assert ratio.min() >= 0.99 - 1e-5 and ratio.max() <= 1.01 + 1e-5 and np.ptp(ratio) > 0.01
    assert jitter(None, x, 0.01) is x and jitter(key, x, 0.0) is x
    assert run(jitter, key, X.astype(jnp.bfloat16), eps=0.01).dtype == jnp.bfloat16


def opened(run, step, layers, steps):
    return int(run(open_experts, np.int32(step), num_experts=4, layers=layers, steps=steps))


def test_schedule_of_the_pool(run):
    """Four experts in each of three layers, opened from step 10 to 18: one a step."""
    counts = [opened(run, t, 3, (10, 18)) for t in (0, 10, 11, 13, 17, 18, 99)]
    assert counts == [4, 4, 5, 7, 11, 12, 12]
    assert [opened(run, t, 2, (0, 3)) for t in range(5)] == [4, 5, 6, 8, 8]
    assert opened(run, 10**6, 1, (0, 10)) == 4
    # 41 times the rounded 1 / 41 is below 1.
    assert opened(run, 41, 3, (0, 41)) == 12


@pytest.mark.parametrize("own", [0, 2])
def test_own_experts_are_never_masked(run, own):
    steps = (10, 18)

    def mask(step, rng):
        options = dict(num_experts=4, layers=3, own=own, steps=steps, rng=rng)
        return run(pool_mask, np.int32(step), **options)

    keys = [None, *jax.random.split(jax.random.key(0))]
    for step, rng in ((0, None), *((13, key) for key in keys)):
        assert mask(step, rng)[own * 4 : own * 4 + 4].all()
        assert mask(step, rng).sum() == opened(run, step, 3, steps)
    assert (mask(13, keys[1]) != mask(13, keys[2])).any()
    assert mask(18, None).all()
