"""The "accuracy" evaluator: how often the class of a picture is found.

Reported for the split, over its pictures that have a label:

* ``image/accuracy``: the share whose class has the highest logit; ``image/top5_accuracy``: the five
  highest (of equal logits the lower class is first);
* ``image/loss``: nats a picture, of the softmax and without smoothing;
* ``image/majority_...``: the same for a guess that knows the frequencies of the classes in the
  training split alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from moejax.config.checks import require
from moejax.config.schema import Config, TaskViTConfig
from moejax.objectives.classification import (
    class_losses,
    labelled,
    one_picture_a_row,
    rank_of_label,
)
from moejax.train.evaluate import EVALUATORS, EvalContext

QUANTITIES = ("accuracy", "top5_accuracy", "loss")


@EVALUATORS.register("accuracy")
def accuracy(context: EvalContext) -> dict[str, float]:
    """See the module docstring. Needs a model with classes and labelled pictures."""
    model = context.model

    def score(params: Any, batch: dict) -> dict[str, jax.Array]:
        outputs = model.apply({"params": params}, batch, train=False)
        return score_classes(outputs.logits, batch)

    def score_majority(batch: dict, log_share_v: jax.Array) -> dict[str, jax.Array]:
        rows = (batch["labels"].size, log_share_v.shape[0])
        return score_classes(jnp.broadcast_to(log_share_v[None], rows), batch)

    learned = context.program("accuracy", score)
    plain = context.program("majority", score_majority)
    counts = context.train_pipeline.label_counts(context.config.model.num_classes)
    log_share_v = jnp.asarray(log_frequencies(counts), jnp.float32)
    sums = {name: np.zeros(len(QUANTITIES) + 1) for name in ("", "majority_")}
    for _, on_device in context.batches():
        scored = {
            "": learned(context.params, on_device),
            "majority_": plain(on_device, log_share_v),
        }
        for prefix, values in jax.device_get(scored).items():
            # Batches are added in float64: a split can be long.
            row = [values[name] for name in (*QUANTITIES, "pictures")]
            sums[prefix] += np.asarray(row, np.float64)
    return {
        f"image/{prefix}{name}": float(total / values[-1]) if values[-1] else float("nan")
        for prefix, values in sums.items()
        for name, total in zip(QUANTITIES, values[:-1], strict=True)
    }


def check(config: Config) -> None:
    """UserError unless the model has classes, of one task."""
    check_classes(config, "accuracy")


def check_classes(config: Config, evaluator: str) -> None:
    """UserError unless the logits of a picture are of classes, all of one task."""
    require(
        getattr(config.model, "num_classes", 0) > 0,
        "eval.metrics",
        f"{evaluator!r} needs a model with classes (model.num_classes); leave it out",
    )
    require(
        not isinstance(config.model, TaskViTConfig),
        "eval.metrics",
        f"{evaluator!r} would rank the classes of all tasks of model.name={config.model.name} "
        "together; use 'task_accuracy'",
    )


def metric_names(config: Config) -> list[str]:
    """What :func:`accuracy` returns."""
    del config
    return [f"image/{prefix}{name}" for prefix in ("", "majority_") for name in QUANTITIES]


accuracy.check = check
accuracy.metric_names = metric_names


def score_classes(logits: jax.Array, batch: dict) -> dict[str, jax.Array]:
    """Sums over the labelled pictures of a batch: the quantities, and how many ``pictures``."""
    logits_bv, batch = one_picture_a_row(logits, batch)
    counted = labelled(batch)
    labels = jnp.maximum(batch["labels"], 0)
    rank = rank_of_label(logits_bv, labels)
    nats = class_losses(logits_bv, labels, "softmax", 0.0)
    return {
        "accuracy": (counted & (rank < 1)).sum(),
        "top5_accuracy": (counted & (rank < 5)).sum(),
        "loss": jnp.where(counted, nats, 0).sum(),
        "pictures": counted.sum(),
    }


def log_frequencies(counts_v: Int[np.ndarray, " v"]) -> Float[np.ndarray, " v"]:
    """Logarithms of the shares of the classes, each counted once more than it occurs."""
    smoothed = np.asarray(counts_v, np.float64) + 1
    return np.log(smoothed / smoothed.sum())
