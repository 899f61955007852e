"""Fixtures of the tests of commands."""

import pytest

from moejax.cli.main import main

from .launch_cases import arguments


@pytest.fixture
def render(tmp_path, monkeypatch, capsys):
    """A function (target, *flags) -> what moejax launch prints; the folder stays empty."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def rendered(target, *flags, odd=True):
        assert main([*arguments(target)[: None if odd else -1], *flags, "--dry-run"]) == 0
        assert list(folder.iterdir()) == []
        return capsys.readouterr().out

    return rendered
