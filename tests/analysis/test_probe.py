"""Ridge probes against plain least squares; what chooses the penalty, and which shots are drawn."""

import numpy as np
import pytest

from moejax.analysis import probe
from moejax.analysis.probe import (
    Labelled,
    Ridge,
    Scale,
    choose_penalty,
    draw_shots,
    few_shot,
    held_out,
)


def drawn(n, d, classes, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    return rng.normal(size=(n, d)) + 3, labels


@pytest.mark.parametrize("n, d", [(40, 6), (6, 40)], ids=["primal", "dual"])
@pytest.mark.parametrize("penalty", [1e-3, 0.5])
def test_ridge_is_least_squares_with_rows_for_the_penalty(n, d, penalty):
    """``|x W + c - y|^2 / n + penalty |W|^2``: d more rows sqrt(penalty n) I, whose bias is 0."""
    x, labels = drawn(n, d, 3)
    y = 2 * np.eye(3)[labels] - 1
    more = np.sqrt(penalty * n) * np.eye(d)
    rows = np.block([[x, np.ones((n, 1))], [more, np.zeros((d, 1))]])
    expected = np.linalg.lstsq(rows, np.concatenate([y, np.zeros((d, 3))]), rcond=None)[0]
    weights, bias = Ridge(x, labels, 3).solve(penalty)
    np.testing.assert_allclose(weights, expected[:-1], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(bias, expected[-1], rtol=1e-6, atol=1e-9)
    got = Ridge(x, labels, 3).classify(x, penalty)
    np.testing.assert_array_equal(got, (x @ expected[:-1] + expected[-1]).argmax(axis=-1))


def test_ridge_by_hand():
    """Features -1, 1 of classes 0, 1: slope 1 / (1 + penalty), no bias."""
    weights, bias = Ridge(np.asarray([[-1.0], [1.0]]), np.asarray([0, 1]), 2).solve(0.25)
    np.testing.assert_allclose(weights, [[-0.8, 0.8]])
    np.testing.assert_allclose(bias, [0, 0], atol=1e-12)


def test_scale_leaves_constant_features_out():
    x = np.asarray([[1.0, 7.0, 0.1], [3.0, 7.0, 0.1]], np.float32)
    np.testing.assert_allclose(Scale.of(x)(x), [[-1, 0, 0], [1, 0, 0]])


def test_the_penalty_is_chosen_by_whole_families_of_training():
    families = [f"family {i // 3}" for i in range(30)]
    out = held_out(families)
    assert out.sum() == 6
    assert all(len(set(out[3 * i : 3 * i + 3])) == 1 for i in range(10))
    # 12 labels, half of them wrong, in 40 directions: what is not held down fits the mistakes.
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    x = rng.normal(size=(200, 40))
    x[:, 0] += 2 * (2 * labels - 1)
    noisy = np.where(rng.random(200) < 0.3, 1 - labels, labels)
    train = Labelled(x, noisy, [str(i) for i in range(200)])
    chosen = choose_penalty(train, 2)
    accuracy = lambda penalty: float((Ridge(x, noisy, 2).classify(x, penalty) == labels).mean())
    assert chosen > min(probe.PENALTIES) and accuracy(chosen) > accuracy(min(probe.PENALTIES))


def test_a_penalty_that_is_too_large_is_not_chosen():
    """The class is the small difference of two features that share their noise."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, 200)
    noise = 3 * rng.normal(size=200)
    x = np.stack([noise + 2 * labels - 1, noise], axis=1)
    train = Labelled(Scale.of(x)(x), labels, [str(i) for i in range(200)])
    chosen = choose_penalty(train, 2)
    accuracy = lambda penalty: float(
        (Ridge(train.x_nd, labels, 2).classify(train.x_nd, penalty) == labels).mean()
    )
    assert accuracy(chosen) == 1 > accuracy(max(probe.PENALTIES)) and chosen < 1


def test_shots():
    labels = np.asarray([0] * 10 + [1] * 2 + [3] * 5)
    rows = draw_shots(labels, 3, np.random.default_rng(0))
    np.testing.assert_array_equal(np.bincount(labels[rows]), [3, 2, 0, 3])
    assert len(set(rows)) == 8
    other = draw_shots(labels, 3, np.random.default_rng(1))
    assert set(rows) != set(other)


def test_few_shot_accuracy_grows_with_shots_and_is_the_same_again():
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(4, 16))

    def made(n):
        labels = rng.integers(0, 4, n)
        x = centres[labels] + 1.5 * rng.normal(size=(n, 16))
        return Labelled(x, labels, [str(i) for i in range(n)])

    train, test = made(400), made(400)
    options = {"draws": 8, "penalty": 0.1}
    one, many = (few_shot(train, test, 4, shots=k, **options) for k in (1, 50))
    assert one.shape == (8,) and one.std() > 0
    assert one.mean() > 0.3 and many.mean() > one.mean() + 0.1
    np.testing.assert_array_equal(one, few_shot(train, test, 4, shots=1, **options))
    assert not np.array_equal(one, few_shot(train, test, 4, shots=1, seed=1, **options))
