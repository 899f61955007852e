"""Runs a comparison: arm by arm, each run in a workdir of its own, each one once."""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path

from moejax.analysis.compare.plan import Arm, Plan, Run
from moejax.analysis.compare.results import ArmResult, choose_rate, read_evaluations
from moejax.data.record_io import write_json
from moejax.errors import UserError
from moejax.train.loop import NonFiniteLoss
from moejax.train.progress import format_seconds
from moejax.train.sweep import is_finished, train_apart
from moejax.train.workdir import check_workdir

PLAN_FILE = "plan.json"
# What the runs print.
LOG_FILE = "train.log"


class Stopped(Exception):
    """A signal ended a run before its last step; the same command goes on."""


def run_comparison(
    plan: Plan, workdir: Path, after_arm: Callable[[list[ArmResult]], object]
) -> list[ArmResult]:
    """Trains what is not trained yet, and reads what each run measured.

    A finished run is not run again, a stopped one goes on from its last checkpoint: the same
    command again continues, also after ``kill -9``.

    Args:
      plan: from :func:`moejax.analysis.compare.plan.make_plan`.
      workdir: folder of the comparison.
      after_arm: is called with the results so far, whenever an arm is complete.

    Returns:
      The results in the order of the arms.

    Raises:
      UserError: ``workdir`` holds something else, a run is refused, or no learning rate of an
        arm came to an end.
      Stopped: a signal asked to stop.
    """
    if (workdir / "config.json").exists():
        raise UserError(f"--workdir {workdir}: holds a run; name another folder")
    for arm in plan.arms:
        for rate in plan.rates:
            run = arm.run(rate, 0)
            check_workdir(workdir / run.folder, run.config)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / PLAN_FILE, plan.document())
    work = _Work(plan, workdir)
    results = []
    for arm in plan.arms:
        results.append(work.run_arm(arm))
        after_arm(results)
    return results


class _Work:
    """Runs one after the other, and knows how many are left."""

    def __init__(self, plan: Plan, workdir: Path):
        self.plan, self.workdir = plan, workdir
        rates = len(plan.rates)
        self.left = len(plan.arms) * (rates + plan.seeds - 1)
        self.ran, self.began = 0, time.monotonic()

    def run_arm(self, arm: Arm) -> ArmResult:
        print(
            f"arm {arm.name}: {arm.steps} steps, {arm.flops:.3g} training FLOPs, "
            f"{arm.tokens:,} tokens a run",
            flush=True,
        )
        tried, rate = choose_rate(self.plan, arm, self.score)
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
            if seed:
                failure = self.train(run)
                if failure:
                    raise UserError(f"arm {arm.name}, seed {seed}: {failure}")
            measured = read_evaluations(self.workdir / run.folder, run.config)
            assert measured is not None, "a finished run was evaluated after its last step"
            runs.append((run, measured))
        return ArmResult(arm, tried, rate, tuple(runs))

    def score(self, run: Run) -> float:
        """Trains the run; its score, infinite where it failed."""
        if self.train(run):
            return math.inf
        measured = read_evaluations(self.workdir / run.folder, run.config)
        return math.inf if measured is None else measured.score

    def train(self, run: Run) -> str:
        """Trains the run unless it is finished; says what went wrong, or ""."""
        folder = self.workdir / run.folder
        check_workdir(folder, run.config)
        # A sweep that goes on beyond its rates has runs that were not foreseen.
        self.left = max(self.left - 1, 0)
        if is_finished(run.config, folder):
            return ""
        began, failure = time.monotonic(), ""
        # What a run says of itself is kept, and would bury the lines of the comparison.
        with (self.workdir / LOG_FILE).open("a", encoding="utf-8") as log:
            print(f"\n{run.folder}", file=log)
            try:
                with contextlib.redirect_stdout(log):
                    train_apart(run.config, folder)
            except NonFiniteLoss as error:
                failure = str(error)
        self.ran += 1
        self.say(run, failure, time.monotonic() - began)
        if not failure and not is_finished(run.config, folder):
            # Only a signal ends an unfinished run without an error.
            raise Stopped
        return failure

    def say(self, run: Run, failure: str, seconds: float) -> None:
        """A line on a run that has ended, with the time that is left for the others."""
        measured = read_evaluations(self.workdir / run.folder, run.config)
        losses = {} if measured is None else measured.losses
        found = failure or ", ".join(f"{name} {min(loss):.4f}" for name, loss in losses.items())
        left = (time.monotonic() - self.began) / self.ran * self.left
        print(
            f"{run.folder.removeprefix('runs/')}: {found}  ({format_seconds(seconds)}; ETA of the "
            f"comparison {format_seconds(left)})",
            flush=True,
        )
