"""What the runs of a comparison measured, read from their folders, and what follows from it."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moejax.analysis.compare.arms import compared
from moejax.analysis.compare.matching import (
    Curve,
    Interval,
    budget_ratio,
    loss_difference,
    mean_interval,
    verdict,
)
from moejax.analysis.compare.plan import (
    MOST_RATES,
    RATE_FACTOR,
    Arm,
    Plan,
    Run,
    positions_per_step,
)
from moejax.config import Config
from moejax.train.workdir import read_record
from moejax.train.writers import read_rows


@dataclasses.dataclass(frozen=True)
class Evaluations:
    """Held-out losses of one run.

    Attributes:
      steps: of each evaluation.
      losses: of each modality at each of them: nats a token, of pictures as latents a squared
        error; infinite where it was not finite.
      seconds_per_step: the median over the run's rows; None where a run was stopped so near its
        end that none was measured.
      stable: how many of them lie before the learning rate decays (all, without a decay).
      data_version: of what the run was trained on.
      final: what was measured at the last of them, by name.
    """

    steps: tuple[int, ...]
    losses: dict[str, tuple[float, ...]]
    seconds_per_step: float | None
    stable: int
    data_version: str
    final: dict[str, float]

    @property
    def score(self) -> float:
        """What learning rates are chosen by: the mean over modalities of the lowest loss."""
        lowest = [self.curve(name, 1.0).lowest for name in self.losses]
        return sum(lowest) / len(lowest)

    def curve(self, modality: str, per_step: float) -> Curve:
        """Loss over what is spent, where a step costs ``per_step``."""
        spent = tuple(step * per_step for step in self.steps[: self.stable])
        return Curve(spent, self.losses[modality][: self.stable])


def read_evaluations(folder: Path, config: Config) -> Evaluations | None:
    """None where nothing was evaluated (a run that failed early)."""
    rows = read_rows(folder / "metrics.jsonl")
    keys = {name: f"eval/{name}/loss" for name in compared(config.model)}
    # What is not finite is in no row.
    evaluated = [row for row in rows if any(key in row for key in keys.values())]
    if not evaluated:
        return None
    seconds = [row["train/seconds_per_step"] for row in rows if "train/seconds_per_step" in row]
    optim, steps = config.optim, tuple(row["step"] for row in evaluated)
    decays = optim.decay_fraction if optim.schedule == "wsd" else 0.0
    stable = sum(step <= config.train.steps * (1 - decays) for step in steps)
    record = read_record(folder) or {}
    return Evaluations(
        steps=steps,
        losses={
            name: tuple(row.get(key, math.inf) for row in evaluated) for name, key in keys.items()
        },
        seconds_per_step=statistics.median(seconds) if seconds else None,
        stable=max(1, stable),
        data_version=record.get("made_with", {}).get("data_version", ""),
        final={
            name.removeprefix("eval/"): value
            for name, value in evaluated[-1].items()
            if name.startswith("eval/")
        },
    )


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """An arm with its runs.

    Attributes:
      arm: the arm.
      tried: (learning rate, score with seed 0) of its sweep, rising; infinite where it failed.
      rate: the chosen one.
      runs: of the chosen rate, (run, its evaluations) for each seed in order.
    """

    arm: Arm
    tried: tuple[tuple[float, float], ...]
    rate: float
    runs: tuple[tuple[Run, Evaluations], ...]

    @property
    def at_edge(self) -> bool:
        """Whether a better rate may lie beyond those that were tried."""
        return len(self.tried) > 1 and self.rate in (self.tried[0][0], self.tried[-1][0])

    def flops_curves(self, modality: str) -> list[Curve]:
        return [one.curve(modality, self.arm.flops_per_step) for _, one in self.runs]

    def final(self, metric: str) -> list[float]:
        """The metric at the end of the run of each seed; NaN where it was not finite."""
        return [one.final.get(metric, math.nan) for _, one in self.runs]

    def seconds_curves(self, modality: str) -> list[Curve] | None:
        """None where the time of a run is not known."""
        curves = [
            one.curve(modality, one.seconds_per_step)
            for _, one in self.runs
            if one.seconds_per_step is not None
        ]
        return curves if len(curves) == len(self.runs) else None


@dataclasses.dataclass(frozen=True)
class Row:
    """An arm against the baseline on one modality.

    Attributes:
      arm, baseline, modality: which.
      ratio: FLOPs to the baseline's lowest loss, over the baseline's own.
      seconds: the same of seconds of training; None where a time is not known.
      reverse: FLOPs that the baseline needs to the arm's lowest loss, over the arm's own.
      loss: lowest held-out loss over seeds, nats a token.
      difference: that loss less the baseline's, paired.
      turned: seeds whose loss had turned at the end, of the arm or the baseline.
      verdict: what can be said.
    """

    arm: str
    baseline: str
    modality: str
    ratio: Interval
    seconds: Interval | None
    reverse: Interval
    loss: Interval
    difference: Interval
    turned: int
    verdict: str

    def document(self) -> dict[str, Any]:
        """Flat, as summary.json has it."""
        document: dict[str, Any] = {
            "arm": self.arm,
            "baseline": self.baseline,
            "modality": self.modality,
            "ratio": self.ratio.mean,
            "low": self.ratio.low,
            "high": self.ratio.high,
            "seeds": self.ratio.seeds,
            "censored": self.ratio.censored,
            "early": self.ratio.early,
            "verdict": self.verdict,
            "turned": self.turned,
        }
        others = {
            "seconds_ratio": self.seconds,
            "reverse_ratio": self.reverse,
            "loss": self.loss,
            "loss_difference": self.difference,
        }
        for name, interval in others.items():
            values = (None,) * 3 if interval is None else _ends(interval)
            for end, value in zip(("", "_low", "_high"), values, strict=True):
                document[f"{name}{end}"] = value
        document["reverse_censored"] = self.reverse.censored
        return document


def _ends(interval: Interval) -> tuple[float | None, ...]:
    return interval.mean, interval.low, interval.high


def compare_arm(arm: ArmResult, baseline: ArmResult, modality: str) -> Row:
    """The statistics of an arm on one modality, over the seeds that both have."""
    seeds = min(len(arm.runs), len(baseline.runs))
    flops, own_flops = arm.flops_curves(modality)[:seeds], baseline.flops_curves(modality)[:seeds]
    seconds, own_seconds = arm.seconds_curves(modality), baseline.seconds_curves(modality)
    difference = loss_difference(flops, own_flops)
    pairs = zip(flops, own_flops, strict=True)
    return Row(
        arm=arm.arm.name,
        baseline=baseline.arm.name,
        modality=modality,
        ratio=budget_ratio(flops, own_flops),
        seconds=budget_ratio(seconds[:seeds], own_seconds[:seeds])
        if seconds and own_seconds
        else None,
        reverse=budget_ratio(own_flops, flops),
        loss=mean_interval([curve.lowest for curve in flops]),
        difference=difference,
        turned=sum(a.turned or b.turned for a, b in pairs),
        verdict=verdict(difference),
    )


def summary_rows(results: Sequence[ArmResult], modalities: Sequence[str]) -> list[Row]:
    """Every arm but the baseline, on every modality."""
    baseline = results[0]
    return [compare_arm(arm, baseline, name) for arm in results[1:] for name in modalities]


def evaluation_rows(results: Sequence[ArmResult], modalities: Sequence[str]) -> list[dict]:
    """Every evaluation of every run of the chosen rates, as comparison.csv has them."""
    rows = []
    for result in results:
        places = positions_per_step(result.arm.config)
        for run, one in result.runs:
            for modality in modalities:
                for step, loss in zip(one.steps, one.losses[modality], strict=True):
                    rows.append(
                        {
                            "arm": result.arm.name,
                            "seed": run.seed,
                            "modality": modality,
                            "flops": step * result.arm.flops_per_step,
                            "loss": loss,
                            "step": step,
                            "tokens": step * places,
                            "seconds": step * one.seconds_per_step if one.seconds_per_step else "",
                            "learning_rate": run.rate,
                        }
                    )
    return rows


def final_rows(results: Sequence[ArmResult], metrics: Sequence[str]) -> list[dict]:
    """The metrics at the end of every run of the chosen rates, as final.csv has them."""
    return [
        {"arm": result.arm.name, "seed": run.seed, "metric": metric, "value": value}
        for metric in metrics
        for result in results
        for (run, _), value in zip(result.runs, result.final(metric), strict=True)
    ]


def choose_rate(
    plan: Plan, arm: Arm, score: Callable[[Run], float]
) -> tuple[tuple[tuple[float, float], ...], float]:
    """The sweep of an arm with seed 0: ((rate, score) of all that were tried, the best rate).

    Where the best rate lies at an end of the sweep, the next one beyond it is tried as well, up to
    ``MOST_RATES``; nothing is compared at a rate that was cut off by the grid.
    """
    tried = {rate: score(arm.run(rate, 0)) for rate in plan.rates}
    while plan.swept:
        best, rates = min(tried, key=lambda rate: tried[rate]), sorted(tried)
        beyond = {rates[0]: rates[0] / RATE_FACTOR, rates[-1]: rates[-1] * RATE_FACTOR}
        if best not in beyond or len(tried) >= MOST_RATES or math.isinf(tried[best]):
            break
        rate = float(f"{beyond[best]:.6g}")
        tried[rate] = score(arm.run(rate, 0))
    best = min(tried, key=lambda rate: tried[rate])
    return tuple(sorted(tried.items())), best
