"""The "accuracy" evaluator by hand, beside class frequencies, and training that raises it."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from moejax.config import load_config
from moejax.config.schema import Config, DataConfig, EvalConfig
from moejax.config.vision import ClassificationConfig, ViTConfig
from moejax.data.pipeline import ImagePipeline
from moejax.errors import UserError
from moejax.models.vit import ViTOutput
from moejax.parallel.mesh import batch_sharding, make_mesh
from moejax.train.accuracy import metric_names
from moejax.train.evaluate import EvalContext, check_evaluators, evaluate
from moejax.train.setup import prepare_model

pytestmark = pytest.mark.usefixtures("quick_compiles")
CLASSES = 7
MODEL = ViTConfig(
    image_size=8, num_classes=CLASSES, d_model=16, num_heads=2, num_layers=2, ffn_hidden=(24,)
)


class Pictures(list):
    """Records of one grey each, which is 30 times the label."""

    name = "made:pictures"
    version = "1"
    categories = tuple(map(str, range(CLASSES)))

    def __init__(self, labels, split):
        self.split = split
        super().__init__(
            {"id": str(i), "label": label, "image": np.full((8, 8, 3), 30 * label, np.uint8)}
            for i, label in enumerate(labels)
        )


def make_config(**fields) -> Config:
    groups = {
        "model": MODEL,
        "data": DataConfig(format="images", image_size=8, batch_size=4),
        "objective": ClassificationConfig(),
        "eval": EvalConfig(metrics=("accuracy",)),
    }
    return Config(**{**groups, **fields})


class Table:
    """A model that looks its logits up by the grey of the picture."""

    def __init__(self, table):
        self.table = np.asarray(table, np.float32)

    def apply(self, variables, batch, *, train):
        logits = variables["params"][batch["images"][:, 0, 0, 0] // 30]
        return ViTOutput(None, None, {}, logits)


def values(table, labels, train_labels):
    config = make_config()
    context = EvalContext(
        config,
        Table(table),
        None,
        Table(table).table,
        ImagePipeline(config, Pictures(labels, "val")),
        ImagePipeline(config, Pictures(train_labels, "train")),
        make_mesh(config.mesh, jax.devices()[:1]),
    )
    return evaluate(context)


def test_by_hand():
    """Labels 0, 1, 2, 6, 6 of seven classes, in batches of four: three rows are filler."""
    table = np.zeros((CLASSES, CLASSES))
    table[0, 0] = math.log(6)  # right, with probability 1/2
    table[1, 2] = 5.0  # wrong, and class 1 is the third
    table[6, :6] = [6, 5, 4, 3, 2, 1]  # wrong, and class 6 is the last
    got = values(table, [0, 1, 2, 6, 6], [3, 3, 3, 6, 0])
    assert set(got) == set(metric_names(make_config()))
    assert got["image/accuracy"] == pytest.approx(1 / 5)
    # All logits of label 2 are equal, so that it is the third.
    assert got["image/top5_accuracy"] == pytest.approx(3 / 5)
    last = math.log(sum(math.exp(i) for i in range(7)))
    nats = [math.log(2), math.log(6 + math.exp(5)), math.log(7), last, last]
    assert got["image/loss"] == pytest.approx(sum(nats) / 5, rel=1e-5)
    # Counts of classes 0, 3, 6 in training, each one more: 2, 4, 2 of 12; the others 1.
    assert got["image/majority_accuracy"] == 0
    # 3, then 0 and 6, then 1 and 2.
    assert got["image/majority_top5_accuracy"] == 1
    nats = [math.log(12 / 2), math.log(12), math.log(12), math.log(12 / 2), math.log(12 / 2)]
    assert got["image/majority_loss"] == pytest.approx(sum(nats) / 5, rel=1e-5)


def test_filler_rows_do_not_count():
    right = 9 * np.eye(CLASSES)
    assert values(right, [1] * 5, [1])["image/accuracy"] == 1
    # Fillers repeat the first record, which is wrong here.
    right[2] = -right[2]
    assert values(right, [2, 1, 1, 1, 1], [1])["image/accuracy"] == pytest.approx(4 / 5)


def test_mistakes():
    with pytest.raises(UserError, match="eval.metrics: 'accuracy' needs a model with classes"):
        check_evaluators(load_config("tokenizer_kl", {"eval.metrics": ("accuracy",)}))
    with pytest.raises(UserError, match="eval.metrics: 'accuracy' .* use 'task_accuracy'"):
        check_evaluators(load_config("modular_vision", {"eval.metrics": ("accuracy",)}))
    few = make_config(model=dataclasses.replace(MODEL, num_classes=3))
    with pytest.raises(UserError, match="model.num_classes=3: made:pictures has 7 classes"):
        ImagePipeline(few, Pictures([0, 1], "train"))
    unlabelled = Pictures([0, 1], "train")
    unlabelled.categories = ()
    for record in unlabelled:
        del record["label"]
    with pytest.raises(UserError, match="have no labels"):
        ImagePipeline(make_config(), unlabelled)


OTHERS = ["soft_moe", "sparse_upcycling", "dynamic_dino", "ewa", "pmoe", "mofme", "modular_vision"]
CONFIGS = ("vit", "vmoe", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_few_steps_find_the_class_of_a_grey(name):
    overrides = {
        "model.image_size": 8,
        "model.num_classes": CLASSES,
        "model.d_model": 16,
        "model.num_heads": 2,
        "model.num_layers": 2,
        "model.ffn_hidden": (24,),
        "model.last_blocks": ("dense",) if name == "vit" else ("moe",),
        "data.image_size": 8,
        "data.batch_size": 16,
        "optim.learning_rate": 1e-2,
        "optim.warmup_steps": 2,
        "train.steps": 20,
    }
    if name == "modular_vision":
        overrides |= {"model.task_classes": (CLASSES, 4, 3), "model.num_classes": CLASSES + 4 + 3}
        overrides |= {"objective.groups": (0, 0, 0, 1, 1, 2, 2)}
    config = load_config(name, overrides)
    setup = prepare_model(config, jax.devices()[:1])
    pipeline = ImagePipeline(config, Pictures(np.arange(64) % CLASSES, "train"))
    step, values = setup.train_step(), []
    with jax.set_mesh(setup.mesh):
        state = setup.recipe.create()
        for i in range(20):
            batch = jax.device_put(pipeline.batch(i), batch_sharding(setup.mesh))
            state, metrics = step(state, batch)
            values.append(float(metrics.losses.mean("class")))
            if name == "vmoe":
                routed = metrics.losses.derived_values()
                assert routed["router/importance"] > 0 and routed["router/load"] > 0
            if name == "modular_vision":
                routed = metrics.losses.derived_values()
                assert -math.log(3) <= routed["router/modality_information"] < 0
    assert values[0] == pytest.approx(math.log(CLASSES), rel=1e-3)
    assert np.mean(values[-3:]) < 0.7 * values[0]
