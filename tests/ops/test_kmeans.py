"""k-means: separate clusters, weights of equal points, and a start without empty centres."""

import numpy as np

from moejax.ops.kmeans import fit_kmeans, nearest


def test_nearest_against_all_distances():
    rng = np.random.default_rng(0)
    points, centres = rng.normal(size=(50, 3)), rng.normal(size=(7, 3))
    index, distance = nearest(points, centres)
    squared = np.square(points[:, None] - centres[None]).sum(axis=-1)
    np.testing.assert_array_equal(index, squared.argmin(axis=1))
    np.testing.assert_allclose(distance, squared.min(axis=1), atol=1e-12)


def test_finds_separate_clusters():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(6, 3)).astype(np.float32) * 20
    points = (truth[:, None] + rng.normal(size=(6, 50, 3)) * 0.1).reshape(-1, 3)
    centres = fit_kmeans(points, 6)
    chosen = np.linalg.norm(centres[:, None] - truth[None], axis=-1).argmin(axis=0)
    assert sorted(chosen) == list(range(6))
    np.testing.assert_allclose(centres[chosen], truth, atol=0.1)


def test_equal_points_weigh_as_many():
    points = np.array([[0.0]] * 9 + [[1.0]] + [[100.0]])
    centres = np.sort(fit_kmeans(points, 2)[:, 0])
    np.testing.assert_allclose(centres, [0.1, 100.0], rtol=1e-6)


def test_fewer_points_than_centres():
    points = np.array([[0.0, 1.0], [2.0, 3.0], [0.0, 1.0]])
    centres = fit_kmeans(points, 4)
    assert centres.shape == (4, 2)
    assert {tuple(row) for row in centres} == {(0.0, 1.0), (2.0, 3.0)}


def test_more_rounds_are_no_worse_and_the_seed_decides():
    points = np.random.default_rng(1).normal(size=(2000, 4)).astype(np.float32)
    errors = [nearest(points, fit_kmeans(points, 32, steps=n))[1].mean() for n in (0, 2, 10)]
    assert errors[0] > errors[1] > errors[2]
    np.testing.assert_array_equal(fit_kmeans(points, 8), fit_kmeans(points, 8))
    assert not np.array_equal(fit_kmeans(points, 8, seed=1), fit_kmeans(points, 8))
