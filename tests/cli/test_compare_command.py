"""``moejax compare`` and ``moejax isoflop``: runs, going on, files; the null check."""

import csv
import json
import os
import signal

import pytest
from PIL import Image

from moejax.cli.main import main
from moejax.train import loop

TINY = [
    "--config.model.num_layers=1",
    "--config.model.d_model=16",
    "--config.model.num_heads=2",
    "--config.model.ffn_hidden=(32,)",
    "--config.data.batch_size=8",
    "--config.log.every=1",
    "--config.eval.batches=1",
]
FAST = ["--budget", "steps=4", "--evaluations", "2", "--seeds", "2"]


@pytest.fixture
def no_training(monkeypatch):
    """Whoever trains fails."""

    def fail(*_):
        raise AssertionError("a second run recomputes nothing")

    def arm():
        monkeypatch.setattr("moejax.train.compare.train_apart", fail)

    return arm


@pytest.mark.slow
def test_two_copies_have_ratio_one_and_nothing_is_computed_twice(
    tmp_path, monkeypatch, capsys, no_training
):
    """Stopped by a signal in the first run; then the same command ends it, and then only reads."""
    monkeypatch.chdir(tmp_path)
    command = ["compare", "--configs", "quickstart,quickstart", *FAST, "--rates", "3e-3", *TINY]
    put_batch, seen = loop.put_batch, []

    def stop(*args):
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return put_batch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "put_batch", stop)
        assert main(command) == 130
    assert "stopped; run the same command to go on" in capsys.readouterr().out
    folder = tmp_path / "runs" / "compare_quickstart_quickstart_2"
    assert not (folder / "summary.json").exists()

    assert main(command) == 0
    assert "resumed from step" in (folder / "train.log").read_text()
    out = capsys.readouterr().out
    assert "| quickstart_2 | text | 1.00 [1.00, 1.00] |" in out and "ETA of the comparison" in out
    rows = json.loads((folder / "summary.json").read_text())
    assert [(row["arm"], row["modality"]) for row in rows] == [
        ("quickstart_2", "text"),
        ("quickstart_2", "image"),
    ]
    for row in rows:
        assert row["baseline"] == "quickstart"
        assert row["ratio"] == row["low"] == row["high"] == 1.0
        assert (row["seeds"], row["censored"], row["verdict"]) == (2, 0, "not told apart")
    with (folder / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    # Two arms, two seeds, two evaluations, two modalities.
    assert len(lines) == 16
    assert {"arm", "seed", "modality", "flops", "loss"} <= set(lines[0])
    pairs = {"quickstart": [], "quickstart_2": []}
    for line in lines:
        pairs[line["arm"]].append((line["seed"], line["modality"], line["flops"], line["loss"]))
    assert pairs["quickstart"] == pairs["quickstart_2"]
    assert len({line["loss"] for line in lines if line["modality"] == "text"}) == 4
    with Image.open(folder / "comparison.png") as picture:
        assert picture.format == "PNG" and picture.width > picture.height
    page = (folder / "index.html").read_text()
    assert "quickstart_2 against quickstart" in page and "data:image/png;base64," in page

    # Of another kind is what no longer fits beside it; more seeds would.
    assert main([*command, "--config.eval.split=test"]) == 2
    assert "holds a comparison with another eval" in capsys.readouterr().err
    no_training()
    before = {path: path.read_bytes() for path in folder.glob("*.*")}
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["rows"] == rows
    assert {path: path.read_bytes() for path in folder.glob("*.*")} == before


@pytest.mark.slow
def test_isoflop_trains_every_width_and_fits(tmp_path, monkeypatch, capsys, no_training):
    monkeypatch.chdir(tmp_path)
    command = [
        *("isoflop", "--config", "quickstart:dense", "--widths", "8,16,24"),
        *(
            "--budget",
            "flops=12.5e9",
            "--evaluations",
            "4",
            "--seeds",
            "1",
            "--rates",
            "3e-3",
            *TINY,
        ),
    ]
    assert main(command) == 0
    folder = tmp_path / "runs" / "isoflop_quickstart_dense"
    fits = json.loads((folder / "isoflop.json").read_text())
    assert [fit["modality"] for fit in fits] == ["text", "image"]
    # The first evaluation is left out.
    assert len(fits[0]["budgets"]) == 3
    assert set(fits[0]["law"]) == {"e", "a", "alpha", "b", "beta", "size_exponent"}
    with Image.open(folder / "isoflop.png") as picture:
        assert picture.format == "PNG"
    assert "best N" in capsys.readouterr().out
    no_training()
    assert main(command) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["compare", "--configs", "mot,chameleon"], "--budget: give what every run may spend"),
        (["compare", "--configs", "mot", "--budget", "flops=1e12"], "name at least two"),
        (["compare", "--configs", "mot,mott", "--budget", "steps=9"], "did you mean"),
        (
            ["compare", "--configs", "mot,mot", "--budget", "steps=9", "--rates", "fast"],
            "--rates fast: write positive numbers",
        ),
        (
            ["compare", "--configs", "mot,deepseek_moe", "--config.model.moe.top_k=99", *FAST],
            "model.moe.top_k",
        ),
        (["isoflop", "--widths", "8,16,24", "--budget", "steps=9"], "--config: give the config"),
        (["isoflop", "--config", "mot", "--widths", "8,x", "--budget", "steps=9"], "whole numbers"),
    ],
)
def test_mistakes(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


class Diverges:
    """Training that fails in place of a learning rate of 1."""

    def __init__(self, train):
        self.train, self.rates = train, []

    def __call__(self, config, folder):
        self.rates.append(config.optim.learning_rate)
        if config.optim.learning_rate == 1.0:
            raise loop.NonFiniteLoss("not finite")
        self.train(config, folder)


@pytest.mark.slow
def test_a_rate_that_diverges_is_not_chosen_nor_tried_again(tmp_path, monkeypatch, capsys):
    from moejax.train import compare

    diverges = Diverges(compare.train_apart)
    monkeypatch.setattr("moejax.train.compare.train_apart", diverges)
    argv = ["compare", "--configs", "quickstart,quickstart", *FAST, *TINY, "--seeds", "1"]
    argv += ["--rates", "1e-3,2e-3,1", "--workdir", str(tmp_path / "found")]
    assert main(argv) == 0
    assert "not finite" in capsys.readouterr().out
    rates = list(diverges.rates)
    assert rates.count(1.0) == 2, "once for each arm"
    # Two steps of Adam like the largest rate best; the one beyond it is the one that diverged.
    assert main([*argv, "--seeds", "2"]) == 0
    assert diverges.rates[len(rates) :] == [2e-3] * 2, "the second seed, nothing else"
    rows = json.loads((tmp_path / "found" / "summary.json").read_text())
    assert [row["seeds"] for row in rows] == [2, 2]


def test_a_folder_that_is_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    argv = ["compare", "--configs", "mot,mot", *FAST, *TINY, "--workdir", str(tmp_path)]
    assert main(argv) == 2
    assert "holds a run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
