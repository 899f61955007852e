"""The evaluators "linear_probe" and "robustness" on pictures and models made by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.cli.eval import with_options
from moejax.config import load_config
from moejax.config.evaluation import ProbeConfig, RobustnessConfig
from moejax.config.schema import Config, DataConfig, EvalConfig
from moejax.config.vision import ClassificationConfig, ViTConfig
from moejax.data.pair_pipeline import PairPipeline
from moejax.data.pipeline import ImagePipeline
from moejax.data.sources import SOURCES
from moejax.errors import UserError
from moejax.models.vit import ViTOutput
from moejax.parallel.mesh import make_mesh
from moejax.train import linear_probe as module
from moejax.train.evaluate import EvalContext, check_evaluators, eval_plans, run_evaluators
from moejax.train.linear_probe import features
from moejax.train.linear_probe import metric_names as probe_names
from moejax.train.robustness import metric_names as robustness_names
from moejax.train.setup import prepare_model
from tests.models.small_vit import SMALL_FIELDS

pytestmark = pytest.mark.usefixtures("quick_compiles")
CLASSES = 4
MODEL = ViTConfig(image_size=8, num_classes=CLASSES, d_model=16, num_heads=2, ffn_hidden=(24,))


class Pictures(list):
    """A bright quarter says the class; unlabelled ones are all white."""

    name = "made:quarters"
    version = "1"
    categories = tuple(map(str, range(CLASSES)))

    def __init__(self, labels, split):
        self.split = split
        super().__init__(self._record(i, label) for i, label in enumerate(labels))

    def _record(self, i, label):
        rng = np.random.default_rng([i, len(self.split)])
        image = rng.integers(0, 60, (8, 8, 3), np.uint8)
        if label is None:
            return {"id": str(i), "family": "white", "image": np.full((8, 8, 3), 255, np.uint8)}
        row, column = divmod(label, 2)
        image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 60
        return {"id": str(i), "label": label, "family": f"f{i // 2}", "image": image}


class Quarters:
    """Mean greys of the quarters as features, and as logits that favour the first by 30."""

    def apply(self, variables, batch, *, train):
        images = batch["images"].astype(jnp.float32).mean(axis=-1)
        b = images.shape[0]
        pooled = images.reshape(b, 2, 4, 2, 4).mean(axis=(2, 4)).reshape(b, 4)
        assert batch["images"].dtype == jnp.uint8
        logits = pooled + jnp.asarray([30.0, 0, 0, 0])[None]
        return ViTOutput(pooled @ variables["params"], None, {}, logits)


def make_context(labels, train_labels, params=None, **fields):
    evaluation = EvalConfig(metrics=("linear_probe", "robustness"), **fields)
    config = Config(
        model=MODEL,
        data=DataConfig(format="images", image_size=8, batch_size=8),
        objective=ClassificationConfig(),
        eval=evaluation,
    )
    return EvalContext(
        config,
        Quarters(),
        None,
        jnp.eye(4) if params is None else params,
        ImagePipeline(config, Pictures(labels, "val")),
        ImagePipeline(config, Pictures(train_labels, "train")),
        make_mesh(config.mesh, jax.devices()[:1]),
    )


def evaluated(name, context):
    with jax.set_mesh(context.mesh):
        return run_evaluators(context, eval_plans(EvalConfig(metrics=(name,))))


def test_linear_probe_finds_the_quarter():
    context = make_context([0, 1, 2, 3, None, 3], [*range(4)] * 12 + [None, 0])
    values = evaluated("linear_probe", context).values
    assert set(values) == set(probe_names(context.config))
    assert values["probe/accuracy"] == 1
    # Class 0 is the most frequent in training; five pictures of the split have a label.
    assert values["probe/majority_accuracy"] == pytest.approx(1 / 5)
    assert values["probe/10_shot"] > 0.9 and values["probe/10_shot_spread"] < 0.2

    # Features without any information are as good as a guess.
    blind = make_context([*range(4)] * 4, [*range(4)] * 12, params=jnp.zeros((4, 4)))
    values = evaluated("linear_probe", blind).values
    assert values["probe/accuracy"] == values["probe/1_shot"] == pytest.approx(1 / 4)


class Named(Pictures):
    """With a number as its text, which says nothing of the class."""

    def _record(self, i, label):
        return {**super()._record(i, label), "text": str(i)}

    def text_at(self, index):
        return self[index]["text"]


PAIRS = {
    **SMALL_FIELDS,
    "model.patch_size": 4,
    "model.vocab_size": 272,
    "model.text_length": 8,
    "data.sequence_length": 8,
    "data.text_tokenizer": "bytes",
    "eval.metrics": ("linear_probe",),
}


@pytest.mark.parametrize("name", ["clip", "limoe"])
def test_linear_probe_of_pictures_with_texts(name):
    """Features are the pictures' embeddings, whatever their texts; labels are those of pictures."""
    config = load_config(name, PAIRS)
    check_evaluators(config)
    train, test = Named([*range(4)] * 48, "train"), Named([*range(4)] * 10 + [None, 3], "val")
    setup = prepare_model(config, jax.devices()[:1])
    with jax.set_mesh(setup.mesh):
        params = setup.recipe.create().params
    pipelines = (PairPipeline(config, test), PairPipeline(config, train))
    context = setup.eval_context(params, *pipelines)
    values = evaluated("linear_probe", context).values
    assert set(values) == set(probe_names(config))
    assert values["probe/majority_accuracy"] == pytest.approx(10 / 41)
    # Of a model without any training.
    assert 0.5 < values["probe/accuracy"] <= 1 and 0.3 < values["probe/10_shot"] <= 1

    with jax.set_mesh(context.mesh):
        found = features(context, test, np.arange(len(test)))
        batch, on_device = next(context.batches())
        apply = jax.jit(lambda params, batch: context.model.apply({"params": params}, batch).image)
        image = np.asarray(apply(params, on_device))
    assert batch["index"].tolist() == [*range(8)] and len(found.labels_n) == 41
    assert found.labels_n[:8].tolist() == [*range(4)] * 2
    np.testing.assert_allclose(found.x_nd[:8], image, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.x_nd, axis=-1), 1, rtol=1e-5)


def test_the_split_chooses_nothing(monkeypatch):
    """Other labels of the split give the same penalty, which training pictures choose."""
    seen = []

    def choose(train, classes, seed):
        seen.append((len(train.labels_n), seed))
        return 10.0

    monkeypatch.setattr(module, "choose_penalty", choose)
    options = {"probe": ProbeConfig(pictures=40, seed=3)}
    values = evaluated("linear_probe", make_context([0, 1, 2], [*range(4)] * 12, **options)).values
    assert values["probe/penalty"] == 10 and seen == [(40, 3)]


def test_features_are_those_of_the_rows_whatever_the_batch():
    context = make_context([0], [3, None, 1, 0, 2, 1, 1, 0, 2, 3, 3])
    source = context.train_pipeline.source
    with jax.set_mesh(context.mesh):
        found = features(context, source, np.asarray([1, 2, 9, 10]))
        every = features(context, source, np.arange(11))
    assert found.labels_n.tolist() == [1, 3, 3] and list(found.families) == ["f1", "f4", "f5"]
    np.testing.assert_allclose(found.x_nd, every.x_nd[[1, 8, 9]])
    assert every.x_nd.shape == (10, 4)


def test_probe_of_another_source(monkeypatch):
    def open_made(rest, split, data):
        return Pictures([0, 1, 2, 3] * 6 if rest == "full" else [None] * 3, split)

    monkeypatch.setitem(SOURCES._entries, "made", open_made)
    empty = make_context([None] * 2, [None] * 2, probe=ProbeConfig(source="made:full"))
    assert evaluated("linear_probe", empty).values["probe/accuracy"] == 1
    for probe in (ProbeConfig(source="made:none"), ProbeConfig()):
        with pytest.raises(UserError, match="has no labelled pictures in 'train'"):
            evaluated("linear_probe", make_context([0], [None] * 2, probe=probe))


def test_robustness():
    levels = RobustnessConfig(noise=(4.0, 500.0), blur=(0.25, 50.0))
    context = make_context([*range(4)] * 8 + [None, 0, 1], [0, 0, 1, 2, 3], robustness=levels)
    result = evaluated("robustness", context)
    values = result.values
    assert set(values) == set(robustness_names(context.config))
    assert values["robustness/clean"] == values["robustness/noise_4"] == 1
    assert values["robustness/blur_0.25"] == 1
    assert values["robustness/noise_500"] < 0.95
    # Nothing but the first class is left of what is blurred away.
    assert values["robustness/blur_50"] == pytest.approx(9 / 34)
    assert values["robustness/majority_clean"] == pytest.approx(9 / 34)
    assert list(result.images) == ["val/robustness"]
    assert evaluated("robustness", context).values == values
    other = dataclasses.replace(levels, seed=1)
    other = make_context([*range(4)] * 8, [0, 1], robustness=other)
    assert evaluated("robustness", other).values != values


def test_mistakes():
    with pytest.raises(UserError, match="eval.metrics: 'linear_probe' needs a model of pictures"):
        check_evaluators(load_config("quickstart", {"eval.metrics": ("linear_probe",)}))
    with pytest.raises(UserError, match="eval.metrics: 'robustness' needs a model with classes"):
        check_evaluators(load_config("tokenizer_kl", {"eval.metrics": ("robustness",)}))
    with pytest.raises(UserError, match="eval.metrics: 'robustness' .* use 'task_accuracy'"):
        check_evaluators(load_config("modular_vision", {"eval.metrics": ("robustness",)}))
    packed = DataConfig(format="images", image_size=8, image_sizes=(4, 8), max_patches=4)
    evaluation = EvalConfig(metrics=("robustness",))
    config = Config(model=MODEL, data=packed, objective=ClassificationConfig(), eval=evaluation)
    with pytest.raises(UserError, match="eval.metrics: 'robustness' needs pictures of one size"):
        check_evaluators(config)
    with pytest.raises(UserError, match="eval.probe.source: 'tuxpaint' is not KIND:NAME"):
        ProbeConfig(source="tuxpaint")
    with pytest.raises(UserError, match="eval.probe.shots: "):
        ProbeConfig(shots=(0, 1))
    with pytest.raises(UserError, match="eval.robustness.noise: name positive levels"):
        RobustnessConfig(noise=(8.0, 8.0))


def test_options_of_evaluators_can_be_changed_for_a_run_that_is_there():
    config = load_config("vit")
    changes = ["eval.probe.source=tuxpaint:default", "eval.robustness.noise=(1.0,)"]
    changed = with_options(config, changes)
    assert changed.eval.probe.source == "tuxpaint:default"
    assert changed.eval.robustness.noise == (1.0,)
    assert dataclasses.replace(changed, eval=config.eval) == config
    with pytest.raises(UserError, match="config.data.source=a:b: the run keeps the config"):
        with_options(config, ["data.source=a:b"])
    with pytest.raises(UserError, match="eval.probe has no field 'sauce'"):
        with_options(config, ["eval.probe.sauce=a:b"])
