"""Biases of routers in the training step: moved by the whole batch's counts, by nothing else."""

import dataclasses

import jax
import numpy as np

from moejax.config.moe import BalanceConfig, MoEConfig, RouterLossConfig
from moejax.config.schema import DecoderConfig
from moejax.train.evaluate import put_batch
from moejax.train.setup import prepare

from .conftest import make_config

MOE = MoEConfig(
    num_experts=4,
    hidden=8,
    top_k=1,
    balance=BalanceConfig("sign", rate=0.25),
    losses=(RouterLossConfig("switch", 0.1),),
)
DECODER = DecoderConfig(
    vocab_size=284,
    num_layers=2,
    d_model=16,
    num_heads=2,
    ffn_hidden=(8,),
    block_pattern=("moe",),
    moe=MOE,
)


def router_of(params) -> dict:
    return params["stack"]["segment_0"]["block_0"]["moe"]["router"]


def one_step(**changes):
    """(state before, state after, metrics) of the first step on one device."""
    config = dataclasses.replace(make_config(**changes), model=DECODER)
    setup = prepare(config, jax.devices()[:1])
    step = setup.train_step()
    with jax.set_mesh(setup.mesh):
        state = setup.recipe.create()
        before = jax.device_get(state)
        after, metrics = step(state, put_batch(setup.pipeline.batch(0), setup.mesh))
    return before, jax.device_get(after), jax.device_get(metrics)


def test_bias_moves_by_the_sign_of_what_is_missing_in_the_whole_batch(fake_data):
    found = []
    for accumulation in (1, 2):
        options = {"optim__weight_decay": 0.5, "optim__ema_decay": 0.9, "train__steps": 3}
        before, after, metrics = one_step(optim__accumulation_steps=accumulation, **options)
        assert np.all(router_of(before.params)["select_bias_e"] == 0)
        (statistics,) = metrics.losses.statistics["routing"].values()
        counts = statistics["statistics"]["chosen_me"].sum(axis=1)
        bias = router_of(after.params)["select_bias_e"]
        wanted = 0.25 * np.sign(counts.mean(axis=1, keepdims=True) - counts)
        np.testing.assert_array_equal(bias, wanted)
        np.testing.assert_array_equal(router_of(after.ema)["select_bias_e"], bias)
        moments = jax.tree_util.tree_leaves_with_path(after.opt_state)
        paths = "".join(jax.tree_util.keystr(path) for path, _ in moments)
        assert "router_mde" in paths
        assert "select_bias_e" not in paths, "the optimizer has no part in it"
        found.append((counts, bias, metrics.losses.derived_values()["router/switch"]))
    # Counts, and with them bias and loss, are those of the batch, however it is cut.
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])
    np.testing.assert_allclose(found[0][2], found[1][2], rtol=1e-6)


def test_bias_of_a_skipped_step_stays(fake_data):
    fake_data.broken = frozenset({0})
    before, after, metrics = one_step()
    assert int(metrics.skipped) == 1
    np.testing.assert_array_equal(
        router_of(after.params)["select_bias_e"], router_of(before.params)["select_bias_e"]
    )


def test_a_bias_that_is_frozen_by_name_stays(fake_data):
    _, after, _ = one_step(optim__freeze=("stack/",))
    assert np.all(router_of(after.params)["select_bias_e"] == 0)
    _, after, _ = one_step(optim__freeze=("embedding_vd",))
    assert np.any(router_of(after.params)["select_bias_e"] != 0)
