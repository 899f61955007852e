"""What makes the ``expert_choice`` config expert choice."""

import numpy as np

from moejax.config.moe import RouterConfig


def counts(aux, num_experts: int) -> np.ndarray:
    """[row, expert]: how many tokens of a row an expert has."""
    return (aux["expert_ids"][..., None] == np.arange(num_experts)).sum(axis=(1, 2))


def test_all_experts_take_as_many_tokens(expert_layer, tokens):
    """Two experts a token on average: 2 x 12 / 8 tokens for each; token choice is not so even."""
    layer = expert_layer("expert_choice")
    taken = counts(layer(tokens, train=True)[1], 8)
    np.testing.assert_array_equal(taken, np.full((2, 8), 3))
    tokens_choose = expert_layer("expert_choice", router=RouterConfig("top_k"))
    chosen = counts(tokens_choose(tokens, train=True)[1], 8)
    assert chosen.max() > 3 and chosen.sum() == 48


def test_experts_are_those_of_the_highest_scores(expert_layer, tokens):
    layer = expert_layer("expert_choice")
    _, aux = layer(tokens, train=True)
    logits = aux["logits"].astype(np.float64)
    probs = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    has = (aux["expert_ids"][..., None] == np.arange(8)).any(axis=-2)
    for row in range(2):
        for expert in range(8):
            best = np.sort(np.argsort(-probs[row, :, expert])[:3])
            np.testing.assert_array_equal(np.flatnonzero(has[row, :, expert]), best)
    weights = np.where(has, probs, 0).sum(axis=-1)
    np.testing.assert_allclose(aux["weights"].sum(axis=-1), weights, rtol=1e-5)


def test_later_tokens_matter_in_training_alone(expert_layer, tokens):
    layer = expert_layer("expert_choice")
    later = tokens.at[:, 6:].multiply(3.0)
    choice = lambda x, train: layer(x, train=train)[1]["expert_ids"][:, :6]
    assert np.any(choice(tokens, True) != choice(later, True))
    np.testing.assert_array_equal(choice(tokens, False), choice(later, False))
