"""What a comparison refuses before anything is trained."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from moejax.analysis.compare.arms import ArmSpec, Budget, compared, folder_name
from moejax.config import Config
from moejax.config.load import flag_text
from moejax.errors import UserError, did_you_mean
from moejax.train.evaluate import EVALUATORS, check_evaluators, eval_plans

# Arms whose training FLOPs differ from the budget by more than this are refused.
TOLERANCE = 0.02
# Fields in which arms may differ: they change no batch, or the comparison sets them.
_FREE_FIELDS = ("data.prefetch", "data.seed", "eval.every", "eval.best_metric", "eval.patience")
# What the comparison sets itself, with the flag that it follows from.
_OWN_FIELDS = {
    "train.steps": "--budget",
    "train.seed": "--seeds",
    "data.seed": "--seeds",
    "optim.learning_rate": "--rates",
    "optim.schedule": "--schedule",
    "optim.warmup_steps": "--budget",
    "eval.every": "--evaluations",
    "eval.best_metric": "--evaluations",
    "eval.patience": "--evaluations",
    "train.checkpoint_every": "--checkpoint-every",
    "train.checkpoint_keep": "--checkpoint-every",
}
# Share of the steps that a learning rate may decay over.
_LONGEST_DECAY = 0.5
SCHEDULES = ("constant", "wsd")
MATCHES = ("flops", "tokens")


def check_options(seeds: int, evaluations: int, rates: Sequence[float], schedule: str, match: str):
    """UserError for a number or name that no comparison can have."""
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: must be positive")
    if evaluations < 2:
        raise UserError(f"--evaluations {evaluations}: a curve needs at least 2")
    if len(set(rates)) == 2 or len({f"{rate:g}" for rate in rates}) < len(rates):
        raise UserError("--rates: give at least three different ones, or one that is taken as is")
    for field, value, known in (("schedule", schedule, SCHEDULES), ("match", match, MATCHES)):
        if value not in known:
            raise UserError(f"--{field} {value}{did_you_mean(value, known)}")


def check_overrides(specs: Sequence[ArmSpec], overrides: Sequence[str]) -> None:
    """UserError where a field is changed that the comparison sets."""
    for override in (*overrides, *(one for arm in specs for one in arm.overrides)):
        field = override.partition("=")[0].lstrip("-").removeprefix("config.")
        if field in _OWN_FIELDS:
            raise UserError(f"{field}: is set by the comparison; see {_OWN_FIELDS[field]}")


def check_configs(
    specs: Sequence[ArmSpec], configs: Sequence[Config], schedule: str, also: Sequence[str] = ()
) -> None:
    """UserError unless all arms are models of modalities on the same data, judged alike."""
    if schedule == "wsd" and configs[0].optim.decay_fraction > _LONGEST_DECAY:
        raise UserError(
            f"optim.decay_fraction: {configs[0].optim.decay_fraction:g} leaves too few evaluations "
            f"before the decay; at most {_LONGEST_DECAY:g} with --schedule wsd"
        )
    for arm, config in zip(specs, configs, strict=True):
        if not compared(config.model):
            raise UserError(
                f"--configs {arm.spec}: compares models of modalities, not a {config.model.name}"
            )
        check_evaluators(config)
        measured = measured_names(config)
        if measured is None:
            continue
        losses = [f"{name}/loss" for name in compared(config.model)]
        if missing := [name for name in losses if name not in measured]:
            raise UserError(
                f"eval.metrics: no evaluator of {arm.name} gives {' or '.join(missing)}; use "
                "likelihood (with denoising for pictures as latents), accuracy for classes"
            )
        for name in also:
            if name not in measured:
                raise UserError(
                    f"--also {name}: no evaluator of {arm.name} gives it"
                    f"{did_you_mean(name, measured)}"
                )
    for arm, config in zip(specs[1:], configs[1:], strict=True):
        check_alike(specs[0].name, configs[0], arm.name, config)


def check_names(specs: Sequence[ArmSpec]) -> None:
    """UserError unless there are two arms or more, each with a folder of its own."""
    if len(specs) < 2:
        raise UserError("--configs: name at least two, the baseline first: --configs mot,chameleon")
    folders = [folder_name(arm.name) for arm in specs]
    for arm, folder in zip(specs, folders, strict=True):
        if folders.count(folder) > 1:
            raise UserError(f"--arm {arm.name}: two arms have that name, or the folder {folder}")
        if not folder.strip("._"):
            raise UserError(f"--arm {arm.name}: give it a name with letters or digits")


def measured_names(config: Config) -> set[str] | None:
    """What the evaluators of the config measure; None where one of them does not say."""
    measured: set[str] = set()
    for plan in eval_plans(config.eval):
        names = getattr(EVALUATORS.get(plan.name), "metric_names", None)
        if names is None:
            return None
        measured |= {plan.prefix + name for name in names(config)}
    return measured


def check_alike(baseline: str, first: Config, arm: str, other: Config) -> None:
    """UserError unless both see the same batches and their losses are of the same kind."""
    if compared(first.model) != compared(other.model):
        raise UserError(
            f"--configs: {baseline} has losses of {compared(first.model)}, {arm} of "
            f"{compared(other.model)}; their losses are not of the same tokens"
        )
    a, b = _comparable(first), _comparable(other)
    for name in sorted(a.keys() | b.keys()):
        if a.get(name) != b.get(name):
            raise UserError(
                f"--configs: {baseline} has {name}={flag_text(a.get(name))}, {arm} "
                f"{flag_text(b.get(name))}; all arms see the same batches and are judged alike: "
                f"give --config.{name}="
            )


def _comparable(config: Config) -> dict[str, Any]:
    """The fields that have to be equal in all arms."""
    fields = {
        f"{group}.{field.name}": getattr(getattr(config, group), field.name)
        for group in ("data", "eval")
        for field in dataclasses.fields(getattr(config, group))
    }
    for name in _FREE_FIELDS:
        del fields[name]
    fields["objective.name"] = config.objective.name
    # Noise and velocity are different things to predict.
    fields["objective.process"] = getattr(config.objective, "process", "")
    for name in ("decay_fraction", "final_fraction"):
        fields[f"optim.{name}"] = getattr(config.optim, name)
    return fields


def check_steps(name: str, steps: int, flops: float, budget: Budget, evaluations: int) -> None:
    """UserError where the budget buys fewer steps than there are evaluations."""
    if steps < evaluations:
        raise UserError(
            f"--budget: {budget.unit}={budget.amount:g} is {steps} steps of {name}, fewer than the "
            f"{evaluations} evaluations; a step is {flops:.3g} FLOPs"
        )


def check_flops(
    names: Sequence[str], steps: Sequence[int], per_step: Sequence[float], budget: float
):
    """UserError where whole steps miss the budget, or two arms each other, by too much."""
    spent = [count * flops for count, flops in zip(steps, per_step, strict=True)]
    for name, count, flops in zip(names, steps, spent, strict=True):
        for other in (budget, min(spent)):
            if abs(flops / other - 1) > TOLERANCE:
                raise UserError(
                    f"--budget: {count} steps of {name} are {flops:.4g} FLOPs, more than "
                    f"{TOLERANCE:.0%} from {other:.4g}; give a larger budget or a smaller batch"
                )
