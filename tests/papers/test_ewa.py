"""EWA: experts that move towards each other, and the dense model that they become."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.api import load
from moejax.cli.main import main
from moejax.config import load_config
from moejax.errors import UserError
from moejax.parallel.mesh import batch_sharding
from moejax.surgery.dense import dense_config
from moejax.train.checkpoint import Checkpoints
from moejax.train.setup import prepare_model
from moejax.train.sharing import make_sharing, share_experts, share_rate
from moejax.train.workdir import write_record

pytestmark = pytest.mark.usefixtures("quick_compiles")
E = 4
TINY = {
    "model.image_size": 8,
    "model.num_classes": 5,
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.ffn_hidden": (24,),
    "model.kernel_backend": "reference",
    "data.image_size": 8,
    "data.batch_size": 4,
    "eval.metrics": (),
    "mesh.data": 1,
    "train.steps": 3,
}
BATCH = {
    "images": np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8),
    "labels": np.arange(4, dtype=np.int32),
    "index": np.arange(4, dtype=np.int32),
    "mirror": np.zeros(4, bool),
    "weights": np.ones(4, np.float32),
}


def test_sharing_by_hand():
    weights = np.random.default_rng(0).normal(size=(2, E, 3)).astype(np.float32)
    shared = np.asarray(share_experts(jnp.asarray(weights), 0.3, 1))
    for e in range(E):
        others = np.delete(weights, e, axis=1).mean(axis=1)
        np.testing.assert_allclose(shared[:, e], 0.7 * weights[:, e] + 0.3 * others, atol=1e-6)
    np.testing.assert_allclose(shared.mean(axis=1), weights.mean(axis=1), atol=1e-6)
    equal = np.asarray(share_experts(jnp.asarray(weights), (E - 1) / E, 1))
    mean = np.broadcast_to(weights.mean(axis=1, keepdims=True), weights.shape)
    np.testing.assert_allclose(equal, mean, atol=1e-6)
    np.testing.assert_array_equal(share_experts(jnp.asarray(weights), 0.0, 1), weights)
    np.testing.assert_array_equal(
        share_experts(jnp.asarray(weights[:, :1]), 0.3, 1), weights[:, :1]
    )


def test_the_rate_begins_at_0():
    rates = [float(share_rate(0.3, 4, jnp.int32(i))) for i in (0, 1, 2, 4, 9)]
    assert rates == pytest.approx([0, 0.075, 0.15, 0.3, 0.3])


def test_only_experts_that_are_trained_are_shared():
    box = lambda *names: nn.LogicallyPartitioned(jnp.asarray([[0.0, 1.0]] * 2), names)
    boxed = {
        "a": {"wi_edf": box("expert", "embed")},
        "b": {"wi_edf": box("expert", "embed")},
        "router": box("modality", "embed"),
    }
    bare = jax.tree.map(lambda x: jnp.asarray([[0.0, 1.0], [4.0, 3.0]]), nn.unbox(boxed))
    fields = {"optim.share_rate": 0.5, "optim.share_steps": 1, "optim.freeze": ("^b/",)}
    moved = make_sharing(load_config("ewa", fields), boxed)(bare, jnp.int32(1))
    np.testing.assert_array_equal(moved["a"]["wi_edf"], [[2, 2], [2, 2]])
    for name in ("b", "router"):
        jax.tree.map(np.testing.assert_array_equal, moved[name], bare[name])
    with pytest.raises(UserError, match="optim.share_rate: no parameter that is trained has exp"):
        make_sharing(load_config("ewa", fields), {"router": boxed["router"]})


def experts_of(params) -> np.ndarray:
    """[l, e, d, 2f]."""
    return np.asarray(params["stack"]["segment_0"]["block_1"]["moe"]["experts"]["wi_edf"])


@pytest.fixture(scope="module")
def trained():
    """(config, setup, states after two and after three steps), the last with rate (E - 1) / E.

    In the first step nothing but the classes learns: their weights begin as 0.
    """
    fields = {"optim.share_rate": (E - 1) / E, "optim.share_steps": 2}
    config = load_config("ewa", {**TINY, **fields})
    setup = prepare_model(config, jax.devices()[:1], BATCH)
    states, step = [], setup.train_step()
    with jax.set_mesh(setup.mesh):
        state = setup.recipe.create()
        begin = experts_of(state.params)
        np.testing.assert_array_equal(begin, np.broadcast_to(begin[:, :1], begin.shape))
        for _ in range(3):
            batch = jax.device_put(BATCH, batch_sharding(setup.mesh))
            state, _ = step(state, batch)
            states.append(jax.device_get(state))
    return config, setup, states[1:]


def spread(experts) -> float:
    return float(np.abs(experts - experts.mean(axis=1, keepdims=True)).max())


def test_experts_are_shared_after_each_step(trained):
    """Each learned from its own patches in the second step; in the third they became one."""
    _, _, (apart, one) = trained
    assert spread(experts_of(apart.params)) > 1e-5
    assert spread(experts_of(one.params)) < 1e-7
    assert np.abs(experts_of(one.params) - experts_of(apart.params)).max() > 1e-5


def features(model, params):
    apply = jax.jit(lambda params: model.apply({"params": params}, BATCH))
    return jax.device_get(apply(params)).patches


@pytest.mark.parametrize("number", [0, 1])
def test_a_run_becomes_a_dense_one_by_command(trained, number, tmp_path, capsys):
    """Of equal experts (after the third step) with their outputs; of others with their mean."""
    config, setup, states = trained
    state = states[number]
    write_record(tmp_path / "ewa", config, {"data_version": "d1"})
    checkpoints = Checkpoints(tmp_path / "ewa/checkpoints")
    checkpoints.save(number + 1, state, {}, setup.mesh)
    checkpoints.close()
    words = ["--workdir", str(tmp_path / "ewa"), "--to", str(tmp_path / "dense")]
    assert main(["convert", "dense", *words]) == 0
    record = json.loads((tmp_path / "dense/config.json").read_text())
    assert record["made_with"]["converted_from"] == f"{tmp_path / 'ewa'}@{number + 1}"

    dense = load(tmp_path / "dense")
    assert dense.step == number + 1 and dense.data_version == "d1"
    assert set(dense.config.model.block_kinds()) == {"dense"}
    size = sum(leaf.size for leaf in jax.tree.leaves(dense.params))
    assert dense.config.about.total_params == size
    ffn = np.asarray(dense.params["stack"]["segment_0"]["block_0"]["ffn"]["wi_mdf"])
    mean = experts_of(state.params).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(ffn[1::2], mean, atol=1e-6)
    others = np.asarray(state.params["stack"]["segment_0"]["block_0"]["ffn"]["wi_mdf"])
    np.testing.assert_array_equal(ffn[0::2], others)

    difference = features(dense.model, dense.params) - features(setup.model, state.params)
    if number:
        np.testing.assert_allclose(difference, 0, atol=1e-5)
    else:
        assert np.abs(difference).max() > 1e-5

    capsys.readouterr()
    assert main(["convert", "dense", *words]) == 2
    assert "is there already; name a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("vit", {}, "model.block_pattern: has no block 'moe'"),
        ("vmoe", {}, "model.moe.router.name: the weights of router 'top_k' do not sum to 1"),
        ("ewa", {"model.moe.shared_hidden": 8}, "model.moe.shared_hidden: only a layer of plain"),
        ("ewa", {"model.moe.hidden": 8}, "model.moe.hidden: the dense layers beside the experts"),
        ("ewa", {"model.block_pattern": ("mod", "moe")}, r"block_pattern: blocks \['mod'\] cannot"),
    ],
)
def test_what_cannot_be_averaged_is_refused(name, fields, message):
    with pytest.raises(UserError, match=message):
        dense_config(load_config(name, fields))


def test_mistakes_of_the_command(capsys):
    assert main(["convert", "dens"]) == 2
    assert "no kind 'dens'; did you mean 'dense'?" in capsys.readouterr().err
    assert main(["convert", "dense", "--workdir", "runs/none"]) == 2
    assert "--to: name a folder" in capsys.readouterr().err
