"""Biases of routers in the training step: moved by the whole batch's counts, by nothing else."""

import dataclasses

import jax
import numpy as np
import pytest

from moejax.config.depth import RecursionConfig
from moejax.config.moe import BalanceConfig, MoEConfig, RouterLossConfig
from moejax.config.schema import DecoderConfig
from moejax.train.evaluate import put_batch
from moejax.train.setup import prepare

from .conftest import make_config

BALANCE = BalanceConfig("sign", rate=0.25)
PLAIN = DecoderConfig(vocab_size=284, num_layers=2, d_model=16, num_heads=2, ffn_hidden=(8,))
MOE = MoEConfig(
    num_experts=4,
    hidden=8,
    top_k=1,
    balance=BALANCE,
    losses=(RouterLossConfig("switch", 0.1),),
)
DECODERS = {
    "experts": dataclasses.replace(PLAIN, block_pattern=("moe",), moe=MOE),
    "steps": dataclasses.replace(
        PLAIN,
        num_layers=1,
        block_pattern=("recursive",),
        recursion=RecursionConfig(steps=3, router="token", balance=BALANCE),
    ),
}
# Where the bias lies, its router's other weight, and a loss of its counts.
PLACES = {
    "experts": ("moe/router/select_bias_e", "router_mde", "router/switch"),
    "steps": ("select_bias_r", "router_dr", "depth/balance"),
}


def bias_of(params, name: str = "experts") -> np.ndarray:
    node = params["stack"]["segment_0"]["block_0"]
    for part in PLACES[name][0].split("/"):
        node = node[part]
    return node


def counts_of(statistics: dict, name: str) -> np.ndarray:
    """How many chose what, [l, e] or [l, r]."""
    if name == "experts":
        (found,) = statistics["routing"].values()
        return found["statistics"]["chosen_me"].sum(axis=1)
    (found,) = statistics["depth"].values()
    return found["recursion"]["chosen_r"]


def one_step(name: str = "experts", devices: int = 1, **changes):
    """(state before, state after, metrics) of the first step."""
    config = dataclasses.replace(make_config(**changes), model=DECODERS[name])
    setup = prepare(config, jax.devices()[:devices])
    step = setup.train_step()
    with jax.set_mesh(setup.mesh):
        state = setup.recipe.create()
        before = jax.device_get(state)
        after, metrics = step(state, put_batch(setup.pipeline.batch(0), setup.mesh))
    return before, jax.device_get(after), jax.device_get(metrics)


@pytest.mark.parametrize("name", [pytest.param("experts", marks=pytest.mark.slow), "steps"])
def test_bias_moves_by_the_sign_of_what_is_missing_in_the_whole_batch(name, fake_data):
    found = []
    _, weight, loss = PLACES[name]
    for accumulation, devices in ((2, 1), (1, 8)):
        options = {"optim__weight_decay": 0.5, "optim__ema_decay": 0.9, "train__steps": 3}
        options["optim__accumulation_steps"] = accumulation
        before, after, metrics = one_step(name, devices, **options)
        assert np.all(bias_of(before.params, name) == 0)
        counts = counts_of(metrics.losses.statistics, name)
        bias = bias_of(after.params, name)
        wanted = 0.25 * np.sign(counts.mean(axis=1, keepdims=True) - counts)
        assert bias.any()
        np.testing.assert_array_equal(bias, wanted)
        np.testing.assert_array_equal(bias_of(after.ema, name), bias)
        moments = jax.tree_util.tree_leaves_with_path(after.opt_state)
        paths = "".join(jax.tree_util.keystr(path) for path, _ in moments)
        assert weight in paths
        assert "select_bias" not in paths, "the optimizer has no part in it"
        found.append((counts, bias, metrics.losses.derived_values()[loss]))
    # Counts, and with them bias and loss, are those of the batch, however it is cut.
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])
    np.testing.assert_allclose(found[0][2], found[1][2], rtol=1e-6)


def test_bias_of_a_skipped_step_stays(fake_data):
    fake_data.broken = frozenset({0})
    before, after, metrics = one_step()
    assert int(metrics.skipped) == 1
    np.testing.assert_array_equal(bias_of(after.params), bias_of(before.params))


@pytest.mark.slow
def test_a_bias_that_is_frozen_by_name_stays(fake_data):
    _, after, _ = one_step(optim__freeze=("stack/",))
    assert np.all(bias_of(after.params) == 0)
    _, after, _ = one_step(optim__freeze=("embedding_vd",))
    assert np.any(bias_of(after.params) != 0)
