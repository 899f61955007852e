"""A trained model from its workdir, for evaluation, sampling and notebooks."""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from moejax.config import freeze
from moejax.config.schema import Config, MeshConfig
from moejax.errors import UserError
from moejax.parallel.mesh import check_mesh
from moejax.train.checkpoint import Checkpoints, saved_steps
from moejax.train.evaluate import EvalContext
from moejax.train.setup import ModelSetup, open_pipeline, prepare_model
from moejax.train.workdir import read_record


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with trained parameters.

    Attributes:
      config: the experiment, with the mesh of this machine.
      model: Linen module, called as ``model.apply({"params": params}, batch, train=False)``.
      objective: function ``(outputs, batch, rng) -> LossSums``.
      params: the parameters (their moving average where ``optim.ema_decay`` > 0).
      step: the step they are from.
      setup: mesh and shapes that they were restored with.
      workdir: the run.
      data_version: of the training data that it was trained on; None if it is not recorded.
    """

    config: Config
    model: Any
    objective: Callable
    params: Any
    step: int
    setup: ModelSetup
    workdir: Path
    data_version: str | None

    def train_pipeline(self) -> Any:
        """The training data as it is now; warns on stderr if the run was trained on other data."""
        pipeline = open_pipeline(self.config, "train")
        if self.data_version not in (None, pipeline.version):
            print(
                f"moejax: warning: the data or the tokenizers changed since {self.workdir} was "
                f"made (version {self.data_version} then, {pipeline.version} now); with another "
                "image tokenizer the pictures mean nothing",
                file=sys.stderr,
            )
        return pipeline

    def eval_context(self, split: str | None = None) -> EvalContext:
        """What evaluators take, for ``split`` (default: ``eval.split``); opens the data."""
        train = self.train_pipeline()
        split = split or self.config.eval.split
        pipeline = train if split == "train" else open_pipeline(self.config, split)
        return self.setup.eval_context(self.params, pipeline, train)


def load(workdir: str | os.PathLike, step: int | None = None) -> Loaded:
    """The model of a run at ``step`` (default: the newest checkpoint); needs none of its data.

    A run whose mesh this machine does not have is loaded on the devices there are.

    Raises:
      UserError: there is no run, or no such checkpoint.
    """
    workdir = Path(workdir)
    record = read_record(workdir)
    if record is None:
        raise UserError(f"--workdir {workdir}: no run there (no config.json)")
    steps = saved_steps(workdir / "checkpoints")
    if not steps:
        raise UserError(f"--workdir {workdir}: no checkpoint there; train it first")
    if step is None:
        step = steps[-1]
    if step not in steps:
        raise UserError(
            f"--step {step}: no such checkpoint in {workdir}; there are: "
            f"{', '.join(map(str, steps))}"
        )
    groups = {field.name for field in dataclasses.fields(Config)}
    config = freeze({name: value for name, value in record.items() if name in groups})
    setup = prepare_model(*_on_this_machine(config))
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    try:
        params = checkpoints.restore_eval_params(step, setup.recipe.abstract)
    finally:
        checkpoints.close()
    data_version = record.get("made_with", {}).get("data_version")
    return Loaded(
        setup.config, setup.model, setup.objective, params, step, setup, workdir, data_version
    )


def _on_this_machine(config: Config) -> tuple[Config, list[Any]]:
    """The config with a mesh that fits, and its devices: all of them, or else the first."""
    everything = jax.devices()
    spread = MeshConfig() if config.mesh.fsdp == 1 else MeshConfig(data=1, fsdp=-1)
    for mesh in (config.mesh, spread):
        fitting = dataclasses.replace(config, mesh=mesh)
        try:
            check_mesh(fitting, len(everything))
        except UserError:
            continue
        return fitting, everything
    return dataclasses.replace(config, mesh=MeshConfig()), everything[:1]
