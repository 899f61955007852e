"""Modular vision: tasks on the same pictures, a router for each, one task's part taken out."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.analysis.params import abstract_params
from moejax.api import build
from moejax.config import load_config
from moejax.config.schema import MultitaskConfig, ViTConfig
from moejax.errors import UserError
from moejax.objectives.base import LossSums
from moejax.objectives.multitask import check_tasks, of_task, with_task
from moejax.ops.augment import quarter_turns
from moejax.surgery.prune import most_used, prune_experts

pytestmark = pytest.mark.usefixtures("quick_compiles")
TASKS = ("class", "rotation", "group")
GROUPS = (0, 0, 1)
E, K, KEPT = 12, 2, 8
TINY = {
    "model.image_size": 8,
    "model.task_classes": (3, 4, 2),
    "model.num_classes": 9,
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.num_layers": 2,
    "model.ffn_hidden": (24,),
    "model.moe.num_experts": E,
    "model.kernel_backend": "reference",
    "objective.groups": GROUPS,
    "data.image_size": 8,
    "data.batch_size": 6,
}
IMAGES = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
MOE = "segment_0/block_1/moe"


@pytest.fixture(scope="module")
def made():
    """(config, objective, model, random parameters)."""
    config = load_config("modular_vision", TINY)
    model, objective = build(config)
    draw = np.random.default_rng(1)
    random = lambda leaf: jnp.asarray(draw.normal(scale=0.3, size=leaf.shape), leaf.dtype)
    return config, objective, model, jax.tree.map(random, abstract_params(model, config))


def run(model, params, task: int):
    """The outputs for one picture of a task."""
    batch = {"images": IMAGES, "task": np.full(1, task, np.int32)}
    apply = jax.jit(lambda params: model.apply({"params": params}, batch, record=True))
    return jax.device_get(apply(params))


def with_leaf(params, path: str, leaf):
    """The parameters with another leaf at the path below the stack."""
    name, _, rest = path.partition("/")
    return {**params, name: with_leaf(params[name], rest, leaf) if rest else leaf}


def test_each_task_has_its_own_router(made):
    """Another router of one task changes what pictures of that task get, and no others."""
    config, _, model, params = made
    router = params["stack"]["segment_0"]["block_1"]["moe"]["router"]["router_mde"]
    assert router.shape == (1, len(TASKS), 16, E)
    path = f"stack/{MOE}/router/router_mde"
    other = with_leaf(params, path, router.at[:, 1].set(-router[:, 1]))
    before, after = ([run(model, p, task) for task in range(3)] for p in (params, other))
    moved = [np.abs(a.logits - b.logits).max() for a, b in zip(before, after, strict=True)]
    assert moved[1] > 1e-3 and moved[0] == moved[2] == 0
    # The same picture is another one to each task.
    assert np.abs(before[0].logits - before[2].logits).max() > 1e-3
    sums = after[1].aux["segment_0"]["block_1"]["moe"]["router"]["statistics"]
    np.testing.assert_array_equal(sums["tokens_m"], [[0, 4, 0]])


def test_a_task_can_be_taken_out_without_the_experts_that_it_does_not_use(made):
    config, _, model, params = made
    expected = run(model, params, 2)
    sums = expected.aux["segment_0"]["block_1"]["moe"]["router"]["statistics"]
    counts = sums["chosen_me"][:, 2]
    # Four patches of two experts each use eight at the most.
    assert (counts > 0).sum() <= KEPT < E
    small, fewer = prune_experts(config.model, params, {MOE: most_used(counts, KEPT)})
    assert small.moe.num_experts == KEPT
    own = fewer["stack"]["segment_0"]["block_1"]["moe"]
    assert own["experts"]["wi_edf"].shape[1] == own["router"]["router_mde"].shape[-1] == KEPT
    pruned = build(dataclasses.replace(config, model=small))[0]
    np.testing.assert_allclose(run(pruned, fewer, 2).logits, expected.logits, atol=1e-5)

    least = most_used(-counts, KEPT)
    _, others = prune_experts(config.model, params, {MOE: least})
    assert np.abs(run(pruned, others, 2).logits - expected.logits).max() > 1e-3


def test_pruning_says_what_is_missing(made):
    config, _, _, params = made
    ids = np.arange(4)[None]
    for keep, message in (
        ({}, "keep: each layer keeps as many"),
        ({"segment_0/block_0/moe": ids}, f"keep: says nothing of {MOE}"),
        ({MOE: ids, "segment_9/moe": ids}, "keep: there are no experts in .'segment_9/moe'"),
        ({MOE: ids[:, :1]}, "model.moe.top_k: 2 of 1 cannot be chosen"),
    ):
        with pytest.raises(UserError, match=message):
            prune_experts(config.model, params, keep)


def test_most_used_by_hand():
    counts = np.float32([[0, 5, 2, 2], [1, 0, 0, 9]])
    np.testing.assert_array_equal(most_used(counts, 2), [[1, 2], [0, 3]])


def test_pictures_are_turned_to_the_left():
    images = np.arange(2 * 9).reshape(2, 3, 3, 1)
    for turns in range(5):
        expected = np.stack([np.rot90(images[0], turns), images[1]])
        turned = quarter_turns(jnp.asarray(images), jnp.asarray([turns, 0]))
        np.testing.assert_array_equal(turned, expected)


def test_labels_of_each_task():
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8)
    labels = np.int32([2, 1, 2, -1, -1, -1])
    batch = {"images": jnp.asarray(images), "labels": jnp.asarray(labels)}
    task = jnp.asarray([0, 1, 2, 0, 1, 2])
    turns = jnp.asarray([3, 3, 3, 1, 6, 1])
    asked = jax.device_get(with_task(batch, TASKS, task, turns, GROUPS))
    np.testing.assert_array_equal(asked["labels"], [2, 3, 1, -1, 2, -1])
    for row, quarters in enumerate([0, 3, 0, 0, 2, 0]):
        np.testing.assert_array_equal(asked["images"][row], np.rot90(images[row], quarters))


def test_probabilities_lie_on_the_classes_of_the_task():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 9)), jnp.float32)
    own, labels = of_task(logits, jnp.asarray([2, 3, 1]), jnp.asarray([0, 1, 2]), (3, 4, 2))
    np.testing.assert_array_equal(labels, [2, 6, 8])
    probs = jax.nn.softmax(own)
    for row, part in enumerate((slice(0, 3), slice(3, 7), slice(7, 9))):
        np.testing.assert_allclose(probs[row, part], jax.nn.softmax(logits[row, part]), rtol=1e-5)
        assert probs[row].sum() == pytest.approx(1)


def test_each_task_has_a_term_and_its_share_of_the_batch(made):
    """Of equal logits a task of n classes costs log n; filler rows count for nothing."""
    _, objective, _, _ = made
    batch = {
        "images": np.zeros((6, 8, 8, 3), np.uint8),
        "labels": np.int32([0, 1, 2, 0, 1, 2]),
        "mirror": np.zeros(6, bool),
        "weights": np.float32([1, 1, 1, 1, 0, 1]),
    }
    batch = objective.prepare(jax.tree.map(jnp.asarray, batch), jax.random.key(0))
    np.testing.assert_array_equal(batch["task"], [0, 1, 2, 0, 1, 2])

    class Outputs:
        logits, aux = jnp.zeros((6, 9)), {}

    sums: LossSums = objective(Outputs, batch)
    assert [float(sums.weights[name]) for name in TASKS] == [2, 1, 2]
    means = [float(sums.mean(name)) for name in TASKS]
    assert means == pytest.approx([math.log(3), math.log(4), math.log(2)])
    assert float(sums.total()) == pytest.approx(sum(means))
    # Labels 0 and 0 of "class": of equal logits the lowest class is the answer.
    assert float(sums.mean("class_correct")) == 1.0


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model.num_classes": 10}, "model.num_classes: must be 9, the sum of model.task_classes"),
        ({"model.task_classes": (3, 4)}, "model.task_classes: needs the classes of each of 3"),
        (
            {"model.task_classes": (3, 5, 2), "model.num_classes": 10},
            "model.task_classes: 'rotation' has 4 classes, got 5",
        ),
        ({"objective.groups": (0, 1)}, "objective.groups: has 2 labels, task 'class' has 3"),
        ({"objective.groups": (0, 0, 0)}, "objective.groups: must name the group of each label"),
        ({"model.modalities": ("class", "rotation", "colour")}, "'colour' is none of class, rot"),
        ({"objective.augment.mixup": 0.2}, "objective.augment.mixup: pictures of two tasks"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(UserError, match=message):
        build(load_config("modular_vision", {**TINY, **fields}))


def test_another_model_has_no_tasks():
    with pytest.raises(UserError, match="model.task_classes: objective 'multitask' needs"):
        check_tasks(MultitaskConfig(), ViTConfig())
