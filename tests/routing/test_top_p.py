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
GATES = jnp.asarray([0.40, 0.25, 0.15, 0.10, 0.06, 0.04])


def by_hand(make_inputs, **fields):
    return make_inputs(padding=0, logits=jnp.broadcast_to(jnp.log(GATES), (2, 12, E)), **fields)


@pytest.mark.parametrize("p, count", [(0.0, 1), (0.3, 1), (0.5, 2), (0.7, 3), (0.85, 4), (1.0, 6)])
def test_number_of_experts(make_inputs, p, count):
    """The fewest whose probabilities reach p: 0.40, 0.65, 0.80, 0.90, 0.96, 1."""
    plan = top_p(by_hand(make_inputs), top_k=6, top_p=p)
    np.testing.assert_array_equal((plan.expert_ids < E).sum(axis=-1), count)
    np.testing.assert_array_equal(plan.expert_ids[0, 0, :count], np.arange(count))
    np.testing.assert_allclose(
        plan.weights[0, 0, :count], GATES[:count] / GATES[:count].sum(), rtol=1e-5
    )
    assert (top_p(by_hand(make_inputs), top_k=2, top_p=p).expert_ids < E).sum(axis=-1).max() <= 2


@pytest.mark.parametrize("estimator", ["softmax", "sparsemixer"])
def test_shared_experts_compete_for_a_total_of_one(make_inputs, estimator):
    inputs = make_inputs(num_ffn=3, num_zero=1, num_shared=2, rng=jax.random.key(0))
    plan = top_p(inputs, top_k=3, estimator=estimator)
    assert plan.shared_weights.shape == (2, 12, 2)
    total = plan.weights.sum(axis=-1) + plan.shared_weights.sum(axis=-1)
    np.testing.assert_allclose(total, inputs.valid, rtol=1e-5)
    # The mass of the routed ones by hand: softmax over the chosen and the shared logits.
    for n in range(12):
        ids = np.asarray(plan.expert_ids[0, n])
        ids = ids[ids < E]
        assert (ids < 4).all()
        exp = np.exp(np.asarray(inputs.logits[0, n]))
        mass = exp[ids].sum() / (exp[ids].sum() + exp[4:].sum())
        np.testing.assert_allclose(plan.weights[0, n].sum(), mass, rtol=1e-4)


def test_a_token_with_the_null_expert_alone_keeps_the_shared_part(make_inputs):
    logits = jnp.zeros((2, 12, E)).at[..., 3].set(9.0)
    inputs = make_inputs(padding=0, logits=logits, num_ffn=3, num_zero=1, num_shared=2)
    plan = top_p(inputs, top_k=3)
    np.testing.assert_array_equal(plan.expert_ids[0, 0], [3, E, E])
    assert 0 < float(plan.shared_weights[0, 0].sum()) < 0.01


def test_sparsemixer_without_sampling_takes_the_largest(make_inputs):
    inputs = by_hand(make_inputs, train=False, rng=jax.random.key(0))
    plan = top_p(inputs, top_k=6, top_p=0.7, estimator="sparsemixer")
    np.testing.assert_array_equal(plan.expert_ids[0, 0], [0, 1, 2, E, E, E])
    # A gap of 1%: the largest logit stands alone in each step.
    np.testing.assert_allclose(plan.weights[0, 0, :3], 1 / 3, rtol=1e-6)


def test_sparsemixer_samples_among_near_logits(make_inputs):
    logits = jnp.broadcast_to(jnp.asarray([2.0, 1.99, 0.5, 0.0, 0.0, 0.0]), (500, 4, E))
    may = jnp.ones(logits.shape, bool)
    chosen, weight = sparsemixer_choice(logits, may, 0.01, jax.random.key(0))
    chosen, weight = np.asarray(chosen), np.asarray(weight)
    assert set(np.unique(chosen)) == {0, 1}
    p = 1 / (1 + np.exp(-0.01))
    np.testing.assert_allclose((chosen == 0).mean(), p, atol=0.05)
    np.testing.assert_allclose(weight[chosen == 0], p, rtol=1e-5)
    # The less probable one counts a third, or in a quarter of the cases in full.
    whole = weight[chosen == 1] > 0.4
    np.testing.assert_allclose(weight[chosen == 1][~whole], (1 - p) / 3, rtol=1e-5)
    np.testing.assert_allclose(whole.mean(), 0.25, atol=0.05)
    none, zero = sparsemixer_choice(logits, jnp.zeros_like(may), 0.01, jax.random.key(0))
    assert (none == E).all() and (zero == 0).all()


def test_sparsemixer_gradient_is_the_jacobian_of_the_softmax():
    """``w (onehot - softmax)``, whatever the factor; and by finite differences of the softmax."""
    logits = jax.random.normal(jax.random.key(0), (5, E))
    mask = jnp.ones((5, E), bool).at[:, 4].set(False)
    chosen = jnp.asarray([0, 1, 2, 3, 5])
    factor = jnp.asarray([1.0, 1 / 3, 1.0, 1 / 3, 1.0])
    value, back = jax.vjp(lambda x: sparsemixer_gate(x, mask, chosen, factor), logits)
    probs = np.asarray(softmax(logits, mask))
    weight = probs[np.arange(5), chosen]
    np.testing.assert_allclose(value, factor * weight, rtol=1e-6)
    cotangent = jnp.asarray([1.0, 2.0, -1.0, 0.5, 3.0])
    (gradient,) = back(cotangent)
    analytic = (np.asarray(cotangent) * weight)[:, None] * (np.eye(E)[chosen] - probs)
    np.testing.assert_allclose(gradient, analytic, rtol=1e-5, atol=1e-7)
    eps = 1e-2
    for e in range(E):
        step = jnp.zeros((5, E)).at[:, e].set(eps)
        read = lambda x: np.asarray(softmax(x, mask), np.float64)[np.arange(5), chosen]
        slope = (read(logits + step) - read(logits - step)) / (2 * eps)
        np.testing.assert_allclose(gradient[:, e], cotangent * slope, atol=1e-4)


def test_threshold_by_hand(make_inputs):
    inputs = by_hand(make_inputs)
    plan = threshold(inputs, top_k=6, threshold=0.12)
    np.testing.assert_array_equal(plan.expert_ids[0, 0], [0, 1, 2, E, E, E])
    np.testing.assert_allclose(plan.weights[0, 0, :3], GATES[:3], rtol=1e-5)
    assert (threshold(inputs, top_k=6, threshold=0.9).expert_ids == E).all()
    np.testing.assert_allclose(
        threshold(inputs, top_k=2, threshold=0.12, renormalise=True).weights[0, 0],
        GATES[:2] / GATES[:2].sum(),
        rtol=1e-5,
    )


def test_dense_in_training_sparse_after(make_inputs):
    options = dict(top_k=6, threshold=0.12, dense_in_training=True)
    inputs = by_hand(make_inputs)
    np.testing.assert_allclose(threshold(inputs, **options).weights[0, 0], GATES, rtol=1e-5)
    plan = threshold(dataclasses.replace(inputs, train=False), **options)
    np.testing.assert_array_equal((plan.expert_ids < E).sum(axis=-1), 3)
