"""The configs of layers of experts, of clips, of diffusion and its towers train: losses fall."""

import jax
import numpy as np
import pytest

from moejax.config import load_config
from moejax.parallel.mesh import batch_sharding
from moejax.train.setup import prepare

# fmt: off
NAMES = (
    "coe", "deepseek_moe", "deepseek_v3", "expert_choice", "gshard", "hunyuan_large",
    "longcat_flash", "ming_flash_omni", "moe_plus_plus", "moiie", "moma", "openmoe", "rexmoe",
    "switch", "uni_moe_2",
)
# fmt: on
NARROW = {
    "model.d_model": 32,
    "model.num_heads": 2,
    "model.num_layers": 2,
    "model.ffn_hidden": (32,),
    "model.moe.hidden": 32,
    "data.batch_size": 4,
    "data.sequence_length": 160,
    "optim.learning_rate": 1e-2,
    "optim.warmup_steps": 2,
}


# Of the built-in emoji, which need no package of the system.
DENOISERS = (
    "dit",
    "sit",
    "dit_moe",
    "promoe",
    "ec_dit",
    "diffmoe",
    "raphael",
    "raphael:text",
    "mode",
)
NARROW_DENOISER = {
    "data.source": "builtin:emoji32",
    "data.image_size": 32,
    "model.image_size": 32,
    "model.d_model": 32,
    "model.num_layers": 2,
    "model.ffn_hidden": (64,),
    "model.moe.hidden": 32,
    "data.batch_size": 16,
    "optim.learning_rate": 5e-3,
    "optim.warmup_steps": 5,
}


def losses(name: str, steps: int, overrides: dict) -> tuple[float, float]:
    """Means of the first and the last five losses of a run on one device."""
    config = load_config(name, {"train.steps": steps, "eval.metrics": (), **overrides})
    setup = prepare(config, jax.devices()[:1])
    step = setup.train_step()
    values = []
    with jax.set_mesh(setup.mesh):
        state = setup.recipe.create()
        for i in range(steps):
            batch = jax.device_put(setup.pipeline.batch(i), batch_sharding(setup.mesh))
            state, metrics = step(state, batch)
            values.append(float(metrics.losses.total()))
    return float(np.mean(values[:5])), float(np.mean(values[-5:]))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_thirty_steps(name, capsys):
    """As shipped: about nine nats at first, the logarithm of 5,112 ids and some more."""
    first, last = losses(name, 30, {})
    with capsys.disabled():
        print(f"\n{name}: {first:.3f} -> {last:.3f}")
    assert last < first - 1


@pytest.mark.parametrize("name", [pytest.param("deepseek_v3", marks=pytest.mark.slow), "moma"])
def test_a_few_steps_of_a_narrow_one(name):
    first, last = losses(name, 12, NARROW)
    assert last < first - 0.3


def test_a_few_steps_on_clips_of_two_frames():
    first, last = losses("videollm_mod", 12, {**NARROW, "data.frames": 2})
    assert last < first - 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", DENOISERS)
def test_denoisers_learn(name, capsys):
    """From the prediction 0, whose error is the variance of what is predicted, to well below it."""
    first, last = losses(name, 40, NARROW_DENOISER)
    with capsys.disabled():
        print(f"\n{name}: {first:.3f} -> {last:.3f}")
    assert last < 0.75 * first


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bagel", "hbridge"])
def test_towers_that_draw_learn(name, capsys):
    few = {"data.batch_size": 8, "optim.learning_rate": 2e-3, "optim.warmup_steps": 2}
    few |= {"optim.freeze": ()}
    first, last = losses(name, 40, few)
    with capsys.disabled():
        print(f"\n{name}: {first:.3f} -> {last:.3f}")
    assert last < 0.9 * first
