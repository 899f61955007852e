"""The "task_accuracy" evaluator by hand."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from moejax.config.schema import DataConfig, EvalConfig, MultitaskConfig, TaskViTConfig
from moejax.data.pipeline import ImagePipeline
from moejax.errors import UserError
from moejax.models.vit import ViTOutput
from moejax.parallel.mesh import make_mesh
from moejax.train.evaluate import EvalContext, check_evaluators, evaluate
from moejax.train.task_accuracy import metric_names

from .test_accuracy import CLASSES, Pictures, make_config

pytestmark = pytest.mark.usefixtures("quick_compiles")
MODEL = TaskViTConfig(
    image_size=8,
    task_classes=(CLASSES, 4, 2),
    num_classes=CLASSES + 6,
    d_model=16,
    num_heads=2,
    ffn_hidden=(24,),
)
GROUPS = (0, 0, 0, 0, 1, 1, 1)


class Answers:
    """A model that knows the class by the grey, the group of the labels below 4 and no rotation."""

    def apply(self, variables, batch, *, train):
        grey = batch["images"][:, 0, 0, 0] // 30
        logits = np.zeros((CLASSES, CLASSES + 6), np.float32)
        logits[:, :CLASSES] = 9 * np.eye(CLASSES)
        logits[:, CLASSES] = math.log(3)  # no quarter, with probability 1/2
        logits[:, -2] = 1.0  # the first group, always
        return ViTOutput(None, None, {}, variables["params"] + jax.numpy.asarray(logits)[grey])


def config():
    return make_config(
        model=MODEL,
        objective=MultitaskConfig(groups=GROUPS),
        data=DataConfig(format="images", image_size=8, batch_size=4),
        eval=EvalConfig(metrics=("task_accuracy",)),
    )


def test_by_hand():
    """Labels 0 to 4 in batches of four: three rows are filler; turns by the number of the row."""
    pipeline = ImagePipeline(config(), Pictures([0, 1, 2, 3, 4], "val"))
    mesh = make_mesh(config().mesh, jax.devices()[:1])
    params = np.zeros((), np.float32)
    context = EvalContext(config(), Answers(), None, params, pipeline, pipeline, mesh)
    got = evaluate(context)
    assert set(got) == set(metric_names(config()))
    assert got["class/accuracy"] == 1
    assert got["class/loss"] == pytest.approx(math.log(1 + (CLASSES - 1) * math.exp(-9)), rel=1e-3)
    # Rows 0 to 4 are turned by 0, 1, 2, 3, 0 quarters.
    assert got["rotation/accuracy"] == pytest.approx(2 / 5)
    assert got["rotation/loss"] == pytest.approx((2 * math.log(2) + 3 * math.log(6)) / 5, rel=1e-5)
    assert got["group/accuracy"] == pytest.approx(4 / 5)
    assert got["accuracy"] == pytest.approx((1 + 0.4 + 0.8) / 3)


def test_mistakes():
    few = dataclasses.replace(MODEL, task_classes=(3, 4, 2), num_classes=9)
    objective = MultitaskConfig(groups=(0, 1, 1))
    with pytest.raises(UserError, match="model.task_classes=3: made:pictures has 7 classes"):
        changed = dataclasses.replace(config(), model=few, objective=objective)
        ImagePipeline(changed, Pictures([0, 1], "train"))
    with pytest.raises(UserError, match="eval.metrics: 'task_accuracy' needs obj"):
        check_evaluators(make_config(eval=EvalConfig(metrics=("task_accuracy",))))
