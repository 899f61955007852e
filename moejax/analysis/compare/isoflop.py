"""IsoFLOP fits: at each budget the size of least loss, and the scaling law through all runs.

N is the training FLOPs of a token over six, so that C = 6 N D holds exactly: the parameters that a
token meets, attention counted in. Schedules are constant, so the losses of one run at its
evaluations are those of runs of smaller budgets (no learning rate has decayed).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from moejax.analysis.compare.arms import ArmSpec, at_width
from moejax.analysis.compare.matching import Interval, mean_interval
from moejax.analysis.compare.plan import positions_per_step
from moejax.analysis.compare.results import ArmResult
from moejax.config.load import load_config
from moejax.errors import UserError

FEWEST_SIZES = 3
# Budgets at the start of a run that no fit takes.
_SKIPPED = 1


def width_arms(spec: str, widths: Sequence[int], overrides: Sequence[str]) -> list[ArmSpec]:
    """``spec`` at each width: as many heads of the same size, feed-forward layers in proportion.

    UserError for fewer than three widths, or one that the head size does not divide.
    """
    if len(set(widths)) < FEWEST_SIZES:
        raise UserError(f"--widths: a parabola needs {FEWEST_SIZES} different widths or more")
    model = load_config(spec, overrides).model
    if model.name != "decoder":
        raise UserError(f"--config {spec}: scales decoders, not a {model.name}")
    return [
        ArmSpec(f"d{width}", spec, at_width(model, width, "--widths"))
        for width in sorted(set(widths))
    ]


@dataclasses.dataclass(frozen=True)
class Points:
    """Losses of one seed on one modality at equal FLOPs.

    Attributes:
      n: sizes.
      budgets: FLOPs.
      losses: [size, budget].
    """

    n: np.ndarray
    budgets: np.ndarray
    losses: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """D = C / 6 N, [size, budget]."""
        return self.budgets[None] / (6 * self.n[:, None])


def points_of(
    results: Sequence[ArmResult], modality: str, seed: int, budget: float, evaluations: int
) -> Points:
    """The losses at k / evaluations of the budget, read between the evaluations of each run.

    The first is left out: the learning rate has hardly risen.
    """
    places = [positions_per_step(result.arm.config) for result in results]
    n = [r.arm.flops_per_step / (6 * place) for r, place in zip(results, places, strict=True)]
    curves = [result.flops_curves(modality)[seed] for result in results]
    # Whole steps end a little before the budget or after it.
    last = min(budget, *(curve.spent[-1] for curve in curves))
    budgets = last * np.arange(1 + _SKIPPED, evaluations + 1) / evaluations
    losses = [[curve.at(flops) for flops in budgets] for curve in curves]
    return Points(np.array(n), budgets, np.array(losses))


def best_size(n: np.ndarray, losses: np.ndarray) -> tuple[float, float] | None:
    """(size, loss) at the bottom of the parabola of the loss in log N.

    None where it opens downwards or its bottom lies outside of the sizes that were tried: nothing
    is extrapolated.
    """
    x = np.log(n)
    a, b, c = np.polyfit(x - x.mean(), losses, 2)
    if a <= 0:
        return None
    bottom = -b / (2 * a) + x.mean()
    if not x.min() <= bottom <= x.max():
        return None
    return float(np.exp(bottom)), float(c - b * b / (4 * a))


@dataclasses.dataclass(frozen=True)
class Law:
    """``L = E + A / N^alpha + B / D^beta`` (Hoffmann et al. 2022, arXiv 2203.15556, eq. 2)."""

    e: float
    a: float
    alpha: float
    b: float
    beta: float

    def loss(self, n: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return self.e + self.a * n**-self.alpha + self.b * tokens**-self.beta

    @property
    def size_exponent(self) -> float:
        """The power of C with which the best size grows."""
        return self.beta / (self.alpha + self.beta)


def fit_law(points: Points) -> Law:
    """Least squares on the logarithm of the loss, robust (Huber, 1e-3), from a grid of starts.

    As approach 3 of arXiv 2203.15556, section 3.3: E, A and B are fitted as logarithms.
    """
    n, tokens = np.broadcast_arrays(points.n[:, None], points.tokens)
    log_n, log_d, target = np.log(n).ravel(), np.log(tokens).ravel(), np.log(points.losses).ravel()

    def residuals(theta):
        e, a, alpha, b, beta = theta
        terms = np.stack([np.full_like(log_n, e), a - alpha * log_n, b - beta * log_d])
        return np.logaddexp.reduce(terms, axis=0) - target

    fits = []
    for exponent in (0.2, 0.5, 1.0):
        for floor in (0.3, 0.8):
            e = np.log(floor) + target.min()
            rest = max(np.log(np.exp(target.mean()) - np.exp(e)), -10) - np.log(2)
            start = (
                e,
                rest + exponent * log_n.mean(),
                exponent,
                rest + exponent * log_d.mean(),
                exponent,
            )
            bounds = ([-10, -10, 0, -10, 0], [np.log(20), 60, 3, 60, 3])
            start = np.clip(start, np.array(bounds[0]) + 1e-6, np.array(bounds[1]) - 1e-6)
            fits.append(least_squares(residuals, start, bounds=bounds, loss="huber", f_scale=1e-3))
    e, a, alpha, b, beta = min(fits, key=lambda fit: fit.cost).x
    return Law(math.exp(e), math.exp(a), alpha, math.exp(b), beta)


@dataclasses.dataclass(frozen=True)
class Fit:
    """What the runs say of one modality; intervals are over seeds.

    Attributes:
      modality: which.
      budgets: FLOPs at which losses were read.
      best: of each budget the best size; None unless the parabola of every seed has its bottom
        inside (those of some seeds alone would pull it inwards).
      exponent: of C in the best size, through those budgets; None with fewer than two.
      law: intervals of e, a, alpha, b, beta and size_exponent.
      turned: runs whose held-out loss had turned: the law then speaks of too little data.
    """

    modality: str
    budgets: tuple[float, ...]
    best: tuple[Interval | None, ...]
    exponent: Interval | None
    law: dict[str, Interval]
    turned: int

    def document(self) -> dict[str, Any]:
        """As isoflop.json has it."""
        return {
            "modality": self.modality,
            "budgets": [
                {"flops": flops, "best_size": None if best is None else dataclasses.asdict(best)}
                for flops, best in zip(self.budgets, self.best, strict=True)
            ],
            "size_exponent": None if self.exponent is None else dataclasses.asdict(self.exponent),
            "law": {name: dataclasses.asdict(value) for name, value in self.law.items()},
            "turned": self.turned,
        }


def fit_modality(
    results: Sequence[ArmResult], modality: str, budget: float, evaluations: int
) -> Fit:
    """Parabolas and law of every seed, and their intervals."""
    seeds = range(min(len(result.runs) for result in results))
    points = [points_of(results, modality, seed, budget, evaluations) for seed in seeds]
    best, inside = [], []
    for j in range(points[0].losses.shape[1]):
        found = [best_size(one.n, one.losses[:, j]) for one in points]
        logs = [math.log(bottom[0]) for bottom in found if bottom is not None]
        whole = len(logs) == len(found)
        best.append(_exponential(mean_interval(logs)) if whole else None)
        if whole:
            inside.append((j, logs))
    slopes = []
    if len(inside) > 1:
        log_c = np.log([points[0].budgets[j] for j, _ in inside])
        log_n = np.array([logs for _, logs in inside])
        slopes = [float(np.polyfit(log_c, log_n[:, seed], 1)[0]) for seed in seeds]
    laws = [fit_law(one) for one in points]
    names = ("e", "a", "alpha", "b", "beta", "size_exponent")
    return Fit(
        modality=modality,
        budgets=tuple(points[0].budgets.tolist()),
        best=tuple(best),
        exponent=mean_interval(slopes) if slopes else None,
        law={name: mean_interval([getattr(law, name) for law in laws]) for name in names},
        turned=sum(curve.turned for r in results for curve in r.flops_curves(modality)),
    )


def _exponential(interval: Interval) -> Interval:
    low, high = (None if end is None else math.exp(end) for end in (interval.low, interval.high))
    return dataclasses.replace(interval, mean=math.exp(interval.mean), low=low, high=high)
