"""The diffusion objective: what the model is given, what is counted, and that it is learned."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.diffusion import DiffusionConfig, TimeSampling
from moejax.config.schema import DataConfig, MeshConfig
from moejax.config.vision import AugmentConfig, ViTConfig
from moejax.data.vocabulary import PAD
from moejax.errors import UserError
from moejax.objectives.diffusion import diffusion_objective, noisy_batch
from moejax.ops import diffusion

CLASSES = 5
MODEL = ViTConfig(num_classes=CLASSES)
ROWS = 64

pytestmark = pytest.mark.usefixtures("quick_compiles")


def make(**fields):
    return diffusion_objective(DiffusionConfig(**fields), MODEL)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {
        "images": rng.integers(0, 256, (ROWS, 4, 4, 3), np.uint8),
        "labels": np.arange(ROWS, dtype=np.int32) % CLASSES,
        "mirror": np.ones(ROWS, bool),
        "weights": np.ones(ROWS, np.float32),
    }


def outputs(prediction):
    return types.SimpleNamespace(prediction=prediction, aux={})


def test_pictures_are_noised_at_a_time_of_their_own(batch):
    prepared = make(direction="to_data").prepare(batch, jax.random.key(0))
    x0 = batch["images"] / 127.5 - 1
    np.testing.assert_allclose(prepared["data"], x0, atol=1e-6)
    t = 1 - np.asarray(prepared["times"])
    assert len(np.unique(t)) == ROWS and 0 < t.min() < 0.1 and 0.9 < t.max() <= 1
    eps = np.asarray(prepared["noise"])
    assert abs(eps.mean()) < 0.1 and eps.std() == pytest.approx(1, abs=0.1)
    mixed = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * eps
    np.testing.assert_allclose(prepared["x_t"], mixed, atol=1e-5)
    assert "images" not in prepared
    other = make(direction="to_data").prepare(batch, jax.random.key(1))
    assert not np.allclose(other["noise"], eps) and not np.allclose(other["times"], 1 - t)
    # What EDM's network reads is scaled.
    edm = make(process="edm", times=TimeSampling("log_normal", -1.2, 1.2))
    prepared = edm.prepare(batch, jax.random.key(0))
    sigma = np.exp(4 * np.asarray(prepared["times"], np.float64))[:, None, None, None]
    np.testing.assert_allclose(
        np.asarray(prepared["x_t"]) * np.sqrt(sigma**2 + 0.25),
        prepared["data"] + sigma * prepared["noise"],
        rtol=1e-4,
        atol=1e-4,
    )


def test_labels_are_dropped_as_often_as_asked(batch):
    """To the null class; without a label it is the null class always.

    Texts as often, beside labels by draws of their own: what is said is both, either or nothing.
    """
    many = {name: np.repeat(value, 40, axis=0) for name, value in batch.items() if name != "images"}
    count = len(many["labels"])
    many |= {
        "latents": np.zeros((count, 1, 1, 1), np.float32),
        "tokens": np.full((count, 3), 7, np.int32),
    }
    many["labels"][:10] = -1
    prepared = make(label_dropout=0.2).prepare(many, jax.random.key(0))
    labels = np.asarray(prepared["labels"])
    assert (labels[:10] == CLASSES).all() and labels.dtype == np.int32
    dropped = labels[10:] == CLASSES
    # Four standard deviations.
    assert dropped.mean() == pytest.approx(0.2, abs=4 * np.sqrt(0.16 / count))
    np.testing.assert_array_equal(labels[10:][~dropped], many["labels"][10:][~dropped])
    tokens = np.asarray(prepared["tokens"])[10:]
    silent = (tokens == PAD).all(axis=1)
    assert (tokens[~silent] == 7).all()
    assert silent.mean() == pytest.approx(0.2, abs=4 * np.sqrt(0.16 / count))
    assert (silent & dropped).mean() == pytest.approx(0.04, abs=4 * np.sqrt(0.0384 / count))
    kept = make(label_dropout=0.0).prepare(many, jax.random.key(0))
    np.testing.assert_array_equal(kept["labels"][10:], many["labels"][10:])
    # A model without classes is told of none.
    plain = diffusion_objective(DiffusionConfig(label_dropout=0.2), ViTConfig())
    alone = plain.prepare(many, jax.random.key(0))
    assert not np.asarray(alone["labels"]).any()
    # The draws of what is said alone are those of labels.
    np.testing.assert_array_equal(np.asarray(alone["tokens"])[10:, 0] == PAD, dropped)


def test_pictures_may_be_mirrored_and_latents_not(batch):
    mirrored = AugmentConfig(flip="all")
    data = np.asarray(make(augment=mirrored).prepare(batch, jax.random.key(0))["data"])
    plain = batch["images"] / 127.5 - 1
    same = np.isclose(data, plain, atol=1e-6).all(axis=(1, 2, 3))
    assert 16 < same.sum() < 48
    np.testing.assert_allclose(data[~same], plain[~same, :, ::-1], atol=1e-6)
    latents = {**batch, "latents": np.zeros((ROWS, 2, 2, 4), np.float32)}
    with pytest.raises(UserError, match="objective.augment: is of pictures, and these are latents"):
        make(augment=mirrored).prepare(latents, jax.random.key(0))
    assert make().prepare(latents, jax.random.key(0))["x_t"].shape == (ROWS, 2, 2, 4)
    with pytest.raises(UserError, match="objective.augment.mixup: a mixed picture"):
        DiffusionConfig(augment=AugmentConfig(mixup=0.2))


def test_losses_by_hand(batch):
    """A prediction that is off by 1/2, of fillers by 100; four quarters whose mean is the whole."""
    objective = make()
    prepared = objective.prepare(batch, jax.random.key(0))
    prepared["weights"] = np.arange(ROWS) < 48
    true = diffusion.target(
        DiffusionConfig(), *(prepared[name] for name in ("data", "noise", "noise_times"))
    )
    off = jnp.where(jnp.arange(ROWS) < 48, 0.5, 100.0) * jnp.where(prepared["quarter"] == 2, 2, 1)
    sums = objective(outputs(true + off[:, None, None, None]), prepared)
    means = {name: float(value) for name, value in sums.means().items()}
    assert set(means) == {"image", *(f"quarter_{i}" for i in range(1, 5))}
    in_third = np.asarray(prepared["quarter"])[:48] == 2
    assert means["image"] == pytest.approx(np.where(in_third, 1.0, 0.25).mean(), rel=1e-5)
    assert [means[f"quarter_{i}"] for i in range(1, 5)] == pytest.approx([0.25, 0.25, 1, 0.25])
    assert float(sums.total()) == means["image"] and float(sums.weights["image"]) == 48
    assert sum(float(sums.weights[f"quarter_{i}"]) for i in range(1, 5)) == 48
    # Quarters are those of the draws: of the least noise first.
    times = np.asarray(prepared["noise_times"])
    np.testing.assert_array_equal(prepared["quarter"], np.minimum(4 * times, 3).astype(int))
    # Rows of a batch without weights all count.
    del prepared["weights"]
    assert float(objective(outputs(true), prepared).weights["image"]) == ROWS


def test_the_learned_range_is_trained_beside_the_error(batch):
    objective = make(process="ddpm", schedule="linear", learned_range=True)
    prepared = objective.prepare(batch, jax.random.key(0))
    eps = prepared["noise"]

    def total(scale, v):
        output = jnp.concatenate([scale * eps, jnp.broadcast_to(v, eps.shape)], axis=-1)
        sums = objective(outputs(output), prepared)
        return sums.total(), sums

    (value, sums), gradient = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(0.9, 0.5)
    assert float(value) == pytest.approx(float(sums.mean("image") + sums.mean("bound")))
    # The prediction is trained by its own error alone.
    assert float(gradient[0]) == pytest.approx(-0.2 * float(jnp.square(eps).mean()), rel=1e-4)
    assert float(gradient[1]) != 0


def test_the_best_answer_to_one_picture_is_that_picture(batch):
    """Gradient descent on a prediction of x0 that knows neither noise nor time."""
    picture = jnp.asarray([[[[0.5, -0.3, 0.1]]]])
    data = {"latents": jnp.tile(picture, (ROWS, 1, 1, 1)), "labels": jnp.zeros(ROWS, jnp.int32)}
    objective = make(prediction="x0")

    @jax.jit
    def step(guess, key):
        prepared = objective.prepare(data, key)
        loss = lambda x: objective(outputs(jnp.tile(x, (ROWS, 1, 1, 1))), prepared).total()
        return guess - 0.5 * jax.grad(loss)(guess)

    guess = jnp.zeros_like(picture)
    for key in jax.random.split(jax.random.key(0), 40):
        guess = step(guess, key)
    np.testing.assert_allclose(guess, picture, atol=1e-3)


def test_evaluation_drops_nothing(batch):
    config = DiffusionConfig()
    x0 = jnp.zeros((ROWS, 4, 4, 3))
    t = jnp.full(ROWS, 0.5)
    made = noisy_batch(batch, config, CLASSES, x0, x0 + 1, t)
    np.testing.assert_array_equal(made["labels"], batch["labels"])
    np.testing.assert_allclose(made["x_t"], 0.5)


def test_sequences_are_refused():
    from moejax.config.schema import Config, DecoderConfig

    with pytest.raises(UserError, match="data.format: objective 'diffusion' needs pictures"):
        Config(DecoderConfig(), DataConfig(), DiffusionConfig(), mesh=MeshConfig())
