"""Routers without a choice, and soft slots."""

import dataclasses

import jax
import numpy as np
import pytest

from moejax.experts.activations import activate
from moejax.experts.soft import soft_mlp
from moejax.routing import ROUTERS, RouterInputs

E = 6
TABLE = np.asarray([[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]], bool)


@pytest.fixture
def route(run):
    return lambda name, inputs, **options: run(ROUTERS.get(name).function, inputs, **options)


def test_forced_is_the_first_allowed_expert(route, make_inputs):
    inputs = make_inputs()
    inputs = dataclasses.replace(inputs, allowed=TABLE[inputs.modality])
    plan = route("forced", inputs)
    expected = np.where(inputs.valid, np.where(inputs.modality == 0, 1, 3), E)
    np.testing.assert_array_equal(plan.expert_ids[..., 0], expected)
    np.testing.assert_array_equal(plan.weights[..., 0], inputs.valid)


def test_hash_knows_the_token_alone(route, make_inputs):
    a, b = make_inputs(0), make_inputs(1)
    ids = np.tile(np.arange(12, dtype=np.int32), (2, 1))
    plans = [route("hash", dataclasses.replace(i, token_ids=ids)).expert_ids for i in (a, b)]
    np.testing.assert_array_equal(*plans)
    many = dataclasses.replace(
        a,
        token_ids=np.arange(2400, dtype=np.int32).reshape(2, 1200),
        logits=np.zeros((2, 1200, E), np.float32),
        valid=np.ones((2, 1200), bool),
        modality=np.zeros((2, 1200), np.int32),
    )
    count = lambda plan: np.bincount(plan.expert_ids.reshape(-1), minlength=E)
    first, second = route("hash", many), route("hash", many, seed=1)
    # 400 each, within five standard deviations.
    assert np.abs(count(first) - 400).max() < 100
    assert (first.expert_ids == second.expert_ids).mean() < 0.25


@pytest.mark.parametrize("key", [None, 0])
def test_random_partition_is_equal(route, make_inputs, key):
    inputs = make_inputs(rng=None if key is None else jax.random.key(key))
    inputs = dataclasses.replace(inputs, modality=np.zeros_like(inputs.modality))
    ids = route("random_partition", inputs).expert_ids
    counts = [np.bincount(row.reshape(-1), minlength=E)[:E] for row in ids]
    np.testing.assert_array_equal(counts[0], 2)
    np.testing.assert_array_equal(np.sort(counts[1]), [1, 1, 1, 2, 2, 2])
    in_order = np.arange(12) % E
    assert (ids[0, :, 0] == in_order).all() == (key is None)


def test_random_partition_deals_each_modality_its_own(route, make_inputs):
    inputs = make_inputs(rng=jax.random.key(2), padding=0)
    modality = np.tile(np.int32([0, 1]), (2, 6))
    table = TABLE[modality]
    plan = route("random_partition", dataclasses.replace(inputs, modality=modality, allowed=table))
    counts = np.bincount(plan.expert_ids[0].reshape(-1), minlength=E)
    np.testing.assert_array_equal(counts, [0, 3, 3, 2, 2, 2])


def test_soft_slots_and_tokens_are_mixtures(route, make_inputs):
    inputs = make_inputs()
    plan = route("soft", inputs, slots=2)
    assert plan.dispatch.shape == plan.combine.shape == (2, 12, 3, 2)
    np.testing.assert_allclose(plan.dispatch.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(plan.combine.sum(axis=(2, 3)), inputs.valid, rtol=1e-6)
    # Column e * slots + c is slot c of expert e.
    by_hand = np.exp(inputs.logits[0]) / np.exp(inputs.logits[0]).sum(axis=0)
    np.testing.assert_allclose(plan.dispatch[0, :, 1, 0], by_hand[:, 2], rtol=1e-5)
    assert ROUTERS.get("soft").columns(8, {"slots": 4}) == 32
    assert ROUTERS.get("soft").columns(8, {}) == 8


def test_soft_without_scale_averages(route, make_inputs):
    plan = route("soft", make_inputs(logits=np.zeros((2, 12, E), np.float32)))
    np.testing.assert_allclose(plan.dispatch[0], 1 / 12, rtol=1e-6)
    np.testing.assert_allclose(plan.dispatch[1, :9], 1 / 9, rtol=1e-6)
    np.testing.assert_allclose(plan.combine[0], 1 / E, rtol=1e-6)


def test_soft_with_a_slot_for_each_token_runs_the_expert_on_it(route, run):
    """One expert, as many slots as tokens, logits that leave no doubt: y = f(x)."""
    draw = np.random.default_rng(0)
    n, d, f = 4, 3, 5
    x = draw.normal(size=(1, n, d)).astype(np.float32)
    wi, wo = (draw.normal(size=shape).astype(np.float32) for shape in ((1, d, f), (1, f, d)))
    ones = np.ones((1, n), np.int32)
    inputs = RouterInputs(100 * np.eye(n, dtype=np.float32)[None], ones > 0, 0 * ones, ones)
    plan = route("soft", inputs, slots=n)
    got = run(soft_mlp, x, plan.dispatch, plan.combine, wi, wo, activation="gelu")
    expected = run(activate, x @ wi[0], activation="gelu") @ wo[0]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_soft_keeps_modalities_apart_where_experts_are(route, make_inputs):
    inputs = make_inputs(padding=0)
    table = np.asarray([[1, 1, 0], [0, 0, 1]], bool)
    inputs = dataclasses.replace(inputs, allowed=table[inputs.modality])
    plan = route("soft", inputs, slots=2)
    text = inputs.modality == 0
    np.testing.assert_array_equal(plan.dispatch[text][:, 2], 0)
    np.testing.assert_array_equal(plan.combine[~text][:, :2], 0)
    np.testing.assert_allclose(plan.combine.sum(axis=(2, 3)), 1, rtol=1e-6)
    # A group of padding alone mixes nothing, with finite numbers.
    inputs.valid[0] = False
    plan = route("soft", inputs, slots=2)
    np.testing.assert_array_equal(plan.dispatch[0], 0)
