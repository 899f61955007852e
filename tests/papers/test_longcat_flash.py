"""What makes the ``longcat_flash`` config LongCat-Flash: experts that give back their input."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from moejax.analysis.params import boxed_params
from moejax.api import build
from moejax.config import load_config
from moejax.routing import update_bias


def test_zero_experts_give_their_input_back(expert_layer, tokens):
    """All three chosen among the four "zero" experts: ``y = 6 (sum R) x``; without them, not."""
    layer = expert_layer("longcat_flash")
    assert layer.config.moe.columns == 12, "eight with weights, four without"
    bias = jnp.zeros(12).at[8:].set(5.0)
    params = {**layer.params, "router": {**layer.params["router"], "select_bias_e": bias}}
    y, aux = layer(tokens, params=params)
    assert np.all((aux["expert_ids"] >= 8) & (aux["expert_ids"] < 12))
    probs = jax.nn.softmax(tokens @ params["router"]["router_mde"][0])
    chosen = np.take_along_axis(np.array(probs), aux["expert_ids"], -1).sum(-1, keepdims=True)
    np.testing.assert_allclose(y, 6 * chosen * tokens, rtol=1e-4)
    assert np.any(chosen < 0.9), "weights are not divided by their sum"
    bare = expert_layer("longcat_flash", {"model.moe.copy_experts": 0})
    assert bare.params["router"]["router_mde"].shape[-1] == 8


def test_the_controller_drives_the_mean_number_of_experts():
    """On fixed scores: towards K_e = 2 of 3 with weights; biases of the others never move."""
    config = load_config("longcat_flash").model
    options = {**config.moe.balance.options, "rate": 0.05, "num_ffn": 8}
    scores = jax.nn.softmax(jax.random.normal(jax.random.key(0), (512, 12)) * 2)
    bias = jnp.zeros(12)
    ffn = lambda bias: (jax.lax.top_k(scores + bias[None], 3)[1] < 8).sum() / 512

    def step(bias, _):
        ids = jax.lax.top_k(scores + bias[None], 3)[1]
        counts = jnp.zeros(12).at[ids.ravel()].add(1.0)
        return update_bias("increment", bias, counts, **options), None

    skewed = bias.at[:8].set(-0.5)
    assert ffn(skewed) < 1
    bias, _ = jax.lax.scan(step, skewed, None, length=400)
    assert abs(float(ffn(bias)) - 2) < 0.1
    np.testing.assert_array_equal(bias[8:], 0)


def test_a_layer_without_experts_is_two_layers(experts_tiny, drawn, tiny_batch):
    """Attention, MLP, attention, MLP; what the experts add comes at the end."""
    tiny = experts_tiny("longcat_flash")
    short = load_config("longcat_flash", {**tiny, "model.num_layers": 1})
    dense = load_config("longcat_flash", {**tiny, "model.block_pattern": ("untied",)})
    params = drawn(build(short)[0], short)
    block = params["stack"]["segment_0"]["block_0"]
    cut = lambda half: {
        name.removeprefix(half): leaf for name, leaf in block.items() if name.startswith(half)
    }
    halves = (cut("first_"), cut("second_"))
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *halves)
    assert (
        joined.keys()
        == meta.unbox(boxed_params(build(dense)[0], dense))["stack"]["segment_0"]["block_0"].keys()
    )
    woven = {**params, "stack": {"segment_0": {"block_0": joined}}}
    expected = jax.jit(build(dense)[0].apply)({"params": woven}, tiny_batch(0)).logits

    def logits(scale):
        # Weights on copies of the input are weights of experts too: the scale takes all away.
        overrides = {**tiny, "model.num_layers": 1, "model.moe.router.options.scale": scale}
        model = build(load_config("longcat_flash", overrides))[0]
        return jax.jit(model.apply)({"params": params}, tiny_batch(0)).logits

    np.testing.assert_allclose(logits(1e-9), expected, atol=1e-5)
    assert np.abs(logits(6.0) - expected).max() > 0.1
