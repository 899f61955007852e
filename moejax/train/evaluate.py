"""Evaluators by name, when and on what they run, and the early stop.

An evaluator is a function ``(EvalContext) -> {"text/loss": 5.1, ...}`` or ``-> EvalResult`` where
it also draws pictures. ``eval.metrics`` names those that run, each by an entry ``NAME``,
``NAME@SPLIT`` or ``NAME@SPLIT/EVERY`` (:class:`EvalPlan`). Their values appear in metrics.jsonl
under ``eval/``, those of another split than ``eval.split`` under ``eval/SPLIT/``. The function may
carry two attributes, so that a mistake is found before a run starts:

* ``metric_names``: a function of the config that lists the names it can return;
* ``check``: a function of the config that raises UserError where the evaluator cannot run.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moejax.config import Registry
from moejax.config.schema import Config, EvalConfig
from moejax.data.records import SPLITS
from moejax.errors import UserError, did_you_mean
from moejax.parallel.batches import put_batch
from moejax.parallel.mesh import replicated

# What the names of a baseline's values begin with, and its title in the table.
BASELINES = {
    "chance_": "chance",
    "majority_": "class frequencies",
    "unigram_": "unigram baseline",
    "kmeans_": "k-means",
    "pca_": "PCA",
    "gaussian_": "Gaussian",
    "shuffled_": "shuffled tokens",
    "floor_": "real against real",
    "real_": "real pictures",
}

_ENTRY = re.compile(r"([^@/\s]+)(?:@([^@/\s]+))?(?:/([^@/\s]+))?")


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """What an evaluation found.

    Attributes:
      values: numbers by name.
      images: pictures by name, each [h, w, 3] uint8.
      arrays: what a report or a notebook needs beside them: sets of arrays by name.
      notes: lines for whoever reads the numbers, printed below them.
    """

    values: dict[str, float]
    images: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    arrays: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def joined(self, other: "EvalResult") -> "EvalResult":
        """Both together."""
        return EvalResult(
            {**self.values, **other.values},
            {**self.images, **other.images},
            {**self.arrays, **other.arrays},
            self.notes + other.notes,
        )

    def __post_init__(self):
        for name, image in self.images.items():
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(
                    f"image {name!r} of an evaluator is {image.dtype}{list(image.shape)}, "
                    "not uint8[h,w,3]"
                )


# eval.metrics -> function(EvalContext) -> {name: value} or EvalResult.
EVALUATORS: Registry[Callable[["EvalContext"], dict[str, float] | EvalResult]] = Registry(
    "evaluator"
)


@dataclasses.dataclass(frozen=True)
class EvalPlan:
    """One entry of ``eval.metrics``.

    Attributes:
      name: of the evaluator.
      split: of the data that it runs on.
      every: steps between its evaluations; 0 runs it after the last step only.
      prefix: what the names of its values begin with: "", or "SPLIT/" for another split than
        ``eval.split``.
    """

    name: str
    split: str
    every: int
    prefix: str = ""

    def due(self, step: int) -> bool:
        """Whether it is time for it after ``step`` steps (all run after the last one)."""
        return self.every > 0 and step % self.every == 0


def eval_plans(config: EvalConfig) -> tuple[EvalPlan, ...]:
    """The entries of ``eval.metrics``; one entry may hold several, parted by commas.

    Raises:
      UserError: an entry that is not of its form, names no evaluator or split, or comes twice.
    """
    plans: dict[tuple[str, str], EvalPlan] = {}
    for entry in map(str.strip, ",".join(config.metrics).split(",")):
        if not entry:
            continue
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise UserError(f"eval.metrics: {entry!r} is not NAME, NAME@SPLIT or NAME@SPLIT/EVERY")
        name, split, every = match[1], match[2] or config.split, match[3] or str(config.every)
        EVALUATORS.get(name, field="eval.metrics")
        if split not in SPLITS:
            raise UserError(
                f"eval.metrics: {entry!r}: no split {split!r}{did_you_mean(split, SPLITS)}"
            )
        if not every.isdecimal():
            raise UserError(f"eval.metrics: {entry!r}: {every!r} is no number of steps")
        if (name, split) in plans:
            raise UserError(f"eval.metrics: names {name!r} on {split} twice")
        prefix = "" if split == config.split else f"{split}/"
        plans[name, split] = EvalPlan(name, split, int(every), prefix)
    return tuple(plans.values())


def on_split(config: Config, split: str) -> Config:
    """``config`` with each of its evaluators on ``split`` alone."""
    names = dict.fromkeys(plan.name for plan in eval_plans(config.eval))
    return dataclasses.replace(
        config, eval=dataclasses.replace(config.eval, split=split, metrics=tuple(names))
    )


def with_metrics(config: Config, metrics: Sequence[str]) -> Config:
    """``config`` with other entries of ``eval.metrics``, checked; nothing is best or stops then."""
    own = dataclasses.replace(config.eval, metrics=tuple(metrics), best_metric="", patience=0)
    config = dataclasses.replace(config, eval=own)
    check_evaluators(config)
    return config


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
      programs: jitted functions, and what else evaluators keep from one evaluation to the next.
      others: pipelines of the splits beside ``eval.split`` that ``eval.metrics`` names.
      split: that of ``pipeline``; "" stands for ``eval.split``.
    """

    config: Config
    model: Any
    objective: Any
    params: Any
    pipeline: Any
    train_pipeline: Any
    mesh: jax.sharding.Mesh
    programs: dict[str, Any] = dataclasses.field(default_factory=dict)
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    split: str = ""

    def with_params(self, params: Any) -> "EvalContext":
        """The same context for other parameters; compiled functions are shared."""
        return dataclasses.replace(self, params=params)

    def on(self, split: str) -> "EvalContext":
        """The same context for the data of another split."""
        if split == (self.split or self.config.eval.split):
            return dataclasses.replace(self, split=split)
        return dataclasses.replace(self, split=split, pipeline=self.others[split])

    def program(self, name: str, function: Callable) -> Callable:
        """``jax.jit(function)``, compiled once per run: ``name`` must stand for one function.

        Its outputs are whole on every device, so that every host can read them.
        """
        jitted = jax.jit(function, out_shardings=replicated(self.mesh))
        return self.programs.setdefault(name, jitted)

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make()`` returned at the first call with this name."""
        if name not in self.programs:
            self.programs[name] = make()
        return self.programs[name]

    def batches(self) -> Iterator[tuple[dict, dict]]:
        """One pass over (at most ``eval.batches`` batches of) the split: (numpy, on device).

        Each host makes whole batches, from which evaluators count on every one the same.
        """
        for batch in self.pipeline.eval_batches(self.config.eval.batches):
            yield batch, put_batch(batch, self.mesh)


def evaluate(context: EvalContext) -> dict[str, float]:
    """The values of all evaluators that ``eval.metrics`` names."""
    return run_evaluators(context, eval_plans(context.config.eval)).values


def run_evaluators(context: EvalContext, plans: Sequence[EvalPlan]) -> EvalResult:
    """The values of ``plans`` by their names in metrics.jsonl less ``eval/``, pictures and notes.

    A picture is called ``SPLIT/NAME``, also that of ``eval.split``: pictures of several splits
    share a folder. So are arrays.

    Raises:
      UserError: an evaluator is not registered, or two return a value of the same name.
    """
    values: dict[str, float] = {}
    images: dict[str, np.ndarray] = {}
    arrays: dict[str, dict[str, np.ndarray]] = {}
    notes: tuple[str, ...] = ()
    owners: dict[str, str] = {}
    with jax.set_mesh(context.mesh):
        for plan in plans:
            found = EVALUATORS.get(plan.name, field="eval.metrics")(context.on(plan.split))
            result = found if isinstance(found, EvalResult) else EvalResult(found)
            own = {plan.prefix + name: value for name, value in result.values.items()}
            _claim(owners, own, plan.name)
            values.update(own)
            images.update({f"{plan.split}/{name}": image for name, image in result.images.items()})
            arrays.update({f"{plan.split}/{name}": held for name, held in result.arrays.items()})
            notes += tuple(plan.prefix + note for note in result.notes)
    return EvalResult(values, images, arrays, notes)


def _claim(owners: dict[str, str], names: Iterable[str], evaluator: str) -> None:
    for name in names:
        if owners.setdefault(name, evaluator) != evaluator:
            raise UserError(
                f"eval.metrics: {owners[name]!r} and {evaluator!r} both return {name!r}; "
                "leave one out"
            )


def check_evaluators(config: Config) -> None:
    """UserError if ``eval.metrics``, ``best_metric`` or ``patience`` cannot be what they say."""
    plans = eval_plans(config.eval)
    owners: dict[str, str] = {}
    steps: dict[str, int] = {}
    all_known = True
    for plan in plans:
        evaluator = EVALUATORS.get(plan.name)
        getattr(evaluator, "check", lambda config: None)(config)
        names = getattr(evaluator, "metric_names", None)
        all_known &= names is not None
        own = [plan.prefix + name for name in (names(config) if names else ())]
        _claim(owners, own, plan.name)
        steps.update(dict.fromkeys(own, plan.every))
    best = config.eval.best_metric.removeprefix("-")
    if best and all_known and best not in owners:
        raise UserError(
            f"eval.best_metric: eval.metrics={config.eval.metrics} measures no {best!r}"
            f"{did_you_mean(best, owners)}"
        )
    every = steps.get(best, max((plan.every for plan in plans), default=0))
    if config.eval.patience and not every:
        raise UserError(
            f"eval.patience: {best!r} is measured after the last step only; set eval.every"
        )


def metric_score(best_metric: str, values: Mapping[str, float]) -> float:
    """``eval.best_metric`` in ``values``, turned so that less is better; inf if it is not there."""
    name = best_metric.removeprefix("-")
    value = values.get(name, math.nan)
    sign = 1 if name == best_metric else -1
    return sign * value if math.isfinite(value) else math.inf


class Patience:
    """How many evaluations in a row had no better ``eval.best_metric``: the early stop.

    All of it follows from the rows of metrics.jsonl, so a run that goes on counts as one that was
    never stopped, also when ``eval.patience`` was changed between. An evaluation whose value is
    not finite is in no row, and does not count.

    Attributes:
      best: the lowest score (:func:`metric_score`) so far, and ``best_step`` where it was.
      since: evaluations since then.
    """

    def __init__(self, config: EvalConfig, rows: Iterable[Mapping[str, Any]] = ()):
        self.metric, self.limit = config.best_metric, config.patience
        self.best, self.best_step, self.since = math.inf, 0, 0
        for row in rows:
            self.note(
                row["step"],
                {
                    name.removeprefix("eval/"): value
                    for name, value in row.items()
                    if name.startswith("eval/")
                },
            )

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """Counts an evaluation after ``step`` steps, if it measured the metric."""
        score = metric_score(self.metric, values)
        if score < self.best:
            self.best, self.best_step, self.since = score, step, 0
        elif math.isfinite(score):
            self.since += 1

    @property
    def exhausted(self) -> bool:
        """Whether the run is to stop."""
        return 0 < self.limit <= self.since

    def describe(self) -> str:
        """``"text/loss is no better than 5.1234 at step 80 in 2 evaluations, of 3 allowed"``."""
        name = self.metric.removeprefix("-")
        best = self.best if name == self.metric else -self.best
        count = f"{self.since} evaluation" + ("s" if self.since > 1 else "")
        return (
            f"{name} is no better than {best:.4f} at step {self.best_step} in {count}, "
            f"of {self.limit} allowed (eval.patience)"
        )


def format_table(values: dict[str, float]) -> str:
    """The values as a table: a row per group and quantity, the baseline of it beside it."""
    prefixes = [p for p in BASELINES if any(p in name for name in values)]
    rows = [("", "model", ", ".join(BASELINES[prefix] for prefix in prefixes))]
    for name, value in values.items():
        group, slash, quantity = name.rpartition("/")
        if quantity.startswith(tuple(prefixes)):
            continue
        found = (values.get(f"{group}{slash}{prefix}{quantity}") for prefix in prefixes)
        baseline = next((value for value in found if value is not None), None)
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
