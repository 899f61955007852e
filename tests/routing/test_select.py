"""Ranks, thresholds and reading by id against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.routing.select import best_of_each, pick, rank_within, two_largest

S, N, E = 2, 12, 6


def test_best_of_each_is_a_stable_sort(run):
    draw = np.random.default_rng(0)
    # Few values, so that many are equal; zeros of both signs among them.
    scores = draw.choice(np.float32([0.0, -0.0, 1e-38, 0.25, 0.5, 1.0, 3e38]), (S, N, E))
    mask = draw.random((S, N, E)) < 0.7
    mask[0, :, 5] = False
    count = draw.integers(0, 10, (S, E)).astype(np.int32)
    count[1, :2] = [0, 99]
    got = run(best_of_each, scores, mask, count)
    for s in range(S):
        for e in range(E):
            order = np.argsort(-np.abs(scores[s, :, e]), kind="stable")
            order = [n for n in order if mask[s, n, e]]
            expected = np.isin(np.arange(N), order[: count[s, e]])
            np.testing.assert_array_equal(got[s, :, e], expected)


def test_rank_within_its_class(run):
    draw = np.random.default_rng(1)
    classes = draw.integers(0, 3, (S, N)).astype(np.int32)
    key = draw.integers(0, 3, (S, N)).astype(np.float32)
    got = run(rank_within, classes, key)
    for s in range(S):
        for n in range(N):
            mine = (key[s, n], n)
            before = [(k, i) < mine for i, k in enumerate(key[s]) if classes[s, i] == classes[s, n]]
            assert got[s, n] == sum(before)


def test_pick_reads_by_id_and_its_gradient_writes_there(run):
    values = np.random.default_rng(2).normal(size=(S, N, E)).astype(np.float32)
    ids = np.tile(np.int32([4, 0, E]), (S, N, 1))
    np.testing.assert_array_equal(run(pick, values, ids)[..., 0], values[..., 4])
    np.testing.assert_array_equal(run(pick, values, ids)[..., 2], 0)
    gradient = run(jax.grad(lambda v, i: pick(v, i).sum()), values, ids)
    np.testing.assert_array_equal(gradient[0, 0], [1, 0, 0, 0, 1, 0])


def test_two_largest(run):
    first, second = run(two_largest, np.float32([[3, 1, 3], [2, -5, 0]]))
    np.testing.assert_array_equal(first, [3, 2])
    np.testing.assert_array_equal(second, [3, 0])
    assert two_largest(jnp.ones((2, 1)))[1].tolist() == [-np.inf] * 2
