"""Filters, guidance and draws against cases computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.generate.sampling import (
    Sampling,
    check_sampling,
    choose,
    guide,
    mask_logits,
    row_keys,
    top_k_filter,
    top_p_filter,
)

PROBS = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
LOGITS = jnp.log(jnp.asarray([PROBS], jnp.float32)) + 3.0


def kept(logits) -> list[list[int]]:
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in np.asarray(logits)]


@pytest.mark.parametrize(
    ("k", "expected"),
    [(1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])],
)
def test_top_k(k, expected):
    filtered = top_k_filter(LOGITS, k)
    assert kept(filtered) == [expected]
    np.testing.assert_array_equal(filtered[0, expected], LOGITS[0, expected])


def test_top_k_keeps_equals_and_skips_tokens_that_are_not_allowed():
    logits = jnp.array([[2.0, 1.0, 1.0, 0.0], [-jnp.inf, -5.0, -0.0, 0.0]])
    assert kept(top_k_filter(logits, 2)) == [[0, 1, 2], [2, 3]]


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.01, [1]),
        (0.39, [1]),
        (0.5, [1, 3]),
        (0.69, [1, 3]),
        (0.8, [1, 3, 4]),
        (0.9, [0, 1, 3, 4]),
    ],
)
def test_top_p(p, expected):
    # Sorted: 0.4, 0.3, 0.15, 0.1, 0.05 with sums 0.4, 0.7, 0.85, 0.95, 1.
    assert kept(top_p_filter(LOGITS, p)) == [expected]


def test_top_p_of_nearly_one_keeps_all_that_is_allowed():
    logits = jnp.concatenate([LOGITS, jnp.array([[-jnp.inf]])], axis=1)
    assert kept(top_p_filter(logits, 1 - 1e-7)) == [[0, 1, 2, 3, 4]]


def test_filters_work_in_each_row_on_its_own():
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.1, 0.45, 0.45]]))
    assert kept(top_p_filter(logits, 0.6)) == [[0], [1, 2]]
    assert kept(top_k_filter(logits, 1)) == [[0], [1, 2]]


def test_guidance():
    cond, uncond = jnp.log(jnp.array([[0.5, 0.25, 0.25]])), jnp.log(jnp.array([[0.25, 0.5, 0.25]]))
    # uncond + 2 (cond - uncond): 0.25^-1 0.5^2, 0.5^-1 0.25^2, 0.25.
    expected = np.log([[1.0, 0.125, 0.25]])
    np.testing.assert_allclose(guide(cond, uncond, 2.0), expected, atol=1e-6)
    # Logits of any offset mean the same.
    np.testing.assert_allclose(guide(cond + 5, uncond - 3, 2.0), expected, atol=1e-5)
    np.testing.assert_array_equal(guide(cond, uncond, 1.0), jax.nn.log_softmax(cond))
    np.testing.assert_allclose(guide(cond, uncond, 0.0), uncond, atol=1e-6)


def draws(sampling: Sampling, count: int = 20_000, logits=LOGITS) -> np.ndarray:
    """Frequencies of the tokens that ``choose`` draws."""
    many = jnp.tile(logits, (count, 1))
    tokens = jax.jit(choose)(row_keys(0, np.arange(count)), many, sampling)
    return np.bincount(tokens, minlength=logits.shape[1]) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_have_the_probabilities_of_the_temperature(temperature):
    expected = PROBS ** (1 / temperature)
    expected /= expected.sum()
    np.testing.assert_allclose(draws(Sampling(temperature)), expected, atol=0.015)


def test_top_p_applies_to_what_top_k_leaves():
    # Of 0.4, 0.3 (top 2) the first has 0.571: enough for 0.5 but not for 0.6.
    np.testing.assert_array_equal(draws(Sampling(top_k=2, top_p=0.5)), [0, 1, 0, 0, 0])
    expected = [0, 4 / 7, 0, 3 / 7, 0]
    np.testing.assert_allclose(draws(Sampling(top_k=2, top_p=0.6)), expected, atol=0.015)


def test_temperature_zero_is_greedy_whatever_the_filters():
    for options in ({}, {"top_k": 3}, {"top_p": 0.2}):
        np.testing.assert_array_equal(draws(Sampling(0.0, **options), 8), [0, 1, 0, 0, 0])


def test_a_masked_token_is_never_drawn():
    masked = mask_logits(LOGITS, jnp.array([[True, False, True, False, False]]))
    np.testing.assert_allclose(
        draws(Sampling(), logits=masked), [2 / 3, 0, 1 / 3, 0, 0], atol=0.015
    )
    np.testing.assert_array_equal(draws(Sampling(0.0), 4, logits=masked), [1, 0, 0, 0, 0])


def test_a_rows_draw_depends_on_its_own_number_alone():
    many = jnp.tile(LOGITS, (64, 1))
    together = choose(row_keys(3, np.arange(64)), many, Sampling())
    for row in (0, 17, 63):
        alone = choose(row_keys(3, [row]), LOGITS, Sampling())
        assert int(alone[0]) == int(together[row])
    assert len(set(np.asarray(together).tolist())) > 1
    other_seed = choose(row_keys(4, np.arange(64)), many, Sampling())
    assert (np.asarray(other_seed) != np.asarray(together)).any()


def test_changing_the_numbers_compiles_nothing():
    # Arguments of a jit are strong-typed or weak alike here.
    compiled = jax.jit(lambda key, logits, sampling: choose(key, logits, sampling))
    for sampling in (Sampling(), Sampling(0.0, 5, 0.9), Sampling(0.7, 3, 0.5, 2.0)):
        compiled(row_keys(0, [0]), LOGITS, sampling)
    assert compiled._cache_size() == 1


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"temperature": -0.1}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"top_k": -1}, "--top-k"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_p": 1.5}, "--top-p"),
        ({"guidance": -1.0}, "--guidance"),
        ({"guidance": float("inf")}, "--guidance"),
    ],
)
def test_values_that_mean_nothing_are_refused(options, flag):
    with pytest.raises(UserError, match=flag):
        check_sampling(Sampling(**options))
