"""The evaluator "fidelity" with ways to draw made here, and a classifier that judges samples."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import load_config
from moejax.config.evaluation import FidelityConfig
from moejax.config.schema import Config, DataConfig, EvalConfig
from moejax.config.vision import ClassificationConfig, ViTConfig
from moejax.data.pipeline import ImagePipeline
from moejax.data.prepare import efficientnet
from moejax.errors import UserError
from moejax.generate.denoiser import Drawing, PictureSampler, draw_pictures
from moejax.parallel.mesh import make_mesh
from moejax.train import classifier as classifiers
from moejax.train import fidelity as module
from moejax.train.classifier import Classifier, class_accuracy, load_classifier
from moejax.train.evaluate import EvalContext, check_evaluators, eval_plans, run_evaluators
from moejax.train.fidelity import DRAWERS, draw_samples
from moejax.train.setup import prepare_model

CLASSES, COUNT, BATCH = 3, 24, 10
OPTIONS = FidelityConfig(pictures=COUNT, draws=5)


class Pictures(list):
    """The channel that is bright says the class."""

    name = "made:channels"
    version = "1"
    categories = ("red", "green", "blue")

    def __init__(self, count, split):
        self.split = split
        rng = np.random.default_rng(len(split))
        for i in range(count):
            image = rng.integers(0, 90, (8, 8, 3), np.uint8)
            image[..., i % CLASSES] += rng.integers(100, 160, (8, 8), np.uint8)
            super().append({"id": str(i), "label": i % CLASSES, "image": image})


def encode(images):
    n, h, w, c = images.shape
    return images.reshape(n, 2, h // 2, 2, w // 2, c).mean(axis=(2, 4)).reshape(n, -1) / 32


def make_config(**fields):
    return Config(
        model=ViTConfig(image_size=8, num_classes=CLASSES),
        data=DataConfig(format="images", image_size=8, batch_size=BATCH),
        objective=ClassificationConfig(),
        eval=EvalConfig(metrics=("fidelity",), fidelity=dataclasses.replace(OPTIONS, **fields)),
    )


@pytest.fixture
def context(monkeypatch):
    monkeypatch.setattr("moejax.analysis.fidelity.pictures.efficientnet_encoder", lambda: encode)
    config = make_config()
    return EvalContext(
        config,
        None,
        None,
        {"copies": True},
        ImagePipeline(config, Pictures(60, "val")),
        ImagePipeline(config, Pictures(120, "train")),
        make_mesh(config.mesh, jax.devices()[:1]),
    )


def register(monkeypatch):
    """Training pictures, or else flat ones, of the classes that are asked for.

    Returns what was asked: contexts that a draw was made for, and labels.
    """
    makings, asked = [], []

    def made(context):
        makings.append(context)
        train = context.train_pipeline.source

        def draw(params, labels, rng):
            assert labels.dtype == np.int32 and len(labels) == BATCH
            asked.append(labels)
            rows = 3 * np.asarray(jax.random.randint(rng, (BATCH,), 0, 40)) + labels
            if params["copies"]:
                return np.stack([train[int(row)]["image"] for row in rows])
            flat = jnp.eye(CLASSES, dtype=jnp.uint8)[labels] * 200
            return jnp.broadcast_to(flat[:, None, None], (BATCH, 8, 8, 3))

        return draw

    monkeypatch.setitem(DRAWERS._entries, "vit", made)
    return makings, asked


def evaluated(context):
    return run_evaluators(context, eval_plans(context.config.eval))


def test_copies_and_flat_pictures(context, monkeypatch):
    makings, asked = register(monkeypatch)
    result = evaluated(context)
    assert list(result.values) == module.names(context.config)
    value = lambda result, name: result.values[f"fidelity/{name}"]
    assert value(result, "pictures") == COUNT
    assert value(result, "memorised") == value(result, "memorised_pixels") == 1
    far, floor = value(result, "fd_efflite0"), value(result, "floor_fd_efflite0")
    spread = np.hypot(*(value(result, f"{n}fd_efflite0_spread") for n in ("", "floor_")))
    assert abs(far - floor) < spread
    (grid,), (note,) = result.images.values(), result.notes
    assert grid.ndim == 3 and "24 pictures on either side" in note
    # Classes of training, about as frequent; real pictures are read and described once.
    labels = np.concatenate(asked)[:COUNT]
    assert set(labels) == {0, 1, 2}
    with monkeypatch.context() as patched:
        patched.setattr(module, "read_pictures", lambda *_: pytest.fail("read again"))
        assert evaluated(context).values == result.values
        flat = evaluated(context.with_params({"copies": False}))
    assert len(makings) == 1
    assert value(flat, "memorised") == 0 and value(flat, "recall") < 0.1
    assert value(flat, "fd_efflite0") > 4 * max(far, floor)


def test_training_pictures_are_not_held_out(context, monkeypatch):
    """By ``eval.metrics`` and by ``moejax eval --split train``, before anything is drawn."""
    _, asked = register(monkeypatch)
    monkeypatch.setattr(module, "installed_weights", lambda: None)
    message = "'fidelity' tells copies by pictures that were not trained on; .* not on train"
    for fields in ({"metrics": ("fidelity@train",)}, {"split": "train"}):
        config = dataclasses.replace(
            context.config, eval=dataclasses.replace(context.config.eval, **fields)
        )
        with pytest.raises(UserError, match=message):
            check_evaluators(config)
    with pytest.raises(UserError, match=message):
        module.fidelity(dataclasses.replace(context, split="train"))
    assert not asked
    check_evaluators(context.config)


def test_samples_are_the_same_in_every_evaluation():
    def draw(params, labels, rng):
        noise = jax.random.randint(rng, (len(labels), 2, 2, 3), 0, 256).astype(jnp.uint8)
        return noise.at[:, 0, 0, 0].set(labels.astype(jnp.uint8))

    labels = np.arange(25, dtype=np.int32)
    first = draw_samples(draw, None, labels, jax.random.key(0), BATCH)
    assert first.shape == (25, 2, 2, 3) and first[:, 0, 0, 0].tolist() == labels.tolist()
    np.testing.assert_array_equal(draw_samples(draw, None, labels, jax.random.key(0), BATCH), first)
    # Each batch has random numbers of its own.
    assert not np.array_equal(first[:10, 1], first[10:20, 1])


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("bagel", {"data.drop_text": 0.0}, "which data.drop_text=0 trains none of"),
        ("bagel", {"eval.fidelity.sampler": "hein"}, "eval.fidelity.sampler: no sampler 'hein'"),
        ("dit", {"eval.fidelity.steps": 1001}, "eval.fidelity.steps: ddpm has 1000 discrete times"),
        (
            "dit:text",
            {"eval.fidelity.classifier": "."},
            "eval.fidelity.classifier: judges pictures",
        ),
        ("mod", {"model.depth.causal_rule": "none"}, "model.depth.causal_rule='none': sees later"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_training(monkeypatch, name, fields, message):
    monkeypatch.setattr(module, "installed_weights", lambda: None)
    config = load_config(name, {"eval.metrics": ("fidelity",), **fields})
    with pytest.raises(UserError, match=message):
        check_evaluators(config)
    check_evaluators(load_config("bagel", {"eval.metrics": ("fidelity",)}))


def test_models_without_classes_are_asked_for_none(context, monkeypatch):
    _, asked = register(monkeypatch)
    model = dataclasses.replace(context.config.model, num_classes=0)
    evaluated(dataclasses.replace(context, config=dataclasses.replace(context.config, model=model)))
    labels = np.concatenate(asked)
    assert set(labels.tolist()) <= {-1, module.FILLER}


def test_mistakes(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="'fidelity' needs a model that draws pictures"):
        check_evaluators(load_config("tokenizer_kl", {"eval.metrics": ("fidelity",)}))
    monkeypatch.setitem(DRAWERS._entries, "vit", None)
    missing = make_config(classifier=str(tmp_path / "none"))
    with pytest.raises(UserError, match="eval.fidelity.classifier: no run in .*none"):
        check_evaluators(missing)
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="the weights of EfficientNet-Lite0 are not installed: pip"):
        check_evaluators(make_config())
    for field in ("pictures", "draws", "neighbours"):
        with pytest.raises(UserError, match=f"eval.fidelity.{field}: must be positive"):
            FidelityConfig(**{field: 0})
    with pytest.raises(UserError, match="eval.fidelity.reference: must not be negative"):
        FidelityConfig(reference=-1)


def make_classifier(monkeypatch, **data):
    """Of means of the channels, wrong about one class in three: green is called red."""
    config = make_config()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))

    def apply(batch):
        assert batch["images"].shape == (BATCH, 8, 8, 3) and batch["images"].dtype == np.uint8
        logits = batch["images"].mean(axis=(1, 2))
        logits[:, 0], logits[:, 1] = logits[:, :2].max(axis=1), 0
        # Rows that fill up the batch say so.
        logits[batch["weights"] == 0] = np.nan
        return SimpleNamespace(logits=logits)

    run = SimpleNamespace(config=config, apply=apply, workdir="runs/judge")
    opened = lambda config, split: SimpleNamespace(source=Pictures(31, split))
    monkeypatch.setattr(classifiers, "open_pipeline", opened)
    monkeypatch.setattr(classifiers, "load", lambda workdir: run)
    return load_classifier("runs/judge")


def test_class_accuracy(monkeypatch):
    judge = make_classifier(monkeypatch)
    images = np.stack([record["image"] for record in Pictures(24, "val")])
    assert judge.classify(images).tolist() == [0, 0, 2] * 8
    labels = np.arange(24) % CLASSES
    # 10 of 31 real pictures are green; of samples those without a class do not count.
    values = class_accuracy(judge, images, labels, categories=Pictures.categories)
    right = {"class_accuracy": 16 / 24, "real_class_accuracy": 21 / 31}
    assert values == pytest.approx(right)
    labels[1::3] = -1
    assert class_accuracy(judge, images, labels)["class_accuracy"] == 1
    assert np.isnan(class_accuracy(judge, images, np.full(24, -1))["class_accuracy"])


def test_a_classifier_that_cannot_judge(monkeypatch):
    judge = make_classifier(monkeypatch)
    images, labels = np.zeros((4, 6, 6, 3), np.uint8), np.zeros(4, np.int32)
    with pytest.raises(UserError, match="reads pictures of 8x8, and these are 6x6; train one with"):
        judge.classify(images)
    with pytest.raises(UserError, match=r"classes are those of made:channels \(red, green, blue"):
        class_accuracy(judge, images, labels, categories=("a", "b", "c"))
    # Data without names of its classes.
    with pytest.raises(UserError, match="runs/judge: it knows 3 classes, and these .* have 10"):
        class_accuracy(judge, np.zeros((4, 8, 8, 3), np.uint8), labels, num_classes=10)
    with pytest.raises(UserError, match="runs/judge: its model is no classifier of pictures"):
        make_classifier(monkeypatch, image_sizes=(8,), max_patches=4)


def test_the_evaluator_asks_the_classifier(context, monkeypatch):
    register(monkeypatch)
    make_classifier(monkeypatch)
    config = make_config(classifier="runs/judge")
    values = evaluated(dataclasses.replace(context, config=config)).values
    assert list(values) == module.names(config)
    assert values["fidelity/real_class_accuracy"] == pytest.approx(21 / 31)
    assert 0.3 < values["fidelity/class_accuracy"] < 0.95
    assert isinstance(make_classifier(monkeypatch), Classifier)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=4))
    with pytest.raises(UserError, match="it knows 3 classes, and these pictures have 4"):
        evaluated(dataclasses.replace(context, config=other))


def test_a_diffusion_model_draws_what_its_labels_say():
    """By the settings of ``eval.fidelity``; a row without a class is drawn without guidance."""
    fields = {
        "data.image_size": 8,
        "model.image_size": 8,
        "model.patch_size": 4,
        "model.num_classes": CLASSES,
        "model.d_model": 16,
        "model.num_heads": 2,
        "model.num_layers": 1,
        "model.ffn_hidden": (16,),
        "eval.metrics": (),
        "eval.fidelity.steps": 2,
        "eval.fidelity.guidance": 3.0,
        "eval.fidelity.sampler": "heun",
    }
    config = load_config("sit", fields)
    setup = prepare_model(config, jax.devices()[:1])
    with jax.set_mesh(setup.mesh):
        params = setup.recipe.create().params
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape), params)
    pipeline = ImagePipeline(config, Pictures(12, "val"))
    context = setup.eval_context(params, pipeline, pipeline)
    draw = DRAWERS.get("dit")(context)
    labels = np.asarray([0, 2, -1], np.int32)
    pictures = draw(params, labels, jax.random.key(5))
    assert pictures.shape == (3, 8, 8, 3) and pictures.dtype == np.uint8
    np.testing.assert_array_equal(draw(params, labels, jax.random.key(5)), pictures)
    drawing = Drawing(sampler="heun", steps=2, guidance=3.0)
    sampler = PictureSampler(context.model, params, config.objective, drawing=drawing)
    seed = int(jax.random.bits(jax.random.key(5)) >> 1)
    expected = draw_pictures(sampler, [0, 2, None], seed=seed).pictures
    np.testing.assert_array_equal(pictures, expected)
    assert (draw(params, labels, jax.random.key(6)) != pictures).any()
