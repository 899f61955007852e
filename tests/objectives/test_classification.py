"""The classification objective: values by hand, who counts, and the augmentation in front."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.vision import AugmentConfig, ClassificationConfig, ViTConfig
from moejax.errors import UserError
from moejax.models.vit import ViTOutput
from moejax.objectives.classification import (
    augmented,
    class_losses,
    classification,
    rank_of_label,
)

MODEL = ViTConfig(num_classes=3)


def losses(logits, labels, weights, **fields):
    outputs = ViTOutput(None, None, {}, jnp.asarray(logits, jnp.float32))
    batch = {
        "labels": np.asarray(labels, np.int32),
        "weights": np.asarray(weights, np.float32),
    }
    return classification(ClassificationConfig(**fields), MODEL)(outputs, batch)


def test_label_smoothing_by_hand():
    """Probabilities 1/2, 1/4, 1/4; the target is 0.8 of the first class and 0.1 of the others."""
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.25]]))
    label = jnp.asarray([0])
    plain = class_losses(logits, label, "softmax", 0.0)
    np.testing.assert_allclose(plain, [math.log(2)], rtol=1e-6)
    smooth = class_losses(logits, label, "softmax", 0.3)
    np.testing.assert_allclose(smooth, [0.8 * math.log(2) + 0.2 * math.log(4)], rtol=1e-6)


def test_sigmoid_by_hand():
    """Logits 0: log 2 for each class; one that says no with probability 3/4 costs log 4/3."""
    logits = jnp.asarray([[0.0, 0.0, -math.log(3)]])
    got = class_losses(logits, jnp.asarray([1]), "sigmoid", 0.0)
    np.testing.assert_allclose(got, [2 * math.log(2) + math.log(4 / 3)], rtol=1e-6)


def test_fillers_and_pictures_without_a_label_count_for_nothing():
    rows = [[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]
    two = losses(rows[:2], [0, 2], [1, 1])
    four = losses(rows, [0, 2, -1, 0], [1, 1, 1, 0])
    for name in ("class", "class_correct"):
        assert float(four.weights[name]) == 2
        assert float(four.mean(name)) == pytest.approx(float(two.mean(name)))
    assert float(two.mean("class_correct")) == 0.5
    nats = [math.log(math.e**2 + 2) - 2, math.log(math.e**3 + 2)]
    assert float(two.total()) == pytest.approx(sum(nats) / 2, rel=1e-5)


def test_rank_counts_ties_by_their_order():
    logits = jnp.asarray([[1.0, 3.0, 3.0, 0.0]] * 4)
    np.testing.assert_array_equal(rank_of_label(logits, jnp.arange(4)), [2, 0, 1, 3])


def test_a_model_without_classes_is_refused():
    with pytest.raises(UserError, match="model.num_classes: "):
        classification(ClassificationConfig(), ViTConfig())


def prepared(images, **fields):
    config = ClassificationConfig(augment=AugmentConfig(**fields))
    objective = classification(config, MODEL)
    batch = {"images": jnp.asarray(images), "mirror": jnp.arange(len(images)) % 2 == 0}
    return np.asarray(objective.prepare(batch, jax.random.key(0))["images"])


def test_augmentation_is_what_the_config_says():
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(prepared(images), images)
    mirrored = prepared(images, flip="all")
    same = (mirrored == images).all(axis=(1, 2, 3))
    assert 16 < same.sum() < 48
    np.testing.assert_array_equal(mirrored[~same], images[~same, :, ::-1])
    allowed = prepared(images, flip="allowed")
    # Odd rows may not be mirrored.
    np.testing.assert_array_equal(allowed[1::2], images[1::2])
    assert (allowed[::2] != images[::2]).any()


def test_a_crop_moves_by_at_most_its_padding():
    images = np.zeros((256, 11, 11, 3), np.uint8)
    images[:, 5, 5] = 200
    moved = prepared(images, crop_padding=2)
    places = np.argwhere(moved[..., 0] == 200)
    assert len(places) == 256 and moved.dtype == np.uint8
    assert len(np.unique(places[:, 1:], axis=0)) == 25
    assert np.abs(places[:, 1:] - 5).max() == 2
    other = augmented(
        {"images": jnp.asarray(images)}, jax.random.key(1), AugmentConfig(crop_padding=2)
    )
    assert (np.asarray(other["images"]) != moved).any()


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_mixed_pictures_are_trained_on_both_labels(loss):
    """The loss of a target distribution, of sum 1, that has a part of each label."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 3)).astype(np.float32)
    labels, others = np.asarray([0, 1, 2, -1]), np.asarray([2, 1, 0, 1])
    share = np.asarray([0.75, 0.6, 1.0, 1.0], np.float32)
    batch = {
        "labels": labels,
        "weights": np.ones(4, np.float32),
        "other_labels": others,
        "label_share": share,
    }
    config = ClassificationConfig(loss=loss, label_smoothing=0.1)
    got = classification(config, MODEL)(ViTOutput(None, None, {}, jnp.asarray(logits)), batch)
    target = share[:3, None] * np.eye(3)[labels[:3]] + (1 - share[:3, None]) * np.eye(3)[others[:3]]
    target = 0.9 * target + 0.1 / 3
    np.testing.assert_allclose(target.sum(axis=1), 1, rtol=1e-6)
    if loss == "softmax":
        nats = -(target * jax.nn.log_softmax(logits[:3])).sum(axis=1)
    else:
        nats = (np.log1p(np.exp(logits[:3])) - target * logits[:3]).sum(axis=1)
    assert float(got.weights["class"]) == 3
    assert float(got.mean("class")) == pytest.approx(float(nats.mean()), rel=1e-5)


def test_mixup_and_colour_in_front_of_the_model():
    images = np.random.default_rng(1).integers(60, 160, (32, 4, 4, 3), np.uint8)
    labels = np.arange(32) % 3
    labels[5] = -1
    batch = {
        "images": jnp.asarray(images),
        "labels": jnp.asarray(labels),
        "weights": jnp.ones(32).at[7].set(0),
        "mirror": jnp.ones(32, bool),
    }
    make = lambda **fields: classification(
        ClassificationConfig(augment=AugmentConfig(**fields)), MODEL
    ).prepare(batch, jax.random.key(2))
    mixed = make(mixup=0.4)
    share = np.asarray(mixed["label_share"])
    assert share[5] == share[7] == 1 and share.min() < 0.9
    np.testing.assert_array_equal(mixed["images"][5], images[5])
    at = int(share.argmin())
    other = np.flatnonzero(
        [
            np.abs(share[at] * images[at] + (1 - share[at]) * image - mixed["images"][at]).max() < 1
            for image in images.astype(np.float32)
        ]
    )
    assert len(other) == 1 and labels[other[0]] == mixed["other_labels"][at]
    assert "label_share" not in make(flip="all")
    for name in ("brightness", "contrast", "saturation"):
        assert (np.asarray(make(**{name: 0.5})["images"]) != images).mean() > 0.3
    with pytest.raises(UserError, match="objective.augment.contrast: 1.5 is not in"):
        AugmentConfig(contrast=1.5)
    with pytest.raises(UserError, match="objective.augment.mixup: must not be negative"):
        AugmentConfig(mixup=-0.1)
