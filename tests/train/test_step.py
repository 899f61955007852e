"""One step: accumulation, the guard, the moving average, the mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.schema import DecoderConfig, MeshConfig
from moejax.train.evaluate import put_batch
from moejax.train.setup import prepare
from moejax.train.step import make_loss, moving_average

from .conftest import BigramConfig, make_config


def first_gradients(setup):
    """(loss, gradients) of the first batch at the initial parameters, as numpy."""
    accumulation = setup.config.optim.accumulation_steps
    loss = make_loss(setup.model, setup.objective, accumulation, setup.mesh)
    grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    state = setup.recipe.create()
    with jax.set_mesh(setup.mesh):
        batch = put_batch(setup.pipeline.batch(0), setup.mesh)
        (value, _), grads = grad(state.params, batch, jax.random.key(0), state.step)
    return float(value), jax.device_get(grads)


def assert_close(tree, reference, tolerance):
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(reference))
    for here, there in zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(here, there, rtol=0, atol=tolerance * largest)


DECODER = DecoderConfig(vocab_size=284, num_layers=1, d_model=16, num_heads=2, ffn_hidden=(16,))


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_equals_the_big_batch(fake_data, accumulation):
    """Also with microbatches of unequal numbers of targets of each modality."""
    one = jax.devices()[:1]
    config = dataclasses.replace(make_config(optim__accumulation_steps=accumulation), model=DECODER)
    big = dataclasses.replace(config, optim=dataclasses.replace(config.optim, accumulation_steps=1))
    loss, grads = first_gradients(prepare(config, one))
    big_loss, big_grads = first_gradients(prepare(big, one))
    assert loss == pytest.approx(big_loss, rel=1e-6)
    assert_close(grads, big_grads, 1e-5)


def test_eight_devices_equal_one(fake_data):
    """Data and fsdp parallel, with accumulation: the same gradients as on one device."""
    config = make_config(optim__accumulation_steps=2, data__batch_size=16, model__dropout=0.0)
    loss, grads = first_gradients(prepare(config, jax.devices()[:1]))
    sharded = dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=4))
    setup = prepare(sharded)
    spec = setup.recipe.shardings.opt_state[1][0].mu["embedding_vd"].spec
    assert tuple(spec) == ("tensor", "fsdp"), "moments are sharded like their parameter"
    many_loss, many_grads = first_gradients(setup)
    assert many_loss == pytest.approx(loss, rel=1e-6)
    assert_close(many_grads, grads, 1e-5)


def test_guard_skips_the_whole_step_and_counts(fake_data):
    fake_data.broken = frozenset({1, 2})
    setup = prepare(make_config(optim__ema_decay=0.9), jax.devices()[:1])
    step = setup.train_step()
    state, seen = setup.recipe.create(), []
    with jax.set_mesh(setup.mesh):
        for number in range(4):
            before = jax.device_get(state)
            state, metrics = step(state, put_batch(setup.pipeline.batch(number), setup.mesh))
            after = jax.device_get(state)
            seen.append((int(after.step), int(after.skipped), int(after.skipped_in_row)))
            same = [
                jax.tree.all(jax.tree.map(np.array_equal, getattr(before, k), getattr(after, k)))
                for k in ("params", "opt_state", "ema")
            ]
            assert same == [number in (1, 2)] * 3, number
            assert np.isfinite(jax.tree.leaves(jax.device_get(metrics.losses))).all()
            assert float(metrics.steps) == (number not in (1, 2))
    assert seen == [(1, 0, 0), (2, 1, 1), (3, 2, 2), (4, 2, 0)]
    # Two updates were made, so the fourth step used the rate of the second update.
    expected = setup.recipe.optimizer.schedule(1)
    assert float(metrics.learning_rate) == pytest.approx(float(expected))


def test_moving_average_ramps_up_to_its_decay():
    old, new = {"w": jnp.full((2,), 1.0)}, {"w": jnp.full((2,), 3.0)}
    # n = 0: min(0.9, 1/10) = 0.1.
    first = moving_average(old, new, 0.9, jnp.int32(0))["w"]
    np.testing.assert_allclose(first, 0.1 * 1 + 0.9 * 3, rtol=1e-6)
    # n = 1000: min(0.9, 1001/1010) = 0.9.
    late = moving_average(old, new, 0.9, jnp.int32(1000))["w"]
    np.testing.assert_allclose(late, 0.9 * 1 + 0.1 * 3, rtol=1e-6)


def test_a_moving_average_without_decay_is_the_new_parameters():
    rng = np.random.default_rng(0)
    old, new = ({"w": jnp.asarray(rng.normal(size=5), jnp.float32)} for _ in range(2))
    for updates in (0, 1000):
        copied = moving_average(old, new, 0.0, jnp.int32(updates))["w"]
        np.testing.assert_array_equal(copied, new["w"])


def test_steps_draw_different_dropout_from_one_key(fake_data):
    """The key in the state never changes; the step is folded in."""
    config = dataclasses.replace(make_config(), model=BigramConfig(dropout=0.5))
    setup = prepare(config, jax.devices()[:1])
    step = setup.train_step()
    state = setup.recipe.create()
    key = jax.device_get(state.rng)
    batch = setup.pipeline.batch(0)
    losses = []
    with jax.set_mesh(setup.mesh):
        for number in range(2):
            fresh = setup.recipe.create().replace(step=jnp.int32(number))
            after, metrics = step(fresh, put_batch(batch, setup.mesh))
            losses.append(float(metrics.losses.total()))
    assert losses[0] != losses[1]
    np.testing.assert_array_equal(jax.device_get(after.rng), key)
