"""What makes ``vmoe`` and ``soft_moe`` what they are, on layers of a few tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from moejax.config import load_config
from moejax.config.moe import RouterConfig
from moejax.nn.context import Context
from moejax.nn.moe import MoE

pytestmark = pytest.mark.usefixtures("quick_compiles")
B, T, D, E, F = 8, 6, 16, 4, 12
TINY = {
    "model.d_model": D,
    "model.num_heads": 2,
    "model.moe.hidden": F,
    "model.moe.num_experts": E,
    "model.kernel_backend": "reference",
}


@pytest.fixture
def tokens():
    return jnp.asarray(np.random.default_rng(3).normal(size=(B, T, D)), jnp.float32)


class Layer:
    """The layer of experts of a config, with random parameters, on tokens [8, 6, 16]."""

    def __init__(self, name: str, overrides: dict | None = None, **moe):
        config = load_config(name, {**TINY, **(overrides or {})}).model
        config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, **moe))
        self._module = MoE(config)
        x = jax.ShapeDtypeStruct((B, T, D), jnp.float32)
        init = lambda key, x: self._module.init(key, x, {}, _context(False, None))["params"]
        rng = np.random.default_rng(1)
        draw = lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype)
        shapes = meta.unbox(jax.eval_shape(init, jax.random.key(0), x))
        self.params = jax.tree.map(draw, shapes)

    def __call__(self, x, params=None, train=False, rng=None):
        """(output, aux of the router) as numpy."""

        @jax.jit
        def apply(params, x, rng):
            ctx = _context(train, rng)
            y, _, aux = self._module.apply({"params": params}, x, {}, ctx)
            return y, aux["router"]

        return jax.device_get(apply(self.params if params is None else params, x, rng))


def _context(train, rng) -> Context:
    ones = jnp.ones((B, T), jnp.int32)
    return Context(
        tokens_bt=ones,
        positions_bt=ones,
        modality_bt=0 * ones,
        valid_bt=ones > 0,
        segments_bt=ones,
        image_id_bt=ones,
        mask_bts=jnp.ones((B, T, T), bool),
        layout=None,
        rng=rng,
        train=train,
        record=True,
    )


def test_vmoe_routes_by_priority(tokens):
    """48 tokens x 2 x 0.5 over 4 experts: 12 places, for the most certain tokens in evaluation."""
    fields = {
        "model.moe.capacity_factor": 0.5,
        "model.moe.eval_capacity_factor": 0.5,
    }
    layer = Layer("vmoe", fields)
    params = {**layer.params}
    # So that one expert is the first choice of many.
    router = layer.params["router"]["router_mde"]
    params["router"] = {"router_mde": router.at[:, :, 0].set(2 * jnp.abs(router[:, :, 0]))}
    x = tokens + 0.5
    free = Layer("vmoe", {**fields, "model.moe.capacity": "none", "model.moe.eval_capacity": ""})
    aux = free(x, params)[1]
    first = aux["expert_ids"].reshape(-1, 2)[:, 0]
    weight = jax.nn.softmax(aux["logits"], axis=-1).reshape(-1, E).max(axis=-1)
    np.testing.assert_allclose(weight, aux["weights"].reshape(-1, 2)[:, 0], rtol=1e-5)
    assert (aux["weights"].sum(axis=-1) < 1).all()

    kept = layer(x, params)[1]["expert_ids"].reshape(-1, 2)[:, 0] < E
    in_order = layer(x, params, train=True)[1]["expert_ids"].reshape(-1, 2)[:, 0] < E
    dropped = 0
    for expert in range(E):
        mine = np.flatnonzero(first == expert)
        best = mine[np.argsort(-weight[mine], kind="stable")][:12]
        np.testing.assert_array_equal(np.flatnonzero(kept & (first == expert)), np.sort(best))
        np.testing.assert_array_equal(np.flatnonzero(in_order & (first == expert)), mine[:12])
        dropped += len(mine) > 12
    assert dropped, "nobody was dropped: the test is void"


def test_vmoe_by_priority_is_by_order_where_all_find_a_place(tokens):
    outputs = {}
    for policy in ("order", "priority", "none"):
        fields = {"model.moe.capacity": policy, "model.moe.eval_capacity": ""}
        fields |= {"model.moe.eval_capacity_factor": float(E)}
        outputs[policy] = Layer("vmoe", fields)(tokens)[0]
    np.testing.assert_array_equal(outputs["priority"], outputs["order"])
    np.testing.assert_array_equal(outputs["priority"], outputs["none"])


def test_vmoe_has_places_in_fours(tokens):
    """48 tokens x 2 x 1.05 over 4 experts are 25.2: 28 places, not 26."""
    one = {"model.moe.num_experts": E}
    counts = {}
    for multiple in (1, 4):
        layer = Layer("vmoe", {**one, "model.moe.capacity_multiple": multiple})
        params = jax.tree.map(jnp.zeros_like, layer.params)
        # Of equal logits the first two experts are chosen by all.
        ids = layer(tokens, params, train=True)[1]["expert_ids"]
        counts[multiple] = [int((ids == expert).sum()) for expert in range(E)]
    assert counts == {1: [26, 26, 0, 0], 4: [28, 28, 0, 0]}


def test_vmoe_is_noisy_in_training_alone(tokens):
    layer = Layer("vmoe", {"model.moe.capacity": "none", "model.moe.eval_capacity": ""})
    rng = jax.random.key(0)
    plain, drawn = layer(tokens)[1], layer(tokens, train=True, rng=rng)[1]
    assert np.abs(plain["weights"] - drawn["weights"]).max() > 0.01
    np.testing.assert_array_equal(layer(tokens, rng=rng)[1]["weights"], plain["weights"])
    assert drawn["losses"]["load"]["groups"] == 1


def through_experts(experts, x_becd):
    """What each expert makes of its own slots, SwiGLU written out."""
    gate, up = np.split(np.einsum("becd,edf->becf", x_becd, experts["wi_edf"]), 2, axis=-1)
    return np.einsum("becf,efd->becd", np.asarray(jax.nn.silu(gate)) * up, experts["wo_efd"])


def test_soft_moe_mixes_all_patches(tokens):
    """``y = C f(D^T x)`` with softmaxes of scaled cosines, written out; sparse routing does not."""
    layer = Layer("soft_moe")
    y = layer(tokens)[0]
    params = jax.device_get(layer.params)
    x, router, experts = np.asarray(tokens), params["router"], params["experts"]
    unit = lambda v, axis: v / np.sqrt((v**2).sum(axis=axis, keepdims=True) + 1e-6)
    scale = router["scale_m"][0]
    logits = scale * unit(x, -1) @ unit(router["prototype_mde"][0], 0)
    dispatch, combine = (
        np.asarray(jax.nn.softmax(logits, axis=axis)).reshape(B, T, E, -1) for axis in (1, 2)
    )
    slots = np.einsum("btec,btd->becd", dispatch, x)
    expected = np.einsum("btec,becd->btd", combine, through_experts(experts, slots))
    np.testing.assert_allclose(y, expected, atol=1e-4)

    last = tokens.at[0, -1].add(1.0)
    changed = np.abs(layer(last)[0] - y).max(axis=-1)
    assert (changed[0] > 1e-4).all() and (changed[1:] == 0).all()
    sparse = Layer("soft_moe", router=RouterConfig())
    changed = np.abs(sparse(last)[0] - sparse(tokens)[0]).max(axis=-1)
    assert (changed[0, :-1] == 0).all() and changed[0, -1] > 0


def test_soft_moe_with_scale_zero_gives_every_slot_the_mean(tokens):
    """And every patch of a picture the mean of what the experts make of it."""
    layer = Layer("soft_moe")
    params = {**layer.params, "router": {**layer.params["router"], "scale_m": jnp.zeros(1)}}
    y = layer(tokens, params)[0]
    mean = np.asarray(tokens).mean(axis=1)[:, None, None]
    slots = np.broadcast_to(mean, (B, E, 1, D))
    expected = through_experts(jax.device_get(params["experts"]), slots).mean(axis=(1, 2))
    np.testing.assert_allclose(y, np.broadcast_to(expected[:, None], y.shape), atol=1e-5)


@pytest.mark.parametrize(
    "spec, where",
    [
        ("vmoe:s32", (5, 7)),
        ("vmoe:b16", (1, 3, 5, 7, 9, 11)),
        ("soft_moe:s16", (6, 7, 8, 9, 10, 11)),
        ("soft_moe:h14", tuple(range(16, 32))),
    ],
)
def test_which_blocks_have_experts(spec, where):
    kinds = load_config(spec).model.block_kinds()
    assert tuple(i for i, kind in enumerate(kinds) if kind == "moe") == where
