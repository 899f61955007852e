"""The "routing" evaluator on a diffusion transformer: experts by noise level."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.analysis.routing import entropy
from moejax.analysis.routing_record import RoutingRecord
from moejax.config import load_config
from moejax.data.pipeline import ImagePipeline
from moejax.train import routing
from moejax.train.denoising import noisy_pictures
from moejax.train.evaluate import eval_plans, run_evaluators
from moejax.train.setup import prepare_model

pytestmark = pytest.mark.usefixtures("quick_compiles")
EXPERTS, PATCHES, LABELS = 4, 4, [0, 1, 2, 1, -1]
FIELDS = {
    "data.image_size": 8,
    "data.batch_size": 3,
    "model.image_size": 8,
    "model.patch_size": 4,
    "model.num_classes": 3,
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.num_layers": 1,
    "model.ffn_hidden": (24,),
    "model.kernel_backend": "reference",
    "model.moe.num_experts": EXPERTS,
    "model.moe.hidden": 8,
    "model.moe.shared_hidden": 8,
    "eval.metrics": ("routing",),
}


class Pictures(list):
    """Records of random pictures of three classes, one without a label."""

    name, version, split = "made:pictures", "1", "val"
    categories = ("round", "long", "flat")

    def __init__(self):
        draw = np.random.default_rng(0)
        super().__init__(
            {"id": str(i), "label": label, "image": draw.integers(0, 256, (8, 8, 3), np.uint8)}
            for i, label in enumerate(LABELS)
        )


@pytest.fixture(scope="module")
def evaluated():
    """(context, its result); blocks begin as the identity, so parameters are drawn."""
    config = load_config("dit_moe", FIELDS)
    setup = prepare_model(config, jax.devices()[:1])
    with jax.set_mesh(setup.mesh):
        params = setup.recipe.create().params
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(scale=0.5, size=leaf.shape), leaf.dtype)
    params = jax.tree.map(draw, params)
    pipeline = ImagePipeline(config, Pictures())
    context = setup.eval_context(params, pipeline, pipeline)
    return context, run_evaluators(context, eval_plans(config.eval))


def test_counts_by_noise_level(evaluated):
    """Against the choices that the model records at each level; filler rows are left out."""
    context, result = evaluated
    record = RoutingRecord(**result.arrays["val/routing"])
    batch = {
        "images": np.stack([picture["image"] for picture in context.pipeline.source]),
        "labels": np.asarray(LABELS, np.int32),
        "index": np.arange(len(LABELS), dtype=np.int32),
    }

    @jax.jit
    def choose(level):
        noisy = noisy_pictures(context.config.objective, 3, batch, level, routing.TIMES)[0]
        outputs = context.model.apply({"params": context.params}, noisy, record=True)
        return outputs.aux["segment_0"]["block_0"]["moe"]["router"]["expert_ids"][0]

    by_time, by_class = np.zeros((routing.TIMES, EXPERTS)), np.zeros((3, EXPERTS))
    with jax.set_mesh(context.mesh):
        for level in range(routing.TIMES):
            for label, ids in zip(LABELS, np.asarray(choose(level)), strict=True):
                counts = np.bincount(ids.ravel(), minlength=EXPERTS)
                by_time[level] += counts
                by_class[label] += counts * (label >= 0)
    assert record.by_time[0].tolist() == by_time.tolist()
    assert record.by_class[0].tolist() == by_class.tolist()
    assert record.tokens.tolist() == [len(LABELS) * PATCHES * routing.TIMES]
    given = (entropy(by_time) * by_time.sum(axis=1)).sum() / by_time.sum()
    assert result.values["routing/time_entropy"] == pytest.approx(given)
    assert set(result.values) == set(routing.metric_names(context.config))
    assert np.all(np.diff(record.times) > 0)
    names = ("experts", "together", "classes", "places", "patches", "times")
    assert set(result.images) == {f"val/routing_{name}" for name in names}


def test_a_level_is_the_same_part_of_the_times_for_every_picture(evaluated):
    """The same noise at each evaluation, whatever the other pictures of the batch are."""
    context, _ = evaluated
    batch = {
        "images": np.zeros((4, 8, 8, 3), np.uint8),
        "labels": np.zeros(4, np.int32),
        "index": np.asarray([7, 3, 7, 5], np.int32),
    }
    objective = context.config.objective
    _, _, eps, times = noisy_pictures(objective, 3, batch, 2, 8)
    np.testing.assert_array_equal(eps[0], eps[2])
    assert times[0] == times[2] != times[1]
    _, _, _, earlier = noisy_pictures(objective, 3, batch, 1, 8)
    assert max(earlier) <= min(times)
