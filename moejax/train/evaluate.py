"""Evaluators by name, and what they are given.

An evaluator is a function ``(EvalContext) -> {"text/loss": 5.1, ...}``; ``eval.metrics`` names
those that run, and their values appear in metrics.jsonl under ``eval/``. It may carry an attribute
``metric_names``, a function of the config that lists the names it will return: ``eval.best_metric``
is then checked before a run starts.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from moejax.config import Registry
from moejax.config.schema import Config
from moejax.errors import UserError, did_you_mean
from moejax.parallel.mesh import batch_sharding

# What the names of a baseline's values begin with, and its title in the table.
BASELINES = {"unigram_": "unigram baseline", "kmeans_": "k-means"}

# eval.metrics -> function(EvalContext) -> {name: value}.
EVALUATORS: Registry[Callable[["EvalContext"], dict[str, float]]] = Registry("evaluator")


@dataclasses.dataclass(frozen=True)
class EvalContext:
    """One model and the data to judge it on.

    Attributes:
      config: the experiment.
      model: Linen module.
      objective: function ``(outputs, batch, rng) -> LossSums``.
      params: the parameters to judge (the moving average where one is kept).
      pipeline: of the split that is evaluated.
      train_pipeline: of the training split, for what baselines are fitted on.
      mesh: the device mesh; evaluators run inside ``jax.set_mesh(mesh)``.
      programs: jitted functions by name, kept from one evaluation to the next.
    """

    config: Config
    model: Any
    objective: Any
    params: Any
    pipeline: Any
    train_pipeline: Any
    mesh: jax.sharding.Mesh
    programs: dict[str, Callable] = dataclasses.field(default_factory=dict)

    def with_params(self, params: Any) -> "EvalContext":
        """The same context for other parameters; compiled functions are shared."""
        return dataclasses.replace(self, params=params)

    def program(self, name: str, function: Callable) -> Callable:
        """``jax.jit(function)``, compiled once per run: ``name`` must stand for one function."""
        return self.programs.setdefault(name, jax.jit(function))

    def batches(self) -> Iterator[tuple[dict, dict]]:
        """One pass over (at most ``eval.batches`` batches of) the split: (numpy, on device)."""
        for batch in self.pipeline.eval_batches(self.config.eval.batches):
            yield batch, put_batch(batch, self.mesh)


def put_batch(batch: dict, mesh: jax.sharding.Mesh) -> dict:
    """The numpy arrays of ``batch`` on the devices, rows over the data axes."""
    return jax.device_put(batch, batch_sharding(mesh))


def evaluate(context: EvalContext) -> dict[str, float]:
    """Runs the evaluators that ``eval.metrics`` names.

    Raises:
      UserError: an evaluator is not registered.
    """
    values: dict[str, float] = {}
    with jax.set_mesh(context.mesh):
        for name in context.config.eval.metrics:
            values.update(EVALUATORS.get(name, field="eval.metrics")(context))
    return values


def check_evaluators(config: Config) -> None:
    """UserError if an evaluator or ``eval.best_metric`` cannot be what it names."""
    known: list[str] | None = []
    for name in config.eval.metrics:
        names = getattr(EVALUATORS.get(name, field="eval.metrics"), "metric_names", None)
        known = None if known is None or names is None else [*known, *names(config)]
    best = config.eval.best_metric.removeprefix("-")
    if best and known is not None and best not in known:
        raise UserError(
            f"eval.best_metric: eval.metrics={config.eval.metrics} measures no {best!r}"
            f"{did_you_mean(best, known)}"
        )


def format_table(values: dict[str, float]) -> str:
    """The values as a table: a row per group and quantity, the baseline of it beside it."""
    prefix = next((p for p in BASELINES if any(p in name for name in values)), "")
    rows = [("", "model", BASELINES.get(prefix, ""))]
    for name, value in values.items():
        group, slash, quantity = name.rpartition("/")
        if prefix and quantity.startswith(prefix):
            continue
        baseline = values.get(f"{group}{slash}{prefix}{quantity}") if prefix else None
        label = f"{group} {quantity}".strip().replace("_", " ")
        rows.append((label, f"{value:.4f}", "" if baseline is None else f"{baseline:.4f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
