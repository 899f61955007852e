"""Expert caching: at each noise level of a sampler a dense model says what the model says."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from moejax.analysis.jaxpr_flops import count_flops
from moejax.cli.main import main
from moejax.config import load_config
from moejax.errors import UserError
from moejax.generate.cached_experts import cached
from moejax.generate.denoiser import Drawing, PictureSampler, draw_pictures
from moejax.models import build_model
from moejax.ops.diffusion import network_input
from moejax.ops.diffusion_times import time_grid
from moejax.train.loop import train
from moejax.train.workdir import write_record

pytestmark = pytest.mark.usefixtures("quick_compiles")
STEPS, LAYERS, HIDDEN = 10, 2, 12
TINY = {
    "data.source": "builtin:emoji32",
    "data.image_size": 32,
    "model.image_size": 32,
    "model.patch_size": 16,
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.num_layers": LAYERS,
    "model.ffn_hidden": (16,),
    "model.moe.hidden": HIDDEN,
}
TEXT = {**TINY, "data.sequence_length": 8, "model.text_length": 8}


def sampler_of(name: str, changes: dict) -> PictureSampler:
    """With random parameters: each noise level has experts or weights of its own."""
    config = load_config(name, changes)
    model = build_model(config)
    batch = {"labels": np.zeros(1, int), "tokens": np.zeros((1, model.config.text_length), int)}
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))["params"]
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(scale=0.25, size=leaf.shape).astype(leaf.dtype)
    drawing = Drawing(steps=STEPS, guidance=2.0)
    return PictureSampler(model, jax.tree.map(draw, shapes), config.objective, drawing=drawing)


@pytest.fixture(scope="module")
def live(quick_compiles) -> PictureSampler:
    return sampler_of("mode", TINY)


@pytest.fixture(scope="module")
def dense(live) -> PictureSampler:
    return cached(live)


def batch_of(sampler: PictureSampler) -> dict:
    """Three noisy pictures, of one of which nothing is said."""
    said = sampler.conditions([None] * 3)
    said["labels"][:2] = 1, 4
    if "tokens" in said:
        said["tokens"][:2, :4] = [[1, 9, 8, 2], [1, 7, 2, 0]]
    return {"x_t": np.float32(np.random.default_rng(1).normal(size=(3, 32, 32, 3))), **said}


def predictions(sampler: PictureSampler, told_n: np.ndarray) -> np.ndarray:
    """[n, b, h, w, z], of the same pictures at each level."""
    batch = batch_of(sampler)

    @jax.jit
    def run(params, told):
        given = {**batch, "times": jnp.full(3, told)}
        return sampler.model.apply({"params": params}, given).prediction

    return np.stack([run(sampler.params, told) for told in told_n])


def levels_of(sampler: PictureSampler) -> np.ndarray:
    """The numbers by which the network is told of the grid's times."""
    times = time_grid(sampler.diffusion, STEPS)[:-1]
    return np.asarray(network_input(sampler.diffusion, jnp.asarray(times), jnp.asarray(times))[1])


# The second has a tower of texts that is no "swiglu", and another process.
@pytest.mark.parametrize(
    "name, changes",
    [("mode", TINY), ("raphael:text", {**TEXT, "model.moe.activation": "swiglu"})],
)
def test_cached_is_live_at_every_level_of_the_grid(name, changes):
    live = sampler_of(name, changes)
    dense = cached(live)
    told = levels_of(live)
    np.testing.assert_allclose(dense.params["levels_n"], told, rtol=1e-6)
    expected = predictions(live, told)
    got = predictions(dense, told)
    size = np.abs(expected).max()
    np.testing.assert_allclose(got / size, expected / size, atol=1e-5)
    # The experts of the level beside it say something else.
    beside = {**dense.params, "levels_n": np.roll(dense.params["levels_n"], 1)}
    wrong = predictions(dataclasses.replace(dense, params=beside), told)
    assert (np.abs(wrong - expected).max(axis=(1, 2, 3, 4)) > 1e-4 * size).all()


@pytest.mark.parametrize("name", ["ddim", "heun"])
def test_pictures_are_those_of_the_live_model(live, dense, name):
    """Guided and not, and where the second call of a step is at the next level."""
    drawing = dataclasses.replace(live.drawing, sampler=name)
    live, dense = (dataclasses.replace(each, drawing=drawing) for each in (live, dense))
    expected, got = (
        draw_pictures(each, [0, 3, None], guidance=[1.0, 2.0, 3.0], seed=1).pictures.astype(int)
        for each in (live, dense)
    )
    assert np.ptp(expected) > 50
    assert np.abs(got - expected).max() <= 1


def test_nothing_is_routed_any_more(live, dense):
    """A level has its two experts' parameters, and their FLOPs without the router's."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(dense.params)]
    assert not any(word in name for name in names for word in ("moe", "router", "expert"))
    ffn = dense.params["dense"]["stack"]["segment_0"]["block_0"]["ffn"]
    assert ffn["wi_mdf"].shape == (STEPS, LAYERS, 1, 16, 2 * 2 * HIDDEN)
    assert ffn["wo_mfd"].shape == (STEPS, LAYERS, 1, 2 * HIDDEN, 16)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    router = live.params["stack"]["segment_0"]["block_0"]["moe"]["router"]
    others = LAYERS * 2 * 3 * 16 * HIDDEN
    of_level = count(dense.params["dense"]) - count(ffn) * (STEPS - 1) // STEPS
    assert of_level == count(live.params) - count(router) - others
    batch = {**batch_of(live), "times": np.zeros(3, np.float32)}
    flops, dense_flops = (
        count_flops(lambda params, each=each: each.model.apply({"params": params}, batch), params)
        for each, params in ((live, live.params), (dense, dense.params))
    )
    # Each of 3 pictures' 4 patches met the router's two matrices.
    assert flops.nominal - dense_flops.nominal >= 2 * 3 * 4 * count(router)


def test_another_grid_needs_another_cache(dense):
    for drawing in (Drawing(steps=STEPS + 1), Drawing(steps=STEPS, spacing="exponential")):
        with pytest.raises(UserError, match="drawing: has other times than those"):
            draw_pictures(dataclasses.replace(dense, drawing=drawing), [0])


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("dit", {}, "the model has no experts"),
        ("dit_moe", {}, "here model.moe.score.input=token, not noise"),
        ("mode", {"model.moe.score.input": "condition"}, "model.moe.score.input=condition, not"),
        ("ec_dit", {"model.moe.score.input": "noise"}, "expert_choice compares tokens"),
        (
            "mode",
            {"model.moe.capacity": "order", "model.moe.eval_capacity_factor": 1.0},
            "model.moe.eval_capacity_factor=1 drops some of them",
        ),
        ("quickstart", {}, "is of a diffusion model of pictures, and has no effect on"),
    ],
)
def test_routing_by_more_than_the_noise_is_refused(tmp_path, capsys, name, changes, message):
    """Before anything is loaded: there is no checkpoint here."""
    write_record(tmp_path, load_config(name, changes), {})
    assert main(["sample", "--workdir", str(tmp_path), "--cache-experts"]) == 2
    error = capsys.readouterr().err
    assert "--cache-experts: " in error and message in error and error.count("\n") == 1


@pytest.mark.slow
def test_by_command(tmp_path, capsys):
    """The same pictures, here of a run on a mesh; and the command says that they were cached."""
    run = {"train.steps": 1, "train.checkpoint_every": 1, "data.batch_size": 8}
    plain = {"eval.metrics": (), "objective.augment.flip": "none", "mesh.fsdp": 2}
    train(load_config("mode", {**TINY, **run, **plain}), tmp_path)
    capsys.readouterr()
    common = ["sample", "--workdir", str(tmp_path), "--mode", "class2image", "--n", "10", "--json"]
    documents = []
    for flags in ([], ["--cache-experts"]):
        assert main([*common, "--denoise-steps", "3", *flags]) == 0
        documents.append(json.loads(capsys.readouterr().out))
    assert [document["cache_experts"] for document in documents] == [False, True]
    routed, dense = [
        [row["samples"][0]["nearest"]["distance"] for row in each["modes"]["class2image"]["rows"]]
        for each in documents
    ]
    np.testing.assert_allclose(dense, routed, atol=0.05)


def test_what_is_said_may_not_choose():
    """Pictures of nothing have experts of their own: two rows of one level are not alike."""
    own = {"model.modalities": ("image", "silent"), "model.moe.allowed": ((0, 1), (2, 3))}
    with pytest.raises(UserError, match="model.moe.score.input: tokens chose differently"):
        cached(sampler_of("mode", {**TINY, **own}))
