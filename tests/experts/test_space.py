"""RAPHAEL's experts of places: the formula word by word, empty masks, the order of words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.experts.space import attention_masks, space_moe

B, T, P, D, E = 2, 5, 6, 4, 3
rng = np.random.default_rng(0)
WI, BIAS = rng.normal(size=(E, D, D)), rng.normal(size=(E, D))
X = rng.normal(size=(B, P, D)).astype(np.float32)
LOGITS = rng.normal(size=(B, T, E)).astype(np.float32)
VALID = np.arange(T)[None] < np.asarray([[5], [3]])
ATTENTION = rng.random(size=(B, T, P)).astype(np.float32)
# A word that looks nowhere.
ATTENTION[0, 1] = 0


@pytest.fixture(autouse=True)
def all_compiles_are_quick(quick_compiles):
    """Of every test here."""


def experts(x_bpd):
    """Maps with a bias, so that zeros are not mapped to zeros."""
    out = jnp.einsum("bpd,edf->bpef", x_bpd, jnp.asarray(WI, x_bpd.dtype))
    return jnp.tanh(out + jnp.asarray(BIAS, x_bpd.dtype)[None, None])


@jax.jit
def run(x, attention, logits, valid):
    masks = attention_masks(attention, 0.5)
    whole = space_moe(x, masks, logits, valid, experts)
    return whole, space_moe(x, masks, logits, valid, experts, outside=False)


def by_hand(nothing):
    out = np.zeros((B, P, D))
    for b in range(B):
        words = [t for t in range(T) if VALID[b, t]]
        for t in words:
            mask = ATTENTION[b, t] > 0.5 * ATTENTION[b, t].max()
            e = LOGITS[b, t].argmax()
            made = np.tanh((X[b] * mask[:, None]) @ WI[e] + BIAS[e])
            out[b] += (made * mask[:, None] if nothing else made) / len(words)
    return out


def test_word_by_word():
    """With an empty mask among them: what the expert makes of zeros, or nothing."""
    for got, nothing in zip(run(X, ATTENTION, LOGITS, VALID), (False, True), strict=True):
        np.testing.assert_allclose(got, by_hand(nothing), rtol=1e-4, atol=1e-5)
    assert np.abs(by_hand(True) - by_hand(False)).max() > 0.1


def test_the_order_of_words_is_of_no_account():
    order = np.asarray([3, 0, 4, 1, 2])
    moved = run(X, ATTENTION[:, order], LOGITS[:, order], VALID[:, order])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        moved,
        run(X, ATTENTION, LOGITS, VALID),
    )


def test_no_words_are_nothing_and_the_gate_learns():
    empty = run(X, ATTENTION, LOGITS, np.zeros_like(VALID))
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), empty)
    of_gate = lambda logits: (run(X, ATTENTION, logits, VALID)[0] ** 2).sum()
    gradient = np.asarray(jax.jit(jax.grad(of_gate))(LOGITS))
    assert (np.abs(gradient[VALID]).max(axis=-1) > 1e-5).all()
    np.testing.assert_array_equal(gradient[~VALID], 0)
