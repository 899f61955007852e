"""docs/routing.md: its files, written outside of the repository, do what the page says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moejax.cli.main import main
from moejax.config import packages
from moejax.routing import ROUTER_LOSSES, ROUTERS

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "routing.md").read_text(encoding="utf-8")
TINY = {
    "model.num_layers": 4,
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.ffn_hidden": (32,),
    "model.moe.hidden": 8,
    "data.batch_size": 8,
    "train.steps": 4,
    "train.checkpoint_every": 2,
    "log.every": 2,
    "eval.batches": 1,
    "eval.every": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outside")
    for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        name = code.partition("\n")[0].removeprefix("# ")
        # The run below is shorter than the page's.
        (folder / name).write_text(code.replace('"runs/mine", 50', '"runs/mine", 2'))
    return folder


def run(folder, *argv):
    """``python ARGV`` in the folder, on the one device of a laptop."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, *argv], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_trains_with_the_router_and_shows_it(folder):
    fields = {**TINY, "model.moe.router.options.sure": 0.3}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    argv = ["train", "--import", "my_routers", "--config", "my_moe.py", "--workdir", "runs/mine"]
    run(folder, "-m", "moejax", *argv, *flags)
    workdir = folder / "runs" / "mine"
    record = json.loads((workdir / "config.json").read_text())
    assert record["model"]["moe"]["router"] == {"name": "unsure", "options": {"sure": 0.3}}
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    assert 1 / 8 <= rows[0]["train/router/spread"] <= 1
    assert 1 < rows[0]["train/router/experts_per_token"] <= 2
    assert {"eval/routing/token_entropy", "eval/text/loss"} <= rows[-1].keys()
    loads = [json.loads(line) for line in (workdir / "routing.jsonl").open()]
    assert [[layer["layer"] for layer in row["layers"]] for row in loads] == [[1, 3]] * 2

    text = run(folder, "my_look.py")
    assert "experts that text and image share" in text and "'first': array([" in text
    assert main(["report", "--workdir", str(workdir)]) == 0
    report = (workdir / "report" / "index.html").read_text(encoding="utf-8")
    assert "Tokens by expert" in report and "Pictures by expert" in report


@pytest.fixture
def imported(folder, monkeypatch):
    """The file's registrations, for one test."""
    for registry in (ROUTERS, ROUTER_LOSSES):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(packages, "_IMPORTED", [])
    monkeypatch.syspath_prepend(str(folder))
    yield
    sys.modules.pop("my_routers", None)


def test_list_and_mistakes(imported, folder, capsys):
    assert main(["list", "routers", "--import", "my_routers", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["unsure"]["options"] == {"sure": 0.5}
    config = ["inspect", "--config", str(folder / "my_moe.py")]
    for flag, message in (
        ("--config.model.moe.router.options.shure=1", "did you mean 'sure'?"),
        ("--config.model.moe.router.name=unsur", "did you mean 'unsure'?"),
    ):
        assert main([*config, flag]) == 2
        assert message in capsys.readouterr().err


def test_names_of_the_page_exist():
    routers = PAGE.partition("## Which router")[2].partition("## A router")[0]
    names = [
        name
        for bold in re.findall(r"^- \*\*(.*?)\*\*", routers, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", bold)
    ]
    assert len(names) >= 8 and set(names) - set(ROUTERS) == {"allowed"}


def test_a_router_is_at_most_fifteen_lines():
    body = PAGE.partition("def unsure")[2].partition("\n\n\n")[0]
    assert len(body.splitlines()) <= 15


def test_the_command_of_the_page_makes_a_model(capsys):
    (line,) = re.findall(r"^moejax train (--config quickstart.*)$", PAGE, re.MULTILINE)
    assert main(["inspect", *line.split(), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["active_params"] < document["total_params"]
