"""The packing plan: every item once an epoch, within capacity, found without replaying the run."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.data.packing import PackingPlan, best_fit

LENGTHS = np.random.default_rng(0).integers(5, 40, 203)


def epoch_items(plan, epoch):
    return [plan.items(epoch * len(plan) + j)[1] for j in range(len(plan))]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_best_fit_places_each_item_once_within_capacity(lengths, capacity):
    lengths = np.asarray(lengths, np.int64)
    bins = best_fit(lengths, capacity)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(lengths[b].sum() <= capacity for b in bins)
    # Two bins that fit into one would be a bin too many.
    loads = sorted(int(lengths[b].sum()) for b in bins)
    assert len(loads) < 2 or loads[0] + loads[1] > capacity


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_epoch_holds_each_item_once(epoch):
    plan = PackingPlan(LENGTHS, 100, seed=3)
    items = epoch_items(plan, epoch)
    assert sorted(np.concatenate(items)) == list(range(len(LENGTHS)))
    assert max(LENGTHS[i].sum() for i in items) <= 100
    assert LENGTHS.sum() / (len(plan) * 100) > 0.95


def test_a_bin_is_a_function_of_its_index_alone():
    plan, again = PackingPlan(LENGTHS, 100, seed=3), PackingPlan(LENGTHS, 100, seed=3)
    # One plan walks there, the other jumps.
    walked = [plan.items(index) for index in range(4 * len(plan))]
    for index in (3 * len(plan) + 2, 0, 2 * len(plan)):
        assert again.items(index)[0] == walked[index][0]
        np.testing.assert_array_equal(again.items(index)[1], walked[index][1])


def test_epochs_and_seeds_differ_and_no_shuffle_repeats():
    plan, other = PackingPlan(LENGTHS, 100, seed=3), PackingPlan(LENGTHS, 100, seed=4)
    fixed = PackingPlan(LENGTHS, 100, seed=3, shuffle=False)
    same = lambda a, b: all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not same(epoch_items(plan, 0), epoch_items(plan, 1))
    assert not same(epoch_items(plan, 0), epoch_items(other, 0))
    assert same(epoch_items(fixed, 0), epoch_items(fixed, 7))


def test_an_item_longer_than_a_bin_is_an_error():
    with pytest.raises(ValueError, match="41 tokens does not fit in 40"):
        PackingPlan([3, 41], 40, seed=0)
