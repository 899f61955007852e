"""CLIP-MoE's diversified multiplet upcycling (arXiv 2409.19291): stages of one model as experts.

From a trained model on, each stage clusters all training pairs by its features, and trains on with
negatives of the same cluster alone, so that what the clusters are about is of no more use; only
feed-forward layers are trained. What the stages made of these layers become experts side by side,
and only their routers are trained in the end::

    moejax train --config clip --workdir runs/stage0
    python -m moejax.surgery.multiplet cluster runs/stage0 runs/clusters1.npz
    moejax train --config clip_moe:stage --workdir runs/stage1
        --config.train.init_from=runs/stage0 --config.data.clusters=runs/clusters1.npz
        --config.objective.negatives=cluster
    python -m moejax.surgery.multiplet cluster runs/stage1 runs/clusters2.npz runs/clusters1.npz
    ...
    python -m moejax.surgery.multiplet assemble runs/experts runs/stage0 runs/stage1 ...
    moejax train --config clip_moe --workdir runs/clip_moe --config.train.init_from=runs/experts

A pair's cluster is that of its two features side by side, together with those of the stages before:
what has been parted stays so. Departure: how features of pictures and texts are joined is ours.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from moejax.config.trunk import TrunkConfig
from moejax.errors import UserError
from moejax.nn.stack import segments_of
from moejax.ops.kmeans import fit_kmeans, nearest

CLUSTERS = 9
_USAGE = """usage: python -m moejax.surgery.multiplet cluster WORKDIR FILE [FILE_BEFORE]
       python -m moejax.surgery.multiplet assemble WORKDIR STAGE STAGE ..."""


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


def layers_of(config: TrunkConfig, stack: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parameters of each block of a stack, in order."""
    layers = []
    for i, segment in enumerate(segments_of(config)):
        held = stack[f"segment_{i}"]
        for repeat in range(segment.repeats):
            for j in range(len(segment.kinds)):
                take = lambda leaf, repeat=repeat: leaf[repeat]
                layers.append(jax.tree.map(take, held[f"block_{j}"]))
    return layers


def as_stack(config: TrunkConfig, layers: Sequence[Any]) -> dict[str, Any]:
    """The inverse of :func:`layers_of`."""
    stack = {}
    for i, segment in enumerate(segments_of(config)):
        period = len(segment.kinds)
        last = segment.first + period * segment.repeats
        blocks = {
            f"block_{j}": jax.tree.map(
                lambda *leaves: jnp.stack(leaves), *layers[segment.first + j : last : period]
            )
            for j in range(period)
        }
        stack[f"segment_{i}"] = blocks
    return stack


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


def _cluster_command(workdir: str, file: str, before: str = "") -> str:
    from moejax.data.pair_pipeline import read_clusters, write_clusters
    from moejax.train.load import load

    run = load(workdir)
    pipeline = run.train_pipeline()
    size, count = run.config.data.batch_size, len(pipeline.source)
    features = []
    for start in range(0, count, size):
        rows = [pipeline.record_row(i % count) for i in range(start, start + size)]
        outputs = run.apply({name: np.stack([row[name] for row in rows]) for name in rows[0]})
        features.append((np.asarray(outputs.image), np.asarray(outputs.text)))
    image, text = (np.concatenate(side)[:count] for side in zip(*features, strict=True))
    ids = [pipeline.source[index]["id"] for index in range(count)]
    earlier = read_clusters(Path(before), ids)[0] if before else None
    clusters = cluster_pairs(image, text, CLUSTERS, earlier)
    write_clusters(Path(file), ids, clusters)
    return f"{file}: {count} pairs in {clusters.max() + 1} clusters"


def _assemble_command(workdir: str, *stages: str) -> str:
    from moejax.config import load_config
    from moejax.train.checkpoint import Checkpoints
    from moejax.train.load import load
    from moejax.train.setup import prepare_model
    from moejax.train.workdir import write_record

    runs = [load(stage) for stage in stages]
    dense, config = runs[0].config.model, load_config("clip_moe")
    model = dataclasses.replace(
        dense,
        moe=dataclasses.replace(config.model.moe, num_experts=len(runs)),
        block_pattern=config.model.block_pattern,
        text=dataclasses.replace(dense.text, block_pattern=config.model.text.block_pattern),
    )
    config = dataclasses.replace(runs[0].config, model=model)
    setup = prepare_model(config)

    def edit(drawn: Any, params: Any, spent: Any) -> Any:
        del spent
        return assemble(config.model, drawn, dense, params)

    state = setup.recipe.create(edit, [run.params for run in runs], ())
    Path(workdir).mkdir(parents=True, exist_ok=True)
    write_record(Path(workdir), config, {})
    checkpoints = Checkpoints(Path(workdir) / "checkpoints")
    checkpoints.save(0, state, {}, setup.mesh)
    checkpoints.close()
    return f"{workdir}: {len(runs)} stages as experts"


if __name__ == "__main__":
    commands = {"cluster": (_cluster_command, 2, 3), "assemble": (_assemble_command, 3, 99)}
    name, *arguments = sys.argv[1:] or [""]
    run, least, most = commands.get(name, (None, 0, 0))
    if run is None or not least <= len(arguments) <= most:
        sys.exit(_USAGE)
    try:
        print(run(*arguments))
    except UserError as error:
        sys.exit(f"moejax: error: {error}")
