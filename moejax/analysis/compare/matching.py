"""What it takes to reach a loss: budgets to a target, their ratios, and intervals over seeds.

Everything is paired by seed: arm and baseline of one seed saw the same batches in the same order,
so what a seed does to both cancels in their ratio.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
# A held-out loss that ends this share above its lowest has turned.
TURNED = 0.005


@dataclasses.dataclass(frozen=True)
class Curve:
    """Held-out losses of one run on one modality.

    Attributes:
      spent: FLOPs (or seconds, or tokens) up to each evaluation, rising.
      losses: at each of them.
    """

    spent: tuple[float, ...]
    losses: tuple[float, ...]

    def __post_init__(self):
        if not self.spent or len(self.spent) != len(self.losses):
            raise ValueError(f"{len(self.spent)} places and {len(self.losses)} losses of a curve")
        if any(b <= a for a, b in zip(self.spent, self.spent[1:], strict=False)):
            raise ValueError("what is spent must rise from one evaluation to the next")

    @property
    def lowest(self) -> float:
        return min(self.losses)

    @property
    def turned(self) -> bool:
        """Whether the loss went up again: more training no longer helps on held-out data."""
        return self.losses[-1] > self.lowest * (1 + TURNED)

    def at(self, spent: float) -> float:
        """The loss after ``spent``, within the evaluations, by the same interpolation."""
        return float(np.interp(math.log(spent), np.log(self.spent), self.losses))

    def to_reach(self, target: float) -> float | None:
        """What is spent when the loss first reaches ``target``; None if it never does.

        Between two evaluations the loss is taken to be linear in the logarithm of what is spent.
        A target that the first evaluation has reached counts as reached there: an upper bound.
        After an evaluation that was not finite it counts as reached at the next one.
        """
        reached = next((i for i, loss in enumerate(self.losses) if loss <= target), None)
        if not reached:
            return None if reached is None else self.spent[0]
        before, after = self.losses[reached - 1], self.losses[reached]
        if math.isinf(before):
            return self.spent[reached]
        low, high = (math.log(spent) for spent in self.spent[reached - 1 : reached + 1])
        return math.exp(low + (before - target) / (before - after) * (high - low))


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; an end that is not known is None.

    Attributes:
      mean: of a ratio the geometric mean over seeds; with censored seeds a lower bound of it, with
        early ones an upper bound.
      low: lower end; None with one seed, or where a seed is early.
      high: upper end; None with one seed, or where a seed is censored.
      seeds: how many.
      censored: seeds whose arm did not reach the target within its budget (or whose baseline had
        it at its first evaluation already).
      early: seeds whose arm had reached the target at its first evaluation.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int
    censored: int = 0
    early: int = 0


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean of independent values; no ends with one value."""
    array = np.asarray(values, np.float64)
    mean, count = float(array.mean()), len(array)
    if count < 2:
        return Interval(mean, None, None, count)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * array.std(ddof=1) / count**0.5)
    return Interval(mean, mean - half, mean + half, count)


def budget_ratio(arms: Sequence[Curve], baselines: Sequence[Curve]) -> Interval:
    """What the arm spends to reach the baseline's lowest loss, over what the baseline spends.

    The interval is Student's t on the logarithms, over seeds. Where the arm does not reach the
    target, its ratio is at least ``all it spent / what the baseline spent``: that bound takes part
    in the lower end, and there is no upper end. A target that the first evaluation had reached
    bounds the ratio in the same way, from above for the arm's and from below for the baseline's.
    Nothing is extrapolated.

    Args:
      arms: a curve for each seed.
      baselines: the curve of the same seed, on the same modality.
    """
    logs, censored, early = [], 0, 0
    for arm, baseline in zip(arms, baselines, strict=True):
        target = baseline.lowest
        needed, own = arm.to_reach(target), baseline.to_reach(target)
        assert own is not None, "a curve reaches its own lowest loss"
        censored += needed is None or own == baseline.spent[0]
        early += needed == arm.spent[0] != own
        logs.append(math.log((arm.spent[-1] if needed is None else needed) / own))
    of_logs = mean_interval(logs)
    low, high = (None if end is None else math.exp(end) for end in (of_logs.low, of_logs.high))
    return Interval(
        mean=math.exp(of_logs.mean),
        low=None if early else low,
        high=None if censored else high,
        seeds=len(logs),
        censored=censored,
        early=early,
    )


def loss_difference(arms: Sequence[Curve], baselines: Sequence[Curve]) -> Interval:
    """Lowest loss of the arm less that of the baseline, paired by seed."""
    pairs = zip(arms, baselines, strict=True)
    return mean_interval([arm.lowest - baseline.lowest for arm, baseline in pairs])


BETTER, WORSE, ALIKE = "better", "worse", "not told apart"


def verdict(difference: Interval) -> str:
    """What the seeds allow to say of the arm at this budget, from :func:`loss_difference`.

    Not from the ratio: where targets are not reached it is a bound, and those of several seeds lie
    close together whatever the ratios are. With one seed nothing can be told apart.
    """
    if difference.low is not None and difference.low > 0:
        return WORSE
    return BETTER if difference.high is not None and difference.high < 0 else ALIKE
