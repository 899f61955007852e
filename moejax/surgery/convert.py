"""A run, or a file, that is made of runs: written once, and whole or not at all."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.analysis.params import param_table
from moejax.config import Config, load_config
from moejax.config.contrastive import TwoTowersConfig
from moejax.data.pair_pipeline import read_clusters, write_clusters
from moejax.errors import UserError
from moejax.surgery.dense import dense_config, dense_params
from moejax.surgery.multiplet import CLUSTERS, assemble, cluster_pairs
from moejax.train.checkpoint import Checkpoints
from moejax.train.load import Loaded, load
from moejax.train.setup import prepare_model
from moejax.train.workdir import read_record, write_record


def convert_to_dense(
    workdir: str | os.PathLike, to: str | os.PathLike, step: int | None = None
) -> Path:
    """Writes the run in ``workdir`` as a dense model into the new folder ``to``.

    Its one checkpoint has the number of the step it is made of (default: the newest) and the
    parameters that are evaluated (the moving average where one is kept); the state of the optimizer
    is a new one, so that training goes on by ``train.init_from``.

    Returns:
      ``to``.

    Raises:
      UserError: no such run or step, its experts cannot be averaged
        (:func:`moejax.surgery.dense.dense_config`), or ``to`` is there already.
    """
    workdir, to = Path(workdir), Path(to)
    _check_new(to)
    run = load(workdir, step)
    config, there = dense_config(run.config), run.config.model
    made_of = f"{workdir}@{run.step}"
    record = read_record(workdir) or {}
    made_with = {**record.get("made_with", {}), "converted_from": made_of}

    def params(drawn: Any, kept: Any, spent: Any) -> Any:
        return dense_params(kept, config.model, there)

    return _write_run(run, to, config, made_with, run.step, params, jax.device_get(run.params))


def convert_to_experts(stages: Sequence[str | os.PathLike], to: str | os.PathLike) -> Path:
    """Writes the stages of CLIP-MoE as one model of their feed-forward layers into ``to``.

    All but the experts is that of the first stage; routers are drawn. Its one checkpoint is that of
    step 0.

    Returns:
      ``to``.

    Raises:
      UserError: fewer than two stages, one that is no run of ``two_towers`` or does not fit the
        others, or ``to`` is there already.
    """
    to = Path(to)
    _check_new(to)
    if len(stages) < 2:
        raise UserError("--workdir: name two stages or more, e.g. runs/stage0,runs/stage1")
    runs = [load(stage) for stage in stages]
    for stage, run in zip(stages, runs, strict=True):
        _check_pairs(stage, run.config)
    dense, like = runs[0].config.model, load_config("clip_moe").model
    assert isinstance(dense, TwoTowersConfig) and isinstance(like, TwoTowersConfig)
    model = dataclasses.replace(
        dense,
        moe=dataclasses.replace(like.moe, num_experts=len(runs)),
        block_pattern=like.block_pattern,
        text=dataclasses.replace(dense.text, block_pattern=like.text.block_pattern),
    )
    optim = dataclasses.replace(runs[0].config.optim, freeze=())
    config = dataclasses.replace(runs[0].config, model=model, optim=optim)

    def params(drawn: Any, kept: Any, spent: Any) -> Any:
        return assemble(model, drawn, dense, kept)

    made_with = {"converted_from": ", ".join(f"{run.workdir}@{run.step}" for run in runs)}
    kept = [jax.device_get(run.params) for run in runs]
    return _write_run(runs[0], to, config, made_with, 0, params, kept)


def write_pair_clusters(
    workdir: str | os.PathLike, to: str | os.PathLike, before: str | os.PathLike = ""
) -> int:
    """Writes the cluster of each training pair, by the features of a run, into the file ``to``.

    ``before`` is the file of the stage before, whose clusters are parted further.

    Returns:
      The number of clusters.

    Raises:
      UserError: ``workdir`` is no run on pairs, ``before`` is not of its data, or ``to`` is there.
    """
    to = Path(to)
    _check_new(to, "file")
    run = load(workdir)
    _check_pairs(workdir, run.config)
    pipeline = run.train_pipeline()
    size, count = run.config.data.batch_size, len(pipeline.source)
    ids = [pipeline.source[index]["id"] for index in range(count)]
    earlier = read_clusters(Path(before), ids)[0] if before else None
    features = []
    for start in range(0, count, size):
        rows = [pipeline.record_row(i % count) for i in range(start, start + size)]
        outputs = run.apply({name: np.stack([row[name] for row in rows]) for name in rows[0]})
        features.append((np.asarray(outputs.image), np.asarray(outputs.text)))
    image, text = (np.concatenate(side)[:count] for side in zip(*features, strict=True))
    clusters = cluster_pairs(image, text, CLUSTERS, earlier)
    write_clusters(to, ids, clusters)
    return int(clusters.max()) + 1


def _check_new(to: Path, kind: str = "folder") -> None:
    if to.exists():
        raise UserError(f"--to {to}: is there already; name a new {kind}")


def _check_pairs(workdir: str | os.PathLike, config: Config) -> None:
    if not isinstance(config.model, TwoTowersConfig):
        raise UserError(f"--workdir {workdir}: is a run of {config.model.name}, not of two_towers")


def _write_run(
    source: Loaded,
    to: Path,
    config: Config,
    made_with: dict,
    step: int,
    params: Callable,
    kept: Any,
) -> Path:
    """The folder ``to`` with one checkpoint; under another name until all of it is there.

    ``params(drawn, kept, ())`` gives the parameters, on the devices of ``source``.
    """
    setup = prepare_model(config, list(source.setup.mesh.devices.flat))
    state = setup.recipe.create(params, kept, ())
    table = param_table(setup.model, config, setup.mesh.size)
    about = dataclasses.replace(
        config.about, total_params=table.total, active_params=round(table.active)
    )
    part = to.with_name(f".{to.name}.part")
    # What a run that was killed has left.
    shutil.rmtree(part, ignore_errors=True)
    write_record(part, dataclasses.replace(config, about=about), made_with)
    checkpoints = Checkpoints(part / "checkpoints")
    try:
        checkpoints.save(step, state.replace(step=state.step + step), {}, setup.mesh)
    finally:
        checkpoints.close()
    part.rename(to)
    return to
