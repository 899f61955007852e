"""A trained model from its workdir, for evaluation, sampling and notebooks."""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from moejax.config import freeze
from moejax.config.packages import import_recorded
from moejax.config.schema import Config, MeshConfig
from moejax.errors import UserError
from moejax.parallel.batches import put_batch
from moejax.parallel.mesh import check_mesh
from moejax.train.checkpoint import Checkpoints, saved_steps
from moejax.train.evaluate import (
    EvalContext,
    eval_plans,
    evaluate,
    on_split,
    with_metrics,
)
from moejax.train.setup import ModelSetup, open_pipeline, prepare_model
from moejax.train.workdir import read_record

if TYPE_CHECKING:
    from moejax.generate.api import Sampler


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with trained parameters.

    For example::

        run = moejax.load("runs/quickstart")
        outputs = run.apply(run.train_pipeline().batch(0))
        run.evaluate("test")  # {"loss": 5.2, "text/loss": 6.1, ...}
        sample_images(run.sampler(), ["red apple"])  # of moejax.generate.api

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

    def apply(self, batch: dict[str, Any]) -> Any:
        """The model's outputs for a batch of arrays, whose rows divide over the devices."""
        with jax.set_mesh(self.setup.mesh):
            return self._forward(self.params, put_batch(batch, self.setup.mesh))

    @functools.cached_property
    def _forward(self) -> Callable[[Any, dict], Any]:
        return jax.jit(lambda params, batch: self.model.apply({"params": params}, batch))

    def evaluate(self, split: str | None = None) -> dict[str, float]:
        """The values of ``moejax eval``: what ``eval.metrics`` names; all on ``split`` if given."""
        return evaluate(self.eval_context(split))

    def sampler(self) -> "Sampler":
        """What the functions of moejax.generate.api sample from."""
        from moejax.generate.api import sampler_of

        return sampler_of(self)

    def eval_context(self, split: str | None = None, metrics: Sequence[str] = ()) -> EvalContext:
        """What evaluators take; opens the data. With a ``split`` all run on that one alone.

        ``metrics`` are entries to run instead of those of ``eval.metrics``.
        """
        config = with_metrics(self.config, metrics) if metrics else self.config
        config = config if split is None else on_split(config, split)
        opened = {"train": self.train_pipeline()}
        for name in (config.eval.split, *(plan.split for plan in eval_plans(config.eval))):
            if name not in opened:
                opened[name] = open_pipeline(config, name)
        setup = dataclasses.replace(self.setup, config=config)
        return setup.eval_context(self.params, opened[config.eval.split], opened["train"], opened)


def load(workdir: str | os.PathLike, step: int | None = None) -> Loaded:
    """The model of a run at ``step`` (default: the newest checkpoint); ``moejax.load``.

    None of its data is needed until it is asked for. A run whose mesh this machine does not have is
    loaded on the devices there are; packages of the user's own that it was trained with are
    imported. For example::

        run = moejax.load("runs/quickstart")
        run.step, run.config.optim.learning_rate
        run.evaluate()

    Raises:
      UserError: there is no run, no such checkpoint, or a package is missing.
    """
    workdir = Path(workdir)
    record = read_record(workdir)
    if record is None:
        raise UserError(f"--workdir {workdir}: no run there (no config.json)")
    import_recorded(record, workdir)
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
