"""Layers that are run again: steps against plain loops, biases, shared keys and values."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.nn.block import make_block
from moejax.nn.recursive import recursive_block
from moejax.ops.attention import multimodal_mask

from .depth_models import LENGTH, ROWS, Block, best, changed, decoder

STEPS = 3
EXPERT = {"gate": "sigmoid", "gate_scale": 0.1, "branch": "whole"}


def recursive(depth=None, **recursion) -> Block:
    recursion = {"steps": STEPS, **recursion}
    return Block(decoder(("recursive",), depth, recursion), "recursive")


def probabilities(block: Block) -> np.ndarray:
    """Of the router "token", [b, t, r]."""
    router = np.asarray(block.params["router_dr"], np.float64)
    logits = np.asarray(block.x, np.float64) @ router
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


def layer_on(block: Block, x: np.ndarray, active: np.ndarray) -> np.ndarray:
    """The block's only layer, among the active tokens."""
    layers = block.params["layers"]["stack"]["segment_0"]["block_0"]
    params = jax.tree.map(lambda leaf: leaf[0], layers)
    segments = jnp.where(active, block.ctx.segments_bt, 0)
    ctx = block.ctx.replace(
        segments_bt=segments, valid_bt=segments > 0, mask_bts=multimodal_mask(segments)
    )
    module = make_block(block.config, "untied", None)
    return np.asarray(module.apply({"params": params}, jnp.asarray(x), {}, {}, ctx)[0])


@pytest.mark.parametrize("gate_steps", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_tokens_that_choose_their_number_of_steps_equal_a_plain_loop(gate_steps, biased):
    """The authors' code weighs the last state by p_i, eq. 2.2 each step r by p_r."""
    balance = {"balance": {"name": "sign"}} if biased else {}
    block = recursive(router="token", gate_steps=gate_steps, **balance)
    bias = np.float32([-0.1, 0.0, 0.2]) if biased else np.zeros(STEPS)
    if biased:
        block.params["select_bias_r"] = jnp.asarray(bias)
    p = probabilities(block)
    steps = (p + bias).argmax(axis=-1) + 1
    assert set(steps.ravel()) == {1, 2, 3}
    # The bias changes choices, and weights are the probabilities all the same.
    assert (steps != p.argmax(axis=-1) + 1).any() == biased
    begin = np.asarray(block.x)
    x = begin.copy()
    for r in range(STEPS):
        active = steps > r
        weight = p[..., r, None] if gate_steps else 1
        x = np.where(active[..., None], weight * layer_on(block, x, active), x)
    chosen = np.take_along_axis(p, steps[..., None] - 1, axis=-1)
    expected = begin + (x if gate_steps else chosen * x)
    np.testing.assert_allclose(block(), expected, atol=2e-4)


def test_a_bias_has_no_gradient():
    block = recursive(router="token", balance={"name": "sign"})
    slopes = jax.grad(lambda params: jnp.square(block(params)).sum())(block.params)
    assert (slopes["select_bias_r"] == 0).all() and (slopes["router_dr"] != 0).any()


def test_steps_have_room_for_the_most_likely():
    """Places for 9, 6 and 3 of 12 tokens that all want three steps; without any, a token stays."""
    block = recursive(router="token", room=0.75, balance={"name": "sign"})
    block.params["select_bias_r"] = jnp.array([0.0, 0.0, 5.0])
    ctx = block.ctx.replace(record=True)
    out, _, _, aux = block.module.apply({"params": block.params}, block.x, {}, {}, ctx)
    weight = probabilities(block)[..., 2]
    for kept, places in zip(aux["depth"]["kept"], (9, 6, 3), strict=True):
        expected = np.zeros((ROWS, LENGTH), bool)
        np.put_along_axis(expected, best(weight, places), True, axis=1)
        np.testing.assert_array_equal(kept, expected)
    np.testing.assert_array_equal(changed(out, block.x), aux["depth"]["kept"][0])


def replaced_before_the_second_step(block: Block) -> np.ndarray:
    """Which tokens of each row end otherwise if the first one of the second step is another."""
    calls = 0

    def replace(call, args, kwargs, context):
        nonlocal calls
        if context.module.name == "layers":
            calls += 1
            if calls == 2:
                args = (args[0].at[:, 0].multiply(-2.0), *args[1:])
        return call(*args, **kwargs)

    before = block()
    with nn.intercept_methods(replace):
        after = block()
    assert calls == 2
    return changed(after, before).sum(axis=1)


def test_keys_of_the_first_step_do_not_depend_on_later_ones():
    router = {"steps": 2, "router": "expert", "capacities": (1.0, 0.5)}
    counts = replaced_before_the_second_step(recursive(EXPERT, **router, share_kv=True))
    # The queries are its own.
    np.testing.assert_array_equal(counts, [1, 1])
    for sharing in ({}, {"share_kv": True, "update_kv": True}):
        counts = replaced_before_the_second_step(recursive(EXPERT, **router, **sharing))
        assert (counts > 1).all()


def test_keys_that_all_tokens_update_are_not_shared():
    """Without a router, or with one that lets all tokens run: each step has keys of its own."""
    plain, updated, shared = (
        recursive(layers=2, **sharing)
        for sharing in ({}, {"share_kv": True, "update_kv": True}, {"share_kv": True})
    )
    for train in (True, False):
        out = plain(ctx=plain.ctx.replace(train=train))
        np.testing.assert_allclose(updated(ctx=updated.ctx.replace(train=train)), out, atol=1e-5)
        assert np.abs(shared(ctx=shared.ctx.replace(train=train)) - out).max() > 1e-2


def test_keys_are_those_of_the_last_step_that_a_token_ran():
    block = recursive(router="token", share_kv=True, update_kv=True)
    ctx = block.ctx.replace(train=False, record=True)
    _, _, state, aux = block.module.apply({"params": block.params}, block.x, {}, {}, ctx)
    rows = [state[f"step_{r}"]["segment_0"]["block_0"]["cache"] for r in range(STEPS)]
    for r in range(1, STEPS):
        ran = np.asarray(aux["depth"]["kept"][r])
        assert ran.any() and not ran.all() and rows[r]["kept"].all()
        for name in ("k", "v"):
            moved = np.asarray(rows[r][name] != rows[r - 1][name]).any(axis=(-2, -1))
            np.testing.assert_array_equal(moved[0], ran)


@pytest.mark.parametrize(
    "recursion, depth, message",
    [
        ({"update_kv": True}, {}, "model.recursion.update_kv: needs model.recursion.share_kv=True"),
        (
            {"router": "expert", "balance": {"name": "sign"}},
            {},
            "model.recursion.balance.name: moves a bias of model.recursion.router='token'",
        ),
        ({"router": "token", "balance": {"name": "sing"}}, {}, "model.recursion.balance.name: "),
        (
            {"router": "token", "balance": {"name": "sign", "options": {"ffn_share": 1.0}}},
            {},
            "model.recursion.balance.options: are of model.moe.balance",
        ),
        ({"router": "token"}, {"warmup_steps": 5}, "model.depth.warmup_steps: is 0 where"),
    ],
)
def test_steps_that_cannot_be(recursion, depth, message):
    with pytest.raises(UserError, match=message):
        recursive_block(decoder(("recursive",), depth, {"steps": 2, **recursion}), "block")
