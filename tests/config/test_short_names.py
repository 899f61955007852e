"""Configs of one's own by short names: ``MOEJAX_CONFIG_PATH``."""

import os

import pytest

from moejax.cli.main import main
from moejax.config import load_config
from moejax.config.load import config_folder, short_names
from moejax.errors import UserError

CONFIG = """
from moejax.config import default_config

ARGS = ("", "long")


def get_config(arg=""):
    config = default_config()
    config.train.steps = 900 if arg == "long" else 9
    return config
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    folder, second = tmp_path / "own", tmp_path / "second"
    for path in (folder, second):
        path.mkdir()
        (path / "heron.py").write_text(CONFIG)
    (second / "heron.py").write_text(CONFIG.replace("900", "800"))
    (second / "_common.py").write_text("")
    monkeypatch.setenv("MOEJAX_CONFIG_PATH", os.pathsep.join(map(str, (folder, second))))
    return folder


def test_a_name_is_found_in_the_first_folder_that_has_it(own):
    assert load_config("heron").train.steps == 9
    config = load_config("heron:long")
    assert (config.train.steps, config.about.name) == (900, "heron_long")
    assert "_common" not in short_names()
    # The user's own come before the shipped ones, which stay there.
    assert short_names()["quickstart"].parent == config_folder()
    (own / "quickstart.py").write_text(CONFIG)
    assert load_config("quickstart").train.steps == 9


def test_mistakes(own, monkeypatch):
    with pytest.raises(UserError, match=r"no config 'herron'; did you mean 'heron'\?"):
        load_config("herron")
    with pytest.raises(UserError, match=r"no argument 'lang'; did you mean 'long'\?"):
        load_config("heron:lang")
    monkeypatch.setenv("MOEJAX_CONFIG_PATH", str(own / "nowhere"))
    with pytest.raises(UserError, match="MOEJAX_CONFIG_PATH: no folder '.*nowhere'"):
        load_config("quickstart")


def test_list_goes_on_past_a_config_that_does_not_load(own, capsys):
    (own / "broken.py").write_text("import a_package_that_is_not_there\n")
    assert main(["list", "configs"]) == 0
    out, err = capsys.readouterr()
    assert "  heron:long" in out and "  quickstart:dense" in out
    assert err.count("\n") == 1
    assert err.startswith("moejax: warning: config 'broken' does not load: No module named")
