"""``moejax train --sweep``: one workdir for each point, going on, failures, the summary."""

import csv
import json
import os
import shlex
import signal

import pytest

from moejax.cli.main import main
from moejax.train import loop
from moejax.train.sweep import format_rows

TINY = [
    "--config.model.num_layers=1",
    "--config.model.d_model=16",
    "--config.model.num_heads=2",
    "--config.model.ffn_hidden=32",
    "--config.data.batch_size=8",
    "--config.train.steps=2",
    "--config.log.every=1",
    "--config.eval.batches=1",
]
SEEDS = ["--sweep", "train.seed=0,1"]


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return ["train", "--config", "quickstart:dense", *TINY]


def summary(folder):
    return json.loads((folder / "sweep.json").read_text())["points"]


@pytest.mark.slow
def test_points_run_go_on_and_are_summed_up(command, tmp_path, monkeypatch, capsys):
    """A signal in the first point; the same command finishes both; a third time nothing is left."""
    put_batch = loop.put_batch

    def stop(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return put_batch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "put_batch", stop)
        assert main([*command, *SEEDS]) == 0
    folder = tmp_path / "runs" / "quickstart_dense_sweep"
    assert [row["status"] for row in summary(folder)] == ["stopped", "pending"]
    assert not (folder / "seed=1").exists()
    assert "sweep of 2 points in runs/quickstart_dense_sweep, 0 of them done" in (
        capsys.readouterr().out
    )

    assert main([*command, *SEEDS, "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert "resumed from step 1" in err
    assert "point 1 of 2: seed=0\n" in err and "point 2 of 2: seed=1  (ETA of the sweep" in err
    assert document["workdir"] == str(folder.relative_to(tmp_path))
    assert document["points"] == summary(folder)
    for seed, row in enumerate(summary(folder)):
        assert (row["point"], row["status"], row["step"]) == (f"seed={seed}", "done", 2)
        assert row["fields"] == {"train.seed": seed}
        record = json.loads((folder / row["point"] / "config.json").read_text())
        assert record["train"]["seed"] == seed
        last = json.loads((folder / row["point"] / "metrics.jsonl").read_text().splitlines()[-1])
        assert row["metrics"]["eval/image/loss"] == last["eval/image/loss"]
    losses = [row["metrics"]["eval/loss"] for row in summary(folder)]
    assert losses[0] != losses[1]
    with (folder / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["train.seed"] for row in table] == ["0", "1"]
    assert [float(row["eval/loss"]) for row in table] == losses

    before = summary(folder)
    assert main([*command, *SEEDS]) == 0
    out = capsys.readouterr().out
    assert "2 of them done" in out and "point 1 of 2" not in out
    head, *lines = out.splitlines()[-3:]
    assert " ".join(head.split()) == "point status step loss structure loss text loss image loss"
    assert [line.split()[:4] for line in lines] == [
        [f"seed={seed}", "done", "2", f"{losses[seed]:.4f}"] for seed in (0, 1)
    ]
    assert summary(folder) == before


def test_a_point_that_fails_does_not_stop_the_others(command, tmp_path, capsys):
    sweep = ["--sweep", "optim.learning_rate=1e38,1e-3", "--workdir", "sweep"]
    assert main([*command, "--config.train.max_skipped=1", *sweep]) == 1
    diverged, good = summary(tmp_path / "sweep")
    assert (diverged["status"], good["status"]) == ("failed", "done")
    assert diverged["error"].startswith("loss or gradient not finite in 1 steps in a row")
    out, err = capsys.readouterr()
    assert "point learning_rate=1e+38 failed: loss or gradient not finite" in err
    assert out.splitlines()[-1].startswith("learning_rate=1e+38: loss or gradient not finite")


def test_an_error_of_the_data_is_a_line_of_the_table(command, tmp_path, capsys):
    sweep = ["--sweep", "data.source=folder:nowhere,folder:nor_here", "--workdir", "sweep"]
    assert main([*command, *sweep]) == 1
    rows = summary(tmp_path / "sweep")
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert "nor_here" in rows[1]["error"]
    # No workdir is made for what cannot start.
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == [
        "sweep.csv",
        "sweep.json",
    ]


def test_dry_run_prints_commands_that_can_be_pasted(command, tmp_path, capsys):
    sweep = [
        *("--sweep", "optim.learning_rate=1e-3,3e-3"),
        *("--sweep", "model.block_pattern=('untied','dense')"),
    ]
    assert main([*command, *sweep, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    words = shlex.split(lines[1])
    assert words[:4] == ["moejax", "train", "--config", "quickstart:dense"]
    assert "--config.optim.learning_rate=3e-3" in words
    assert "--config.model.block_pattern=('untied','dense')" in words
    name = "learning_rate=0.003,block_pattern=untied-dense"
    assert words[-2:] == ["--workdir", f"runs/quickstart_dense_sweep/{name}"]
    assert main([*command, *sweep, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1] == words
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sweep"], "quickstart.py defines no get_hyper(hyper)"),
        (["--sweep", "train.seed"], "--sweep train.seed: write --sweep FIELD=VALUE,VALUE"),
        ([*SEEDS, *SEEDS], "train.seed is swept twice"),
        (["--sweep", "train.seed=0,-1"], "point 2 (train.seed=-1): train.seed: must not be"),
        (["--sweep", "train.sed=0"], "did you mean 'seed'?"),
        (["--sweep", "train.steps=1,2"], "train.steps is set by --config.train.steps too"),
        (["--dry-run"], "--dry-run: goes with --sweep"),
    ],
)
def test_mistakes_are_found_before_anything_runs(command, tmp_path, capsys, flags, message):
    assert main([*command, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_refused(command, tmp_path, capsys):
    run, other = tmp_path / "run", tmp_path / "sweep" / "seed=1"
    for folder in (run, other):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    assert main([*command, *SEEDS, "--workdir", "run"]) == 2
    assert "--workdir run: holds a run" in capsys.readouterr().err
    assert main([*command, *SEEDS, "--workdir", "sweep"]) == 2
    assert "seed=1: belongs to another config" in capsys.readouterr().err
    assert not (tmp_path / "sweep" / "sweep.json").exists()
    assert main(["train", "--workdir", "run", *SEEDS]) == 2
    assert "--sweep: needs --config" in capsys.readouterr().err


def test_table_without_an_evaluation_shows_training_losses():
    row = {"point": "a", "status": "done", "step": 3, "fields": {}}
    row["metrics"] = {"train/loss": 1.5, "train/loss/text": 1.0, "train/grad_norm": 2.0}
    head, line = format_rows([row]).splitlines()
    assert " ".join(head.split()) == "point status step train loss train text loss"
    assert line.split() == ["a", "done", "3", "1.5000", "1.0000"]
