"""Places of experts: who is dropped under each policy, recycling, capacities by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.routing import (
    ROUTERS,
    RoutingPlan,
    expert_capacity,
    heterogeneous_capacity,
    limit_capacity,
)

E = 6
top_k = ROUTERS.get("top_k").function


@pytest.fixture
def limit(run):
    return lambda plan, inputs, capacity, policy, **options: run(
        limit_capacity, plan, inputs, capacity=capacity, policy=policy, **options
    )


def plan_of(ids, weights):
    """A plan whose first group begins with these tokens; all others choose nothing."""
    all_ids, all_weights = np.full((2, 12, 2), E, np.int32), np.zeros((2, 12, 2), np.float32)
    all_ids[0, : len(ids)], all_weights[0, : len(ids)] = ids, weights
    one_hot = all_ids[..., None] == np.arange(E)
    return RoutingPlan(all_ids, all_weights, (one_hot * all_weights[..., None]).sum(axis=2))


# Expert 0 is wanted by all: first by tokens 1, 2, 3, as a second choice by token 0.
IDS = [[1, 0], [0, 1], [0, 2], [0, 3]]
WEIGHTS = [[0.6, 0.4], [0.5, 0.3], [0.7, 0.2], [0.9, 0.1]]


@pytest.mark.parametrize(
    "policy, kept",
    [
        # All first choices before all second ones, in the order of the tokens.
        ("order", [[1, E], [0, 1], [0, 2], [E, 3]]),
        # In the order of the first weights: tokens 3, 2, 0, 1.
        ("priority", [[1, E], [E, 1], [0, 2], [0, 3]]),
        # By each choice's own weight: 0.9, 0.7, 0.5, 0.4 for expert 0.
        ("weight", [[1, E], [E, 1], [0, 2], [0, 3]]),
    ],
)
def test_who_is_dropped(limit, make_inputs, policy, kept):
    plan = plan_of(IDS, WEIGHTS)
    limited = limit(plan, make_inputs(), 2, policy)
    np.testing.assert_array_equal(limited.expert_ids[0, : len(kept)], kept)
    expected = np.where(np.asarray(kept) < E, WEIGHTS, 0)
    np.testing.assert_allclose(limited.weights[0, :4], expected, rtol=1e-6)
    np.testing.assert_array_equal(limited.chosen_ids, plan.expert_ids)
    assert limited.max_choices == 12


def test_a_first_choice_comes_before_a_heavier_second_one(limit, make_inputs):
    """By order and priority; by weight it does not."""
    plan = plan_of([[1, 0], [0, 1]], [[0.9, 0.8], [0.5, 0.1]])
    for policy, kept in (
        ("order", [[1, E], [0, E]]),
        ("priority", [[1, E], [0, E]]),
        ("weight", [[1, 0], [E, E]]),
    ):
        limited = limit(plan, make_inputs(), 1, policy)
        np.testing.assert_array_equal(limited.expert_ids[0, : len(kept)], kept)


def test_of_two_tokens_for_one_place_priority_keeps_the_surer(limit, make_inputs):
    """V-MoE's batch priority routing; in the order of the tokens it is the earlier one."""
    plan = plan_of([[0, E], [0, E]], [[0.4, 0], [0.7, 0]])
    for policy, kept in (("order", [0, E]), ("priority", [E, 0])):
        limited = limit(plan, make_inputs(), 1, policy)
        np.testing.assert_array_equal(limited.expert_ids[0, :2, 0], kept)


def test_places_may_differ_by_expert(limit, make_inputs):
    plan = plan_of(IDS, WEIGHTS)
    limited = limit(plan, make_inputs(), (1, 1, 0, 1, 1, 1), "order")
    np.testing.assert_array_equal(limited.expert_ids[0, :4], [[1, E], [0, E], [E, E], [E, 3]])
    assert limited.max_choices == 5


def test_what_is_left_may_be_renormalised(limit, make_inputs):
    plan = plan_of(IDS, WEIGHTS)
    limited = limit(plan, make_inputs(), 2, "order", renormalise=True)
    np.testing.assert_allclose(
        limited.weights[0, :4], [[1, 0], [0.5, 0.3], [0.7, 0.2], [0, 1]], rtol=1e-6
    )


def test_drop_rate_grows_with_the_position_by_order_and_not_by_priority(run, limit, make_inputs):
    """OpenMoE's drop towards the end, on a router that prefers one expert."""
    inputs = make_inputs(s=40, padding=0)
    inputs.logits[..., :2] += [2, 1]
    plan = run(top_k, inputs, top_k=1)
    places = expert_capacity(12, 1, 1.0, E)
    dropped = lambda policy: (limit(plan, inputs, places, policy).expert_ids[..., 0] == E).mean(0)
    by_order, by_priority = dropped("order"), dropped("priority")
    thirds = by_order.reshape(3, 4).mean(axis=1)
    assert by_order[0] == by_order[1] == 0 and (np.diff(thirds) > 0.05).all()
    assert by_order.sum() == pytest.approx(by_priority.sum(), rel=1e-6)
    thirds = by_priority.reshape(3, 4).mean(axis=1)
    assert np.ptp(thirds) < 0.2 < thirds.mean()


def test_recycling_leaves_nobody_out(run, limit, make_inputs):
    """E * C >= N: all tokens of a router that has one favourite find a place."""
    inputs = make_inputs(padding=0)
    inputs.logits[..., 2] += 9
    plan = run(top_k, inputs, top_k=1)
    limited = limit(plan, inputs, 2, "recycle", rng=jax.random.key(0))
    ids = limited.expert_ids[..., 0]
    for row in ids:
        np.testing.assert_array_equal(np.bincount(row, minlength=E), 2)
    # The first two keep their place; the others are weighted by their new expert's probability.
    np.testing.assert_array_equal(ids[:, :2], 2)
    probs = np.take_along_axis(plan.probs, ids[..., None], axis=-1)
    np.testing.assert_allclose(limited.weights, probs, rtol=1e-6)
    other = limit(plan, inputs, 2, "recycle", rng=jax.random.key(1))
    assert (other.expert_ids != limited.expert_ids).any()
    # One place each for twelve tokens: six are left.
    short = limit(plan, inputs, 1, "recycle")
    np.testing.assert_array_equal((short.expert_ids == E).sum(axis=(1, 2)), 6)


def test_recycling_keeps_to_what_is_allowed(run, limit, make_inputs):
    allowed = np.broadcast_to(np.arange(E) < 3, (2, 12, E))
    inputs = make_inputs(allowed=allowed)
    inputs.logits[..., 0] += 9
    ids = limit(run(top_k, inputs), inputs, 3, "recycle", rng=jax.random.key(0)).expert_ids
    assert set(np.unique(ids)) <= {0, 1, 2, E}
    assert (ids[1, 9:] == E).all()
    chosen_twice = (ids[..., 0] == ids[..., 1]) & (ids[..., 0] < E)
    assert not chosen_twice.any()


def test_a_place_of_an_expert_that_the_token_has_is_no_help(limit, make_inputs):
    """Token 0 has the one place of expert 0 that is taken; the free one is of expert 0 too."""
    plan = plan_of([[0, 1], [1, E]], [[0.6, 0.4], [0.9, 0.0]])
    ids = limit(plan, make_inputs(), (2, 1, 0, 0, 0, 0), "recycle").expert_ids
    np.testing.assert_array_equal(ids[0, :2], [[0, E], [1, E]])


def test_gradient_goes_through_what_is_kept(run, make_inputs):
    inputs = make_inputs(padding=0)

    def output(logits):
        moved = dataclasses.replace(inputs, logits=logits)
        plan = limit_capacity(top_k(moved, top_k=1), moved, 1, "order")
        return plan.weights.sum(), plan.expert_ids < E

    gradient, kept = run(jax.grad(output, has_aux=True), inputs.logits)
    assert ((np.abs(gradient).sum(axis=-1) > 0) == kept[..., 0]).all()


def test_capacities_by_hand():
    assert expert_capacity(64, 2, 1.05, 8) == 17
    assert expert_capacity(64, 2, 1.05, 8, multiple=4) == 20
    # 1.1 * 110 is a little above 121 in binary.
    assert expert_capacity(110, 1, 1.1, 1) == 121
    assert expert_capacity(1, 1, 0.1, 8) == 1


def test_experts_without_weights_have_more_places():
    """MoE++: tau = 0.75, eight experts and four without weights, T = K tokens."""
    places = heterogeneous_capacity(100, 2, 1.0, 8, 4, 0.75)
    assert places == (15,) * 8 + (20,) * 4
    assert sum(places) == 200
    assert heterogeneous_capacity(100, 2, 1.0, 8, 0, 1.0) == (expert_capacity(100, 2, 1.0, 8),) * 8


def test_unknown_policy(make_inputs):
    with pytest.raises(UserError, match="model.moe.capacity: no policy 'recycled'.*'recycle'"):
        limit_capacity(plan_of(IDS, WEIGHTS), make_inputs(), 2, "recycled")
