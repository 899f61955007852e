"""What makes the ``uni_moe_2`` config Uni-MoE-2.0: as many experts as a token needs."""

import numpy as np

OPEN = {"model.moe.capacity": "none"}
NULL = 4


def scaled(layer, factor: float) -> dict:
    """Parameters with all logits of the router times ``factor``."""
    router = {name: leaf * factor for name, leaf in layer.params["router"].items()}
    return {**layer.params, "router": router}


def experts_of(aux) -> np.ndarray:
    """How many experts each token has, the null expert among them."""
    return (aux["expert_ids"] < 7).sum(axis=-1)


def test_doubt_takes_more_experts(expert_layer, tokens):
    """Sure tokens have one expert, doubting ones four of five: 0.7 of the probability."""
    layer = expert_layer("uni_moe_2", OPEN)
    sure, doubting = (experts_of(layer(tokens, params=scaled(layer, f))[1]) for f in (100.0, 1e-3))
    assert np.mean(sure == 1) > 0.9 and np.all(doubting == 4)
    _, aux = layer(tokens)
    found = experts_of(aux)
    logits = aux["logits"].astype(np.float64)[..., :5]
    probs = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    reached = np.cumsum(-np.sort(-probs, axis=-1), axis=-1)
    np.testing.assert_array_equal(found, (reached < 0.7).sum(axis=-1) + 1)
    assert len(np.unique(found)) > 1
    every = expert_layer("uni_moe_2", {**OPEN, "model.moe.router.options.top_p": 1.0})
    assert np.all(experts_of(every(tokens, params=layer.params)[1]) == 5)
    one = expert_layer("uni_moe_2", {**OPEN, "model.moe.router.options.top_p": 0.0})
    assert np.all(experts_of(one(tokens, params=layer.params)[1]) == 1)


def test_the_null_expert_leaves_the_shared_ones(expert_layer, tokens, mlp):
    """A token with the null expert alone gets its shared experts, by weights that compete."""
    layer = expert_layer("uni_moe_2", OPEN)
    x = tokens.at[..., 0].set(5.0)
    router_mde = (layer.params["router"]["router_mde"] * 0.01).at[0, 0, NULL].set(2.0)
    params = {**layer.params, "router": {**layer.params["router"], "router_mde": router_mde}}
    y, aux = layer(x, params=params)
    ids = aux["expert_ids"]
    assert np.all(ids[..., 0] == NULL) and np.all(ids[..., 1:] == 7)
    logits = aux["logits"][..., [NULL, 5, 6]]
    weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(aux["weights"][..., 0], weights[..., 0], rtol=1e-4)
    expected = sum(
        weights[..., 1 + i, None] * mlp(x, params["shared_wi_edf"][i], params["shared_wo_efd"][i])
        for i in (0, 1)
    )
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-6)
    assert layer.config.moe.shared_hidden == 2 * layer.config.moe.hidden // 8
