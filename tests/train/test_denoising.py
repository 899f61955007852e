"""The denoising evaluator: its baseline by hand, and the same noise at every evaluation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import load_config
from moejax.config.diffusion import Diffusion, DiffusionConfig
from moejax.config.schema import Config, DataConfig
from moejax.config.vision import ViTConfig
from moejax.errors import UserError
from moejax.ops import diffusion
from moejax.train.denoising import denoising, gaussian_loss, noisy_pictures
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
                "segments": np.ones((1, 6), np.int32),
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


PICTURES = 6
EMOJI = Config(
    ViTConfig(image_size=4, num_classes=3),
    DataConfig(format="images", image_size=4),
    DiffusionConfig(),
)


class PicturePipeline:
    """Six pictures in two batches of four, the last rows filler; in another order if asked."""

    def __init__(self, order=range(PICTURES)):
        self.order = list(order)

    def eval_batches(self, limit=0):
        images = np.random.default_rng(2).integers(0, 256, (PICTURES, 4, 4, 3), np.uint8)
        for begin in (0, 4):
            index = np.asarray((self.order + [0, 0])[begin : begin + 4], np.int32)
            weights = np.float32(np.arange(begin, begin + 4) < PICTURES)
            yield {
                "images": images[index],
                "index": index,
                "labels": index % 3,
                "weights": weights,
            }


class PictureModel:
    """Predicts its parameter times what it reads, and says nothing of the variance."""

    def apply(self, variables, batch, *, train):
        assert not train
        output = variables["params"] * batch["x_t"]
        double = jnp.concatenate([output, 0 * output], axis=-1)
        return type("Output", (), {"prediction": double, "aux": {}})


def picture_context(params, pipeline, objective):
    from moejax.objectives import build_objective
    from moejax.parallel.mesh import make_mesh

    config = dataclasses.replace(EMOJI, objective=objective)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    return EvalContext(
        config, PictureModel(), build_objective(config), jnp.asarray(params), pipeline, None, mesh
    )


def test_pictures_are_denoised_in_each_quarter_by_noise_of_their_own():
    """The loss by hand for the prediction 0: the mean square of eps - x0; order does not matter."""
    found = denoising(picture_context(0.0, PicturePipeline(), DiffusionConfig()))
    assert list(found) == denoising.metric_names(
        Config(ViTConfig(), DataConfig(format="images"), DiffusionConfig())
    )
    images = np.random.default_rng(2).integers(0, 256, (PICTURES, 4, 4, 3), np.uint8)
    mean_square = 1 + np.square(images / 127.5 - 1).mean()
    quarters = [found[f"image/loss_quarter_{i}"] for i in range(1, 5)]
    assert found["image/loss"] == pytest.approx(np.mean(quarters))
    # 288 numbers in a quarter, with a standard deviation of about 2 each.
    np.testing.assert_allclose(quarters, mean_square, atol=4 * 2 / np.sqrt(288))
    assert len(set(quarters)) == 4
    turned = denoising(picture_context(0.0, PicturePipeline([3, 5, 0, 1, 4, 2]), DiffusionConfig()))
    assert turned == pytest.approx(found, rel=1e-5)
    # The error of the prediction x_t is (2 - t) x0 - (1 - t) eps, which falls with t: in the first
    # quarter it is 1.9 or so, in the last 0.4.
    reads = denoising(picture_context(1.0, PicturePipeline(), DiffusionConfig()))
    quarters = [reads[f"image/loss_quarter_{i}"] for i in range(1, 5)]
    assert quarters == sorted(quarters, reverse=True)
    assert quarters[0] > 1.4 and quarters[3] < 0.7


def test_the_bound_is_measured_where_the_range_is_learned():
    """The mean of its bits over the pictures that count, once in each quarter."""
    learned = DiffusionConfig(process="ddpm", learned_range=True)
    found = denoising(picture_context(1.0, PicturePipeline(), learned))
    assert list(found)[-1] == "image/bound"
    bits = []
    for batch in PicturePipeline().eval_batches():
        for quarter in range(4):
            read, *parts = noisy_pictures(learned, 3, batch, quarter, 4)
            output = PictureModel().apply({"params": 1.0}, read, train=False).prediction
            bound = diffusion.losses(learned, output, *parts)["bound"]
            bits += np.asarray(bound)[batch["weights"] > 0].tolist()
    assert len(bits) == 4 * PICTURES
    assert found["image/bound"] == pytest.approx(np.mean(bits), rel=1e-5)


def test_likelihood_leaves_pictures_to_it():
    names = metric_names(load_config("transfusion"))
    assert "text/bits_per_byte" in names and not any(name.startswith("image/") for name in names)
    assert "speech/bits_per_code" in metric_names(load_config("quickstart:speech"))
    check_evaluators(load_config("transfusion", {"eval.best_metric": "image/loss"}))
