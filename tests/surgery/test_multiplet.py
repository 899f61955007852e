"""CLIP-MoE's upcycling: clusters, stages that train MLPs alone, experts made of the stages."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.core import meta

from moejax.cli.main import main
from moejax.config import load_config
from moejax.errors import UserError
from moejax.models import build_model
from moejax.parallel.mesh import batch_sharding
from moejax.surgery.layers import as_stack, layers_of
from moejax.surgery.multiplet import assemble, cluster_pairs
from moejax.train.leaves import named_leaves
from moejax.train.load import load
from moejax.train.setup import prepare_model
from tests.models.small_vit import SMALL_FIELDS

pytestmark = pytest.mark.usefixtures("quick_compiles")
TINY = {
    **SMALL_FIELDS,
    "model.vocab_size": 20,
    "model.text_length": 6,
    "data.sequence_length": 6,
}


def make_batch() -> dict:
    rng = np.random.default_rng(0)
    rows = np.arange(8, dtype=np.int32)
    return {
        "images": rng.integers(0, 256, (8, 8, 8, 3), np.uint8),
        "tokens": rng.integers(1, 20, (8, 6)).astype(np.int32),
        "mirror": rows > 8,
        "family": rows,
        "cluster": rows // 4,
        "weights": np.ones(8, np.float32),
    }


def make(name, **more):
    """(config.model, model, random parameters)"""
    config = load_config(name, {**TINY, **more})
    model = build_model(config)
    boxed = jax.eval_shape(model.init, jax.random.key(0), make_batch())
    rng = np.random.default_rng(len(name))
    draw = lambda leaf: np.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype)
    return config.model, model, jax.tree.map(draw, meta.unbox(boxed)["params"])


def run(model, params):
    batch = make_batch()
    return jax.device_get(jax.jit(lambda p: model.apply({"params": p}, batch))(params))


def other_ffn(params, seed):
    """The parameters with other feed-forward layers."""
    rng = np.random.default_rng(seed)

    def change(path, leaf):
        names = [getattr(key, "key", "") for key in path]
        return rng.normal(size=leaf.shape).astype(leaf.dtype) if "ffn" in names else leaf

    return jax.tree_util.tree_map_with_path(change, params)


def test_equal_stages_are_their_base():
    """Four times the same experts, of which each token has two whose weights sum to 1."""
    dense, base, params = make("clip")
    config, model, drawn = make("clip_moe")
    assert config.moe.num_experts == 4 and config.moe.top_k == 2
    made = assemble(config, drawn, dense, [params] * 4)
    expected, got = run(base, params), run(model, made)
    np.testing.assert_allclose(got.image, expected.image, atol=1e-5)
    np.testing.assert_allclose(got.text, expected.text, atol=1e-5)
    assert got.scale == expected.scale
    # Stages that differ are another model.
    stages = [params, *(other_ffn(params, seed) for seed in range(3))]
    other = run(model, assemble(config, drawn, dense, stages))
    assert np.abs(other.image - expected.image).max() > 1e-2
    # Weights that do not sum to 1 are not those of the base.
    _, plain, _ = make("clip_moe", **{"model.moe.router.options.renormalise": False})
    assert np.abs(run(plain, made).image - expected.image).max() > 1e-2


def test_experts_are_the_stages_and_routers_are_drawn():
    dense, _, params = make("clip")
    config, _, drawn = make("clip_moe")
    stages = [other_ffn(params, seed) for seed in range(4)]
    made = assemble(config, drawn, dense, stages)
    for tower in ("image", "text"):
        block = made[tower]["stack"]["segment_0"]["block_0"]
        experts = block["moe"]["experts"]
        for i, stage in enumerate(stages):
            ffn = stage[tower]["stack"]["segment_0"]["block_0"]["ffn"]
            np.testing.assert_array_equal(experts["wi_edf"][:, i], ffn["wi_mdf"][:, 0])
            np.testing.assert_array_equal(experts["wo_efd"][:, i], ffn["wo_mfd"][:, 0])
        fresh = drawn[tower]["stack"]["segment_0"]["block_0"]["moe"]["router"]
        jax.tree.map(np.testing.assert_array_equal, block["moe"]["router"], fresh)
        attention = params[tower]["stack"]["segment_0"]["block_0"]["attention"]
        jax.tree.map(np.testing.assert_array_equal, block["attention"], attention)
    jax.tree.map(np.testing.assert_array_equal, made["head"], params["head"])


def test_layers_in_order_whatever_the_segments():
    config = dataclasses.replace(
        load_config("clip_moe", TINY).model,
        num_layers=5,
        block_pattern=("dense", "untied"),
        last_blocks=("moe",),
    )
    segment = lambda first, count: {"w": np.arange(first, first + 2 * count, 2.0)}
    stack = {
        "segment_0": {"block_0": segment(0, 2), "block_1": segment(1, 2)},
        "segment_1": {"block_0": {"w": np.asarray([4.0])}},
    }
    layers = layers_of(config, stack)
    assert [float(layer["w"]) for layer in layers] == [0, 1, 2, 3, 4]
    jax.tree.map(np.testing.assert_array_equal, as_stack(config, layers), stack)


def test_clusters_are_parted_further_by_each_stage():
    corners = np.asarray([[0, 0], [0, 9], [9, 0], [9, 9]], np.float32)
    image, text = np.repeat(corners[:, :1], 5, axis=0), np.repeat(corners[:, 1:], 5, axis=0)
    four = cluster_pairs(image, text, 4)
    assert [len(set(four[i : i + 5].tolist())) for i in range(0, 20, 5)] == [1] * 4
    assert sorted(set(four.tolist())) == [0, 1, 2, 3]
    # By pictures alone there are two; with the halves of before, four.
    two = cluster_pairs(image, 0 * text, 2)
    assert len(set(two.tolist())) == 2
    again = cluster_pairs(0 * image, text, 2, before=two)
    assert len({(a, b) for a, b in zip(again.tolist(), four.tolist(), strict=True)}) == 4


def trained(name, overrides):
    """(parameters before, after two steps) of a config, by their path."""
    config = load_config(name, {**TINY, "objective.augment.flip": "none", **overrides})
    setup = prepare_model(config, jax.devices()[:1])
    step = setup.train_step()
    with jax.set_mesh(setup.mesh):
        state = setup.recipe.create()
        before = jax.device_get(named_leaves(state.params))
        batch = jax.device_put(make_batch(), batch_sharding(setup.mesh))
        for _ in range(2):
            state, _ = step(state, batch)
        return before, jax.device_get(named_leaves(state.params))


def test_a_stage_trains_mlps_alone(tmp_path):
    """All else keeps its bytes."""
    clusters = {"objective.negatives": "cluster", "data.clusters": str(tmp_path / "c.npz")}
    before, after = trained("clip_moe:stage", clusters)
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == {name for name in before if "/ffn/" in name} and len(changed) == 4


def test_routers_are_all_that_is_trained_in_the_end():
    before, after = trained("clip_moe", {})
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == {name for name in before if "/router/" in name} and len(changed) == 2


@pytest.mark.slow
def test_from_a_run_to_experts_by_command(tmp_path, capsys):
    """Of one stage twice the model is the stage; what is there stays, and nothing is left half."""
    flags = [f"--config.{k}={v}" for k, v in TINY.items() if k not in ("model.vocab_size",)]
    flags += ["--config.train.steps=1", "--config.eval.metrics=()", "--config.eval.every=0"]
    stage, made = tmp_path / "stage", tmp_path / "experts"
    clusters, more = tmp_path / "c" / "one.npz", tmp_path / "two.npz"
    assert main(["train", "--config", "clip", "--workdir", str(stage), *flags]) == 0
    from_stage = ["--workdir", str(stage)]
    assert main(["convert", "clusters", *from_stage, "--to", str(clusters)]) == 0
    again = [*from_stage, "--to", str(more), "--before", str(clusters)]
    assert main(["convert", "clusters", *again]) == 0
    # The same features: no cluster is parted further.
    with np.load(clusters) as one, np.load(more) as two:
        assert one["ids"].tolist() == two["ids"].tolist() and one["clusters"].max() > 0
        np.testing.assert_array_equal(one["clusters"], two["clusters"])
    pair = ["--workdir", f"{stage},{stage}", "--to", str(made)]
    assert main(["convert", "experts", *pair]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "experts", "stage", "two.npz"]
    base, experts = load(stage), load(made)
    assert experts.config.model.moe.num_experts == 2 and experts.step == 0
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(run.params)) for run in (base, experts)]
    assert experts.config.about.total_params == sizes[1] > sizes[0]
    batch = base.train_pipeline().batch(0)
    np.testing.assert_allclose(experts.apply(batch).image, base.apply(batch).image, atol=1e-5)

    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    for command, message in (
        (["experts", *pair], "experts: is there already; name a new folder"),
        (["clusters", *again], "two.npz: is there already; name a new file"),
        (["experts", *from_stage, "--to", str(tmp_path / "x")], "--workdir: name two stages"),
        (["dense", *from_stage, "--to", "x", "--before", "y"], "--before: is for clusters"),
    ):
        assert main(["convert", *command]) == 2
        assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_mistakes():
    dense, _, params = make("clip")
    config, _, drawn = make("clip_moe")
    with pytest.raises(UserError, match="the experts do not fit: give as many stages"):
        assemble(config, drawn, dense, [params] * 3)
    with pytest.raises(UserError, match="objective.negatives: 'cluster' needs data.clusters"):
        load_config("clip", {"objective.negatives": "cluster"})
