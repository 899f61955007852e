"""The denoising evaluator: its baseline by hand, and the same noise at every evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import load_config
from moejax.config.diffusion import Diffusion
from moejax.errors import UserError
from moejax.ops import diffusion
from moejax.train.denoising import denoising, gaussian_loss
from moejax.train.evaluate import EvalContext, check_evaluators
from moejax.train.likelihood import metric_names


@pytest.mark.parametrize("process", ["ddpm", "flow"])
def test_gaussian_baseline_is_the_error_of_the_best_linear_guess(process):
    """Least squares on a million draws finds no better line, and that line's error."""
    rng = np.random.default_rng(0)
    x0, noise = (jnp.asarray(rng.normal(size=1_000_000), jnp.float32) for _ in range(2))
    process = Diffusion(process)
    for time in (0.1, 0.5, 0.9):
        t = jnp.full(x0.shape, time)
        noisy = np.asarray(diffusion.add_noise(process, x0, noise, t))
        target = np.asarray(diffusion.target(process, x0, noise, t))
        slope = (noisy * target).mean() / (noisy**2).mean()
        error = np.square(target - slope * noisy).mean()
        assert float(gaussian_loss(process, jnp.asarray(time))) == pytest.approx(error, rel=0.01)
    ends = gaussian_loss(Diffusion("flow"), jnp.asarray([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(ends, [1, 2, 1], atol=1e-6)


class Pipeline:
    """Two batches of one row: a picture of four patches; the second row is filler."""

    def eval_batches(self, limit=0):
        rng = np.random.default_rng(1)
        for weight in (1.0, 0.0):
            image_id = np.asarray([[0, 1, 1, 1, 1, 0]], np.int32)
            yield {
                "tokens": np.where(image_id, 5, 20).astype(np.int32),
                "positions": np.arange(6, dtype=np.int32)[None],
                "image_id": image_id,
                "latents": rng.normal(size=(1, 6, 3)).astype(np.float32) + 9 * (1 - weight),
                "weights": np.full((1, 6), weight, np.float32),
            }


class Model:
    """Predicts ``scale`` times the noisy latents."""

    def apply(self, variables, batch, *, train):
        assert not train
        return type("Output", (), {"denoised": variables["params"] * batch["latents"]})


def context(params):
    config = load_config("transfusion", {"model.latents.grid": 2, "model.latents.channels": 3})
    from moejax.objectives import build_objective
    from moejax.parallel.mesh import make_mesh

    mesh = make_mesh(config.mesh, jax.devices()[:1])
    return EvalContext(
        config, Model(), build_objective(config), jnp.asarray(params), Pipeline(), None, mesh
    )


def test_filler_does_not_count_and_noise_is_the_same_each_time():
    found = denoising(context(0.0))
    # Predicting 0 leaves the noise itself: twelve normal numbers, of variance about 1.
    assert 0.3 < found["image/loss"] < 2.5
    assert found == denoising(context(0.0))
    assert found["image/gaussian_loss"] == denoising(context(0.5))["image/gaussian_loss"]
    assert found["image/loss"] != denoising(context(0.5))["image/loss"]


def test_it_needs_the_objective_that_it_measures():
    config = load_config("quickstart", {"eval.metrics": ("denoising",)})
    with pytest.raises(UserError, match="'denoising' needs objective.name=transfusion or"):
        check_evaluators(config)


def test_likelihood_leaves_pictures_to_it():
    names = metric_names(load_config("transfusion"))
    assert "text/bits_per_byte" in names and not any(name.startswith("image/") for name in names)
    assert "speech/bits_per_code" in metric_names(load_config("quickstart:speech"))
    check_evaluators(load_config("transfusion", {"eval.best_metric": "image/loss"}))
