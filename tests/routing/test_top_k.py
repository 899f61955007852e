"""Token choice against gates written by hand; DeepSeek-V3's groups and biases; noise; Sinkhorn."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import ROUTERS, check_router
from moejax.routing.normalise import sinkhorn, softmax
from moejax.routing.perturb import perturb

E = 6
top_k = ROUTERS.get("top_k").function
BIAS = np.float32([0.3, 0, -0.2, 0.1, 0, 0.4])
V3 = dict(
    top_k=2,
    normalise="sigmoid",
    renormalise=True,
    scale=2.5,
    num_groups=3,
    top_groups=2,
    group_score="top2",
)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(make_inputs, gates, **fields):
    """Inputs whose softmax is ``gates`` [n, e] in group 0."""
    inputs = make_inputs(padding=0, **fields)
    inputs.logits[0, : len(gates)] = np.log(gates)
    return inputs


GATES = [[0.5, 0.25, 0.05, 0.05, 0.1, 0.05], [0.1, 0.1, 0.2, 0.1, 0.3, 0.2]]


def test_softmax_before_or_after_the_choice(run, make_inputs):
    inputs = by_hand(make_inputs, GATES)
    before = run(top_k, inputs)
    np.testing.assert_array_equal(before.expert_ids[0, :2], [[0, 1], [4, 2]])
    np.testing.assert_allclose(before.weights[0, :2], [[0.5, 0.25], [0.3, 0.2]], rtol=1e-5)
    after = run(top_k, inputs, normalise_first=False)
    np.testing.assert_array_equal(after.expert_ids, before.expert_ids)
    np.testing.assert_allclose(after.weights[0, :2], [[2 / 3, 1 / 3], [0.6, 0.4]], rtol=1e-5)
    # A softmax over two logits is what is left of the softmax over all, divided by its sum.
    divided = run(top_k, inputs, renormalise=True)
    np.testing.assert_allclose(divided.weights, after.weights, rtol=1e-5)
    np.testing.assert_allclose(run(top_k, inputs, scale=3.0).weights, 3 * before.weights, rtol=1e-6)


def test_the_two_orders_have_different_gradients(run, make_inputs):
    inputs = make_inputs()

    def first_weights(logits, **options):
        return top_k(dataclasses.replace(inputs, logits=logits), **options).weights[..., 0].sum()

    grad = lambda **options: run(jax.grad(first_weights), inputs.logits, **options)
    not_chosen = ~np.isin(np.arange(E), run(top_k, inputs).expert_ids[0, 0])
    assert (np.abs(grad()[0, 0])[not_chosen] > 0).all()
    assert (np.abs(grad(normalise_first=False)[0, 0])[not_chosen] == 0).all()


def test_of_equal_scores_the_lower_id_is_chosen(run, make_inputs):
    inputs = make_inputs(logits=np.zeros((2, 12, E), np.float32))
    ids = run(top_k, inputs, top_k=3).expert_ids
    np.testing.assert_array_equal(ids[0], np.tile([0, 1, 2], (12, 1)))
    ids = run(top_k, inputs, top_k=3, num_groups=3, top_groups=2, group_score="top2").expert_ids
    np.testing.assert_array_equal(ids[0], np.tile([0, 1, 2], (12, 1)))


def test_fewer_allowed_than_chosen(run, make_inputs):
    allowed = np.zeros((2, 12, E), bool)
    allowed[..., 3] = True
    plan = run(top_k, make_inputs(allowed=allowed))
    np.testing.assert_array_equal(plan.expert_ids[0], np.tile([3, E], (12, 1)))
    np.testing.assert_array_equal(plan.weights[0], np.tile([1.0, 0.0], (12, 1)))


def test_experts_are_drawn_without_putting_them_back(run, make_inputs):
    """MoDE: pairs as often as drawing from p twice has them, weights from p itself."""
    p = np.float32([0.4, 0.3, 0.2, 0.1, 0])
    tokens = 40_000
    logits = np.broadcast_to(np.log(np.maximum(p, 1e-30)), (1, tokens, 5))
    inputs = make_inputs(s=1, n=tokens, e=5, padding=0, logits=logits, rng=jax.random.key(0))
    options = dict(noise="gumbel", noisy_weights=False, renormalise=True)
    plan = run(top_k, inputs, **options)
    assert not (plan.expert_ids == 4).any(), "an expert of probability 0 was drawn"
    first, second = plan.expert_ids[0].T
    counts = np.zeros((5, 5))
    np.add.at(counts, (first, second), 1)
    expected = p[:, None] * p[None] / (1 - p[:, None])
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(counts / tokens, expected, atol=0.01)
    own = p[plan.expert_ids]
    np.testing.assert_allclose(plan.weights, own / own.sum(-1, keepdims=True), rtol=1e-5)
    # Evaluation takes the likeliest two.
    still = run(top_k, dataclasses.replace(inputs, train=False), **options)
    np.testing.assert_array_equal(still.expert_ids[0, 0], [0, 1])


def test_deepseek_v3_uses_few_groups_and_sums_to_its_scale(run, make_inputs):
    inputs = make_inputs(padding=0, select_bias=BIAS)
    plan = run(top_k, inputs, **{**V3, "top_k": 4})
    np.testing.assert_allclose(plan.weights.sum(axis=-1), 2.5, rtol=1e-6)
    groups = plan.expert_ids // 2
    assert max(len(set(row)) for row in groups.reshape(-1, 4)) == 2
    # Group scores by hand: the sum of both biased scores.
    biased = sigmoid(inputs.logits) + inputs.select_bias
    best = np.argsort(-biased.reshape(2, 12, 3, 2).sum(axis=-1), axis=-1)[..., :2]
    np.testing.assert_array_equal(np.unique(groups[0, 0]), np.sort(best[0, 0]))


def test_group_score_by_hand(run, make_inputs):
    gates = [[0.40, 0.01, 0.25, 0.22, 0.06, 0.06]]
    inputs = by_hand(make_inputs, gates)
    options = dict(top_k=1, num_groups=3, top_groups=1)
    assert run(top_k, inputs, group_score="max", **options).expert_ids[0, 0, 0] == 0
    # 0.25 + 0.22 beats 0.40 + 0.01.
    assert run(top_k, inputs, group_score="top2", **options).expert_ids[0, 0, 0] == 2
    # Groups with one allowed expert count by that one alone.
    allowed = np.ones((2, 12, E), bool)
    allowed[..., [1, 3]] = False
    inputs = dataclasses.replace(inputs, allowed=allowed)
    assert run(top_k, inputs, group_score="top2", **options).expert_ids[0, 0, 0] == 0


def test_a_constant_added_to_all_biases_changes_nothing(run, make_inputs):
    inputs = make_inputs(select_bias=BIAS)
    moved = dataclasses.replace(inputs, select_bias=inputs.select_bias + 2)
    jax.tree.map(np.testing.assert_array_equal, run(top_k, inputs, **V3), run(top_k, moved, **V3))


def test_a_bias_changes_the_choice_and_not_the_ratio_of_weights(run, make_inputs):
    inputs = make_inputs(padding=0)
    plan = run(top_k, dataclasses.replace(inputs, select_bias=np.float32([0, 0, 5, 0, 0, 0])), **V3)
    assert (plan.expert_ids == 2).any(axis=-1).all()
    scores = sigmoid(inputs.logits)
    chosen = np.take_along_axis(scores, plan.expert_ids, axis=-1)
    np.testing.assert_allclose(
        plan.weights, 2.5 * chosen / chosen.sum(axis=-1, keepdims=True), rtol=1e-5
    )
    # Losses and statistics see the scores without it.
    np.testing.assert_allclose(plan.probs, scores / scores.sum(-1, keepdims=True), rtol=1e-5)


def test_shared_experts_compete(run, make_inputs):
    inputs = by_hand(make_inputs, GATES, num_ffn=4, num_shared=2)
    plan = run(top_k, inputs)
    assert (plan.expert_ids < 4).all()
    np.testing.assert_allclose(plan.weights[0, 0], [0.5, 0.25], rtol=1e-5)
    np.testing.assert_allclose(plan.shared_weights[0, 0], [0.1, 0.05], rtol=1e-5)
    np.testing.assert_allclose(plan.probs[0, 0, :4] * 0.85, GATES[0][:4], rtol=1e-5)
    np.testing.assert_array_equal(plan.probs[..., 4:], 0)
    for options in ({"renormalise": True}, {"normalise_first": False}):
        plan = run(top_k, inputs, **options)
        total = plan.weights.sum(axis=-1) + plan.shared_weights.sum(axis=-1)
        np.testing.assert_allclose(total, 1, rtol=1e-6)
        np.testing.assert_allclose(plan.weights[0, 0] * 0.9, [0.5, 0.25], rtol=1e-5)


def test_zero_experts_leave_their_weight_to_the_others(run, make_inputs):
    """The released code of MoE++ against the formula of its paper."""
    inputs = by_hand(make_inputs, GATES, num_ffn=4, num_zero=2)
    paper, code = run(top_k, inputs), run(top_k, inputs, renormalise_after_zero=True)
    # Token 1 chose expert 4, which gives zero, and expert 2.
    np.testing.assert_allclose(paper.weights[0, 1], [0.3, 0.2], rtol=1e-5)
    np.testing.assert_allclose(code.weights[0, 1], [0.0, 1.0], rtol=1e-5)
    np.testing.assert_allclose(code.weights[0, 0], [2 / 3, 1 / 3], rtol=1e-5)
    # Zero experts alone: nothing is left to divide by.
    alone = by_hand(make_inputs, GATES, num_ffn=0, num_zero=6)
    np.testing.assert_array_equal(run(top_k, alone, renormalise_after_zero=True).weights, 0)


def test_gaussian_noise_is_in_weights_and_choice_but_not_in_probs(run, make_inputs):
    inputs = make_inputs(rng=jax.random.key(1))
    plan, clean = run(top_k, inputs, noise="gaussian", noise_scale=6.0), run(top_k, inputs)
    np.testing.assert_array_equal(plan.probs, clean.probs)
    assert (plan.expert_ids != clean.expert_ids).any()
    noisy = np.exp(run(perturb, inputs, kind="gaussian", scale=6.0))
    noisy /= noisy.sum(axis=-1, keepdims=True)
    first = np.take_along_axis(noisy, plan.expert_ids[..., :1] % E, axis=-1)
    np.testing.assert_allclose(plan.weights[0, :, 0], first[0, :, 0], rtol=1e-5)


def test_random_second_is_kept_in_proportion_to_its_weight(run, make_inputs):
    inputs = make_inputs(padding=0)

    @jax.jit
    @jax.vmap
    def draw(key):
        plan = run(top_k, dataclasses.replace(inputs, rng=key), random_second=True)
        return plan.expert_ids[..., 1] < E, plan.weights

    kept, weights = map(np.asarray, draw(jax.random.split(jax.random.key(0), 400)))
    whole = run(top_k, inputs)
    share = whole.weights[..., 1] / whole.weights.sum(axis=-1)
    # Four standard errors of a share of 400.
    np.testing.assert_allclose(kept.mean(axis=0), 2 * share, atol=0.1)
    np.testing.assert_allclose(
        weights[..., 0], np.broadcast_to(whole.weights[..., 0], kept.shape), rtol=1e-5
    )
    assert (weights[..., 1][~kept] == 0).all()
    key = jax.random.key(0)
    evaluating = dataclasses.replace(inputs, rng=key, train=False)
    evaluated = run(top_k, evaluating, random_second=True)
    np.testing.assert_array_equal(evaluated.expert_ids, whole.expert_ids)


def test_sinkhorn_balances_rows_and_columns(run, make_inputs):
    inputs = make_inputs(padding=0, logits=3 * make_inputs().logits)
    inputs.logits[..., 0] += 4
    plan = run(sinkhorn, inputs.logits, np.ones((2, 12, E), bool), iterations=200)
    np.testing.assert_allclose(plan.sum(axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(plan.sum(axis=1), 12 / E, rtol=1e-3)
    skewed, balanced = run(top_k, inputs, top_k=1), run(ROUTERS.get("sinkhorn").function, inputs)
    most = lambda plan: max(np.bincount(plan.expert_ids[0, :, 0], minlength=E))
    assert most(skewed) == 7 and most(balanced) <= 4


def test_sinkhorn_without_padding_and_within_what_is_allowed(run, make_inputs):
    inputs = make_inputs()
    may = np.broadcast_to(inputs.valid[..., None], (2, 12, E)).copy()
    may[:, :6, :2] = False
    plan = run(sinkhorn, inputs.logits, may, iterations=300)
    np.testing.assert_array_equal(plan[~may], 0)
    np.testing.assert_allclose(plan.sum(axis=-1), inputs.valid, atol=1e-5)
    # Group 1: six tokens share four experts, three (the others are padding) share six.
    np.testing.assert_allclose(plan[1].sum(axis=0), [0.5] * 2 + [2.0] * 4, rtol=1e-3)


def test_masked_softmax_is_blind_to_what_is_masked():
    mask = jnp.asarray([[True, False, True], [False, False, False]])
    logits = jnp.asarray([[1.0, jnp.inf, 2.0], [jnp.nan, jnp.inf, 3.0]])
    probs, back = jax.vjp(jax.jit(lambda x: softmax(x, mask)), logits)
    p = 1 / (1 + math.e)
    np.testing.assert_allclose(probs, [[p, 0, 1 - p], [0, 0, 0]], rtol=1e-6)
    (gradient,) = back(jnp.asarray([[1.0, 5.0, 0.0], [1.0, 1.0, 1.0]]))
    np.testing.assert_allclose(
        gradient, [[p * (1 - p), 0, -p * (1 - p)], [0, 0, 0]], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("count, experts", [(1, 5), (5, 5)])
def test_smallest_and_largest_k_pass(count, experts):
    check_router("top_k", {"top_k": count}, experts, causal_model=True)
