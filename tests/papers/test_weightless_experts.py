"""What makes the ``moe_plus_plus`` config MoE++: experts without weights, and carried logits."""

import jax
import numpy as np

from moejax.config import load_config
from moejax.nn.moe import places_of

OPEN = {"model.moe.capacity": "none"}
ZERO, COPY, CONSTANT = 8, 9, 10


def towards(layer, tokens, *experts: int):
    """Tokens and parameters with which all tokens choose the given experts."""
    x = tokens.at[..., 0].set(5.0)
    router_mde = layer.params["router"]["router_mde"] * 0.01
    for rank, expert in enumerate(experts):
        router_mde = router_mde.at[0, 0, expert].set(2.0 - 0.1 * rank)
    router = {**layer.params["router"], "router_mde": router_mde}
    return x, {**layer.params, "router": router}


def test_moe_plus_plus_has_experts_without_weights(expert_layer, tokens):
    """Zero and copy give g x; a constant expert g (a_1 x + a_2 v). No expert with weights runs."""
    layer = expert_layer("moe_plus_plus", OPEN)
    assert layer.config.moe.columns == 12, "eight with weights, four without"
    x, params = towards(layer, tokens, ZERO, COPY)
    y, aux = layer(x, params=params)
    ids, weights = aux["expert_ids"], aux["weights"]
    np.testing.assert_array_equal(ids, np.broadcast_to([ZERO, COPY], ids.shape))
    assert np.all(weights.sum(axis=-1) < 1), "weights are the softmax over all, as they are"
    np.testing.assert_allclose(y, weights[..., 1:] * x, rtol=1e-5)

    x, params = towards(layer, tokens, CONSTANT, ZERO)
    y, aux = layer(x, params=params)
    mix, x = np.array(jax.nn.softmax(x @ params["constant_gate_edk"][0])), np.array(x)
    expected = mix[..., :1] * x + mix[..., 1:] * np.array(params["constant_ed"][0])
    np.testing.assert_allclose(y, aux["weights"][..., :1] * expected, rtol=1e-4, atol=1e-5)

    none = {"zero_experts": 0, "copy_experts": 0, "constant_experts": 0}
    bare = expert_layer("moe_plus_plus", {**OPEN, **{f"model.moe.{k}": v for k, v in none.items()}})
    assert bare.params["router"]["router_mde"].shape[-1] == 8
    assert not any(name.startswith("constant") for name in bare.params)


def test_moe_plus_plus_adds_the_logits_of_the_layer_before(expert_layer, tokens):
    """``G_j = x W + G_(j-1) W_g``, with a gradient to the layer before."""
    layer = expert_layer("moe_plus_plus", OPEN)
    before = jax.random.normal(jax.random.key(0), (2, 12, 12))

    @jax.jit
    def logits(carry):
        return layer.traced(layer.params, tokens, carry={"router_logits": carry})[1]["logits"]

    router = layer.params["router"]
    expected = tokens @ router["router_mde"][0] + before @ router["residual_router_ee"]
    np.testing.assert_allclose(logits(before), expected, atol=1e-4)
    gradient = jax.jit(jax.grad(lambda carry: logits(carry)[0, 0, 0]))(before)
    np.testing.assert_allclose(gradient[0, 0], router["residual_router_ee"][:, 0], rtol=1e-5)


def test_moe_plus_plus_gives_experts_without_weights_more_places():
    """Gamma tau K T / (tau N + Z) and gamma K T / (tau N + Z): 1 / tau times as many."""
    moe = load_config("moe_plus_plus").model.moe
    with_weights, without = (places_of(moe, 10_000, True)[i] for i in (0, -1))
    unit = 1.1 * 2 * 10_000 / (0.75 * 8 + 4)
    assert (with_weights, without) == (round(0.75 * unit), round(unit))
    assert sum(places_of(moe, 10_000, True)) == round(1.1 * 20_000)
    assert moe.losses[0].options["tau"] == moe.capacity_tau
