"""What makes ``openmoe`` and ``deepseek_moe`` what they are: some weights are for all tokens."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import load_config


def without_routed(params: dict) -> dict:
    """The same with routed experts that give 0."""
    experts = {**params["experts"], "wo_efd": jnp.zeros_like(params["experts"]["wo_efd"])}
    return {**params, "experts": experts}


def test_openmoe_runs_a_dense_layer_beside(expert_layer, tokens, mlp):
    """``MoE(x) + FFN(x)``: with experts that give 0 the FFN is left, as wide as those elsewhere."""
    layer = expert_layer("openmoe")
    left, _ = layer(tokens, params=without_routed(layer.params))
    wi, wo = layer.params["shared_wi_edf"][0], layer.params["shared_wo_efd"][0]
    np.testing.assert_allclose(left, mlp(tokens, wi, wo), atol=1e-5)
    assert np.abs(left).min(axis=-1).max() > 1e-3
    assert np.abs(left - layer(tokens)[0]).max() > 0.1
    bare = expert_layer("openmoe", {"model.moe.shared_hidden": 0})
    assert np.all(bare(tokens, params=without_routed(bare.params))[0] == 0)
    for arg in ("small", "base", "8b", "34b"):
        model = load_config(f"openmoe:{arg}").model
        assert model.moe.shared_hidden == model.moe.hidden == model.ffn_hidden[0]


def test_deepseek_moe_shares_an_expert_between_all_tokens(expert_layer, tokens, mlp):
    """The shared expert takes each token with weight 1, the routed ones with their softmax."""
    layer = expert_layer("deepseek_moe")
    y, aux = layer(tokens)
    wi, wo = layer.params["shared_wi_edf"][0], layer.params["shared_wo_efd"][0]
    left, _ = layer(tokens, params=without_routed(layer.params))
    np.testing.assert_allclose(left, mlp(tokens, wi, wo), atol=1e-5)
    assert np.abs(y - left).max() > 0.1
    # Of the softmax over all 15, three weights as they are: not divided by their sum.
    probs = jax.nn.softmax(tokens @ layer.params["router"]["router_mde"][0])
    best = jnp.sort(probs, axis=-1)[..., :-4:-1]
    np.testing.assert_allclose(aux["weights"], best, rtol=1e-4)
    assert np.all(best.sum(axis=-1) < 1)
    bare = expert_layer("deepseek_moe", {"model.moe.shared_hidden": 0})
    assert np.all(bare(tokens, params=without_routed(bare.params))[0] == 0)


def test_deepseek_moe_cuts_experts_without_more_weights():
    """Sixteen quarters are four experts of the dense layer's width; four of them are active."""
    moe, dense = load_config("deepseek_moe").model.moe, load_config("chameleon").model.ffn_hidden[0]
    assert moe.num_experts * moe.hidden + moe.shared_hidden == 4 * dense
    assert moe.top_k * moe.hidden + moe.shared_hidden == dense


def test_parts_of_a_layer_with_weight_1_are_the_layer(mlp, tokens):
    """What fine-grained experts begin from: a layer cut along its hidden width."""
    rng = np.random.default_rng(0)
    wi, wo = rng.normal(size=(16, 2, 32)), rng.normal(size=(32, 16))
    whole = mlp(tokens, jnp.asarray(wi.reshape(16, 64)), jnp.asarray(wo))
    parts = [
        mlp(tokens, jnp.asarray(wi[:, :, part].reshape(16, 16)), jnp.asarray(wo[part]))
        for part in (slice(0, 8), slice(8, 16), slice(16, 24), slice(24, 32))
    ]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-4, atol=1e-3)


def test_sizes_of_the_papers_are_their_parameters():
    """The papers round what the shapes give."""
    for name, wanted in {
        "openmoe:base": 0.65e9,
        "openmoe:8b": 8.7e9,
        "openmoe:34b": 34e9,
        "deepseek_moe:2b": 2e9,
        "deepseek_moe:16b": 16.4e9,
        "deepseek_moe:145b": 145e9,
        "deepseek_v3:671b": 671e9,
        "hunyuan_large:389b": 389e9,
        "longcat_flash:560b": 560e9,
        "moma:90m": 210e6,
        "moma:435m": 1.9e9,
        "moma:1.4b": 7.1e9,
        "moe_plus_plus:0.6b": 0.6e9,
        "moe_plus_plus:1b": 1e9,
        "moe_plus_plus:2b": 2e9,
    }.items():
        # What the config says of itself is counted in tests/test_configs.py.
        total = load_config(name).about.total_params
        assert abs(total / wanted - 1) < 0.04, (name, total)
