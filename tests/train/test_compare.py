"""Several processes share the runs of one comparison."""

import contextlib
import functools

import pytest

from moejax.analysis.compare.arms import ArmSpec, parse_budget
from moejax.analysis.compare.plan import make_plan
from moejax.analysis.compare.results import Evaluations
from moejax.data.record_io import locked
from moejax.train import compare

BEST = 4e-3


@pytest.fixture
def trained(monkeypatch):
    """Folders that were "trained", in their order; the best rate of all lies beyond the sweep."""
    folders = []

    def train_apart(config, folder):
        folders.append(str(folder).partition("/runs/")[2])
        (folder / "done").touch()

    def read_evaluations(folder, config):
        loss = abs(config.optim.learning_rate / BEST - 1)
        losses = {name: (loss,) for name in config.model.modalities}
        return Evaluations((1,), losses, 0.1, 1, f"seed {config.data.seed}", {})

    monkeypatch.setattr(compare, "train_apart", train_apart)
    monkeypatch.setattr(compare, "read_evaluations", read_evaluations)
    monkeypatch.setattr(compare, "is_finished", lambda config, folder: (folder / "done").exists())
    monkeypatch.setattr(compare, "_check_arms", lambda plan: None)
    return folders


@functools.cache
def make(seeds=2):
    specs = [ArmSpec("a", "quickstart:dense", ()), ArmSpec("b", "quickstart", ())]
    rates = (1e-3, 2e-3, BEST)
    return make_plan(specs, parse_budget("steps=9"), seeds=seeds, rates=rates)


ARM_A = [f"a/rate={rate:g},seed=0" for rate in (1e-3, 2e-3, BEST, 2 * BEST)]
ALL = [*ARM_A, f"a/rate={BEST:g},seed=1"]
ALL += [run.replace("a/", "b/") for run in ALL]


def test_alone_a_process_goes_arm_by_arm(trained, tmp_path):
    compare.run_comparison(make(), tmp_path, len)
    assert trained == ALL


def test_what_another_process_has_is_waited_for_and_the_rest_is_taken(
    trained, tmp_path, monkeypatch
):
    """Another process has a run of the first sweep, and ends it when nothing else is left."""
    taken = tmp_path / "runs" / ARM_A[1]
    other = contextlib.ExitStack()
    assert other.enter_context(locked(taken))
    waits = []

    def sleep(seconds):
        # Its last checkpoint is there, its last evaluation is not: it still has the lock.
        if not waits:
            (taken / "done").touch()
        else:
            other.close()
        waits.append(list(trained))

    monkeypatch.setattr(compare.time, "sleep", sleep)
    results, _ = compare.run_comparison(make(), tmp_path, len)
    assert len(waits) == 2 and waits[0] == waits[1]
    # The other arm is trained meanwhile, its seeds and the rate beyond the sweep too.
    assert set(waits[0]) == {*ALL} - {*ARM_A[1:2], *ARM_A[3:], ALL[4]}
    assert set(trained) == {*ALL} - {ARM_A[1]} and len(trained) == len(set(trained))
    assert [result.rate for result in results] == [BEST, BEST]


def test_a_run_that_another_process_left_unfinished_is_taken(trained, tmp_path, monkeypatch):
    taken = tmp_path / "runs" / ALL[-1]
    other = contextlib.ExitStack()
    assert other.enter_context(locked(taken))
    monkeypatch.setattr(compare.time, "sleep", lambda seconds: other.close())
    compare.run_comparison(make(), tmp_path, len)
    assert trained == ALL
