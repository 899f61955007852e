"""``moejax train`` and ``moejax eval``: exit codes, one-line errors, JSON."""

import json
import os
import signal

import pytest

from moejax.cli.main import main
from moejax.train.loop import train

from .conftest import make_config

CONFIG = """
from moejax.config import default_config

def get_config(arg=""):
    config = default_config("bigram")
    config.data.update(batch_size=8, sequence_length=16, text_tokenizer="bytes")
    config.train.update(steps=4, checkpoint_every=2, max_skipped=2)
    config.eval.batches = 1
    return config
"""


@pytest.fixture
def command(fake_data, tmp_path, monkeypatch):
    """``moejax train`` of the bigram; by default in runs/tiny of the current folder."""
    (tmp_path / "tiny.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return ["train", "--config", "tiny.py"]


def test_train_command(command, tmp_path, capsys):
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["step"] == 4
    assert document["workdir"] == os.path.join("runs", "tiny")
    assert (tmp_path / "runs/tiny/checkpoints/4").is_dir()
    record = json.loads((tmp_path / "runs/tiny/config.json").read_text())
    assert record["made_with"]["data_version"] == "fake-1"
    assert record["made_with"]["xla_flags"] == os.environ["XLA_FLAGS"]
    # The run knows its config: no --config is needed to go on.
    assert main(["train", "--workdir", "runs/tiny"]) == 0
    assert "already trained to step 4" in capsys.readouterr().out


def test_stop_by_signal_exits_with_130(command, fake_data, capsys):
    """A cluster takes 0 for the end of the job and would not start it again."""
    fake_data.before = staticmethod(lambda step: os.kill(os.getpid(), signal.SIGTERM))
    assert main(command) == 130
    assert "stopped at step 1; run the same command" in capsys.readouterr().out


def test_failed_run_exits_with_1_and_says_why(command, fake_data, capsys):
    fake_data.broken = frozenset({1, 2})
    assert main(command) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("moejax: error: loss or gradient not finite in 2 steps in a row")
    assert "r2_0" in line


def test_mistakes_exit_with_2_in_one_line(command, tmp_path, capsys):
    for override, message in (
        ("--config.optim.name=sgdd", "optim.name: no optimizer 'sgdd'"),
        ("--config.data.batch_size=6", "data.batch_size=6"),
        ("--config.optim.freeze=hed_dv", "optim.freeze: 'hed_dv' is found in no parameter"),
        ("--config.train.init_from=nowhere", "train.init_from=nowhere: there is no folder"),
        ("--config.train.stepz=6", "train has no field 'stepz'; did you mean 'steps'?"),
        ("--config.eval.metrics=likelyhood", "did you mean 'likelihood'?"),
    ):
        assert main([*command, override]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("moejax: error: ") and message in line
    assert not (tmp_path / "runs").exists()


def test_eval_command(fake_data, tmp_path, capsys):
    workdir = tmp_path / "run"
    train(make_config(train__steps=5, optim__ema_decay=0.9), workdir)
    capsys.readouterr()
    assert main(["eval", "--workdir", str(workdir), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["step"], document["split"]) == (5, "val")
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    # The moving average is what the run itself evaluated, on the same batches.
    assert document["metrics"]["loss"] == pytest.approx(rows[-1]["eval/loss"], rel=1e-6)
    assert main(["eval", "--workdir", str(workdir), "--split", "train"]) == 0
    assert "unigram baseline" in capsys.readouterr().out
    assert main(["eval", "--workdir", str(workdir), "--step", "4"]) == 2
    assert "--step 4: no such checkpoint" in capsys.readouterr().err
