"""The class of a picture."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.config.checks import require
from moejax.config.schema import AugmentConfig, ClassificationConfig, ViTConfig
from moejax.objectives.base import OBJECTIVES, LossSums, Objective
from moejax.ops.augment import crop, jitter, mirror, mixup


def class_losses(
    logits_bv: Float[Array, "b v"], labels_b: Int[Array, " b"], kind: str, smoothing: float
) -> Float[Array, " b"]:
    """Nats of each picture; a target is ``(1 - smoothing) onehot + smoothing / v``.

    ``kind`` "softmax" is the cross-entropy of one class of all (with smoothing arXiv 1512.00567,
    section 7), "sigmoid" the sum over the classes of that of each by itself, as V-MoE has it.
    """
    classes = logits_bv.shape[1]
    onehot = jax.nn.one_hot(labels_b, classes, dtype=logits_bv.dtype)
    target = (1 - smoothing) * onehot + smoothing / classes
    if kind == "sigmoid":
        return (jax.nn.softplus(logits_bv) - target * logits_bv).sum(axis=-1)
    return -(target * jax.nn.log_softmax(logits_bv)).sum(axis=-1)


def rank_of_label(logits_bv: Float[Array, "b v"], labels_b: Int[Array, " b"]) -> Int[Array, " b"]:
    """How many classes stand before the right one; of equal logits the lower class is first."""
    right = jnp.take_along_axis(logits_bv, labels_b[:, None], axis=1)
    earlier = jnp.arange(logits_bv.shape[1])[None] < labels_b[:, None]
    return ((logits_bv > right) | ((logits_bv == right) & earlier)).sum(axis=-1)


def labelled(batch: dict) -> Bool[Any, " b"]:
    """Which rows count: those that are no filler and have a label (it is not negative)."""
    return (batch["weights"] > 0) & (batch["labels"] >= 0)


def one_picture_a_row(logits: Float[Array, "... v"], batch: dict) -> tuple[Array, dict]:
    """Logits [n, v] and the batch's labels and weights [n], also of rows of several pictures."""
    flat = {name: batch[name].reshape(-1) for name in ("labels", "weights")}
    return logits.reshape(-1, logits.shape[-1]), {**batch, **flat}


def augmented(batch: dict, rng: Array, config: AugmentConfig) -> dict:
    """The batch with its ``images`` [b, h, w, c] changed at random; ``mirror`` [b] allows flips.

    Mixed pictures have ``other_labels`` [b] beside their ``labels``, and ``label_share`` [b], how
    much of the target is their own.
    """
    if config == AugmentConfig():
        # Also rows of patches, which nothing is done to.
        return batch
    images = batch["images"]
    crop_rng, mirror_rng, colour_rng, mixup_rng = jax.random.split(rng, 4)
    if config.crop_padding:
        images = crop(crop_rng, images, config.crop_padding)
    if config.flip != "none":
        flipped = mirror(mirror_rng, images)
        may = batch["mirror"] if config.flip == "allowed" else jnp.ones(len(images), bool)
        images = jnp.where(may[:, None, None, None], flipped, images)
    if config.brightness or config.contrast or config.saturation:
        strengths = (config.brightness, config.contrast, config.saturation)
        images = jitter(colour_rng, images, *strengths)
    batch = {**batch, "images": images}
    if config.mixup:
        images, other, share = mixup(mixup_rng, images, labelled(batch), config.mixup)
        others = {"other_labels": batch["labels"][other], "label_share": share}
        batch = {**batch, "images": images, **others}
    return batch


@OBJECTIVES.register("classification")
def classification(config: ClassificationConfig, model: ViTConfig):
    """Cross-entropy of the label of each picture, after ``objective.augment`` in training.

    The trained term is ``class``, in nats a picture; ``class_correct`` is the share of pictures
    whose label (of a mixed one that of the larger part) has the highest logit. Rows without a label
    count for nothing.

    Raises UserError for a model without classes.
    """
    require(
        getattr(model, "num_classes", 0) > 0,
        "model.num_classes",
        "objective 'classification' needs the number of classes",
    )

    def prepare(batch: dict, rng: Array) -> dict:
        return augmented(batch, rng, config.augment)

    def loss(outputs, batch: dict, rng=None) -> LossSums:
        del rng
        logits, batch = one_picture_a_row(outputs.logits, batch)
        counted = labelled(batch)
        weights = batch["weights"].astype(logits.dtype) * counted
        labels = jnp.maximum(batch["labels"], 0)
        nats = class_losses(logits, labels, config.loss, config.label_smoothing)
        if "label_share" in batch:
            # The loss is linear in the target: that of two labels by their shares.
            others = jnp.maximum(batch["other_labels"], 0)
            theirs = class_losses(logits, others, config.loss, config.label_smoothing)
            share = batch["label_share"].astype(nats.dtype)
            nats = share * nats + (1 - share) * theirs
        correct = (rank_of_label(logits, labels) == 0).astype(logits.dtype)
        terms = {"class": nats, "class_correct": correct}
        return LossSums(
            sums={name: (values * weights).sum() for name, values in terms.items()},
            weights={name: weights.sum() for name in terms},
            coefficients=(("class", 1.0),),
        )

    return Objective(loss, prepare)
