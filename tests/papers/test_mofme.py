"""MoFME: experts that scale and shift shared features; a router that knows when it is unsure."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import load_config
from moejax.config.moe import RouterConfig
from moejax.errors import UserError
from moejax.nn.moe_checks import check_moe
from moejax.routing import SCORES

from .test_vision import D, E, F, Layer, tokens

__all__ = ["tokens"]
pytestmark = pytest.mark.usefixtures("quick_compiles")


def size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def gelu(x):
    return np.asarray(jax.nn.gelu(jnp.asarray(x)))


def test_experts_modulate_shared_features(tokens):
    """``adaptor(sum_e w_e (scale_e h + shift_e))`` written out; of equal experts it is an MLP."""
    layer = Layer("mofme")
    y, aux = layer(tokens)
    params = jax.device_get(layer.params)["experts"]
    x = np.asarray(tokens)
    gate, up = np.split(x @ params["base_dz"], 2, axis=-1)
    features = gelu(gate) * up
    top = np.sort(aux["logits"], axis=-1)[..., -2:]
    np.testing.assert_allclose(
        np.sort(aux["weights"], axis=-1),
        np.exp(top) / np.exp(top).sum(-1, keepdims=True),
        rtol=1e-4,
    )
    mixed = np.zeros_like(features)
    for k in range(2):
        ids, weights = aux["expert_ids"][..., k], aux["weights"][..., k, None]
        mixed += weights * (params["scale_ed"][ids] * features + params["shift_ed"][ids])
    expected = gelu(mixed @ params["adaptor_wi_df"]) @ params["adaptor_wo_fd"]
    np.testing.assert_allclose(y, expected, atol=1e-4)

    same = {**params, "scale_ed": jnp.ones((E, D)), "shift_ed": jnp.zeros((E, D))}
    shared = gelu(features @ params["adaptor_wi_df"]) @ params["adaptor_wo_fd"]
    equal = layer(tokens, {**layer.params, "experts": same})[0]
    np.testing.assert_allclose(equal, shared, atol=1e-4)
    assert np.abs(y - shared).max() > 1e-2


def test_an_expert_costs_two_vectors():
    four, six = (Layer("mofme", {"model.moe.num_experts": e}).params for e in (E, E + 2))
    assert size(four["experts"]) == 2 * D * D + 2 * D * F + 2 * E * D
    assert size(six["experts"]) - size(four["experts"]) == 2 * 2 * D


def uncertain(x, rng=None, **options):
    score = SCORES.get("uncertain")
    router = jnp.asarray(np.random.default_rng(1).normal(size=(1, D, E)), jnp.float32)
    modality = jnp.zeros(x.shape[:2], jnp.int32)
    apply = jax.jit(lambda x: score.apply({"router_mde": router}, x, modality, rng, **options))
    return np.asarray(apply(x)), np.asarray(router[0])


def test_one_pass_or_no_dropout_is_the_plain_router(tokens):
    rng = jax.random.key(0)
    for given, options in (
        (None, {"passes": 5, "dropout": 0.5}),
        (rng, {"passes": 1, "dropout": 0.5}),
        (rng, {"passes": 5, "dropout": 0.0}),
    ):
        logits, router = uncertain(tokens, given, **options)
        np.testing.assert_allclose(logits, np.asarray(tokens) @ router, rtol=1e-4, atol=1e-4)


def test_a_logit_shrinks_by_the_variance_of_its_passes(tokens):
    """Of many passes: ``l / (1 + var)``, where dropout of a linear map has a known variance."""
    x, p = tokens[:1, :2], 0.2
    logits, router = uncertain(x, jax.random.key(0), passes=4000, dropout=p)
    plain = np.asarray(x) @ router
    variance = p / (1 - p) * np.asarray(x) ** 2 @ router**2
    np.testing.assert_allclose(logits, plain / (1 + variance), atol=0.1)
    assert np.abs(logits - plain).max() > 0.5


def test_passes_are_of_training_alone(tokens):
    layer = Layer("mofme")
    rng = jax.random.key(0)
    plain, drawn = layer(tokens, rng=rng)[1], layer(tokens, train=True, rng=rng)[1]
    router = layer.params["router"]["router_mde"][0]
    np.testing.assert_allclose(plain["logits"], tokens @ router, rtol=1e-4, atol=1e-4)
    assert np.abs(plain["logits"] - drawn["logits"]).max() > 0.01


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model.moe.activation": "swiglu"}, "model.moe.activation: 'film' is made with 'gelu'"),
        ({"model.moe.zero_experts": 1}, "model.moe.zero_experts: is not for experts of kind"),
        ({"model.moe.kind": "films"}, "model.moe.kind: 'films' is none of mlp, film"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(UserError, match=message):
        check_moe(load_config("mofme", fields).model)


def test_other_mistakes():
    with pytest.raises(UserError, match="score.options.passes: must be at least 1"):
        SCORES.get("uncertain").shapes(D, E, passes=0)
    config = load_config("mofme").model
    soft = dataclasses.replace(config.moe, router=RouterConfig("soft"))
    with pytest.raises(UserError, match="model.moe.kind: experts of kind 'film' have no slots"):
        check_moe(dataclasses.replace(config, moe=soft))
