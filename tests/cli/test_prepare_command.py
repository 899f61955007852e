"""``moejax prepare``: mistakes are one line, and nothing is written."""

import builtins
import shutil
import subprocess
import sys

import pytest

from moejax.cli.main import main
from moejax.data.prepare import packages
from moejax.errors import UserError


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "prepare: name a set; choose from: emoji3m"),
        (["emoji3"], "prepare: no set 'emoji3'; did you mean 'emoji3m'?"),
        (["emoji3m", "--limit", "-1"], "--limit -1"),
        (["emoji3m", "--limit", "few"], "--limit"),
        (["emoji3m", "--nospeech"], "did you mean '--no-speech'?"),
    ],
)
def test_a_mistake_in_the_command(arguments, message, tmp_path, capsys):
    refused([*arguments, *(["--data-dir", str(tmp_path)] if arguments else [])], message, capsys)
    assert not list(tmp_path.iterdir())


def refused(arguments, message, capsys):
    assert main(["prepare", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("moejax: error: ") and error.count("\n") == 1, error
    assert message in error


def without(monkeypatch, *missing):
    """Hides programs and Python packages."""
    which, load = shutil.which, builtins.__import__
    monkeypatch.setattr(shutil, "which", lambda name: None if name in missing else which(name))

    def hide(name, *args, **kwargs):
        if name in missing:
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", hide)


@pytest.mark.parametrize(
    "missing, message",
    [("resvg_py", "pip install 'moejax[prepare]'"), ("espeak-ng", "apt-get install espeak-ng")],
)
def test_something_is_not_installed(missing, message, tmp_path, capsys, monkeypatch):
    if missing != "resvg_py":
        pytest.importorskip("resvg_py", reason="resvg-py is not installed")
    without(monkeypatch, missing)
    refused(["emoji3m", "--data-dir", str(tmp_path)], message, capsys)
    assert not list(tmp_path.iterdir())


def test_npm_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm is not installed.*apt-get install npm.*or put emoji"):
        packages.fetch([packages.NOTO], tmp_path / "packages")


def test_npm_fails(tmp_path, monkeypatch):
    (tmp_path / "npm").write_text("#!/bin/sh\necho 'npm error network unreachable' >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match="npm pack .*network unreachable.*or put .* yourself"):
        packages.fetch([packages.NOTO], tmp_path / "packages")
    assert not (tmp_path / "packages" / packages.NOTO.file).exists()


def test_a_download_of_other_content_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(
        packages, "_download", lambda p, folder, home: (folder / p.file).write_bytes(b"x")
    )
    with pytest.raises(UserError, match="the file is not emoji-datasource-google@16.0.0"):
        packages.fetch([packages.NOTO], tmp_path)
    assert not (tmp_path / packages.NOTO.file).exists()


def test_help_is_light():
    code = (
        "import sys, contextlib\n"
        "from moejax.cli.main import main\n"
        "for flags in (['prepare', '--help'], ['prepare', 'emoji3m', '--help']):\n"
        "    with contextlib.suppress(SystemExit): main(flags)\n"
        "heavy = {'jax', 'PIL', 'numpy', 'scipy', 'array_record'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "emoji3m" in done.stdout and "--no-speech" in done.stdout
