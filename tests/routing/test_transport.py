"""Sparsity-constrained transport by brute force and by hand, and expert choice by a plan."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.experts.capacity import capacity_layout
from moejax.routing import ROUTERS, check_router
from moejax.routing.transport import sparse_columns, sparse_transport

E = 6
expert_choice = ROUTERS.get("expert_choice").function
top_k = ROUTERS.get("top_k").function
# The sparse routers of arXiv 2401.15969: (name, options).
SPARSE = {
    "softmax_token": ("top_k", {"top_k": 1}),
    "sinkhorn_token": ("sinkhorn", {"top_k": 1}),
    "softmax_expert": ("expert_choice", {"normalise": "softmax"}),
    "sinkhorn_expert": ("expert_choice", {"normalise": "softmax", "plan": "sinkhorn"}),
    "sparse_expert": ("expert_choice", {"normalise": "softmax", "plan": "sparse"}),
}
PLANS = ("sinkhorn_expert", "sparse_expert")


@pytest.fixture
def route(run):
    """``route("sparse_expert", inputs, **options)``: the plan."""

    def call(name, inputs, **options):
        router, own = SPARSE[name]
        return run(ROUTERS.get(router).function, inputs, **{**own, **options})

    return call


def taken(plan):
    """[s, n, e] bool."""
    return (plan.expert_ids[..., None] == np.arange(E)).any(axis=2)


def simplex(column, total):
    """The nearest point that is >= 0 and has this sum, by trying every set of entries above 0."""
    best, found = np.inf, None
    for size in range(1, len(column) + 1):
        for places in map(list, itertools.combinations(range(len(column)), size)):
            point = np.zeros(len(column))
            point[places] = column[places] - (column[places].sum() - total) / size
            if (point >= 0).all() and ((point - column) ** 2).sum() < best:
                best, found = ((point - column) ** 2).sum(), point
    return found


def sparse_simplex(column, count, total):
    """The same with at most ``count`` entries above 0, by trying every set of those."""
    best, found = np.inf, None
    for places in map(list, itertools.combinations(range(len(column)), count)):
        point = np.zeros(len(column))
        point[places] = simplex(column[places], total)
        if ((point - column) ** 2).sum() < best:
            best, found = ((point - column) ** 2).sum(), point
    return found


def test_projection_by_hand(run):
    """Of 3, 1, 2, -1 two entries with the sum 2: 3 and 2 less 3/2."""
    scores = np.float32([3, 1, 2, -1])[None, :, None]
    project = lambda count, total, mask=True: run(
        sparse_columns,
        scores,
        np.broadcast_to(mask, (1, 4))[..., None].copy(),
        np.int32([[count]]),
        np.float32([[total]]),
    )[0, :, 0]
    np.testing.assert_allclose(project(2, 2.0), [1.5, 0, 0.5, 0])
    # One entry has it all; of four, three are above 0: 3, 1, 2 less (6 - 4) / 3.
    np.testing.assert_allclose(project(1, 2.0), [2, 0, 0, 0])
    np.testing.assert_allclose(project(4, 4.0), [7 / 3, 1 / 3, 4 / 3, 0], rtol=1e-6)
    # A sum that two entries leave nothing of for the second.
    np.testing.assert_allclose(project(2, 0.5), [0.5, 0, 0, 0])
    np.testing.assert_allclose(project(2, 2.0, [False, True, True, True]), [0, 0.5, 1.5, 0])
    for empty in (project(0, 2.0), project(2, 2.0, [False] * 4)):
        np.testing.assert_array_equal(empty, 0)


def test_projection_is_the_nearest_column(run):
    """Against all sets of entries, with ties and scores below 0."""
    draw = np.random.default_rng(0)
    scores = draw.normal(scale=0.7, size=(5, 6, 2)).astype(np.float32)
    scores[0, 3] = scores[0, 1]
    count, total = np.int32([[1, 2], [3, 4], [5, 6], [2, 3], [4, 1]]), np.float32([[0.4, 2.0]] * 5)
    got = run(sparse_columns, scores, np.ones(scores.shape, bool), count, total)
    for s, e in np.ndindex(5, 2):
        expected = sparse_simplex(scores[s, :, e], int(count[s, e]), float(total[s, e]))
        np.testing.assert_allclose(got[s, :, e], expected, atol=1e-5)


def test_of_equal_entries_the_earlier_ones_are_taken(run):
    ones = np.ones((1, 5, 1), np.float32)
    got = run(sparse_columns, ones, ones > 0, np.int32([[2]]), np.float32([[3.0]]))
    np.testing.assert_allclose(got[0, :, 0], [1.5, 1.5, 0, 0, 0])


def similar(make_inputs, **fields):
    """(softmax of random logits, what may be chosen) [2, 12, 6]."""
    inputs = make_inputs(**fields)
    probs = np.asarray(jax.nn.softmax(2 * inputs.logits, axis=-1))
    return probs, np.broadcast_to(inputs.valid[..., None], probs.shape).copy()


def test_plan_has_few_tokens_a_column_and_its_sums(run, make_inputs):
    """Columns to tokens / E exactly; rows to 1 when the prices have come to rest."""
    probs, may = similar(make_inputs)
    count = np.int32([[3] * E, [2] * E])
    short = run(sparse_transport, probs, may, count)
    assert ((short > 0).sum(axis=1) <= count).all() and (short >= 0).all()
    assert (short[~may] == 0).all()
    np.testing.assert_allclose(short.sum(axis=1), [[12 / E] * E, [9 / E] * E], rtol=1e-5)
    # As many as there are: no more a question of sets, and the prices come to rest.
    full = np.full_like(count, 12)
    long = run(sparse_transport, probs, may, full, iterations=4000)
    np.testing.assert_allclose(long.sum(axis=-1), may[..., 0], atol=0.01)
    begin = run(sparse_transport, probs, may, full)
    off = lambda plan: np.abs(plan.sum(axis=-1) - may[..., 0]).max()
    assert off(long) < off(begin) / 5


def test_plan_without_a_limit_solves_the_regularised_problem(run, make_inputs):
    """The KKT conditions: T = max(0, (similarity + price_t + price_e) / gamma), no pair better."""
    probs, may = similar(make_inputs, padding=0)
    gamma = 0.5
    full = np.full((2, E), 12, np.int32)
    plan = run(sparse_transport, probs, may, full, gamma=gamma, iterations=4000)
    for similarity, T in zip(probs, plan, strict=True):
        # Moving mass round a rectangle of entries keeps all sums: where two opposite corners can
        # give and the value rises, the plan was not the best one.
        gain = similarity - gamma * T
        can_give = T > 1e-3
        for (a, b), (c, d) in itertools.product(
            itertools.permutations(range(12), 2), itertools.combinations(range(E), 2)
        ):
            if can_give[a, c] and can_give[b, d]:
                assert gain[a, d] + gain[b, c] - gain[a, c] - gain[b, d] < 0.02


def test_plan_by_hand(run):
    """Two experts of two tokens each; of its two the one that is wanted more has more."""
    first = np.float32([0.55, 0.53, 0.40, 0.42])
    similarity = np.stack([first, 1 - first], axis=-1)[None]
    at = lambda steps: run(
        sparse_transport,
        similarity,
        np.ones((1, 4, 2), bool),
        np.int32([[2, 2]]),
        iterations=steps,
    )[0]
    # 1 + 0.55 less the mean of 0.55 and 0.53, and so on.
    np.testing.assert_allclose(at(0), [[1.01, 0], [0.99, 0], [0, 1.01], [0, 0.99]], atol=1e-5)
    # Adam's first step is 0.01 for each, down where a token gives more than 1: all are equal then.
    np.testing.assert_allclose(at(1), [[1, 0], [1, 0], [0, 1], [0, 1]], atol=1e-4)


def test_a_plan_serves_tokens_that_scores_leave_out(run, make_inputs):
    """Token 0 suits both experts best; by scores it has both and token 2 none."""
    # Softmax over a third expert, which is for others, leaves scores of any size.
    gates = np.float32([[0.45, 0.45, 0.1], [0.44, 0.1, 0.46], [0.1, 0.44, 0.46], [0.1, 0.1, 0.8]])
    inputs = make_inputs(s=1, n=4, e=3, padding=0, logits=np.log(gates)[None])
    choose = lambda **options: np.argwhere(
        run(expert_choice, inputs, normalise="softmax", rounding="down", **options).expert_ids[0]
        < 3
    ).tolist()
    # One token each (4 / 3, rounded down): 0 for both, 3 for the third one.
    assert choose() == [[0, 0], [0, 1], [3, 2]]
    served = lambda **options: len({token for token, _ in choose(**options)})
    assert served(plan="sinkhorn", iterations=100) == 3
    # Prices of a hundredth: down for token 0, up for those that have nothing.
    assert served(plan="sparse", iterations=1) == 3


@pytest.mark.parametrize("name", PLANS)
def test_weights_are_the_scores_and_the_plan_has_no_gradient(route, run, make_inputs, name):
    inputs = make_inputs()
    plan = route(name, inputs)
    probs = np.asarray(jax.nn.softmax(inputs.logits, axis=-1))
    np.testing.assert_allclose(plan.weights, np.where(taken(plan), probs, 0), rtol=1e-5)
    readout = np.random.default_rng(1).normal(size=(2, 12, E)).astype(np.float32)

    def weighed(logits, options):
        moved = dataclasses.replace(inputs, logits=logits)
        return (expert_choice(moved, **SPARSE[name][1], **options).weights * readout).sum()

    def of_scores(logits, chosen):
        return (jnp.where(chosen, jax.nn.softmax(logits, axis=-1), 0) * readout).sum()

    gradient = run(jax.grad(lambda x: weighed(x, {})), inputs.logits)
    expected = run(jax.grad(of_scores), inputs.logits, taken(plan))
    np.testing.assert_allclose(gradient, expected, atol=1e-6)

    by_plan = route(name, inputs, weights="plan")
    np.testing.assert_array_equal(taken(by_plan), taken(plan))
    assert np.abs(by_plan.weights - plan.weights).max() > 0.1
    gradient = run(jax.grad(lambda x: weighed(x, {"weights": "plan"})), inputs.logits)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-3
    assert (gradient[~inputs.valid] == 0).all()


def test_gradient_of_the_sparse_plan_is_that_of_its_last_projection(run, make_inputs):
    """Of a column with k entries: 1 - 1/k on the diagonal and -1/k beside it, over gamma."""
    probs, may = map(jnp.asarray, similar(make_inputs))
    count = jnp.full((2, E), 3, jnp.int32)
    readout = np.random.default_rng(1).normal(size=probs.shape).astype(np.float32)
    transport = functools.partial(sparse_transport, gamma=0.5)
    value = lambda probs: (transport(probs, may, count) * readout).sum()
    gradient = run(jax.grad(value), probs)
    kept = run(transport, probs, may, count) > 0
    size = kept.sum(axis=1, keepdims=True)
    mean = (readout * kept).sum(axis=1, keepdims=True) / size
    np.testing.assert_allclose(gradient, np.where(kept, readout - mean, 0) / 0.5, atol=1e-5)


@pytest.mark.parametrize("name", PLANS)
def test_experts_take_no_more_than_their_share(route, make_inputs, name):
    """12 and 9 tokens over 6 experts, rounded up; padding takes no part."""
    inputs = make_inputs(logits=3 * make_inputs().logits)
    inputs.logits[..., 0] += 2
    for factor, most in ((1.0, (2, 2)), (2.0, (4, 3))):
        plan = route(name, inputs, capacity_factor=factor)
        counts = taken(plan).sum(axis=1)
        assert (counts <= np.asarray(most)[:, None]).all() and (counts >= 1).all()
        assert (plan.expert_ids < E).sum(axis=(1, 2)).max() <= plan.max_choices
    other = dataclasses.replace(inputs, logits=inputs.logits.copy())
    other.logits[~inputs.valid] = 50
    np.testing.assert_array_equal(route(name, other).weights, route(name, inputs).weights)
    assert not taken(route(name, other))[~inputs.valid].any()


@pytest.mark.parametrize("name", PLANS)
def test_groups_and_the_order_of_tokens_do_not_matter(route, make_inputs, name):
    inputs = make_inputs(padding=0)
    expected = route(name, inputs).weights
    order = np.random.default_rng(0).permutation(12)
    moved = jax.tree.map(lambda x: x[:, order] if np.shape(x)[:2] == (2, 12) else x, inputs)
    np.testing.assert_allclose(route(name, moved).weights, expected[:, order], atol=1e-6)
    other = dataclasses.replace(inputs, logits=inputs.logits.copy())
    other.logits[0] = make_inputs(1).logits[0]
    np.testing.assert_array_equal(route(name, other).weights[1], expected[1])


@pytest.mark.parametrize("name", PLANS)
def test_plans_keep_to_modalities_and_to_what_is_allowed(route, make_inputs, name):
    table = np.asarray([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]], bool)
    inputs = make_inputs()
    inputs = dataclasses.replace(inputs, allowed=table[inputs.modality])
    for options in ({}, {"per_modality": True}):
        plan = route(name, inputs, **options)
        assert taken(plan).any() and not taken(plan)[~np.asarray(inputs.may_choose())].any()


@pytest.mark.parametrize("name", SPARSE)
def test_every_slot_has_one_token(route, make_inputs, name):
    """The dispatch tensor of arXiv 2401.15969: 0 or 1, of a slot's tokens one at most."""
    inputs = make_inputs(padding=0)
    plan = route(name, inputs)
    for ids in plan.expert_ids:
        places = 2
        layout = jax.device_get(capacity_layout(jnp.asarray(ids), E, places))
        dispatch = np.zeros((12, E * places), int)
        for t, rows in enumerate(layout.row):
            for row in rows[rows < E * places]:
                dispatch[t, row] += 1
        assert set(np.unique(dispatch)) == {0, 1}
        assert (dispatch.sum(axis=0) <= 1).all()
        # And no choice of expert choice is without a slot: capacity factor 1 are two tokens each.
        if "expert" in name:
            assert dispatch.sum() == (ids < E).sum() == 12


@pytest.mark.parametrize("name", SPARSE)
def test_one_expert_takes_all_tokens_with_weight_one(route, make_inputs, name):
    inputs = make_inputs(e=1)
    plan = route(name, inputs)
    np.testing.assert_array_equal(plan.expert_ids[..., 0], ~inputs.valid)
    np.testing.assert_allclose(plan.weights[..., 0], inputs.valid, rtol=1e-6)


def test_mistakes():
    for options, match in (
        ({"plan": "spars"}, "options.plan: 'spars' is none of '', 'sinkhorn', 'sparse'"),
        ({"weights": "plan"}, "options.weights: 'plan' weighs by a plan"),
        (
            {"plan": "sparse", "weights": "plan", "causal_rule": "threshold"},
            "options.weights: 'plan' compares a token with others",
        ),
        ({"plan": "sparse", "temperature": 0.0}, "options.temperature: must be positive"),
        ({"plan": "sparse", "iterations": 0}, "options.iterations: must be at least 1"),
        ({"plan": "sparse", "learning_rate": 0.0}, "options.learning_rate: must be positive"),
    ):
        with pytest.raises(UserError, match=match):
            check_router("expert_choice", options, E, causal_model=False)
