"""The Python API of notebooks, from a config to samples."""

import flax.core.meta
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from moejax.generate.api import sample_images

TINY = {
    "model.num_layers": 1,
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.ffn_hidden": (32,),
    "data.batch_size": 8,
    "train.steps": 2,
    "eval.batches": 1,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    config = moejax.load_config("quickstart:dense", TINY)
    workdir = tmp_path_factory.mktemp("api") / "run"
    values = moejax.train(config, workdir)
    return config, workdir, values


def test_load_evaluate_and_apply(trained):
    config, workdir, values = trained
    run = moejax.load(workdir)
    assert (run.step, run.config.model) == (2, config.model)
    found = run.evaluate()
    assert found["image/loss"] == pytest.approx(values["eval/image/loss"], rel=1e-6)
    assert run.evaluate("test")["image/loss"] != found["image/loss"]
    batch = jax.tree.map(jnp.asarray, run.train_pipeline().batch(0))
    outputs = run.apply(batch)
    assert outputs.logits.shape == (*batch["tokens"].shape, config.model.vocab_size)
    losses = run.objective(outputs, batch, jax.random.key(0))
    assert set(losses.means()) >= {"token", "text", "image"}


def test_sampler_draws(trained):
    _, workdir, _ = trained
    images = sample_images(moejax.load(workdir).sampler(), ["red heart"])
    assert (images.shape, images.dtype) == ((1, 32, 32, 3), np.uint8)


def test_build_makes_a_fresh_model(trained):
    config, workdir, _ = trained
    model, objective = moejax.build(config)
    batch = jax.tree.map(jnp.asarray, moejax.load(workdir).train_pipeline().batch(0))
    params = flax.core.meta.unbox(jax.jit(model.init)(jax.random.key(0), batch)["params"])
    outputs = jax.jit(model.apply)({"params": params}, batch)
    # A fresh model knows nothing: its loss is near that of a guess among the whole vocabulary.
    loss = objective(outputs, batch, jax.random.key(1)).means()["token"]
    assert loss == pytest.approx(np.log(config.model.vocab_size), rel=0.2)
