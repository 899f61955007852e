"""Experts of diffusion transformers: chosen by picture, by batch, by time; drawn by the noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import load_config
from moejax.train.balance import make_controller

pytestmark = pytest.mark.usefixtures("quick_compiles")
E = 8


def taken(aux, experts: int = E):
    """[2, 12, e] bool."""
    return (aux["expert_ids"][..., None] == np.arange(experts)).any(axis=2)


def other_second_picture(tokens):
    return tokens.at[1].set(tokens[1, ::-1] * 3)


def test_experts_choose_in_one_picture(expert_layer, tokens):
    """EC-DiT: one of twelve patches each, whatever else is in the batch; softmax scores weigh."""
    layer = expert_layer("ec_dit")
    _, aux = layer(tokens)
    np.testing.assert_array_equal(taken(aux).sum(axis=1), 1)
    probs = np.asarray(jax.nn.softmax(tokens @ layer.params["router"]["router_mde"][0]))
    best = probs.argmax(axis=1)[:, None] == np.arange(12)[:, None]
    np.testing.assert_array_equal(taken(aux), best)
    weights = np.where(taken(aux), probs, 0).sum(axis=-1)
    np.testing.assert_allclose(aux["weights"].sum(axis=-1), weights, rtol=1e-4)
    _, beside = layer(other_second_picture(tokens))
    np.testing.assert_array_equal(beside["expert_ids"][0], aux["expert_ids"][0])


def test_experts_choose_from_the_batch(expert_layer, tokens):
    """DiffMoE: three of all 24 patches each; what one picture gets depends on the other."""
    layer = expert_layer("diffmoe")
    _, aux = layer(tokens, train=True)
    probs = np.asarray(jax.nn.softmax(tokens @ layer.params["router"]["router_mde"][0]))
    third = -np.sort(-probs.reshape(24, E), axis=0)[2]
    np.testing.assert_array_equal(taken(aux), probs >= third)
    first, second = taken(aux).sum(axis=1)
    assert (first != second).all()
    _, beside = layer(other_second_picture(tokens), train=True)
    assert (beside["expert_ids"][0] != aux["expert_ids"][0]).any()


def test_thresholds_say_how_many_patches_an_expert_takes(expert_layer, tokens):
    layer = expert_layer("diffmoe")
    router = layer.params["router"]
    model = load_config("diffmoe").model
    assert router["causal_router_wi_df"].shape == (16, model.d_model), "as wide as the model"
    hidden = jax.nn.silu(tokens @ router["causal_router_wi_df"])
    probs = np.asarray(jax.nn.sigmoid(hidden @ router["causal_router_wo_fe"])).reshape(24, E)
    # Between the n-th and the next probability of expert n.
    ranked = -np.sort(-probs, axis=0)
    counts = np.arange(E)
    threshold = np.float32([(ranked[max(n - 1, 0), n] + ranked[n, n]) / 2 for n in counts])
    threshold[0] = 1
    params = {**layer.params, "router": {**router, "causal_threshold_e": jnp.asarray(threshold)}}
    _, aux = layer(tokens, params=params)
    np.testing.assert_array_equal(taken(aux).sum(axis=(0, 1)), counts)


def test_a_step_moves_the_thresholds_and_no_gradient_does(expert_layer, tokens):
    layer = expert_layer("diffmoe")
    before = np.linspace(0, 0.7, E, dtype=np.float32)
    router = {**layer.params["router"], "causal_threshold_e": jnp.asarray(before)}
    params = {**layer.params, "router": router}
    _, aux = layer(tokens, params=params, train=True)
    gradient = layer.gradient(params, tokens)
    assert not gradient["router"]["causal_threshold_e"].any()
    hidden = jax.nn.silu(tokens @ router["causal_router_wi_df"])
    probs = np.asarray(jax.nn.sigmoid(hidden @ router["causal_router_wo_fe"])).reshape(24, E)
    # As a model has it: stacked layers, here one, under the name of the router.
    name = "segment_0/block_1/moe/router"
    sums = jax.tree.map(lambda leaf: leaf[None], aux["statistics"])
    stack = {"segment_0": {"block_1": {"moe": jax.tree.map(lambda x: x[None], params)}}}
    control = make_controller(load_config("diffmoe"))
    moved = control({"stack": stack}, {"routing": {name: {"statistics": sums}}})
    moved = moved["stack"]["segment_0"]["block_1"]["moe"]
    after = moved["router"].pop("causal_threshold_e")[0]
    np.testing.assert_allclose(after, 0.95 * before + 0.05 * -np.sort(-probs, axis=0)[2], rtol=1e-4)
    rest = {**params, "router": {**router}}
    del rest["router"]["causal_threshold_e"]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), moved, rest)


NOISE = np.float32(np.random.default_rng(5).normal(size=(2, 16)) * 4)


def test_a_time_has_one_expert(expert_layer, tokens):
    """RAPHAEL's time-MoE: of four, one for all patches of a picture, whatever they are."""
    layer = expert_layer("raphael")
    _, aux = layer(tokens, noise=NOISE)
    ids = aux["expert_ids"][..., 0]
    assert [len(set(row)) for row in ids] == [1, 1] and ids[0, 0] != ids[1, 0]
    _, other = layer(-tokens, noise=NOISE)
    np.testing.assert_array_equal(other["expert_ids"], aux["expert_ids"])
    _, turned = layer(tokens, noise=NOISE[::-1])
    np.testing.assert_array_equal(turned["expert_ids"], aux["expert_ids"][::-1])


def test_mode_draws_by_the_noise_alone(expert_layer, tokens):
    """Two of four: the likeliest in evaluation, drawn for each patch in training."""
    layer = expert_layer("mode")
    router = layer.params["router"]
    hidden = jax.nn.gelu(NOISE @ router["router_wi_mdf"][0])
    probs = np.asarray(jax.nn.softmax(hidden @ router["router_wo_mfe"][0]))
    _, aux = layer(tokens, noise=NOISE)
    best = np.argsort(-probs, axis=-1)[:, :2]
    np.testing.assert_array_equal(aux["expert_ids"], np.repeat(best[:, None], 12, axis=1))
    pair = np.take_along_axis(probs, best, axis=-1)
    share = pair / pair.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(aux["weights"], np.repeat(share[:, None], 12, 1), rtol=1e-4)
    _, other = layer(-tokens, noise=NOISE)
    np.testing.assert_array_equal(other["expert_ids"], aux["expert_ids"])
    _, drawn = layer(tokens, noise=0 * NOISE, train=True, rng=jax.random.key(0))
    assert len({tuple(sorted(pair)) for pair in drawn["expert_ids"].reshape(-1, 2)}) > 3
    # Without noise all are as likely, and the weights know nothing of the draw.
    np.testing.assert_allclose(drawn["weights"], 0.5, rtol=1e-5)
