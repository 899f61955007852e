"""Dynamic numbers of experts: top-p, SparseMixer, thresholds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import ROUTERS
from moejax.routing.normalise import softmax
from moejax.routing.sparsemixer import sparsemixer_choice, sparsemixer_gate

E = 6
top_p = ROUTERS.get("top_p").function
threshold = ROUTERS.get("threshold").function
GATES = np.float32([0.40, 0.25, 0.15, 0.10, 0.06, 0.04])


def by_hand(make_inputs, **fields):
    return make_inputs(padding=0, logits=np.broadcast_to(np.log(GATES), (2, 12, E)), **fields)


@pytest.mark.parametrize("p, count", [(0.0, 1), (0.5, 2), (0.7, 3), (1.0, 6)])
def test_number_of_experts(run, make_inputs, p, count):
    """The fewest whose probabilities reach p: 0.40, 0.65, 0.80, 0.90, 0.96, 1."""
    plan = run(top_p, by_hand(make_inputs), top_k=6, top_p=p)
    np.testing.assert_array_equal((plan.expert_ids < E).sum(axis=-1), count)
    np.testing.assert_array_equal(plan.expert_ids[0, 0, :count], np.arange(count))
    np.testing.assert_allclose(
        plan.weights[0, 0, :count], GATES[:count] / GATES[:count].sum(), rtol=1e-5
    )


def test_no_more_experts_than_top_k(run, make_inputs):
    plan = run(top_p, by_hand(make_inputs), top_k=2, top_p=0.9)
    np.testing.assert_array_equal(plan.expert_ids[0, 0], [0, 1])
    np.testing.assert_allclose(plan.weights[0, 0], GATES[:2] / GATES[:2].sum(), rtol=1e-5)


@pytest.mark.parametrize("estimator", ["softmax", "sparsemixer"])
def test_shared_experts_compete_for_a_total_of_one(run, make_inputs, estimator):
    inputs = make_inputs(num_ffn=3, num_zero=1, num_shared=2, rng=jax.random.key(0))
    plan = run(top_p, inputs, top_k=3, estimator=estimator)
    assert plan.shared_weights.shape == (2, 12, 2)
    total = plan.weights.sum(axis=-1) + plan.shared_weights.sum(axis=-1)
    np.testing.assert_allclose(total, inputs.valid, rtol=1e-5)
    # The mass of the routed ones by hand: softmax over the chosen and the shared logits.
    for n in range(12):
        ids = plan.expert_ids[0, n]
        ids = ids[ids < E]
        assert (ids < 4).all()
        exp = np.exp(inputs.logits[0, n])
        mass = exp[ids].sum() / (exp[ids].sum() + exp[4:].sum())
        np.testing.assert_allclose(plan.weights[0, n].sum(), mass, rtol=1e-4)


def test_a_token_with_the_null_expert_alone_keeps_the_shared_part(run, make_inputs):
    logits = np.zeros((2, 12, E), np.float32)
    logits[..., 3] = 9
    inputs = make_inputs(padding=0, logits=logits, num_ffn=3, num_zero=1, num_shared=2)
    plan = run(top_p, inputs, top_k=3)
    np.testing.assert_array_equal(plan.expert_ids[0, 0], [3, E, E])
    assert 0 < float(plan.shared_weights[0, 0].sum()) < 0.01


def test_sparsemixer_without_sampling_takes_the_largest(run, make_inputs):
    inputs = by_hand(make_inputs, train=False, rng=jax.random.key(0))
    plan = run(top_p, inputs, top_k=6, top_p=0.7, estimator="sparsemixer")
    np.testing.assert_array_equal(plan.expert_ids[0, 0], [0, 1, 2, E, E, E])
    # A gap of 1%: the largest logit stands alone in each step.
    np.testing.assert_allclose(plan.weights[0, 0, :3], 1 / 3, rtol=1e-6)


def test_sparsemixer_samples_among_near_logits(run):
    logits = np.broadcast_to(np.float32([2.0, 1.99, 0.5, 0, 0, 0]), (500, 4, E))
    may = np.ones(logits.shape, bool)
    key = jax.random.key(0)
    chosen, weight = run(sparsemixer_choice, logits, may, key=key, gap=0.01)
    assert set(np.unique(chosen)) == {0, 1}
    p = 1 / (1 + np.exp(-0.01))
    np.testing.assert_allclose((chosen == 0).mean(), p, atol=0.05)
    np.testing.assert_allclose(weight[chosen == 0], p, rtol=1e-5)
    # The less probable one counts a third, or in a quarter of the cases in full.
    whole = weight[chosen == 1] > 0.4
    np.testing.assert_allclose(weight[chosen == 1][~whole], (1 - p) / 3, rtol=1e-5)
    np.testing.assert_allclose(whole.mean(), 0.25, atol=0.05)
    none, zero = run(sparsemixer_choice, logits, ~may, key=key, gap=0.01)
    assert (none == E).all() and (zero == 0).all()


def test_sparsemixer_gradient_is_the_jacobian_of_the_softmax(run):
    """``w (onehot - softmax)``, whatever the factor; and by finite differences of the softmax."""
    logits = np.random.default_rng(0).normal(size=(5, E)).astype(np.float32)
    mask = np.broadcast_to(np.arange(E) != 4, (5, E))
    chosen = np.asarray([0, 1, 2, 3, 5])
    factor = np.float32([1, 1 / 3, 1, 1 / 3, 1])
    gate = jax.jit(lambda x: sparsemixer_gate(x, mask, chosen, factor))
    value, back = jax.vjp(gate, logits)
    probs = run(softmax, logits, mask)
    weight = probs[np.arange(5), chosen]
    np.testing.assert_allclose(value, factor * weight, rtol=1e-6)
    cotangent = np.float32([1, 2, -1, 0.5, 3])
    (gradient,) = map(np.asarray, back(jnp.asarray(cotangent)))
    analytic = (cotangent * weight)[:, None] * (np.eye(E)[chosen] - probs)
    np.testing.assert_allclose(gradient, analytic, rtol=1e-5, atol=1e-7)
    eps = 1e-2
    for e in range(E):
        step = np.float32(eps * (np.arange(E) == e)[None])
        read = lambda x: np.float64(run(softmax, np.asarray(x), mask)[np.arange(5), chosen])
        slope = (read(logits + step) - read(logits - step)) / (2 * eps)
        np.testing.assert_allclose(gradient[:, e], cotangent * slope, atol=1e-4)


def test_threshold_by_hand(run, make_inputs):
    inputs = by_hand(make_inputs)
    plan = run(threshold, inputs, top_k=6, threshold=0.12)
    np.testing.assert_array_equal(plan.expert_ids[0, 0], [0, 1, 2, E, E, E])
    np.testing.assert_allclose(plan.weights[0, 0, :3], GATES[:3], rtol=1e-5)
    assert (run(threshold, inputs, top_k=6, threshold=0.9).expert_ids == E).all()
    np.testing.assert_allclose(
        run(threshold, inputs, top_k=2, threshold=0.12, renormalise=True).weights[0, 0],
        GATES[:2] / GATES[:2].sum(),
        rtol=1e-5,
    )


def test_dense_in_training_sparse_after(run, make_inputs):
    options = dict(top_k=6, threshold=0.12, dense_in_training=True)
    inputs = by_hand(make_inputs)
    np.testing.assert_allclose(run(threshold, inputs, **options).weights[0, 0], GATES, rtol=1e-5)
    plan = run(threshold, dataclasses.replace(inputs, train=False), **options)
    np.testing.assert_array_equal((plan.expert_ids < E).sum(axis=-1), 3)
