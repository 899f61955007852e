"""Checkpoints: exact under donation, kept by age and by metric, refused in one line."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.train.checkpoint import Checkpoints, saved_steps
from moejax.train.setup import prepare

from .conftest import make_config


@pytest.fixture
def setup(fake_data):
    return prepare(make_config(optim__ema_decay=0.5))


def values(tree):
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def test_restores_what_was_saved_though_the_state_was_donated(setup, tmp_path):
    """The next step writes over the buffers while the save is still under way."""
    state = setup.recipe.create()
    sums = {"loss": jnp.float32(3.5)}
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path / "c", keep=5)
    expected = {}
    for step in range(4):
        expected[step] = values(state)
        checkpoints.save(step, state, sums, setup.mesh)
        state = overwrite(state)
        jax.block_until_ready(state)
    checkpoints.wait()
    for step, leaves in expected.items():
        restored, restored_sums = checkpoints.restore(step, setup.recipe.abstract, sums)
        for here, there in zip(values(restored), leaves, strict=True):
            np.testing.assert_array_equal(here, there)
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        assert restored.params["head_dv"].sharding == setup.recipe.shardings.params["head_dv"]
        assert float(restored_sums["loss"]) == 3.5
    ema = checkpoints.restore_eval_params(2, setup.recipe.abstract)
    whole, _ = checkpoints.restore(2, setup.recipe.abstract, sums)
    np.testing.assert_array_equal(ema["head_dv"], whole.ema["head_dv"])
    checkpoints.close()


def test_keeps_the_newest_and_the_best(setup, tmp_path):
    state = setup.recipe.create()
    losses = {1: 3.0, 2: 1.0, 3: float("nan"), 4: None, 5: 2.0, 6: 2.5}
    checkpoints = Checkpoints(tmp_path / "c", keep=2, best_metric="loss")
    for step, loss in losses.items():
        metrics = None if loss is None else {"loss": loss}
        checkpoints.save(step, state, {}, setup.mesh, metrics)
    checkpoints.close()
    assert saved_steps(tmp_path / "c") == [2, 5, 6]
    reopened = Checkpoints(tmp_path / "c", keep=2, best_metric="loss")
    assert reopened.best() == 1.0
    assert sorted(reopened.arrays(2)) == sorted(reopened.arrays(6))
    np.testing.assert_array_equal(reopened.arrays(5)["params/head_dv"], state.params["head_dv"])
    assert reopened.latest() == 6
    # What was let go is gone from the disk too.
    assert sorted(p.name for p in (tmp_path / "c").iterdir() if p.is_dir()) == ["2", "5", "6"]
    reopened.close()


def test_minus_keeps_the_highest(setup, tmp_path):
    state = setup.recipe.create()
    checkpoints = Checkpoints(tmp_path / "c", keep=1, best_metric="-psnr")
    for step, psnr in {1: 20.0, 2: 30.0, 3: 25.0}.items():
        checkpoints.save(step, state, {}, setup.mesh, {"psnr": psnr})
    checkpoints.close()
    assert saved_steps(tmp_path / "c") == [2, 3]


def test_other_shapes_are_refused_in_one_line(setup, tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, setup.recipe.create(), {}, setup.mesh)
    wider = prepare(make_config(optim__ema_decay=0.5, model__d_model=32))
    with pytest.raises(UserError, match=r"params/embedding_vd is float32\[284,16\] in the") as e:
        checkpoints.restore(1, wider.recipe.abstract, {})
    assert "\n" not in str(e.value)
    no_ema = prepare(make_config())
    checkpoints.restore(1, no_ema.recipe.abstract, {})
    with pytest.raises(UserError, match="--step 7: no such checkpoint.*there are: 1"):
        checkpoints.restore(7, setup.recipe.abstract, {})
    checkpoints.close()


def test_reading_leaves_a_save_under_way_alone(setup, tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, setup.recipe.create(), {}, setup.mesh)
    checkpoints.close()
    unfinished = tmp_path / "c" / "2.orbax-checkpoint-tmp"
    unfinished.mkdir()
    reader = Checkpoints(tmp_path / "c", read_only=True)
    assert reader.latest() == 1
    reader.close()
    assert unfinished.exists()
    assert saved_steps(tmp_path / "c") == [1]
    # The run itself clears it away, and saves that step again.
    writer = Checkpoints(tmp_path / "c", keep=2)
    writer.save(2, setup.recipe.create(), {}, setup.mesh)
    writer.close()
    assert not unfinished.exists()
    assert saved_steps(tmp_path / "c") == [1, 2]


def test_damaged_checkpoint_is_named(setup, tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, setup.recipe.create(), {}, setup.mesh)
    checkpoints.wait()
    shutil.rmtree(tmp_path / "c" / "1" / "layout")
    with pytest.raises(UserError, match="c/1: is no checkpoint of moejax, or was damaged; delete"):
        checkpoints.restore(1, setup.recipe.abstract, {})
    checkpoints.close()
