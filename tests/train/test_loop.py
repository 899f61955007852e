"""The loop: stopping and going on changes nothing; rows, refusals, the end of a run."""

import json
import os
import signal

import jax
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.train import setup as setups
from moejax.train.checkpoint import Checkpoints
from moejax.train.evaluate import EVALUATORS
from moejax.train.load import load
from moejax.train.loop import NonFiniteLoss, train
from moejax.train.routing_log import RoutingLog
from moejax.train.writers import TIME_FIELDS, MetricWriter, read_rows

from .conftest import make_config


class Stopped(BaseException):
    """Stands for a crash: nothing in moejax catches it."""


def rows(workdir):
    """The rows without the fields that time decides."""
    return [
        {name: value for name, value in row.items() if name not in TIME_FIELDS}
        for row in read_rows(workdir / "metrics.jsonl")
    ]


def assert_same_end(workdir, reference):
    assert rows(workdir) == rows(reference)
    here, there = load(workdir), load(reference)
    assert here.step == there.step
    for a, b in zip(jax.tree.leaves(here.params), jax.tree.leaves(there.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def whole(fake_data, tmp_path):
    """A run that was never stopped: 12 steps, rows at 4, 8, 12, checkpoints at 5, 10, 12."""
    config = make_config(optim__ema_decay=0.9)
    train(config, tmp_path / "whole")
    return config, tmp_path / "whole"


def test_crashed_and_resumed_equals_never_stopped(fake_data, whole, tmp_path, capsys):
    """Checkpoints lie between log points, so the sums since the last row must be restored too."""
    config, reference = whole
    assert [row["step"] for row in rows(reference)] == [4, 6, 8, 12, 12]

    crashes = [9, 11]

    def crash(step):
        if crashes and step == crashes[0]:
            del crashes[0]
            raise Stopped

    fake_data.before = staticmethod(crash)
    workdir = tmp_path / "stopped"
    for resumed in ("", "resumed from step 5"):
        with pytest.raises(Stopped):
            train(config, workdir)
        assert resumed in capsys.readouterr().out
    values = train(config, workdir)
    assert "resumed from step 10" in capsys.readouterr().out
    assert_same_end(workdir, reference)
    assert values["step"] == 12 and "eval/text/loss" in values and "train/loss" in values


def test_rows_reach_a_mounted_bucket_before_a_checkpoint_does(fake_data, tmp_path, monkeypatch):
    """Such a file system takes what was written at fsync; without it a kill would lose the rows."""
    seen, fsync, save = [], os.fsync, Checkpoints.save

    def synced(file):
        if os.readlink(f"/proc/self/fd/{file}").endswith("metrics.jsonl"):
            seen.append([row["step"] for row in rows(tmp_path / "run")])
        fsync(file)

    def saved(self, step, *args):
        seen.append(f"checkpoint {step}")
        save(self, step, *args)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(RoutingLog, "sync", lambda self: seen.append("routing"))
    monkeypatch.setattr(Checkpoints, "save", saved)
    train(make_config(), tmp_path / "run")
    assert seen == [
        *([4], "routing", "checkpoint 5"),
        *([4, 6, 8], "routing", "checkpoint 10"),
        *([4, 6, 8, 12, 12], "routing", "checkpoint 12"),
    ]


def test_a_bucket_is_no_workdir(fake_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--workdir gs:/b/run: is no folder; mount the bucket"):
        train(make_config(), "gs://b/run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_returns(fake_data, whole, tmp_path, capsys, number):
    config, reference = whole

    def interrupt(step):
        if step == 6:
            os.kill(os.getpid(), number)

    fake_data.before = staticmethod(interrupt)
    before = signal.getsignal(number)
    train(config, tmp_path / "stopped")
    assert "stopped at step 7; run the same command to go on" in capsys.readouterr().out
    assert signal.getsignal(number) is before
    fake_data.before = staticmethod(lambda step: None)
    train(config, tmp_path / "stopped")
    assert "resumed from step 7" in capsys.readouterr().out
    assert_same_end(tmp_path / "stopped", reference)


def test_finished_run_says_so_at_once(fake_data, whole, capsys):
    config, workdir = whole
    files = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    values = train(config, workdir)
    assert "already trained to step 12 of 12" in capsys.readouterr().out
    assert values["step"] == 12
    assert files == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}


def test_longer_run_goes_on_and_another_config_is_refused(fake_data, whole, capsys):
    _, workdir = whole
    before = (workdir / "config.json").read_bytes()
    for change, message in (
        ({"optim__learning_rate": 0.1}, r"optim.learning_rate \(0.05 there, 0.1 now\)"),
        ({"train__steps": 8}, r"train.steps \(12 there, 8 now\)"),
        ({"data__seed": 3, "model__dropout": 0.0}, r"data.seed \(0 .*model.dropout \(0.1 there"),
    ):
        with pytest.raises(UserError, match=message):
            train(make_config(**{"optim__ema_decay": 0.9, **change}), workdir)
    assert (workdir / "config.json").read_bytes() == before
    # The run of an older moejax, whose schema had neither of two fields.
    record = json.loads(before)
    del record["train"]["init_experts"], record["optim"]["ema_decay"]
    (workdir / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"another config: optim.ema_decay \(0.0 there, 0.9 now\);"):
        train(make_config(optim__ema_decay=0.9), workdir)
    (workdir / "config.json").write_bytes(before)
    longer = make_config(
        optim__ema_decay=0.9, train__steps=14, train__checkpoint_every=3, log__every=7
    )
    train(longer, workdir)
    assert "resumed from step 12" in capsys.readouterr().out
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 14
    assert [row["step"] for row in rows(workdir)] == [4, 6, 8, 12, 12, 14, 14]


def test_changed_data_is_refused(fake_data, tmp_path):
    config = make_config(train__steps=2)
    train(config, tmp_path / "run")
    fake_data.version = "fake-2"
    with pytest.raises(UserError, match="data.source: the data changed.*fake-1 then, fake-2 now"):
        train(make_config(train__steps=4), tmp_path / "run")


def test_mistakes_leave_no_workdir(fake_data, tmp_path):
    for change, message in (
        ({"eval__metrics": ("likelyhood",)}, "eval.metrics: no evaluator.*'likelihood'"),
        ({"eval__best_metric": "text/los"}, "eval.best_metric: .*did you mean 'text/loss'"),
        ({"optim__name": "sgdd"}, "optim.name: no optimizer"),
        ({"mesh__data": 3}, "mesh.data=3"),
        ({"data__batch_size": 6}, "data.batch_size=6"),
    ):
        with pytest.raises(UserError, match=message):
            train(make_config(**change), tmp_path / "run")
        assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        train(make_config(), tmp_path / "file")


def test_skipped_steps_are_counted_in_the_rows(fake_data, tmp_path):
    fake_data.broken = frozenset({1, 4, 5})
    train(make_config(train__steps=8, eval__every=0), tmp_path / "run")
    first, second, _ = rows(tmp_path / "run")
    assert (first["train/skipped"], second["train/skipped"]) == (1, 3)
    assert np.isfinite(first["train/loss"])


def test_too_many_skipped_in_a_row_stop_the_run_and_name_the_records(fake_data, tmp_path):
    fake_data.broken = frozenset({5, 6, 7, 8, 9})
    with pytest.raises(NonFiniteLoss, match="3 steps in a row, up to step 8,.*r7_0, r7_1") as error:
        train(make_config(), tmp_path / "run")
    assert "\n" not in str(error.value)


def test_rows_are_exact_means_of_the_steps_since_the_last_row(fake_data, tmp_path):
    """Logged every step, then every fourth: the weighted means agree."""
    shared = {"train__steps": 8, "optim__learning_rate": 1e-9, "model__dropout": 0.0}
    train(make_config(log__every=1, **shared), tmp_path / "each")
    train(make_config(log__every=4, **shared), tmp_path / "four")
    one = [row for row in rows(tmp_path / "each") if "train/loss" in row]
    four = [row for row in rows(tmp_path / "four") if "train/loss" in row]
    pipeline = fake_data(make_config(), "train")
    weights = [float(pipeline.batch(step)["weights"].sum()) for step in range(8)]
    expected = np.average([row["train/loss/token"] for row in one[:4]], weights=weights[:4])
    assert four[0]["train/loss/token"] == pytest.approx(expected, rel=1e-6)
    norms = [row["train/grad_norm"] for row in one[4:]]
    assert four[1]["train/grad_norm"] == pytest.approx(np.mean(norms), rel=1e-6)


SCORES = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5, 9: 2.5}


@EVALUATORS.register("scripted")
def scripted(context):
    """A score for each evaluated step, in turn."""
    return {"score": SCORES[context.programs.setdefault("steps", iter(SCORES)).__next__()]}


def test_best_checkpoint_is_kept_beside_the_newest(fake_data, tmp_path):
    """An evaluation that beats all before is saved, whatever checkpoint_every says."""
    config = make_config(
        eval__metrics=("scripted",),
        eval__best_metric="score",
        eval__every=2,
        train__checkpoint_keep=1,
        train__checkpoint_every=5,
        train__steps=9,
    )
    train(config, tmp_path / "run")
    kept = sorted(int(p.name) for p in (tmp_path / "run/checkpoints").iterdir() if p.is_dir())
    assert kept == [4, 9]
    assert load(tmp_path / "run", step=4).step == 4


# The score after so many steps, and how many steps have been begun.
BY_STEP = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5, 10: 0.5, 12: 0.6, 14: 0.5, 16: 0.9}
BEGUN = [0]


@EVALUATORS.register("scripted_by_step")
def scripted_by_step(context):
    """A score that depends on the step alone, also in a run that was killed."""
    return {"by_step": BY_STEP[BEGUN[0]]}


def test_early_stop_is_exact_and_can_be_undone(fake_data, tmp_path, capsys):
    """Best at 4, worse at 6 and 8: stops at 8, also when it was killed in between."""

    def config(**fields):
        return make_config(
            **{
                "eval__metrics": ("scripted_by_step", "likelihood/0"),
                "eval__best_metric": "by_step",
                "eval__every": 2,
                "eval__patience": 2,
                "train__checkpoint_keep": 1,
                "train__steps": 20,
                **fields,
            }
        )

    crashes = []

    def note(step):
        if crashes and step == crashes[0]:
            del crashes[0]
            raise Stopped
        BEGUN[0] = step + 1

    fake_data.before = staticmethod(note)
    values = train(config(), tmp_path / "whole")
    said = capsys.readouterr().out
    assert "stopped early at step 8: by_step is no better than 1.0000 at step 4 in 2 eval" in said
    assert values["step"] == 8
    assert "% of the time of the steps" in said, "the input wait of the whole run"
    # What was not due has its turn when the run ends.
    assert "eval/text/loss" in values
    kept = sorted(int(p.name) for p in (tmp_path / "whole/checkpoints").iterdir() if p.is_dir())
    assert kept == [4, 8], "the best and the newest"

    crashes.append(7)
    with pytest.raises(Stopped):
        train(config(), tmp_path / "killed")
    train(config(), tmp_path / "killed")
    assert "resumed from step 5" in capsys.readouterr().out
    assert_same_end(tmp_path / "killed", tmp_path / "whole")

    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").rglob("*")}
    assert train(config(), tmp_path / "whole")["step"] == 8
    assert "stopped early, finished: by_step is no better" in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").rglob("*")}

    train(config(eval__patience=3), tmp_path / "killed")
    said = capsys.readouterr().out
    assert "resumed from step 8" in said
    assert "stopped early at step 16: by_step is no better than 0.5000 at step 10 in 3" in said


def test_rows_after_the_restored_step_are_cut(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    for step in (1, 2, 3, 4):
        writer.write(step, {"train/loss": float(step), "train/bad": float("nan")})
    writer.close()
    # A kill in the middle of a line.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/lo')
    writer = MetricWriter(tmp_path, 2)
    writer.write(3, {"train/loss": 30.0})
    writer.close()
    kept = rows(tmp_path)
    assert kept == [
        {"step": 1, "train/loss": 1.0},
        {"step": 2, "train/loss": 2.0},
        {"step": 3, "train/loss": 30.0},
    ]


def test_load_names_what_is_missing(fake_data, whole, tmp_path, monkeypatch):
    _, workdir = whole
    with pytest.raises(UserError, match="no run there"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="--step 3: no such checkpoint.*there are: 10, 12"):
        load(workdir, step=3)
    # A trained model is loaded without its data.
    with monkeypatch.context() as patched:
        patched.setattr(setups, "build_pipeline", None)
        params = load(workdir, step=10).params
    assert not np.array_equal(params["head_dv"], load(workdir).params["head_dv"])


def test_run_of_another_mesh_is_loaded_on_this_machine(fake_data, tmp_path):
    """Made on 8 devices by fsdp; config.json then names a mesh that is not here."""
    train(make_config(train__steps=3, mesh__data=1, mesh__fsdp=8), tmp_path / "run")
    here = load(tmp_path / "run")
    assert dict(here.setup.mesh.shape)["fsdp"] == 8
    record = json.loads((tmp_path / "run/config.json").read_text())
    record["mesh"].update(data=4, fsdp=4)
    (tmp_path / "run/config.json").write_text(json.dumps(record))
    there = load(tmp_path / "run")
    np.testing.assert_array_equal(there.params["head_dv"], here.params["head_dv"])
