"""FLOPs to reach a loss: interpolation, censoring, intervals that hold what they should."""

import math

import numpy as np
import pytest
from scipy import stats

from moejax.analysis.compare.matching import (
    ALIKE,
    BETTER,
    WORSE,
    Curve,
    Interval,
    budget_ratio,
    loss_difference,
    mean_interval,
    verdict,
)

SPENT = tuple(1e9 * (i + 1) for i in range(8))


def test_a_target_between_two_evaluations_is_reached_between_them():
    curve = Curve((1e9, 1e10, 1e11), (6.0, 5.0, 4.0))
    assert curve.to_reach(5.0) == pytest.approx(1e10)
    # Halfway in the loss is halfway in the logarithm.
    assert curve.to_reach(5.5) == pytest.approx(10**9.5)
    assert curve.to_reach(7.0) == 1e9, "an upper bound"
    assert curve.to_reach(3.9) is None


def test_the_first_time_counts():
    """A loss that turned reached its lowest before the end."""
    curve = Curve((1.0, 2.0, 4.0, 8.0), (6.0, 5.0, 5.5, 5.2))
    assert curve.to_reach(5.2) == pytest.approx(2**0.8)
    assert curve.turned and curve.lowest == 5.0
    assert not Curve((1.0, 2.0), (6.0, 5.0)).turned


def test_an_evaluation_that_was_not_finite_is_passed_over():
    curve = Curve((1.0, 2.0, 4.0), (float("inf"), 5.0, 4.0))
    assert curve.to_reach(5.5) == 2.0 and curve.lowest == 4.0


def test_a_curve_must_rise_in_what_is_spent():
    with pytest.raises(ValueError, match="must rise"):
        Curve((2.0, 2.0), (1.0, 1.0))
    with pytest.raises(ValueError, match="2 places and 1 losses"):
        Curve((1.0, 2.0), (1.0,))


def test_interval_is_that_of_student():
    values = [1.0, 2.0, 4.0]
    got = mean_interval(values)
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (got.mean, got.low, got.high) == pytest.approx((7 / 3, low, high))
    assert mean_interval([3.0]) == Interval(3.0, None, None, 1)


def power_law(scale: float, shift: float = 0.0) -> Curve:
    """A loss that falls as a power of FLOPs; with ``scale`` times as many it does the same."""
    losses = tuple(2.0 + 3.0 * (spent / scale / 1e9) ** -0.3 + shift for spent in SPENT)
    return Curve(SPENT, losses)


def test_ratio_is_that_of_the_flops():
    baselines = [power_law(1.0, shift) for shift in (0.0, 0.1, -0.1)]
    arms = [power_law(0.5, shift) for shift in (0.0, 0.1, -0.1)]
    got = budget_ratio(arms, baselines)
    # What it costs to take a power law as straight between two evaluations.
    assert got.mean == pytest.approx(0.5, rel=0.02)
    assert (got.seeds, got.censored) == (3, 0)
    assert verdict(loss_difference(arms, baselines)) == BETTER


def test_a_target_that_is_not_reached_is_a_bound_and_no_more():
    baselines = [power_law(1.0, shift) for shift in (0.0, 0.1, -0.1)]
    arms = [power_law(4.0, shift) for shift in (0.0, 0.1, -0.1)]
    got = budget_ratio(arms, baselines)
    assert got.censored == 3 and got.high is None
    # The true ratio is 4: nothing is extrapolated beyond the budget.
    assert got.mean == pytest.approx(1.0)
    assert verdict(loss_difference(arms, baselines)) == WORSE
    reverse = budget_ratio(baselines, arms)
    assert reverse.mean == pytest.approx(0.25, rel=0.02) and reverse.censored == 0


def test_a_target_that_was_there_from_the_start_is_a_bound_too():
    """The baseline of a much worse arm has its loss at the first evaluation: at most 1/8."""
    arms = [power_law(40.0, shift) for shift in (0.0, 0.1)]
    baselines = [power_law(1.0, shift) for shift in (0.0, 0.1)]
    got = budget_ratio(baselines, arms)
    assert (got.early, got.censored) == (2, 0)
    assert got.mean == pytest.approx(1 / 8) and got.low is None and got.high is not None
    # A baseline that is lowest at once: what it needed is not known from below.
    risen = [Curve(SPENT, tuple(5.0 + i for i in range(8)))] * 2
    got = budget_ratio([power_law(0.1)] * 2, risen)
    assert got.censored == 2 and got.high is None


def test_one_seed_tells_nothing_apart():
    arms, baselines = [power_law(0.3)], [power_law(1.0)]
    got = budget_ratio(arms, baselines)
    assert got.mean < 0.35 and got.low is None and got.high is None
    assert verdict(loss_difference(arms, baselines)) == ALIKE


def test_copies_have_ratio_one():
    """Fixed paired seeds: the same numbers twice."""
    curves = [power_law(1.0, shift) for shift in (0.0, 0.2, -0.3)]
    got = budget_ratio(curves, curves)
    assert got.low == got.mean == got.high == 1.0 and got.censored == 0
    assert verdict(loss_difference(curves, curves)) == ALIKE


def noisy(
    rng: np.random.Generator, scale: float, seed_effect: float, more: float, turns: bool
) -> Curve:
    """A power law with the noise of a run; ``more``: what whole steps add to the budget."""
    losses = np.array(power_law(scale, seed_effect).losses)
    if turns:
        losses[3:] = losses[2] + 0.05 * np.arange(1, 6)
    losses += rng.normal(0, 0.01) + rng.normal(0, 0.003, len(SPENT))
    return Curve(tuple(more * spent for spent in SPENT), tuple(losses.tolist()))


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(("more", "turns"), [(1.0, False), (1.01, False), (1.0, True)])
def test_intervals_hold_one_for_equal_arms_and_not_for_worse_ones(seeds, more, turns):
    """Of 300 comparisons of equal arms, whose runs differ by noise, few are told apart.

    Nearly all of those with an arm that needs half as many FLOPs again are.
    """
    rng = np.random.default_rng(0)
    wrong = seen = outside = 0
    for _ in range(300):
        effects = rng.normal(0, 0.1, seeds)
        baselines, equal, worse = (
            [noisy(rng, scale, effect, spends, turns) for effect in effects]
            for scale, spends in ((1.0, 1.0), (1.0, more), (1.5, more))
        )
        wrong += verdict(loss_difference(equal, baselines)) != ALIKE
        seen += verdict(loss_difference(worse, baselines)) == WORSE
        ratio = budget_ratio(equal, baselines)
        low = 0.0 if ratio.low is None else ratio.low
        outside += not low <= more <= (math.inf if ratio.high is None else ratio.high)
    assert wrong <= 0.08 * 300
    # The lowest of a curve that has turned is that of a few evaluations: a bound, often of all.
    assert turns or outside <= 0.12 * 300
    assert seen >= 0.8 * 300
