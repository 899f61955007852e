"""pMoE: experts that take patches, weighed by a softmax over those that they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import load_config
from moejax.config.moe import RouterConfig
from moejax.config.options import Options
from moejax.errors import UserError
from moejax.routing import ROUTERS, SCORES, RouterInputs
from moejax.routing.checks import check_router

from .test_vision import B, D, E, Layer, T, tokens

__all__ = ["tokens"]
pytestmark = pytest.mark.usefixtures("quick_compiles")
# Two experts a patch: three of the six patches of a picture for each of four experts.
TAKEN = 3
TWICE = {"model.moe.router.options.capacity_factor": 2.0}


def test_weights_are_a_softmax_over_the_patches(tokens):
    """By hand: of each picture each expert takes its three best and shares 1 out among them."""
    layer = Layer("pmoe", TWICE)
    y, aux = layer(tokens)
    logits, weights = aux["logits"], aux["weights"]
    expected = np.zeros((B, T, E))
    for b in range(B):
        for e in range(E):
            best = np.argsort(-logits[b, :, e])[:TAKEN]
            shares = np.exp(logits[b, best, e])
            expected[b, best, e] = shares / shares.sum()
    np.testing.assert_allclose(weights, expected, atol=1e-5)

    # The same choice as plain expert choice, which weighs by the scores themselves.
    options = {"capacity_factor": 2.0, "rounding": "down"}
    plain = Layer("pmoe", TWICE, router=RouterConfig("expert_choice", Options(**options)))
    y_plain, aux_plain = plain(tokens)
    np.testing.assert_array_equal(aux["expert_ids"], aux_plain["expert_ids"])
    assert np.abs(y - y_plain).max() > 1e-3


def test_gates_begin_near_0_and_weights_near_1_over_l(tokens):
    layer = Layer("pmoe", TWICE)
    shapes = SCORES.get("linear").shapes(D, E, **load_config("pmoe").model.moe.score.options)
    (shape, init) = shapes["router_mde"]
    router = {"router_mde": init(jax.random.key(0), shape, jnp.float32)}
    aux = layer(tokens, {**layer.params, "router": router})[1]
    taken = aux["expert_ids"] < E
    assert (taken.sum(axis=1) == TAKEN).all()
    np.testing.assert_allclose(aux["weights"][taken], 1 / TAKEN, rtol=2e-3)
    assert np.abs(layer(tokens)[1]["weights"][taken] - 1 / TAKEN).max() > 0.05


def test_an_expert_takes_12_of_the_49_patches_of_a_picture():
    model = load_config("pmoe").model
    options = model.moe.router.options
    logits = np.random.default_rng(0).normal(size=(1, model.num_tokens, 4)).astype(np.float32)
    ones = np.ones(logits.shape[:2], np.int32)
    inputs = RouterInputs(logits, ones > 0, 0 * ones, ones, num_ffn=4, num_modalities=1)
    route = jax.jit(lambda inputs: ROUTERS.get("expert_choice").function(inputs, **options))
    plan = route(inputs)
    np.testing.assert_array_equal((np.asarray(plan.expert_ids) < 4).sum(axis=1), [[12] * 4])
    assert plan.max_choices == model.num_tokens == 49
    np.testing.assert_allclose(np.asarray(plan.weights).sum(axis=1), 1, rtol=1e-5)


def test_shares_of_a_patch_sum_to_1(tokens):
    options = Options(capacity_factor=2.0, weights="share")
    layer = Layer("pmoe", TWICE, router=RouterConfig("expert_choice", options))
    aux = layer(tokens)[1]
    taken = (aux["expert_ids"] < E).any(axis=-1)
    np.testing.assert_allclose(aux["weights"].sum(axis=-1), taken, atol=1e-6)
    assert taken.mean() > 0.5


def test_what_sees_later_tokens_has_no_causal_rule():
    with pytest.raises(UserError, match="router.options.weights: 'tokens' compares a token"):
        check_router("expert_choice", {"weights": "tokens", "causal_rule": "threshold"}, 4, True)
    check_router("expert_choice", {"weights": "tokens", "causal_rule": "none"}, 4, True)
