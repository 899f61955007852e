"""Which text belongs to which picture, among those of a batch."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.config.contrastive import ContrastiveConfig, PairConfig
from moejax.objectives.base import OBJECTIVES, LossSums, Objective
from moejax.objectives.classification import augmented
from moejax.ops.contrastive import Pairs, pair_losses
from moejax.parallel.local import ROWS, run_local


@OBJECTIVES.register("contrastive")
def contrastive(config: ContrastiveConfig, model: PairConfig) -> Objective:
    """``objective.loss`` over all pairs of the batch, after ``objective.augment`` in training.

    The trained term is ``contrastive`` (moejax.ops.contrastive.pair_losses), a mean over the rows;
    ``contrastive_correct`` is the share of pictures whose likeliest text is a positive, ``scale``
    the factor of the products. Rows that only fill up a batch are neither rows nor negatives. On a
    mesh each device has the rows that it holds against those of all.
    """
    del model

    def prepare(batch: dict, rng: jax.Array) -> dict:
        return augmented(batch, rng, config.augment)

    def loss(outputs, batch: dict, rng=None) -> LossSums:
        del rng
        weights = batch["weights"].astype(outputs.image.dtype)
        count = len(weights)
        ids = jnp.arange(count) if config.positives == "pair" else batch[config.positives]
        clusters = jnp.zeros(count, jnp.int32)
        if config.negatives == "cluster":
            clusters = batch["cluster"]
        pairs = Pairs(outputs.image, outputs.text, ids, clusters, batch["weights"] > 0)
        nats, correct = run_local(
            functools.partial(pair_losses, kind=config.loss, chunk=config.chunk),
            (pairs, ROWS),
            (pairs, P()),
            (outputs.scale, P()),
            (outputs.bias, P()),
            tokens=(count, 1),
            out=ROWS,
        )
        terms = {"contrastive": nats, "contrastive_correct": correct}
        terms["scale"] = jnp.broadcast_to(outputs.scale, (count,))
        return LossSums(
            sums={name: (values * weights).sum() for name, values in terms.items()},
            weights={name: weights.sum() for name in terms},
            coefficients=(("contrastive", 1.0),),
        )

    return Objective(loss, prepare)
