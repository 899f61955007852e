"""A run that is made of another: written once, read by ``eval``, ``load`` and ``init_from``."""

import dataclasses
import os
from pathlib import Path

import jax

from moejax.errors import UserError
from moejax.surgery.dense import dense_config, dense_params
from moejax.train.checkpoint import Checkpoints
from moejax.train.load import load
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
    if to.exists():
        raise UserError(f"--to {to}: is there already; name a new folder")
    run = load(workdir, step)
    record = read_record(workdir) or {}
    there = run.config.model
    config = dense_config(run.config)
    setup = prepare_model(config, list(run.setup.mesh.devices.flat))
    make = lambda drawn, kept, spent: dense_params(kept, config.model, there)
    state = setup.recipe.create(make, jax.device_get(run.params))
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    about = dataclasses.replace(config.about, total_params=count, active_params=count)
    made_with = {**record.get("made_with", {}), "converted_from": f"{workdir}@{run.step}"}
    write_record(to, dataclasses.replace(config, about=about), made_with)
    checkpoints = Checkpoints(to / "checkpoints")
    try:
        state = state.replace(step=state.step + run.step)
        checkpoints.save(run.step, state, {}, setup.mesh)
    finally:
        checkpoints.close()
    return to
