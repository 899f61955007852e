"""What makes ``coe`` and ``rexmoe`` what they are: experts that run again, or in several layers."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.api import build
from moejax.config import load_config


def test_coe_runs_its_experts_twice(expert_layer, tokens):
    """``x_1 = x + MoE_1(x); y = MoE_1(x) + MoE_2(x_1)``, with one pool and two routers."""
    layer = expert_layer("coe")
    assert {"router", "router_1"} <= layer.params.keys()
    once = expert_layer("coe", {"model.moe.iterations": 1})
    # One more router, and nothing else.
    extra = layer.params.keys() - once.params.keys()
    assert extra == {"router_1"}
    shared = {name: layer.params[name] for name in once.params}
    first, _ = once(tokens, params=shared)
    second, _ = once(tokens + first, params={**shared, "router": layer.params["router_1"]})
    np.testing.assert_allclose(layer(tokens)[0], first + second, atol=1e-4)
    assert np.abs(second).max() > 0.1


def test_one_iteration_of_coe_is_a_layer_of_experts(expert_layer, tokens, mlp):
    """C = 1: the sum over the chosen experts and the shared one, nothing else."""
    layer = expert_layer("coe", {"model.moe.iterations": 1})
    y, aux = layer(tokens)
    experts = layer.params["experts"]
    expected = mlp(tokens, layer.params["shared_wi_edf"][0], layer.params["shared_wo_efd"][0])
    for k in range(3):
        ids = aux["expert_ids"][..., k]
        one = jax.vmap(jax.vmap(mlp))(tokens, experts["wi_edf"][ids], experts["wo_efd"][ids])
        expected += aux["weights"][..., k, None] * one
    np.testing.assert_allclose(y, expected, atol=1e-4)


def choices(config, params, batch, **options) -> list[set[int]]:
    """The experts that each layer of a period chooses."""
    model = build(config)[0]
    apply = jax.jit(model.apply, static_argnames=("record", "train"))
    aux = apply({"params": params}, batch, record=True, **options).aux["segment_0"]
    blocks = sorted(name for name in aux if name.startswith("block_"))
    return [set(np.unique(aux[name]["moe"]["router"]["expert_ids"]).tolist()) for name in blocks]


def test_rexmoe_layers_choose_from_one_pool(experts_tiny, drawn, tiny_batch):
    """Two layers, eight experts between them: once all are let in, each layer uses all eight."""
    tiny, batch = experts_tiny("rexmoe"), tiny_batch(0)
    config = load_config("rexmoe", tiny)
    params = drawn(build(config)[0], config)
    period = params["stack"]["segment_0"]
    assert period["pool"]["wi_edf"].shape[:2] == (1, 8)
    assert all("experts" not in period[f"block_{i}"]["moe"] for i in (0, 1))
    for chosen in choices(config, params, batch):
        assert chosen & {0, 1, 2, 3} and chosen & {4, 5, 6, 7}
    # At first a layer has its own four alone.
    start = {"train": True, "step": jnp.asarray(0)}
    own, other = choices(config, params, batch, **start)
    assert own <= {0, 1, 2, 3} and other <= {4, 5, 6, 7}
    end = {"train": True, "step": jnp.asarray(180)}
    assert choices(config, params, batch, **end) == choices(config, params, batch)


def test_rexmoe_without_the_pool_is_a_plain_model(experts_tiny, drawn, tiny_batch):
    """Before others' experts are let in, each layer is a layer of experts with its own four."""
    tiny, batch = experts_tiny("rexmoe"), tiny_batch(0)
    alone = {"model.moe.pool_layers": 1, "model.moe.pool_steps": (0, 0)}
    config, plain = load_config("rexmoe", tiny), load_config("rexmoe", {**tiny, **alone})
    model, plain_model = build(config)[0], build(plain)[0]
    params = drawn(model, config)
    period = params["stack"]["segment_0"]
    layers = []
    for i in (0, 1):
        block, own = period[f"block_{i}"], slice(4 * i, 4 * i + 4)
        experts = {name: leaf[:, own] for name, leaf in period["pool"].items()}
        router = {"router_mde": block["moe"]["router"]["router_mde"][..., own]}
        layers.append({**block, "moe": {"experts": experts, "router": router}})
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *layers)
    same = {**params, "stack": {"segment_0": {"block_0": joined}}}
    apply = lambda model: jax.jit(model.apply, static_argnames="train")
    logits = apply(model)({"params": params}, batch, train=True, step=jnp.asarray(0)).logits
    expected = apply(plain_model)({"params": same}, batch, train=True).logits
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    # Two routers of four more columns each.
    assert size(params) - size(same) == 2 * 16 * 4
