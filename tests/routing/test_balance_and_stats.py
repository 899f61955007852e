"""Bias controllers, and the figures of a log."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.routing import (
    CONTROLLERS,
    ROUTERS,
    allowed_experts,
    fair_counts,
    limit_capacity,
    routing_statistics,
    summarise,
    update_bias,
)

E = 6
top_k = ROUTERS.get("top_k").function


def test_sign_rule_by_hand(run):
    bias = np.float32([0.0, 0.1, -0.1, 0.0])
    new = run(update_bias, bias_e=bias, counts_e=np.float32([10, 0, 4, 4]), kind="sign", rate=0.01)
    np.testing.assert_allclose(new, [-0.01, 0.11, -0.09, 0.01], rtol=1e-6)
    # The mean is 5 over the first three: the last is shared, and stays.
    counts = np.float32([5, 6, 4, 0])
    new = run(update_bias, bias_e=bias, counts_e=counts, kind="sign", rate=0.01, num_shared=1)
    np.testing.assert_allclose(new, [0.0, 0.09, -0.09, 0.0], atol=1e-7)


def test_increment_by_hand(run):
    """LongCat: mu (K_e / K / N - T_i / (K T)); experts without weights keep their bias."""
    bias, counts = np.zeros(4, np.float32), np.float32([6, 2, 1, 1])
    options = dict(kind="increment", rate=0.1, num_ffn=2, ffn_share=0.5)
    new = run(update_bias, bias_e=bias, counts_e=counts, **options)
    np.testing.assert_allclose(new, [0.1 * (0.25 - 0.6), 0.1 * (0.25 - 0.2), 0, 0], atol=1e-7)


@pytest.mark.parametrize("kind", CONTROLLERS)
def test_nothing_moves_without_tokens(run, kind):
    bias = np.float32([0.1, -0.1])
    new = run(update_bias, bias_e=bias, counts_e=np.zeros(2, np.float32), kind=kind, rate=1.0)
    np.testing.assert_array_equal(new, bias)


def test_unknown_controller():
    with pytest.raises(UserError, match="model.moe.balance.name: no controller 'sing'.*'sign'"):
        update_bias("sing", jnp.zeros(2), jnp.ones(2), rate=1.0)


@pytest.mark.parametrize("kind, rate, steps", [("sign", 2e-3, 250), ("increment", 0.2, 80)])
def test_controller_balances_a_fixed_skewed_router(make_inputs, kind, rate, steps):
    inputs = make_inputs(n=200, padding=0)
    inputs.logits[:] += np.linspace(0, 3, E)
    inputs = jax.tree.map(jnp.asarray, inputs)

    @jax.jit
    def step(bias):
        moved = dataclasses.replace(inputs, select_bias=bias)
        sums = routing_statistics(moved, top_k(moved), 2)
        violation = summarise(sums, num_ffn=E)["max_violation"]
        return update_bias(kind, bias, sums["chosen_me"].sum(0), rate=rate), violation

    bias, violations = np.zeros(E, np.float32), []
    for _ in range(steps):
        bias, violation = step(bias)
        violations.append(float(violation))
    assert violations[0] > 0.8
    assert np.mean(violations[-10:]) < 0.1
    # The favourite is held back most.
    assert bias[-1] == bias.min() and bias[0] == bias.max()


def test_increment_drives_the_mean_number_of_experts_with_weights(make_inputs):
    """K = 3 of four experts and two without weights: two with weights on average."""
    inputs = jax.tree.map(jnp.asarray, make_inputs(n=200, padding=0, num_ffn=4))

    @jax.jit
    def step(bias):
        moved = dataclasses.replace(inputs, select_bias=bias)
        sums = routing_statistics(moved, top_k(moved, top_k=3), 2)
        counts = sums["chosen_me"].sum(0)
        new = update_bias("increment", bias, counts, rate=0.1, num_ffn=4, ffn_share=1.5 / 3)
        return new, summarise(sums, num_ffn=4)["experts_per_token"]

    bias = np.zeros(E, np.float32)
    for _ in range(80):
        bias, mean = step(bias)
    assert float(mean) == pytest.approx(1.5, abs=0.05)
    np.testing.assert_array_equal(bias[4:], 0)


def test_no_gradient_comes_out_of_a_controller():
    gradients = jax.grad(lambda b, c: update_bias("increment", b, c, rate=0.1).sum(), (0, 1))(
        jnp.zeros(3), jnp.asarray([1.0, 2.0, 3.0])
    )
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), gradients)


def test_fair_counts_by_hand():
    counts = jnp.asarray([[6.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 2.0]])
    table = jnp.asarray([[1, 1, 0, 0], [0, 0, 1, 1]], bool)
    np.testing.assert_allclose(fair_counts(counts, table), [4, 4, 1.5, 1.5])
    overlap = jnp.asarray([[1, 1, 0, 0], [0, 1, 1, 1]], bool)
    np.testing.assert_allclose(fair_counts(counts, overlap), [4, 5, 1, 1])
    # Against the plain mean of 2.75 both experts of the second modality would go up.
    new = update_bias(
        "sign",
        jnp.zeros(4),
        counts.sum(0),
        rate=1.0,
        target_e=fair_counts(counts, table),
    )
    np.testing.assert_array_equal(new, [-1, 1, 1, -1])


def test_statistics_by_hand(run, make_inputs):
    gates = np.float32([0.4, 0.3, 0.1, 0.1, 0.05, 0.05])
    modality = np.tile(np.int32([0, 0, 1]), (2, 4))
    logits = np.broadcast_to(np.log(gates), (2, 12, E))
    inputs = make_inputs(logits=logits, modality=modality)
    plan = run(limit_capacity, run(top_k, inputs), inputs, capacity=10, policy="order")
    sums = run(routing_statistics, inputs, plan, num_modalities=3)
    # 12 + 9 tokens, of which 8 + 6 are text, 4 + 3 pictures, none the third modality.
    np.testing.assert_array_equal(sums["tokens_m"], [14, 7, 0])
    np.testing.assert_array_equal(sums["chosen_me"].sum(axis=0), [21, 21, 0, 0, 0, 0])
    np.testing.assert_array_equal(sums["kept_me"].sum(axis=0), [19, 19, 0, 0, 0, 0])
    np.testing.assert_allclose(sums["probs_me"], np.outer([14, 7, 0], gates), rtol=1e-5)
    figures = run(summarise, sums, num_ffn=1)
    np.testing.assert_allclose(figures["load"], [0.5, 0.5, 0, 0, 0, 0])
    np.testing.assert_allclose(figures["load_by_modality"][1], [0.5, 0.5, 0, 0, 0, 0])
    np.testing.assert_array_equal(figures["load_by_modality"][2], 0)
    expected = {
        "drop_fraction": 4 / 42,
        "null_fraction": 0.5,
        "experts_per_token": 19 / 21,
        "entropy": -(gates * np.log(gates)).sum(),
        "margin": 0.1,
        "max_violation": 0.0,
    }
    for name, value in expected.items():
        assert float(figures[name]) == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert float(run(summarise, sums, num_ffn=3)["max_violation"]) == pytest.approx(0.5)


def test_statistics_add_up_and_none_are_zero(run, make_inputs):
    inputs = make_inputs()
    plan = run(top_k, inputs)
    half = lambda tree, i: jax.tree.map(lambda x: x[i : i + 1] if np.ndim(x) >= 2 else x, tree)
    statistics = lambda *pair: run(routing_statistics, *pair, num_modalities=2)
    total = jax.tree.map(np.add, *(statistics(half(inputs, i), half(plan, i)) for i in (0, 1)))
    whole = statistics(inputs, plan)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), total, whole)
    nothing = run(summarise, jax.tree.map(np.zeros_like, whole), num_ffn=E)
    jax.tree.map(lambda value: np.testing.assert_array_equal(value, 0), nothing)


def test_statistics_of_soft_routing_are_masses(run, make_inputs):
    inputs = make_inputs()
    plan = run(ROUTERS.get("soft").function, inputs, slots=2)
    sums = run(routing_statistics, inputs, plan, num_modalities=2)
    assert sums["chosen_me"].shape == (2, 3)
    assert float(sums["chosen_me"].sum()) == pytest.approx(21, rel=1e-5)
    figures = run(summarise, sums, num_ffn=3)
    assert float(figures["load"].sum()) == pytest.approx(1, rel=1e-5)
    assert 0 < float(figures["entropy"]) < math.log(3)


def test_no_gradient_through_statistics(run, make_inputs):
    inputs = make_inputs()

    def of(logits):
        moved = dataclasses.replace(inputs, logits=logits)
        return routing_statistics(moved, top_k(moved), 2)["entropy"]

    np.testing.assert_array_equal(run(jax.grad(of), inputs.logits), 0)


def test_allowed_experts_by_modality():
    table = jnp.asarray([[1, 1, 0], [0, 1, 1]], bool)
    allowed = allowed_experts(table, jnp.asarray([[0, 1, 0]], jnp.int32))
    np.testing.assert_array_equal(allowed[0], [[1, 1, 0], [0, 1, 1], [1, 1, 0]])
