"""What all commands share: overrides, unknown flags, packages of the user's own."""

import sys

import pytest

from moejax.cli import main as cli
from moejax.cli.common import (
    command_parser,
    config_from,
    default_workdir,
    split_overrides,
    workdir_config,
)
from moejax.config import load_config, to_json
from moejax.errors import UserError
from moejax.nn.block import BLOCKS


def parse(*argv):
    return command_parser("train", "Trains.").parse(argv)


def test_overrides_with_and_without_equals():
    argv = [
        "--config",
        "mot:7b",
        "--config.a.b=1,2",
        "--json",
        "--config.c",
        "-3",
        "--config.d=x=y",
    ]
    rest, overrides = split_overrides(argv)
    assert rest == ["--config", "mot:7b", "--json"]
    assert overrides == ["a.b=1,2", "c=-3", "d=x=y"]


def test_a_bucket_is_no_workdir():
    with pytest.raises(UserError, match="--workdir gs://b/run: is no folder; mount the bucket"):
        parse("--workdir", "gs://b/run")


@pytest.mark.parametrize("argv", [["--config.a"], ["--config.a", "--json"]])
def test_override_without_value(argv):
    with pytest.raises(UserError, match=r"--config.a: write --config.a=VALUE"):
        split_overrides(argv)


def test_overrides_reach_the_config_in_any_order():
    args = parse("--config.train.steps=7", "--config", "mot", "--config.model.num_layers", "3")
    config = config_from(args)
    assert (config.train.steps, config.model.num_layers) == (7, 3)
    assert str(default_workdir(args, config)) == "runs/mot"
    assert str(default_workdir(parse("--workdir", "x"), config)) == "x"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--confg=mot"], r"train: no flag '--confg'; did you mean '--config'\?"),
        (["--workdi", "x"], r"no flag '--workdi'; did you mean '--workdir'\?"),
        (["--train.steps=3"], "no flag '--train.steps'.*--config.train.steps=3"),
        (["stray"], "unexpected argument 'stray'"),
        (["--config"], "expected one argument"),
    ],
)
def test_unknown_flags(argv, message):
    with pytest.raises(UserError, match=message):
        parse(*argv)


def test_command_without_config_refuses_overrides():
    parser = command_parser("list", "Lists.", config=False)
    with pytest.raises(UserError, match="list: takes no --config.a.b=1"):
        parser.parse(["--config.a.b=1"])


def test_import_registers_a_package_in_the_current_folder(tmp_path, monkeypatch, capsys):
    # What it adds is not for the tests after this one: their child processes would import it.
    monkeypatch.setattr("moejax.config.packages._IMPORTED", [])
    (tmp_path / "my_blocks.py").write_text(
        "from moejax.nn.block import BLOCKS\n"
        "@BLOCKS.register('mine')\n"
        "def mine(config, name):\n"
        "    '''A block of my own.'''\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    # The test's block is forgotten afterwards.
    monkeypatch.setattr(BLOCKS, "_entries", dict(BLOCKS._entries))
    assert cli.main(["list", "blocks", "--import", "my_blocks"]) == 0
    assert "mine A block of my own." in " ".join(capsys.readouterr().out.split())


def test_import_that_fails(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--import nothere: no such package"):
        parse("--import", "nothere")
    with pytest.raises(UserError, match="--import needs_more: it needs 'not_installed_anywhere'"):
        parse("--import", "needs_more")


def test_config_of_a_workdir(tmp_path):
    config = load_config("mot", {"train.steps": 9})
    (tmp_path / "config.json").write_text(to_json(config))
    assert workdir_config(tmp_path) == config
    assert config_from(parse("--workdir", str(tmp_path))) == config
    with pytest.raises(UserError, match="keeps the config that it was made with"):
        config_from(parse("--workdir", str(tmp_path), "--config.train.steps=3"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: cannot be read"):
        workdir_config(tmp_path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "no command 'trian'; did you mean 'train'?"),
        (["inspect"], "--config: give a config"),
        (["inspect", "--config", "mott"], "no config 'mott'; did you mean 'mot'?"),
        (["inspect", "--config", "mot:443"], "no argument '443'; did you mean '443m'?"),
        (["inspect", "--config", "no/such.py"], "--config: no file 'no/such.py'"),
        (["inspect", "--workdir", "nowhere"], "--workdir nowhere: no run there"),
        (
            ["inspect", "--config", "mot", "--config.model.num_layer=3"],
            "model has no field 'num_layer'; did you mean 'num_layers'?",
        ),
        (["inspect", "--config", "mot", "--config.data.batch_size=-1"], "data.batch_size"),
        (["inspect", "--config", "mot", "--config.mesh.fsdp=3"], "data.batch_size=8"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("moejax: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_no_command_prints_the_help(capsys):
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.count(".") == 2
