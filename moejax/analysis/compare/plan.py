"""Which runs a comparison is made of: arms, budget, seeds, learning rates; all checked first."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.analysis.compare.arms import ArmSpec, Budget, compared, folder_name, widened
from moejax.analysis.compare.checks import (
    check_configs,
    check_flops,
    check_names,
    check_options,
    check_overrides,
    check_steps,
)
from moejax.analysis.flops import (
    BACKWARD_AND_FORWARD,
    TokenFlops,
    counted_flops,
    flops_by_modality,
)
from moejax.config import Config
from moejax.config.load import load_config
from moejax.train.setup import configure_jax, open_pipeline

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
        """Places of all batches of one run, padding included; pictures, of a model of them."""
        return self.steps * positions_per_step(self.config)

    @property
    def unit(self) -> str:
        """What ``tokens`` counts."""
        return "tokens" if self.config.data.format == "tokens" else "pictures"

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
      also: metrics of the last evaluation that are reported beside the losses.
    """

    arms: tuple[Arm, ...]
    budget: Budget
    match: str
    seeds: int
    rates: tuple[float, ...]
    evaluations: int
    schedule: str
    also: tuple[str, ...] = ()

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those whose losses are compared."""
        return compared(self.arms[0].config.model)

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
            "also": list(self.also),
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
    width: int = 0,
    also: Sequence[str] = (),
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
      width: of all arms, each scaled in proportion (:func:`at_width`); 0 leaves them as they are.
      also: metrics to report beside the losses, as they are at the end: ``image/accuracy``.
      overrides: of all arms, each ``"a.b=v"``.

    Raises:
      UserError: an arm that is refused, whose data are not the baseline's, or whose budget is not.
    """
    check_options(seeds, evaluations, rates, schedule, match)
    check_names(specs)
    check_overrides(specs, overrides)
    if width:
        specs = [widened(arm, width, overrides) for arm in specs]
    configs = [load_config(arm.spec, [*overrides, *arm.overrides]) for arm in specs]
    check_configs(specs, configs, schedule, also)
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
        check_steps(spec.name, count, flops, budget, evaluations)
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
        check_flops([arm.name for arm in arms], steps, per_step, budget.amount)
    return Plan(tuple(arms), budget, match, seeds, rates, evaluations, schedule, tuple(also))


def positions_per_step(config: Config) -> int:
    """Tokens of a batch, padding included; pictures where each is a row of its own."""
    data = config.data
    return data.batch_size * (data.sequence_length if data.format == "tokens" else 1)


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
