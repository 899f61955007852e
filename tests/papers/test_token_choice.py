"""What makes ``switch`` and ``gshard`` what they are: tokens choose experts, which have places."""

import jax
import numpy as np

OPEN = {"model.moe.capacity": "none"}


def test_switch_sends_a_token_to_one_expert(expert_layer, tokens, mlp):
    """``y = p_i(x) E_i(x)`` with the one most probable expert; a second one changes it."""
    layer = expert_layer("switch", OPEN)
    y, aux = layer(tokens)
    assert aux["expert_ids"].shape[-1] == 1
    probs = np.array(jax.nn.softmax(tokens @ layer.params["router"]["router_mde"][0]))
    chosen = probs.argmax(axis=-1)
    np.testing.assert_array_equal(aux["expert_ids"][..., 0], chosen)
    experts = layer.params["experts"]
    wi, wo = experts["wi_edf"][chosen], experts["wo_efd"][chosen]
    expected = probs.max(axis=-1, keepdims=True) * jax.vmap(jax.vmap(mlp))(tokens, wi, wo)
    np.testing.assert_allclose(y, expected, atol=1e-5)

    two = expert_layer("switch", {**OPEN, "model.moe.top_k": 2})
    assert np.abs(two(tokens, params=layer.params)[0] - y).max() > 0.01


def test_switch_drops_tokens_beyond_the_capacity(expert_layer, tokens):
    """12 tokens x 1.25 over 8 experts: two places in training, the first to come are served."""
    layer, free = expert_layer("switch"), expert_layer("switch", OPEN)
    ids = layer(tokens, train=True)[1]["expert_ids"][..., 0]
    wanted = free(tokens)[1]["expert_ids"][..., 0]
    for row, all_of_row in zip(ids, wanted, strict=True):
        for expert in range(8):
            first = np.flatnonzero(all_of_row == expert)[:2]
            np.testing.assert_array_equal(np.flatnonzero(row == expert), first)
    assert np.any(ids == 8), "nobody was dropped: the test is void"
    assert layer(tokens, train=True)[0][ids == 8].any() == 0
    # More places when it does not train.
    assert (layer(tokens)[1]["expert_ids"] == 8).sum() < (ids == 8).sum()


def test_switch_scores_see_jittered_tokens_in_training(expert_layer, tokens):
    layer = expert_layer("switch", OPEN)
    rng = jax.random.key(0)
    plain, noisy = layer(tokens)[1], layer(tokens, train=True, rng=rng)[1]
    difference = np.abs(plain["logits"] - noisy["logits"]).max()
    assert 0 < difference < 0.01 * np.abs(tokens).max() * 16
    np.testing.assert_array_equal(layer(tokens, rng=rng)[1]["logits"], plain["logits"])


def test_gshard_draws_the_second_expert(expert_layer, tokens):
    """It is kept with probability min(1, 2 w_2) in training; without the option, always."""

    def second(layer):
        """How often of 200 draws each token has a second expert, and its weights."""
        keys = jax.random.split(jax.random.key(0), 200)
        kept = [layer(tokens, train=True, rng=key)[1]["expert_ids"][..., 1] < 8 for key in keys]
        return np.mean(kept, axis=0), layer(tokens)[1]["weights"]

    layer = expert_layer("gshard", OPEN)
    share, weights = second(layer)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-6)
    expected = np.minimum(1, 2 * weights[..., 1])
    assert np.abs(share - expected).max() < 0.15
    assert expected.min() < 0.6, "all second experts are sure: the test is void"
    always = expert_layer("gshard", {**OPEN, "model.moe.router.options.random_second": False})
    assert np.all(second(always)[0] == 1)
    # The first is never drawn.
    ids = layer(tokens, train=True, rng=jax.random.key(1))[1]["expert_ids"]
    assert np.all(ids[..., 0] < 8)
