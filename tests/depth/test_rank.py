"""The rank of attention maps made by hand, and the layer patterns that are proposed of it."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.schema import DecoderConfig
from moejax.depth import attention_rank, layers_of_lowest_rank, shortest_pattern

EPS = float(np.finfo(np.float32).eps)


def shifted(*weights):
    """[t, t]: token i + 1 looks at token i with the i-th weight; its singular values are these."""
    return np.diag(np.asarray(weights, np.float32), -1)


def rank_of(*heads, valid=None):
    """Of one sample."""
    maps = jnp.asarray(np.stack(heads))[None]
    valid = np.ones(maps.shape[-1], bool) if valid is None else np.asarray(valid)
    return float(attention_rank(maps, jnp.asarray(valid)[None])[0])


def test_identity_has_rank_0_and_looking_at_one_token_rank_1():
    identity, first = np.eye(6, dtype=np.float32), np.zeros((6, 6), np.float32)
    first[:, 0] = 1
    assert rank_of(identity) == 0
    assert rank_of(first) == 1
    assert rank_of(shifted(*[1.0] * 5)) == 5
    # What lies on and above the diagonal says nothing of it.
    assert rank_of(identity + np.triu(np.full((6, 6), 0.3, np.float32))) == 0


def test_mean_over_heads_of_each_sample():
    identity, full = np.eye(4, dtype=np.float32), shifted(1, 1, 1)
    assert rank_of(identity, full) == 1.5
    maps = jnp.asarray(np.stack([[identity, full], [full, full]]))
    ranks = attention_rank(maps, jnp.ones((2, 4), bool))
    np.testing.assert_array_equal(ranks, [1.5, 3])


def test_padding_does_not_count():
    """Neither what is in its rows and columns nor how much of it there is."""
    rng = np.random.default_rng(0)
    own = shifted(1, 1, 5 * EPS)
    padded = rng.random((64, 64)).astype(np.float32)
    padded[:4, :4] = own
    assert rank_of(own) == 3
    assert rank_of(padded, valid=np.arange(64) < 4) == 3
    assert rank_of(padded) > 60


def test_the_tolerance_is_that_of_float32():
    # Of four tokens: singular values above 4 eps of the largest count.
    assert rank_of(shifted(1, 3 * EPS, 1)) == 2
    assert rank_of(shifted(1, 5 * EPS, 1)) == 3
    assert rank_of(8 * shifted(1, 3 * EPS, 1)) == 2
    own = np.random.default_rng(1).random((9, 9)).astype(np.float32)
    below = np.tril(own, -1)
    assert rank_of(own) == np.linalg.matrix_rank(below) == 8


def test_layers_of_the_lowest_rank():
    ranks = {0: 5.0, 2: 3.0, 3: 4.0, 4: 3.0, 5: 2.0}
    assert layers_of_lowest_rank(ranks, 2) == (4, 5)
    assert layers_of_lowest_rank(ranks, 3) == (2, 4, 5)
    assert layers_of_lowest_rank(ranks, 0) == layers_of_lowest_rank(ranks, -2) == ()
    assert layers_of_lowest_rank(ranks, 9) == (0, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("kinds", "pattern"),
    [
        ("aaaa", ("", "a", "")),
        ("aabbbb", ("aa", "b", "")),
        ("aaabbbbba", ("aaa", "b", "a")),
        ("ababab", ("", "ab", "")),
        ("cababa", ("c", "ab", "")),
        ("a", ("", "a", "")),
    ],
)
def test_the_shortest_pattern(kinds, pattern):
    assert shortest_pattern(tuple(kinds)) == tuple(map(tuple, pattern))


def test_a_pattern_gives_its_layers_back():
    for kinds in itertools.product(("dense", "untied"), repeat=6):
        first, period, last = shortest_pattern(kinds)
        model = DecoderConfig(
            num_layers=6, first_blocks=first, block_pattern=period, last_blocks=last
        )
        assert model.block_kinds() == kinds
