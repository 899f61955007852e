"""The "task_accuracy" evaluator: every picture of the split asked for each task.

``<task>/accuracy`` and ``<task>/loss`` (nats a picture), over the pictures that have a label;
``accuracy`` is the mean over the tasks. A picture whose rotation is asked for is turned by the
quarters that its number in the source says, the same in every evaluation.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config.checks import require
from moejax.config.schema import Config
from moejax.objectives.classification import class_losses, labelled, rank_of_label
from moejax.objectives.multitask import check_tasks, of_task, with_task
from moejax.train.evaluate import EVALUATORS, EvalContext

QUANTITIES = ("accuracy", "loss", "pictures")


@EVALUATORS.register("task_accuracy")
def task_accuracy(context: EvalContext) -> dict[str, float]:
    """See the module docstring. Needs ``model.name=task_vit`` and the objective "multitask"."""
    config, model = context.config, context.model
    tasks, counts = config.model.modalities, config.model.task_classes

    def score(params: Any, batch: dict, task: jax.Array) -> dict[str, jax.Array]:
        task_b = jnp.full(batch["labels"].shape, task, jnp.int32)
        asked = with_task(batch, tasks, task_b, batch["index"], config.objective.groups)
        outputs = model.apply({"params": params}, asked, train=False)
        logits, labels = of_task(outputs.logits, asked["labels"], task_b, counts)
        counted = labelled(asked)
        return {
            "accuracy": (counted & (rank_of_label(logits, labels) == 0)).sum(),
            "loss": jnp.where(counted, class_losses(logits, labels, "softmax", 0.0), 0).sum(),
            "pictures": counted.sum(),
        }

    program = context.program("task_accuracy", score)
    sums = np.zeros((len(tasks), len(QUANTITIES)))
    for _, on_device in context.batches():
        for number in range(len(tasks)):
            scored = jax.device_get(program(context.params, on_device, jnp.int32(number)))
            sums[number] += [float(scored[name]) for name in QUANTITIES]
    values = {}
    for name, (right, nats, pictures) in zip(tasks, sums, strict=True):
        values[f"{name}/accuracy"] = float(right / pictures) if pictures else float("nan")
        values[f"{name}/loss"] = float(nats / pictures) if pictures else float("nan")
    values["accuracy"] = float(np.mean([values[f"{name}/accuracy"] for name in tasks]))
    return values


def check(config: Config) -> None:
    """UserError unless the model has tasks, and is trained for them."""
    require(
        config.objective.name == "multitask",
        "eval.metrics",
        "'task_accuracy' needs objective.name=multitask; leave it out",
    )
    check_tasks(config.objective, config.model)


def metric_names(config: Config) -> list[str]:
    """What :func:`task_accuracy` returns."""
    names = [f"{task}/{name}" for task in config.model.modalities for name in QUANTITIES[:2]]
    return [*names, "accuracy"]


task_accuracy.check = check
task_accuracy.metric_names = metric_names
