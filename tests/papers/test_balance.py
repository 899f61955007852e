"""What makes the ``deepseek_v3`` config its routing: a bias that chooses, and groups of experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.api import build
from moejax.config import load_config
from moejax.config.moe import SELECT_BIAS
from moejax.train.balance import make_controller


def with_bias(params: dict, bias) -> dict:
    router = {**params["router"], SELECT_BIAS: jnp.asarray(bias, jnp.float32)}
    return {**params, "router": router}


def test_deepseek_v3_moves_the_choice_by_a_bias(expert_layer, tokens):
    """It decides who is chosen; weights are shares of sigmoids without it, times 2.5."""
    layer = expert_layer("deepseek_v3")
    assert SELECT_BIAS in layer.params["router"], "no controller, no bias"
    zero = with_bias(layer.params, jnp.zeros(16))
    _, before = layer(tokens, params=zero)
    _, shifted = layer(tokens, params=with_bias(zero, jnp.full(16, 3.0)))
    np.testing.assert_array_equal(before["expert_ids"], shifted["expert_ids"])
    bias = jnp.zeros(16).at[5].set(4.0)
    _, pushed = layer(tokens, params=with_bias(zero, bias))
    chosen = pushed["expert_ids"]
    assert np.all((chosen == 5).any(axis=-1)) and not np.all((before["expert_ids"] == 5).any(-1))
    scores = jax.nn.sigmoid(tokens @ layer.params["router"]["router_mde"][0])
    picked = jnp.take_along_axis(scores, chosen, axis=-1)
    share = 2.5 * picked / picked.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(pushed["weights"], share, rtol=1e-5)
    # No gradient reaches it.
    gradient = layer.gradient(with_bias(zero, bias), tokens)["router"]
    assert np.all(gradient[SELECT_BIAS] == 0) and np.any(gradient["router_mde"] != 0)


def test_deepseek_v3_chooses_from_two_groups(expert_layer, tokens):
    """The three experts of a token lie in two of four groups; without the limit, in three."""

    def most(layer) -> int:
        groups = layer(tokens)[1]["expert_ids"].reshape(-1, 3) // 4
        return max(len(set(of_token.tolist())) for of_token in groups)

    assert most(expert_layer("deepseek_v3")) == 2
    assert most(expert_layer("deepseek_v3", {"model.moe.router.options.top_groups": 4})) == 3


@pytest.mark.parametrize("name", ["deepseek_v3", "ming_flash_omni"])
def test_the_bias_moves_against_the_load(name, experts_tiny, drawn, tiny_batch):
    """After a step: up by the rate for experts with less than the mean, else down."""
    config = load_config(name, experts_tiny(name))
    model, objective = build(config)
    params = drawn(model, config)
    batch = tiny_batch(np.random.default_rng(1).integers(0, 2, (2, 12)))
    batch |= {"targets": batch["tokens"], "weights": np.ones((2, 12), np.float32)}
    control = make_controller(config)

    @jax.jit
    def step(params, batch):
        outputs = model.apply({"params": params}, batch, train=True)
        statistics = objective(outputs, batch).statistics
        return control(params, statistics), statistics

    moved, statistics = step(params, batch)
    changed = 0
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(moved), strict=True
    ):
        if path[-1].key != SELECT_BIAS:
            np.testing.assert_array_equal(old, new)
            continue
        segment, block = path[1].key, path[2].key
        loads = statistics["routing"][f"{segment}/{block}/moe/router"]["statistics"]["chosen_me"]
        loads = np.asarray(loads.sum(axis=1))
        expected = 1e-3 * np.sign(loads.mean(axis=-1, keepdims=True) - loads)
        np.testing.assert_allclose(new - old, expected, atol=1e-6)
        changed += np.count_nonzero(expected)
    assert changed > 0
