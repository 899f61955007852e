"""Several tasks on the same pictures, one for each picture of a batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.config.checks import require, require_one_of
from moejax.config.schema import MultitaskConfig, TaskViTConfig, ViTConfig
from moejax.objectives.base import OBJECTIVES, LossSums, Objective
from moejax.objectives.classification import augmented, class_losses, labelled, rank_of_label
from moejax.ops.augment import quarter_turns

# What a picture can be asked: its class, by how many quarters it is turned, its group of classes.
TASKS = ("class", "rotation", "group")
TURNS = 4
# Logits of other tasks: no probability, and no infinity whose product with 0 is no number.
_OUT = -1e9


def with_task(
    batch: dict, tasks: tuple[str, ...], task_b: Array, turns_b: Array, groups: tuple[int, ...]
) -> dict:
    """The batch with ``task`` [b] and the ``labels`` [b] of that task; pictures turned for it.

    Args:
      batch: ``images`` [b, h, h, c], ``labels`` [b] of the source, -1 without one.
      tasks: their names, in the order of their numbers.
      task_b: the task of each picture.
      turns_b: quarters to turn a picture by whose task is "rotation"; others stay upright.
      groups: the group of each label.
    """
    is_task = lambda name: (
        task_b == tasks.index(name) if name in tasks else jnp.zeros(task_b.shape, bool)
    )
    turns_b = jnp.where(is_task("rotation"), turns_b % TURNS, 0)
    known = batch["labels"] >= 0
    group_b = jnp.asarray(groups or (0,), jnp.int32)[jnp.maximum(batch["labels"], 0)]
    labels = jnp.where(is_task("group"), jnp.where(known, group_b, -1), batch["labels"])
    labels = jnp.where(is_task("rotation"), turns_b, labels)
    images = quarter_turns(batch["images"], turns_b) if "rotation" in tasks else batch["images"]
    return {**batch, "images": images, "labels": labels, "task": task_b}


def of_task(
    logits_bv: Float[Array, "b v"],
    labels_b: Int[Array, " b"],
    task_b: Int[Array, " b"],
    counts: tuple[int, ...],
) -> tuple[Float[Array, "b v"], Int[Array, " b"]]:
    """Logits whose probabilities lie on the classes of the picture's task, and labels among all.

    ``counts`` are the classes of each task, whose logits lie side by side.
    """
    owner_v = jnp.repeat(
        jnp.arange(len(counts)), jnp.asarray(counts), total_repeat_length=sum(counts)
    )
    first = jnp.asarray([sum(counts[:i]) for i in range(len(counts))])
    own = owner_v[None] == task_b[:, None]
    return jnp.where(own, logits_bv, _OUT), jnp.maximum(labels_b, 0) + first[task_b]


def check_tasks(config: MultitaskConfig, model: ViTConfig) -> None:
    """UserError, by field, for tasks that there are not, or whose numbers do not fit."""
    require(
        isinstance(model, TaskViTConfig) and model.task_classes != (),
        "model.task_classes",
        "objective 'multitask' needs model.name=task_vit and the classes of each task",
    )
    assert isinstance(model, TaskViTConfig)
    counts = dict(zip(model.modalities, model.task_classes, strict=True))
    for name in counts:
        require_one_of(name, TASKS, "model.modalities")
    require(
        counts.get("rotation", TURNS) == TURNS,
        "model.task_classes",
        f"'rotation' has {TURNS} classes, got {counts.get('rotation')}",
    )
    if "group" in counts:
        require(
            max(config.groups, default=-1) + 1 == counts["group"],
            "objective.groups",
            f"must name the group of each label, numbered up to {counts['group'] - 1}",
        )
        require(
            counts.get("class", len(config.groups)) == len(config.groups),
            "objective.groups",
            f"has {len(config.groups)} labels, task 'class' has {counts.get('class')}",
        )


@OBJECTIVES.register("multitask")
def multitask(config: MultitaskConfig, model: TaskViTConfig):
    """Cross-entropy of the class that each picture has in its task.

    The pictures of a batch have the tasks in turn, so that all have as many; a picture whose task
    is "rotation" is turned at random. Each task's term is named after it, in nats a picture, and
    all count the same; ``<task>_correct`` is the share of right answers. Rows without a label count
    for nothing but as turned pictures.
    """
    check_tasks(config, model)
    tasks, counts = model.modalities, model.task_classes

    def prepare(batch: dict, rng: Array) -> dict:
        augment_rng, turn_rng = jax.random.split(rng)
        batch = augmented(batch, augment_rng, config.augment)
        rows = batch["labels"].shape[0]
        task_b = jnp.arange(rows, dtype=jnp.int32) % len(tasks)
        turns_b = jax.random.randint(turn_rng, (rows,), 0, TURNS)
        return with_task(batch, tasks, task_b, turns_b, config.groups)

    def loss(outputs, batch: dict, rng=None) -> LossSums:
        del rng
        logits, labels = of_task(outputs.logits, batch["labels"], batch["task"], counts)
        nats = class_losses(logits, labels, "softmax", 0.0)
        correct = (rank_of_label(logits, labels) == 0).astype(logits.dtype)
        weights = batch["weights"].astype(logits.dtype) * labelled(batch)
        sums, totals = {}, {}
        for number, name in enumerate(tasks):
            own = weights * (batch["task"] == number)
            for term, values in ((name, nats), (f"{name}_correct", correct)):
                sums[term], totals[term] = (values * own).sum(), own.sum()
        return LossSums(sums, totals, coefficients=tuple((name, 1.0) for name in tasks))

    return Objective(loss, prepare)
