"""Which runs a comparison is made of: arms, budget, seeds, learning rates; all checked first."""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.analysis.flops import (
    BACKWARD_AND_FORWARD,
    TokenFlops,
    counted_flops,
    flops_by_modality,
)
from moejax.config import Config
from moejax.config.load import flag_text, load_config
from moejax.config.sweep import split_commas
from moejax.errors import UserError, did_you_mean
from moejax.train.evaluate import EVALUATORS, check_evaluators, eval_plans
from moejax.train.setup import configure_jax, open_pipeline

# Arms whose training FLOPs differ from the budget by more than this are refused.
TOLERANCE = 0.02
# Share of a run's steps over which its learning rate rises.
WARMUP_SHARE = 0.05
# Neighbouring learning rates of a sweep.
RATE_FACTOR = 2.0
# Fewer rates are no sweep: a lone one is taken as given.
FEWEST_RATES = 3
# A sweep whose best rate lies at an end goes on beyond it, up to so many rates.
MOST_RATES = 7
# Batches that say how many tokens are of which modality.
_MIX_BATCHES = 8
# Fields in which arms may differ: they change no batch, or the comparison sets them.
_FREE_FIELDS = ("data.prefetch", "data.seed", "eval.every", "eval.best_metric", "eval.patience")
SCHEDULES = ("constant", "wsd")
MATCHES = ("flops", "tokens")
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


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every run may spend: ``unit`` is flops (of training), tokens or steps."""

    unit: str
    amount: float


def parse_budget(text: str) -> Budget:
    """``"flops=3e12"``, ``"tokens=1e6"`` or ``"steps=200"``."""
    unit, _, amount = text.partition("=")
    try:
        value = float(amount)
    except ValueError:
        value = 0.0
    if unit not in ("flops", "tokens", "steps") or not 0 < value < float("inf"):
        raise UserError(f"--budget {text}: write flops=3e12, tokens=1e6 or steps=200")
    return Budget(unit, value)


@dataclasses.dataclass(frozen=True)
class ArmSpec:
    """One arm as asked for: a name, a config and what is changed in it (each ``"a.b=v"``)."""

    name: str
    spec: str
    overrides: tuple[str, ...] = ()


def parse_arm(text: str) -> ArmSpec:
    """``"half=quickstart,model.num_layers=2"``: a name, a config, and what is changed in it."""
    name, equals, rest = text.partition("=")
    spec, *overrides = split_commas(rest)
    if not (equals and name.strip() and spec.strip()) or not all("=" in part for part in overrides):
        raise UserError(f"--arm {text}: write --arm NAME=CONFIG,FIELD=VALUE,FIELD=VALUE")
    return ArmSpec(name.strip(), spec.strip(), tuple(part.strip() for part in overrides))


def arms_of(configs: str, arms: Sequence[str]) -> list[ArmSpec]:
    """The arms of ``--configs a,b`` and of each ``--arm``; of one config twice the second is b_2.

    The first is the baseline. UserError for fewer than two.
    """
    found: list[ArmSpec] = []
    for spec in filter(None, (part.strip() for part in configs.split(","))):
        copies = sum(arm.spec == spec for arm in found)
        found.append(ArmSpec(f"{spec}_{copies + 1}" if copies else spec, spec))
    found += map(parse_arm, arms)
    if len(found) < 2:
        raise UserError("--configs: name at least two, the baseline first: --configs mot,chameleon")
    return found


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm that has been checked.

    Attributes:
      name: in tables and as the name of its folder.
      spec: the config it is made of.
      overrides: what was changed in it, those of all arms included.
      config: with the budget, schedule and evaluations of the comparison; its learning rate and
        seeds are those of the first run.
      flops_per_step: training FLOPs of one step, by formula (counted where there is none).
    """

    name: str
    spec: str
    overrides: tuple[str, ...]
    config: Config
    flops_per_step: float

    @property
    def steps(self) -> int:
        return self.config.train.steps

    @property
    def flops(self) -> float:
        """Training FLOPs of one run."""
        return self.steps * self.flops_per_step

    @property
    def tokens(self) -> int:
        """Places of all batches of one run, padding included."""
        return self.steps * positions_per_step(self.config)

    def run(self, rate: float, seed: int) -> "Run":
        """The run with that learning rate and seed."""
        config = dataclasses.replace(
            self.config,
            optim=dataclasses.replace(self.config.optim, learning_rate=rate),
            train=dataclasses.replace(self.config.train, seed=seed),
            data=dataclasses.replace(self.config.data, seed=seed),
        )
        return Run(self.name, rate, seed, config)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a comparison."""

    arm: str
    rate: float
    seed: int
    config: Config

    @property
    def folder(self) -> str:
        """Where it lies in the folder of the comparison."""
        return f"runs/{folder_name(self.arm)}/rate={self.rate:g},seed={self.seed}"


def folder_name(arm: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", arm)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A comparison.

    Attributes:
      arms: the baseline first.
      budget: of every run.
      match: "flops" or "tokens": what is equal in all arms.
      seeds: how many; they are 0, 1, ...
      rates: learning rates that every arm tries with seed 0; one alone is taken as given.
      evaluations: asked for, of each run.
      schedule: "constant" or "wsd".
    """

    arms: tuple[Arm, ...]
    budget: Budget
    match: str
    seeds: int
    rates: tuple[float, ...]
    evaluations: int
    schedule: str

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.arms[0].config.model.modalities

    @property
    def swept(self) -> bool:
        return len(self.rates) >= FEWEST_RATES

    def document(self) -> dict[str, Any]:
        """What plan.json records."""
        return {
            "budget": dataclasses.asdict(self.budget),
            "match": self.match,
            "seeds": self.seeds,
            "rates": list(self.rates),
            "schedule": self.schedule,
            "evaluations": self.evaluations,
            "eval": dataclasses.asdict(self.arms[0].config.eval),
            "baseline": self.arms[0].name,
            "arms": [
                {
                    "arm": arm.name,
                    "config": arm.spec,
                    "overrides": list(arm.overrides),
                    "steps": arm.steps,
                    "tokens": arm.tokens,
                    "flops": arm.flops,
                    "flops_per_step": arm.flops_per_step,
                }
                for arm in self.arms
            ],
        }


def make_plan(
    specs: Sequence[ArmSpec],
    budget: Budget,
    *,
    seeds: int = 3,
    match: str = "flops",
    rates: Sequence[float] = (),
    evaluations: int = 8,
    schedule: str = "constant",
    checkpoint_every: int = 0,
    overrides: Sequence[str] = (),
) -> Plan:
    """Loads every arm and gives it its steps; nothing is trained or written.

    Args:
      specs: the arms, the baseline first.
      budget: of every run. Of tokens or steps, all arms take equally many.
      seeds: paired: seed s of every arm sees the same batches in the same order.
      match: "flops": each arm takes as many steps as the budget buys. "tokens": all arms take
        those of the baseline.
      rates: learning rates of the sweep; by default half, once and twice that of the baseline.
      evaluations: of each run, evenly spread; one or a few less where they do not divide the steps.
      schedule: "constant" (after a rise) or "wsd", whose losses count before it decays.
      checkpoint_every: steps between checkpoints; 0: one at each evaluation.
      overrides: of all arms, each ``"a.b=v"``.

    Raises:
      UserError: an arm that is refused, whose data are not the baseline's, or whose budget is not.
    """
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: must be positive")
    if evaluations < 2:
        raise UserError(f"--evaluations {evaluations}: a curve needs at least 2")
    if len(set(rates)) == 2 or len({f"{rate:g}" for rate in rates}) < len(rates):
        raise UserError("--rates: give at least three different ones, or one that is taken as is")
    _check_names(specs)
    for field, value, known in (("schedule", schedule, SCHEDULES), ("match", match, MATCHES)):
        if value not in known:
            raise UserError(f"--{field} {value}{did_you_mean(value, known)}")
    for override in (*overrides, *(one for arm in specs for one in arm.overrides)):
        field = override.partition("=")[0].lstrip("-").removeprefix("config.")
        if field in _OWN_FIELDS:
            raise UserError(f"{field}: is set by the comparison; see {_OWN_FIELDS[field]}")
    configs = [load_config(arm.spec, [*overrides, *arm.overrides]) for arm in specs]
    for arm, config in zip(specs, configs, strict=True):
        if config.model.name != "decoder":
            raise UserError(f"--configs {arm.spec}: compares decoders, not a {config.model.name}")
        check_evaluators(config)
        if missing := _missing_losses(config):
            raise UserError(
                f"eval.metrics: no evaluator of {arm.name} gives {' or '.join(missing)}; use "
                "likelihood, with denoising for pictures as latents"
            )
    for arm, config in zip(specs[1:], configs[1:], strict=True):
        _check_alike(specs[0].name, configs[0], arm.name, config)
    mix = functools.cache(lambda: token_mix(configs[0]))
    per_step = [_flops_per_step(config, mix) for config in configs]
    if budget.unit == "flops":
        steps = [round(budget.amount / flops) for flops in per_step]
        if match == "tokens":
            steps = [steps[0]] * len(steps)
    else:
        places = positions_per_step(configs[0]) if budget.unit == "tokens" else 1
        match, steps = "tokens", [round(budget.amount / places)] * len(configs)
    rates = tuple(sorted(rates)) or _default_rates(configs[0].optim.learning_rate)
    arms = []
    for spec, config, count, flops in zip(specs, configs, steps, per_step, strict=True):
        _check_steps(spec.name, count, flops, budget, evaluations)
        arms.append(
            Arm(
                name=spec.name,
                spec=spec.spec,
                overrides=(*overrides, *spec.overrides),
                config=_for_comparison(
                    config, count, evaluations, schedule, checkpoint_every, rates[0]
                ),
                flops_per_step=flops,
            )
        )
    if match == "flops":
        _check_flops(arms, budget)
    return Plan(tuple(arms), budget, match, seeds, rates, evaluations, schedule)


def positions_per_step(config: Config) -> int:
    return config.data.batch_size * config.data.sequence_length


def token_mix(config: Config) -> dict[str, float]:
    """The share of each modality in the places of the first training batches, padding as text."""
    configure_jax(config)
    pipeline = open_pipeline(config, "train")
    counts = np.zeros(len(config.model.modalities))
    for step in range(_MIX_BATCHES):
        modality = np.asarray(pipeline.batch(step)["modality"])
        counts += np.bincount(modality.ravel(), minlength=len(counts))
    return dict(zip(config.model.modalities, (counts / counts.sum()).tolist(), strict=True))


def _flops_per_step(config: Config, mix: Any) -> float:
    """Training FLOPs of one step. ``mix()`` is asked only where modalities differ in their cost."""
    by_modality = flops_by_modality(config)
    positions = positions_per_step(config)
    if by_modality is None:
        # Not the count of the gradient, which has what model.remat computes again.
        return BACKWARD_AND_FORWARD * counted_flops(config).forward.nominal * positions
    costs = set(by_modality.values())
    if len(costs) == 1:
        (flops,) = costs
    else:
        shares = mix()
        parts = (flops.scaled(shares[name]) for name, flops in by_modality.items())
        flops = sum(parts, TokenFlops(0.0, 0.0, 0.0))
    return BACKWARD_AND_FORWARD * flops.forward * positions


def _check_names(specs: Sequence[ArmSpec]) -> None:
    """UserError unless there are two arms or more, each with a folder of its own."""
    if len(specs) < 2:
        raise UserError("--configs: name at least two, the baseline first: --configs mot,chameleon")
    folders = [folder_name(arm.name) for arm in specs]
    for arm, folder in zip(specs, folders, strict=True):
        if folders.count(folder) > 1:
            raise UserError(f"--arm {arm.name}: two arms have that name, or the folder {folder}")
        if not folder.strip("._"):
            raise UserError(f"--arm {arm.name}: give it a name with letters or digits")


def _missing_losses(config: Config) -> list[str]:
    """The losses of modalities that no evaluator of the config measures, as far as they say."""
    measured: set[str] = set()
    for plan in eval_plans(config.eval):
        names = getattr(EVALUATORS.get(plan.name), "metric_names", None)
        if names is None:
            return []
        measured |= {plan.prefix + name for name in names(config)}
    return [f"{name}/loss" for name in config.model.modalities if f"{name}/loss" not in measured]


def _check_alike(baseline: str, first: Config, arm: str, other: Config) -> None:
    """UserError unless both see the same batches and their losses are of the same kind."""
    if first.model.modalities != other.model.modalities:
        raise UserError(
            f"--configs: {baseline} has model.modalities={first.model.modalities}, {arm} "
            f"{other.model.modalities}; their losses are not of the same tokens"
        )
    a, b = _comparable(first), _comparable(other)
    for name in a.keys() | b.keys():
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


def _check_steps(name: str, steps: int, flops: float, budget: Budget, evaluations: int) -> None:
    if steps < evaluations:
        raise UserError(
            f"--budget: {budget.unit}={budget.amount:g} is {steps} steps of {name}, fewer than the "
            f"{evaluations} evaluations; a step is {flops:.3g} FLOPs"
        )


def _check_flops(arms: Sequence[Arm], budget: Budget) -> None:
    """UserError where whole steps miss the budget, or two arms each other, by too much."""
    low, high = (pick(arms, key=lambda arm: arm.flops) for pick in (min, max))
    for arm in (low, high):
        other = budget.amount if arm is low else min(budget.amount, low.flops)
        if abs(arm.flops / other - 1) > TOLERANCE:
            raise UserError(
                f"--budget: {arm.steps} steps of {arm.name} are {arm.flops:.4g} FLOPs, more than "
                f"{TOLERANCE:.0%} from {other:.4g}; give a larger budget or a smaller batch"
            )


def _default_rates(rate: float) -> tuple[float, ...]:
    return tuple(float(f"{rate * factor:.6g}") for factor in (1 / RATE_FACTOR, 1, RATE_FACTOR))


def _for_comparison(
    config: Config,
    steps: int,
    evaluations: int,
    schedule: str,
    checkpoint_every: int,
    rate: float,
) -> Config:
    """The config of an arm with what is the same in all arms."""
    every = math.ceil(steps / evaluations)
    return dataclasses.replace(
        config,
        optim=dataclasses.replace(
            config.optim,
            schedule=schedule,
            learning_rate=rate,
            warmup_steps=max(1, round(WARMUP_SHARE * steps)),
        ),
        train=dataclasses.replace(
            config.train, steps=steps, checkpoint_every=checkpoint_every or every, checkpoint_keep=1
        ),
        eval=dataclasses.replace(config.eval, every=every, best_metric="", patience=0),
    )
