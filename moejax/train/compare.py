"""Runs a comparison: arm by arm, each run in a workdir of its own, each one once."""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from moejax.analysis.compare.arms import ArmSpec, parse_budget
from moejax.analysis.compare.plan import Arm, Plan, Run, make_plan
from moejax.analysis.compare.results import (
    ArmResult,
    Evaluations,
    Row,
    choose_rate,
    read_evaluations,
)
from moejax.config.load import flag_text
from moejax.data.record_io import locked, write_json
from moejax.errors import UserError
from moejax.train.loop import NonFiniteLoss
from moejax.train.progress import format_seconds
from moejax.train.setup import open_pipeline, prepare_model
from moejax.train.sweep import is_finished, train_apart
from moejax.train.workdir import check_workdir
from moejax.train.writers import check_writers

PLAN_FILE = "plan.json"
# What the runs print.
LOG_FILE = "train.log"
# In the workdir of a run that diverged: why. It is not run again.
FAILED_FILE = "failed.txt"
# What may change between two invocations: more seeds, rates and arms are added to what is there.
_MAY_GROW = ("seeds", "rates", "arms", "baseline", "also")
# Seconds between looks at runs that other processes have.
_LOOK_AGAIN = 1.0


class Stopped(Exception):
    """A signal ended a run before its last step; the same command goes on."""


class _NotEnded(Exception):
    def __init__(self, run: Run):
        self.run = run


def run_comparison(
    plan: Plan, workdir: Path, report: Callable[[list[ArmResult]], Any]
) -> tuple[list[ArmResult], Any]:
    """Trains what is not trained yet, and reports what each run measured.

    A finished run is not run again, a stopped one goes on from its last checkpoint: the same
    command again continues, also after ``kill -9``.

    Args:
      plan: from :func:`moejax.analysis.compare.plan.make_plan`.
      workdir: folder of the comparison.
      report: is called with the results in the order of the arms, when all are there; and before,
        after each arm, as long as no earlier invocation has reported all of them.

    Returns:
      (the results, what the last call of ``report`` gave).

    Raises:
      UserError: ``workdir`` holds something else, an arm is refused, or no learning rate of an
        arm came to an end.
      Stopped: a signal asked to stop.
    """
    if jax.process_count() > 1:
        raise UserError("compare: trains in one process; start it on one host")
    _check_folder(plan, workdir)
    first = [arm.run(rate, 0) for arm in plan.arms for rate in plan.rates]
    for run in first:
        check_workdir(workdir / run.folder, run.config)
    if not all(is_finished(run.config, workdir / run.folder) for run in first):
        _check_arms(plan)
    known = (workdir / "index.html").exists()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / PLAN_FILE, plan.document())
    except OSError as error:
        raise UserError(f"--workdir {workdir}: cannot be written ({error.strerror})") from error
    work = _Work(plan, workdir)
    results: list[ArmResult] = []
    reported = None
    for arm in plan.arms:
        results.append(work.run_arm(arm))
        if len(results) == len(plan.arms) or not known:
            reported = report(results)
    return results, reported


def _check_folder(plan: Plan, workdir: Path) -> None:
    """UserError where ``workdir`` holds something else, or a comparison of another kind."""
    if (workdir / "config.json").exists():
        raise UserError(f"--workdir {workdir}: holds a run; name another folder")
    path = workdir / PLAN_FILE
    if not path.exists():
        if (workdir / "index.html").exists():
            raise UserError(f"--workdir {workdir}: has a page that is no comparison; name another")
        return
    # As JSON has it: tuples are lists there.
    new = json.loads(json.dumps(plan.document()))
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        arms = {arm["arm"]: arm for arm in old["arms"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not that of a comparison; name another --workdir") from error
    differing = [name for name in new if name not in _MAY_GROW and old.get(name) != new[name]]
    differing += [f"arm {arm['arm']}" for arm in new["arms"] if arms.get(arm["arm"], arm) != arm]
    if differing:
        raise UserError(
            f"--workdir {workdir}: holds a comparison with another {', '.join(differing)}; name "
            "another folder"
        )


def _check_arms(plan: Plan) -> None:
    """Every mistake of the user that can be found before anything is trained or written."""
    for arm in plan.arms:
        check_writers(arm.config.log)
        prepare_model(arm.config)
    for split in ("train", plan.arms[0].config.eval.split):
        open_pipeline(plan.arms[0].config, split)


class _Work:
    """The runs of a plan, those that other processes take included, and how many are left."""

    def __init__(self, plan: Plan, workdir: Path):
        self.plan, self.workdir = plan, workdir
        self._ended: set[str] = set()
        # Of each seed, which is a part of it.
        self.data_versions: dict[int, str] = {}
        self.left_at_first, self.began = self.left(), time.monotonic()

    def run_arm(self, arm: Arm) -> ArmResult:
        """The sweep of the learning rate with seed 0, then the other seeds at the best one."""
        print(
            f"arm {arm.name}: {arm.steps} steps, {arm.flops:.3g} training FLOPs, "
            f"{arm.tokens:,} {arm.unit} a run",
            flush=True,
        )
        tried, rate = choose_rate(self.plan, arm, self.trained_score)
        if math.isinf(dict(tried)[rate]):
            raise UserError(
                f"arm {arm.name}: no learning rate of {', '.join(f'{r:g}' for r, _ in tried)} came "
                "to an end; give lower --rates"
            )
        if len(tried) > 1:
            shown = ", ".join(f"{rate:g}: {score:.4f}" for rate, score in tried)
            print(f"arm {arm.name}: learning rate {rate:g} of {shown}", flush=True)
        runs = []
        for seed in range(self.plan.seeds):
            run = arm.run(rate, seed)
            self.train(run)
            measured = self.read(run)
            if measured is None or any(min(x) == math.inf for x in measured.losses.values()):
                found = self.failure(run) or "no loss of some modality was finite"
                raise UserError(f"arm {arm.name}, seed {seed}: {found}; give lower --rates")
            runs.append((run, measured))
        return ArmResult(arm, tried, rate, tuple(runs))

    def trained_score(self, run: Run) -> float:
        """Sees to it that the run ends; its score, infinite where it diverged."""
        self.train(run)
        return self.score(run)

    def score(self, run: Run) -> float:
        """That of a run that has ended, infinite where it diverged; else raises _NotEnded."""
        if not self.ended(run):
            raise _NotEnded(run)
        measured = None if self.failure(run) else self.read(run)
        return math.inf if measured is None else measured.score

    def read(self, run: Run) -> Evaluations | None:
        """What the run measured. UserError where another arm was trained on other data."""
        measured = read_evaluations(self.workdir / run.folder, run.config)
        if measured is not None:
            first = self.data_versions.setdefault(run.seed, measured.data_version)
            if measured.data_version != first:
                raise UserError(
                    f"data.source: changed since the first runs in {self.workdir} (version {first} "
                    f"then, {measured.data_version} in {run.folder}); name another --workdir"
                )
        return measured

    def ended(self, run: Run) -> bool:
        """Whether the run has come to its end, good or bad, and no process has it any more."""
        folder = self.workdir / run.folder
        if run.folder not in self._ended and (self.failure(run) or is_finished(run.config, folder)):
            with locked(folder) as mine:
                if mine:
                    self._ended.add(run.folder)
        return run.folder in self._ended

    def failure(self, run: Run) -> str:
        """Why the run diverged, or ""."""
        path = self.workdir / run.folder / FAILED_FILE
        return path.read_text(encoding="utf-8").strip() if path.exists() else ""

    def open_runs(self) -> Iterator[Run]:
        """What has not ended of all that is asked for so far: seeds once their rate is known."""
        for arm in self.plan.arms:
            runs = [arm.run(rate, 0) for rate in self.plan.rates]
            try:
                tried, rate = choose_rate(self.plan, arm, self.score)
            except _NotEnded as error:
                # Of the sweep, or one beyond its end.
                runs += [error.run] if error.run not in runs else []
            else:
                if not math.isinf(dict(tried)[rate]):
                    runs += [arm.run(rate, seed) for seed in range(1, self.plan.seeds)]
            yield from (run for run in runs if not self.ended(run))

    def left(self) -> int:
        """Runs that have not ended, as far as can be foreseen: a sweep may go on at its end."""
        swept = [arm.run(rate, 0) for arm in self.plan.arms for rate in self.plan.rates]
        arms = {run.arm for run in swept if not self.ended(run)}
        return sum(1 for _ in self.open_runs()) + len(arms) * (self.plan.seeds - 1)

    def train(self, run: Run) -> None:
        """Sees to it that the run ends. While another process has it, takes what none has."""
        check_workdir(self.workdir / run.folder, run.config)
        while not self.ended(run):
            if not self.train_unless_taken(run) and not any(
                map(self.train_unless_taken, self.open_runs())
            ):
                time.sleep(_LOOK_AGAIN)

    def train_unless_taken(self, run: Run) -> bool:
        """Trains the run to its end, unless another process has it or had it."""
        folder = self.workdir / run.folder
        with locked(folder) as mine:
            if not mine or self.failure(run) or is_finished(run.config, folder):
                return False
            began, failure = time.monotonic(), ""
            # What a run says of itself is kept, and would bury the lines of the comparison.
            with (self.workdir / LOG_FILE).open("a", encoding="utf-8") as log:
                print(f"\n{run.folder}", file=log)
                try:
                    with contextlib.redirect_stdout(log):
                        train_apart(run.config, folder)
                except NonFiniteLoss as error:
                    failure = " ".join(str(error).split())
                    (folder / FAILED_FILE).write_text(failure + "\n", encoding="utf-8")
            if not failure and not is_finished(run.config, folder):
                # Only a signal ends an unfinished run without an error.
                raise Stopped
        self.say(run, time.monotonic() - began)
        return True

    def say(self, run: Run, seconds: float) -> None:
        """A line on a run that has ended, with the time that is left for the others."""
        measured = self.read(run)
        losses = [] if measured is None else measured.losses
        found = self.failure(run) or ", ".join(
            f"{name} {measured.curve(name, 1.0).lowest:.4f}" for name in losses if measured
        )
        left = self.left()
        ended = max(1, self.left_at_first - left)
        rest = (time.monotonic() - self.began) / ended * left
        print(
            f"{run.folder.removeprefix('runs/')}: {found}  ({format_seconds(seconds)}; ETA of the "
            f"comparison {format_seconds(rest)})",
            flush=True,
        )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
      plan: the arms with their steps and FLOPs.
      results: of each arm its learning rate, and the evaluations of each seed.
      rows: each arm against the first one, on each modality.
      workdir: where the runs, tables and pictures lie.
    """

    plan: Plan
    results: list[ArmResult]
    rows: list[Row]
    workdir: Path

    def table(self) -> str:
        """The tables in Markdown."""
        from moejax.analysis.compare.tables import comparison_markdown

        return comparison_markdown(self.plan, self.results, self.rows)


def compare(
    arms: Mapping[str, str | tuple[str, Mapping[str, Any]]],
    budget: str,
    workdir: str | os.PathLike,
    **options: Any,
) -> Comparison:
    """Several configs at equal training FLOPs, as ``moejax compare``; the first is the baseline.

    For example::

        arms = {"dense": "quickstart:dense", "half": ("quickstart", {"model.num_layers": 2})}
        found = moejax.compare(arms, "flops=3e12", "runs/mine", seeds=3)
        print(found.table())

    Args:
      arms: a name for each arm -> its config, or (config, overrides).
      budget: of each run: ``"flops=3e12"``, ``"tokens=1e6"`` or ``"steps=100"``.
      workdir: folder of the comparison; what is finished in it is not run again.
      **options: of :func:`moejax.analysis.compare.plan.make_plan`: seeds, match, rates,
        evaluations, schedule, checkpoint_every, overrides.

    Raises:
      UserError: an arm or the budget is refused; nothing was trained.
      Stopped: a signal asked to stop; the same call goes on.
    """
    # Here, so that what trains without drawing does not wait for matplotlib.
    from moejax.analysis.compare.output import write_comparison

    specs = []
    for name, arm in arms.items():
        spec, overrides = (arm, {}) if isinstance(arm, str) else arm
        changed = tuple(f"{field}={flag_text(value)}" for field, value in overrides.items())
        specs.append(ArmSpec(name, spec, changed))
    plan, workdir = make_plan(specs, parse_budget(budget), **options), Path(workdir)
    report = lambda done: write_comparison(plan, done, workdir)
    results, rows = run_comparison(plan, workdir, report)
    return Comparison(plan, results, rows, workdir)
