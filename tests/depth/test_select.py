"""The choice of tokens against plain loops, and gates, schedules and losses by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.depth import (
    choose,
    decision_sums,
    first_come,
    gate_of,
    linear_decay,
    number_of,
    recursion_indices,
    runs_of,
    select,
    shifted_cosine_decay,
    warmed_up,
)

ROWS, LENGTH = 3, 20


def plain_choice(scores, competes, share, rounding, classes, counted=None):
    """By sorting each class of each row."""
    chosen = np.zeros(scores.shape, bool)
    for b in range(len(scores)):
        for one in np.unique(classes[b]):
            here = [t for t in range(scores.shape[1]) if competes[b, t] and classes[b, t] == one]
            count = len(here) if counted is None else int(counted[b].sum())
            best = sorted(here, key=lambda t: (-scores[b, t], t))
            chosen[b, best[: number_of(share, count, rounding)]] = True
    return chosen


@pytest.mark.parametrize("rounding", ["down", "up"])
@pytest.mark.parametrize("share", [0.125, 0.35, 1.0])
def test_choice_equals_sorting(share, rounding):
    rng = np.random.default_rng(0)
    # Few values: ties are common, and the earlier token is taken.
    scores = rng.integers(0, 4, (ROWS, LENGTH)).astype(np.float32)
    competes = rng.random((ROWS, LENGTH)) < 0.8
    competes[2] = False
    classes = np.sort(rng.integers(0, 3, (ROWS, LENGTH)), axis=1)
    for own in (np.zeros_like(classes), classes):
        got = choose(*map(jnp.asarray, (scores, competes)), share, rounding, jnp.asarray(own))
        np.testing.assert_array_equal(got, plain_choice(scores, competes, share, rounding, own))
    counted = np.ones((ROWS, LENGTH), bool)
    got = choose(
        *map(jnp.asarray, (scores, competes)), share, rounding, counted_bt=jnp.asarray(counted)
    )
    expected = plain_choice(scores, competes, share, rounding, np.zeros_like(classes), counted)
    np.testing.assert_array_equal(got, expected)


def test_as_many_are_taken_as_there_is_room_for():
    everyone = jnp.ones((1, 5140), bool)
    scores = jnp.arange(5140.0)[None]
    for share, rounding in ((0.65, "down"), (0.6, "up"), (0.125, "down")):
        taken = choose(scores, everyone, share, rounding).sum()
        assert int(taken) == number_of(share, 5140, rounding)


def test_share_of_a_training_step_chooses_alike():
    scores = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, LENGTH)), jnp.float32)
    everyone = jnp.ones((ROWS, LENGTH), bool)
    fixed = choose(scores, everyone, 0.35, "down")
    np.testing.assert_array_equal(fixed, choose(scores, everyone, jnp.float32(0.35), "down"))
    np.testing.assert_array_equal(fixed.sum(axis=1), [7] * ROWS)


def test_selection_keeps_order_and_leaves_out_the_lowest():
    scores = jnp.array([[5.0, 1, 4, 3, 2, 9]])
    kept = jnp.array([[True, True, False, True, True, False]])
    protected = jnp.array([[False, True, False, False, False, False]])
    got = select(kept, 3, scores, protected)
    # Token 1 is protected; of the others 0 and 3 have the highest scores.
    np.testing.assert_array_equal(got.index_bc, [[0, 1, 3]])
    np.testing.assert_array_equal(got.kept_bc, [[True, True, True]])
    # Places that are left over are taken by tokens that skip.
    got = select(kept, 5, scores)
    np.testing.assert_array_equal(np.asarray(got.index_bc)[0][got.kept_bc[0]], [0, 1, 3, 4])
    assert len(set(got.index_bc[0].tolist())) == 5 and sorted(got.index_bc[0]) == [*got.index_bc[0]]
    everyone = select(kept, 6)
    np.testing.assert_array_equal(everyone.index_bc, [range(6)])
    np.testing.assert_array_equal(everyone.kept_bc, kept)


def test_first_come_and_runs():
    wanted = jnp.array([[True, False, True, True], [False, True, False, True]])
    np.testing.assert_array_equal(
        first_come(wanted, 2), [[True, False, True, False], [False, True, False, True]]
    )
    inside = jnp.array([[True, True, False, True, False, True, True]])
    one = jnp.ones_like(inside, jnp.int32)
    np.testing.assert_array_equal(runs_of(inside, one), [[1, 1, 0, 2, 0, 3, 3]])
    two = one.at[:, 1:].set(2)
    np.testing.assert_array_equal(runs_of(inside, two), [[1, 2, 0, 3, 0, 4, 4]])


def test_gates_by_hand():
    r = jnp.array([[-1.5, 0.0, 2.0]])
    sigmoid = 1 / (1 + np.exp([[1.5, 0.0, -2.0]]))
    np.testing.assert_array_equal(gate_of("linear", r), r)
    np.testing.assert_allclose(gate_of("sigmoid", r, 0.1), 0.1 * sigmoid, rtol=1e-6)
    np.testing.assert_allclose(gate_of("softmax", r), sigmoid, rtol=1e-6)
    np.testing.assert_allclose(gate_of("tanh_norm", r, 0.2), 1 + 0.2 * np.tanh(r), rtol=1e-6)
    np.testing.assert_array_equal(gate_of("none", r), [[1, 1, 1]])
    with pytest.raises(ValueError, match="unknown gate 'relu'"):
        gate_of("relu", r)


def test_decisions_by_hand():
    scores = jnp.array([[2.0, -1.0, 0.5, 9.0]])
    chosen = jnp.array([[True, True, False, True]])
    competes = jnp.array([[True, True, True, False]])
    sums = decision_sums(scores, chosen, competes)
    nats = -np.log([1 / (1 + np.exp(-2)), 1 / (1 + np.exp(1)), 1 - 1 / (1 + np.exp(-0.5))])
    np.testing.assert_allclose(sums.cross_entropy, nats.sum(), rtol=1e-6)
    # Decided are tokens 0 and 2, chosen 0 and 1.
    assert [float(x) for x in sums[1:]] == [1, 2, 2, 3]
    slope = jax.grad(lambda s: decision_sums(s, chosen, competes).cross_entropy)(scores)
    expected = 1 / (1 + np.exp(-np.asarray(scores))) - np.asarray(chosen)
    np.testing.assert_allclose(slope, np.where(competes, expected, 0), atol=1e-6)


def test_schedules():
    assert float(warmed_up(0.25, jnp.int32(0), 10)) == 1
    np.testing.assert_allclose(warmed_up(0.25, jnp.int32(5), 10), 0.625)
    np.testing.assert_allclose(warmed_up(0.25, jnp.int32(99), 10), 0.25)
    shares = shifted_cosine_decay(32)
    # Of 32 layers those from 8 on skip tokens, those from 24 on keep 15% (p-MoD's released code).
    assert [i for i, share in enumerate(shares) if share < 1][0] == 8
    assert shares.index(0.15) == 24 and shares[24:] == (0.15,) * 8
    for decay in (shifted_cosine_decay, linear_decay):
        shares = decay(12)
        assert all(a >= b for a, b in zip(shares, shares[1:], strict=False))
        free = decay(101, dense_above=2.0, least=0.0)
        np.testing.assert_allclose(np.mean(free), 0.5, atol=1e-6)


def test_layers_that_share_weights():
    assert recursion_indices(8, 3, "middle_cycle") == (0, 1, 2, 1, 2, 1, 2, 7)
    assert recursion_indices(8, 3, "middle_sequence") == (0, 1, 1, 1, 2, 2, 2, 7)
    assert recursion_indices(6, 2, "cycle") == (0, 1, 2, 0, 1, 2)
    assert recursion_indices(6, 2, "sequence") == (0, 0, 1, 1, 2, 2)
    for layers, steps in ((8, 3), (32, 3), (32, 2)):
        own = len(set(recursion_indices(layers, steps, "middle_cycle")))
        assert own == 2 + (layers - 2) // steps
    with pytest.raises(ValueError, match="4 steps do not divide the 6 layers"):
        recursion_indices(8, 4, "middle_cycle")
    with pytest.raises(ValueError, match="unknown sharing 'loop'"):
        recursion_indices(8, 2, "loop")
