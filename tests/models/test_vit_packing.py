"""Pictures that share a row are as they are alone, in values and in gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from moejax.analysis.flops import counted_flops, flops_per_token
from moejax.analysis.params import abstract_batch
from moejax.config.schema import Config, DataConfig
from moejax.config.vision import HEADS, ClassificationConfig
from moejax.errors import UserError
from moejax.models.vit import build_vit
from moejax.objectives.classification import classification
from moejax.ops.patchify import patchify
from moejax.ops.positions import grid_positions
from moejax.train.accuracy import score_classes

from .small_vit import CLASSES, EXPERTS, PATCH, SIDE, make_config

pytestmark = pytest.mark.usefixtures("quick_compiles")


def drawn_params(config):
    boxed = jax.eval_shape(
        build_vit(config).init, jax.random.key(0), {"images": jnp.zeros((1, SIDE, SIDE, 3))}
    )
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype)
    return jax.tree.map(draw, meta.unbox(boxed)["params"])


def picture(rows, columns, seed):
    shape = (1, PATCH * rows, PATCH * columns, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def packed(pictures, length, places):
    """One row of the pictures, in their order."""
    row = {
        "patches": np.zeros((1, length, PATCH**2 * 3), np.uint8),
        "image_id": np.zeros((1, length), np.int32),
        "places": np.zeros((1, length, 2), np.int32),
        "weights": np.zeros((1, places), np.float32),
    }
    begin = 0
    for i, image in enumerate(pictures):
        grid = patchify(image, PATCH)[0]
        here = slice(begin, begin + grid.shape[0] * grid.shape[1])
        row["patches"][0, here] = grid.reshape(-1, grid.shape[-1])
        row["image_id"][0, here] = i + 1
        row["places"][0, here] = grid_positions(*grid.shape[:2])
        row["weights"][0, i] = 1
        begin = here.stop
    return row


def apply_to(config, params):
    model = build_vit(config)
    return jax.jit(lambda batch: model.apply({"params": params}, batch))


PICTURES = [picture(4, 4, 0), picture(2, 3, 1), picture(2, 2, 2)]
CASES = [
    *({"head": head, "registers": 2} for head in HEADS),
    {"positions": "rope", "head": "class_token"},
    {"block_pattern": ("moe",), "moe": EXPERTS},
]


@pytest.mark.parametrize("changes", CASES, ids=["class", "map", "mean", "rope", "experts"])
def test_a_picture_in_a_row_is_what_it_is_alone(changes):
    config = make_config(**changes)
    params = drawn_params(config)
    apply = apply_to(config, params)
    together = apply(packed(PICTURES, 28, 4))
    assert together.pooled.shape == (1, 4, 16) and together.logits.shape == (1, 4, CLASSES)
    for i, image in enumerate(PICTURES):
        # Alone in a row that is as long, and so the same program.
        alone = apply(packed([image], 28, 4))
        np.testing.assert_allclose(together.pooled[0, i], alone.pooled[0, 0], atol=1e-5)
        np.testing.assert_allclose(together.logits[0, i], alone.logits[0, 0], atol=1e-5)
    # The largest without any row: the model on a batch of pictures.
    whole = apply({"images": PICTURES[0]})
    np.testing.assert_allclose(together.pooled[:, 0], whole.pooled, atol=1e-5)
    np.testing.assert_allclose(together.logits[:, 0], whole.logits, atol=1e-5)
    assert np.abs(together.pooled[0, 1] - together.pooled[0, 2]).max() > 1e-2


@pytest.mark.parametrize("head", HEADS)
def test_no_gradient_from_one_picture_to_another(head):
    config = make_config(head=head, registers=1)
    model, params = build_vit(config), drawn_params(config)
    row = packed(PICTURES, 28, 4)

    @jax.jit
    def influence(patches):
        def features(patches):
            return model.apply({"params": params}, {**row, "patches": patches}).pooled[0]

        return jnp.abs(jax.jacrev(features)(patches)).sum(axis=(1, 2, 4))

    # [picture, patch]
    found = np.asarray(influence(row["patches"].astype(np.float32)))
    for i in range(3):
        own = row["image_id"][0] == i + 1
        assert (found[i, own] > 0).all() and (found[i, ~own] == 0).all()


def test_pictures_of_weight_zero_take_no_part_in_the_routing():
    """Experts that choose among all tokens do not see them."""
    router = dataclasses.replace(EXPERTS.router, name="expert_choice")
    config = make_config(block_pattern=("moe",), moe=dataclasses.replace(EXPERTS, router=router))
    apply = apply_to(config, drawn_params(config))
    row = packed(PICTURES, 28, 4)
    row["weights"][0, 2] = 0
    before = apply(row).pooled[0, :2]
    other = packed([*PICTURES[:2], picture(2, 2, 9)], 28, 4)
    kept = apply(other).pooled[0, :2]
    other["weights"][0, 2] = 0
    np.testing.assert_allclose(apply(other).pooled[0, :2], before, atol=1e-5)
    assert np.abs(kept - before).max() > 1e-4


def test_loss_and_accuracy_count_pictures():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, CLASSES)), jnp.float32)
    labels = np.asarray([[0, 1, -1], [4, -1, -1]], np.int32)
    weights = np.asarray([[1, 1, 0], [1, 1, 0]], np.float32)
    rows = {"labels": labels, "weights": weights}
    flat = {"labels": labels.reshape(-1), "weights": weights.reshape(-1)}
    objective = classification(ClassificationConfig(), make_config())
    found = [
        objective(type("Outputs", (), {"logits": x, "aux": {}}), batch)
        for x, batch in ((logits, rows), (logits.reshape(-1, CLASSES), flat))
    ]
    assert float(found[0].weights["class"]) == 3
    assert float(found[0].mean("class")) == pytest.approx(float(found[1].mean("class")))
    scored = score_classes(logits, rows)
    assert int(scored["pictures"]) == 3


@pytest.mark.parametrize("head", HEADS)
def test_flops_of_a_row_by_formula_and_counted(head):
    config = Config(
        model=make_config(head=head, registers=2),
        data=DataConfig(
            format="images", image_size=16, image_sizes=(16, 8), max_patches=32, batch_size=2
        ),
        objective=ClassificationConfig(),
    )
    assert config.images_per_row == 8
    assert abstract_batch(config)["patches"].shape == (2, 32, 48)
    counted = counted_flops(config).forward.nominal
    # What is not in the formula is the mean over the patches of each picture.
    assert counted == pytest.approx(flops_per_token(config), rel=0.02)


def test_learned_places_are_refused():
    config = make_config(positions="learned")
    with pytest.raises(UserError, match="model.positions: 'learned' places are those of one grid"):
        apply_to(config, drawn_params(config))(packed(PICTURES, 28, 4))
