"""CLIP-MoE's diversified multiplet upcycling (arXiv 2409.19291): stages of one model as experts.

From a trained model on, each stage clusters all training pairs by its features, and trains on with
negatives of the same cluster alone, so that what the clusters are about is of no more use; only
feed-forward layers are trained. What the stages made of these layers become experts side by side,
and only their routers are trained in the end; docs/vision.md has the commands.

A pair's cluster is that of its two features side by side, together with those of the stages before:
what has been parted stays so. Departure: how features of pictures and texts are joined is ours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from moejax.config.trunk import TrunkConfig
from moejax.errors import UserError
from moejax.ops.kmeans import fit_kmeans, nearest
from moejax.surgery.layers import as_stack, layers_of

CLUSTERS = 9


def cluster_pairs(
    image: Float[np.ndarray, "n z"],
    text: Float[np.ndarray, "n z"],
    count: int,
    before: Int[np.ndarray, " n"] | None = None,
) -> Int[np.ndarray, " n"]:
    """The cluster of each pair by k-means of its features side by side, in parts of ``before``.

    Clusters are numbered from 0, by their number before and then by that of k-means.
    """
    features = np.concatenate([image, text], axis=1).astype(np.float32)
    cluster, _ = nearest(features, fit_kmeans(features, count))
    if before is not None:
        cluster = np.asarray(before, np.int64) * (cluster.max() + 1) + cluster
    return np.unique(cluster, return_inverse=True)[1].reshape(-1)


def multiplet(
    config: TrunkConfig, drawn: Mapping[str, Any], dense: TrunkConfig, stages: Sequence[Mapping]
) -> dict[str, Any]:
    """The stack of ``config`` whose experts are the feed-forward layers of the stages.

    Args:
      config: of the stack with experts, as many as there are stages.
      drawn: its parameters as initialised, of which routers are kept.
      dense: of the stages' stacks, which are as deep.
      stages: their parameters; what is no expert is that of the first.

    Raises UserError where shapes do not allow it.
    """
    layers = [layers_of(dense, stage) for stage in stages]
    fresh = layers_of(config, drawn)
    if len(fresh) != len(layers[0]):
        raise UserError(
            f"model.num_layers: {len(layers[0])} layers of the stages, {len(fresh)} of experts"
        )
    made = []
    for layer, own in zip(zip(*layers, strict=True), fresh, strict=True):
        base = dict(layer[0])
        if "moe" in own and "ffn" in base:
            weights = [one["ffn"] for one in layer]
            experts = {
                "wi_edf": jnp.concatenate([ffn["wi_mdf"] for ffn in weights]),
                "wo_efd": jnp.concatenate([ffn["wo_mfd"] for ffn in weights]),
            }
            del base["ffn"]
            base["moe"] = {**own["moe"], "experts": experts}
        _check_shapes(own, base)
        made.append(base)
    return as_stack(config, made)


def _check_shapes(wanted: Any, made: Any) -> None:
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (wanted, made)]
    if shapes[0] != shapes[1]:
        raise UserError(
            "the experts do not fit: give as many stages as model.moe.num_experts, of the same "
            f"widths and activation (wanted {shapes[0]}, made {shapes[1]})"
        )


def assemble(config: Any, drawn: Mapping[str, Any], dense: Any, stages: Sequence[Mapping]) -> dict:
    """The parameters of two towers with experts, from those of the dense stages.

    ``config`` and ``dense`` are the two TwoTowersConfig; all else is of the first stage.
    """
    made = dict(stages[0])
    for name, own, base in (
        ("image", config, dense),
        ("text", config.text_tower, dense.text_tower),
    ):
        stacks = [stage[name]["stack"] for stage in stages]
        stack = multiplet(own, drawn[name]["stack"], base, stacks)
        made[name] = {**made[name], "stack": stack}
    _check_shapes(drawn, made)
    return made
