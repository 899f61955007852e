"""Meshes: shapes and refusals; eight simulated devices compute what one does."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from moejax.config.depth import DepthConfig, RecursionConfig
from moejax.config.moe import BalanceConfig, MoEConfig, RouterConfig, RouterLossConfig
from moejax.config.options import Options
from moejax.config.schema import (
    Config,
    DataConfig,
    DecoderConfig,
    MeshConfig,
    NextTokenConfig,
    OptimConfig,
    UntieConfig,
)
from moejax.errors import UserError
from moejax.generate.cache import init_cache, write_rows
from moejax.models.decoder import build_decoder
from moejax.objectives.base import Objective
from moejax.objectives.depth import with_depth
from moejax.objectives.next_token import next_token
from moejax.objectives.routing import with_routing
from moejax.parallel.mesh import batch_sharding, check_mesh, make_mesh, mesh_shape
from moejax.parallel.rules import state_shardings

UNTIED = UntieConfig(qkv=True, out=True, ffn=True, norms=True, final_norm=True)
MODEL = DecoderConfig(
    vocab_size=64,
    num_layers=1,
    d_model=32,
    num_heads=4,
    ffn_hidden=(48,),
    untie=UNTIED,
    dtype="float64",
)

CHOSEN_BY_EXPERTS = RouterConfig("expert_choice", Options(causal_rule="none", normalise="sigmoid"))
MOE = {
    # Layers of experts that are split over devices, with every loss that is no ratio of sums.
    "top_k": dataclasses.replace(
        MODEL,
        block_pattern=("moe",),
        moe=MoEConfig(
            num_experts=8,
            hidden=16,
            shared_hidden=8,
            balance=BalanceConfig("sign"),
            losses=(RouterLossConfig("switch", 0.1), RouterLossConfig("z", 0.1)),
        ),
    ),
    # A routing group that is the whole batch, wherever its tokens lie.
    "expert_choice": dataclasses.replace(
        MODEL,
        block_pattern=("moe",),
        moe=MoEConfig(num_experts=8, hidden=16, router=CHOSEN_BY_EXPERTS, routing_group=0),
    ),
}


# MoMa: each modality has experts of its own, which choose their tokens.
MOE["moma"] = dataclasses.replace(
    MOE["expert_choice"],
    moe=dataclasses.replace(
        MOE["expert_choice"].moe, allowed=((0, 1, 2, 3), (4, 5, 6, 7)), causal_router=True
    ),
)
KINDS = {
    "mot": MODEL,
    **MOE,
    # Two rows compete, wherever they lie.
    "mod": dataclasses.replace(
        MODEL, block_pattern=("mod",), depth=DepthConfig(capacity=0.5, group=2)
    ),
    "mor": dataclasses.replace(
        MODEL,
        block_pattern=("recursive",),
        depth=DepthConfig(gate="sigmoid", branch="whole"),
        recursion=RecursionConfig(steps=2, router="expert", share_kv=True),
    ),
    # Each token has its number of steps, whose bias no loss moves.
    "mor_token": dataclasses.replace(
        MODEL,
        block_pattern=("recursive",),
        recursion=RecursionConfig(
            steps=2,
            router="token",
            room=1.2,
            share_kv=True,
            update_kv=True,
            balance=BalanceConfig("sign"),
        ),
    ),
}


def test_minus_one_takes_the_devices_that_are_left():
    assert mesh_shape(MeshConfig(data=-1, fsdp=2), 8) == (4, 2, 1, 1, 1)
    assert mesh_shape(MeshConfig(data=2, fsdp=-1), 8) == (2, 4, 1, 1, 1)


@pytest.mark.parametrize(
    "mesh, optim, message",
    [
        ({"data": 3}, {}, "mesh.data=3: makes 3 device"),
        ({"data": -1, "fsdp": 3}, {}, "mesh.data=-1: the other axes need 3 devices"),
        ({"data": 1}, {}, "mesh: makes 1 device"),
        ({"data": -1}, {"accumulation_steps": 2}, "data.batch_size=8 / .*=2: 4 rows do not divide"),
        ({"data": 1, "tensor": 8}, {}, "mesh.tensor=8: does not divide model.num_heads=4"),
        (
            {"data": 1, "sequence": 8},
            {},
            "mesh.sequence=8: does not divide data.sequence_length=12",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_names_the_field(mesh, optim, message):
    config = Config(
        model=MODEL,
        mesh=MeshConfig(**mesh),
        optim=OptimConfig(**optim),
        data=DataConfig(sequence_length=12),
    )
    with pytest.raises(UserError, match=message):
        check_mesh(config, 8)


def test_fsdp_has_to_divide_the_width():
    model = dataclasses.replace(MODEL, d_model=36, num_heads=2)
    with pytest.raises(UserError, match="mesh.fsdp=8: does not divide model.d_model=36"):
        check_mesh(Config(model=model, mesh=MeshConfig(data=1, fsdp=8)), 8)


def test_a_slice_that_the_axes_do_not_follow_is_cut(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("Failed to find assignment for logical_axis_index 1 of size 64")

    config = MeshConfig(data=2, fsdp=4)
    usual = make_mesh(config, jax.devices()[:8])
    monkeypatch.setattr(jax, "make_mesh", refuse)
    assert make_mesh(config, jax.devices()[:8]) == usual


def batch_of(rows=8, length=12):
    rng = np.random.default_rng(0)
    ids = lambda: rng.integers(16, 64, (rows, length)).astype(np.int32)
    return {
        "tokens": ids(),
        "targets": ids(),
        # Devices differ in how many tokens of each modality they hold; one holds no image.
        "modality": (rng.random((rows, length)) < np.linspace(0, 0.9, rows)[:, None]).astype(
            np.int32
        ),
        "segments": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "weights": (rng.random((rows, length)) < 0.8).astype(np.float32),
    }


def gradients_on(config: DecoderConfig, mesh_config: MeshConfig, devices):
    """Loss and gradients of one batch, and the parameters' shards, on a mesh."""
    model = build_decoder(config)
    objective = Objective(next_token(NextTokenConfig(), config))
    objective = with_depth(with_routing(objective, config), config)

    def loss(params, batch):
        outputs = model.apply({"params": params}, batch, train=True)
        return objective(outputs, batch).total()

    with jax.enable_x64(True):
        mesh = make_mesh(mesh_config, devices)
        batch = batch_of()
        boxed = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
        shardings = state_shardings(mesh, boxed)
        with jax.set_mesh(mesh):
            init = jax.jit(
                lambda key: meta.unbox(model.init(key, batch)["params"]), out_shardings=shardings
            )
            params = init(jax.random.key(0))
            batch = jax.device_put(batch, batch_sharding(mesh))
            value, gradients = jax.jit(jax.value_and_grad(loss))(params, batch)
        return float(value), jax.device_get(gradients), params


MESHES = {
    "data": MeshConfig(data=8),
    "fsdp x expert": MeshConfig(data=1, fsdp=2, expert=4),
    "data x expert x tensor": MeshConfig(data=2, expert=2, tensor=2),
    "expert": MeshConfig(data=1, expert=8),
    "data x sequence": MeshConfig(data=4, sequence=2),
    "fsdp x tensor x sequence": MeshConfig(data=1, fsdp=2, tensor=2, sequence=2),
}
# What each axis splits of the parameters that are compared below.
SPLIT_BY = {"mot": ("fsdp", "tensor"), "moe": ("fsdp", "expert", "tensor")}


@functools.cache
def on_one_device(kind):
    return gradients_on(KINDS[kind], MeshConfig(data=1), jax.devices()[:1])[:2]


def check_equal_to_one_device(kind, mesh, **moe):
    value, gradients = on_one_device(kind)
    config = KINDS[kind]
    if moe:
        config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, **moe))
    other_value, other, params = gradients_on(config, mesh, jax.devices())
    assert other_value == pytest.approx(value, rel=1e-12)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), gradients, other
    )
    name, split_by = ("wi_mdf", SPLIT_BY["mot"])
    if config.moe.num_experts:
        name, split_by = ("wi_edf", SPLIT_BY["moe"])
    leaves = jax.tree_util.tree_leaves_with_path(params)
    (wi,) = (leaf for path, leaf in leaves if path[-1].key == name)
    shards = math.prod(getattr(mesh, axis) for axis in split_by)
    assert wi.addressable_shards[0].data.size == wi.size // shards


@pytest.mark.parametrize(
    "kind, mesh, moe",
    [
        ("mot", "fsdp x tensor x sequence", {}),
        ("mod", "fsdp x tensor x sequence", {}),
        ("top_k", "data x expert x tensor", {"exchange": "ring", "exchange_chunks": 2}),
    ],
)
def test_eight_devices_equal_one(kind, mesh, moe):
    check_equal_to_one_device(kind, MESHES[mesh], **moe)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_mesh_and_exchange_equals_one_device(kind, mesh):
    exchanges = ("fsdp", "ring", "all_to_all", "ragged")
    if not KINDS[kind].moe.num_experts:
        check_equal_to_one_device(kind, MESHES[mesh])
    elif MESHES[mesh].expert == 1:
        check_equal_to_one_device(kind, MESHES[mesh], exchange="auto")
    else:
        for exchange in exchanges:
            check_equal_to_one_device(kind, MESHES[mesh], exchange=exchange)


def jaxpr_on_eight(config, mesh):
    """The program of a forward pass in training, as text; nothing is compiled."""
    model = build_decoder(config)
    forward = lambda params: model.apply({"params": params}, batch_of(), train=True).logits
    with jax.enable_x64(True), jax.set_mesh(make_mesh(mesh)):
        shapes = jax.eval_shape(model.init, jax.random.key(0), batch_of())["params"]
        return str(jax.make_jaxpr(forward)(meta.unbox(shapes)))


def test_rows_of_a_device_are_bounded_by_its_own_experts():
    """Experts choose from the whole batch: 96 tokens of all, of which one expert lies here."""
    config = KINDS["expert_choice"]
    moe = dataclasses.replace(config.moe, exchange="ring")
    program = jaxpr_on_eight(dataclasses.replace(config, moe=moe), MESHES["expert"])
    assert "reduce_scatter" in program
    # The rows that an expert MLP is traced with: without the bound it has one for each of the eight
    # columns of a token.
    assert set(re.findall(r"grouped_mlp_forward_(\d+)x", program)) == {"96"}


def test_tokens_are_exchanged_in_chunks():
    config = KINDS["top_k"]
    for chunks in (1, 2):
        moe = dataclasses.replace(config.moe, exchange="ring", exchange_chunks=chunks)
        program = jaxpr_on_eight(dataclasses.replace(config, moe=moe), MESHES["expert"])
        assert program.count("= reduce_scatter[") == chunks


def test_attention_of_a_model_goes_by_blocks_of_queries():
    scans = [
        jaxpr_on_eight(dataclasses.replace(MODEL, attention_block=block), MESHES["data"]).count(
            "= scan["
        )
        for block in (0, 4)
    ]
    assert scans[1] == scans[0] + 1


def test_decoding_on_a_mesh_equals_decoding_on_one_device():
    """One row, then one token: what does not divide over an axis lies whole on it."""
    config = KINDS["top_k"]
    model = build_decoder(config)
    batch = {name: x[:1] for name, x in batch_of().items()}
    rest = {name: x[:, 8:9] for name, x in batch.items()}
    first = {name: x[:, :8] for name, x in batch.items()}

    def last_logits(params):
        rows = model.apply({"params": params}, first).rows
        cache = write_rows(init_cache(model, params, 1, 8), rows, jnp.full((1,), 8))
        return model.apply({"params": params}, rest, cache=cache.rows).logits

    with jax.enable_x64(True):
        boxed = jax.jit(model.init)(jax.random.key(0), batch)["params"]
        params = meta.unbox(boxed)
        expected = jax.jit(last_logits)(params)
        mesh = make_mesh(MESHES["data x expert x tensor"])
        with jax.set_mesh(mesh):
            spread = jax.device_put(params, state_shardings(mesh, boxed))
            got = jax.jit(last_logits)(spread)
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_experts_have_to_divide_over_their_devices():
    model = dataclasses.replace(MOE["top_k"], moe=MoEConfig(num_experts=6))
    with pytest.raises(UserError, match="mesh.expert=4: does not divide model.moe.num_experts=6"):
        check_mesh(Config(model=model, mesh=MeshConfig(data=2, expert=4)), 8)
