"""Argument parsing shared by every command: ``--config``, overrides, ``--import``, ``--json``.

A command builds its parser with :func:`command_parser`, adds flags of its own, and calls
``parser.parse(argv)``. The namespace then holds ``config``, ``overrides``, ``workdir``, ``json``
and ``imports`` beside them. Nothing here imports jax, so a misspelt flag answers at once.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax.config.checks import refuse_url
from moejax.config.convert import freeze
from moejax.config.load import load_config
from moejax.config.packages import import_packages, import_recorded
from moejax.config.schema import Config
from moejax.errors import UserError, did_you_mean

# Exit code of what a signal stopped: a script should not go on to its next line, and a cluster
# should start it again.
STOPPED = 130


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises UserError and keeps ``--config.a.b`` overrides apart."""

    def error(self, message: str):
        raise UserError(f"{self.command}: {message}")

    @property
    def command(self) -> str:
        return self.prog.removeprefix("moejax ")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses ``argv``, then imports the packages named by ``--import``.

        Returns:
          The namespace; ``overrides`` is a list of ``"a.b=v"`` as ``load_config`` takes them.

        Raises:
          UserError: unknown flag (with the nearest one), missing value, package that is not there.
        """
        rest, overrides = split_overrides(argv)
        args, unknown = self.parse_known_args(rest)
        if unknown:
            raise UserError(f"{self.command}: {self._unknown(unknown[0])}")
        args.overrides = overrides
        if overrides and not hasattr(args, "config"):
            raise UserError(f"{self.command}: takes no --config.{overrides[0]}")
        import_packages(args.imports)
        return args

    def _unknown(self, word: str) -> str:
        flag = word.partition("=")[0]
        if not flag.startswith("-"):
            return f"unexpected argument {word!r}"
        if flag.startswith("--") and "." in flag:
            return f"no flag {flag!r}; config fields are set as --config.{word.lstrip('-')}"
        known = [option for action in self._actions for option in action.option_strings]
        return f"no flag {flag!r}{did_you_mean(flag, known)}"


def command_parser(
    name: str, description: str, *, config: bool = True, workdir: bool = True
) -> Parser:
    """The parser of ``moejax NAME`` with the flags that commands share.

    Args:
      name: the command.
      description: what it does, shown by ``--help``.
      config: whether it takes ``--config`` and ``--config.a.b=v``.
      workdir: whether it takes ``--workdir``.
    """
    parser = Parser(
        prog=f"moejax {name}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if config:
        parser.add_argument(
            "--config",
            metavar="SPEC",
            help="a config: FILE.py[:arg] or a short name such as mot:7b (see moejax list "
            "configs); change a field with --config.train.steps=100",
        )
    if workdir:
        parser.add_argument(
            "--workdir",
            metavar="DIR",
            type=_folder,
            help="folder of the run (default: runs/<config>)",
        )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document on stdout, nothing else"
    )
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="import a package that registers parts of your own; can be given several times; a "
        "run remembers its packages (docs/extend.md)",
    )
    return parser


def _folder(text: str) -> str:
    refuse_url(text)
    return text


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes ``--config.a.b=v`` and ``--config.a.b v`` out of ``argv``.

    Returns:
      (the other arguments, overrides as ``"a.b=v"``), both in their order.
    """
    rest: list[str] = []
    overrides: list[str] = []
    words = iter(argv)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
            continue
        key, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            # A negative number is a value; another flag is not.
            value = next(words, "--")
            if value.startswith("--"):
                raise UserError(f"--config.{key}: write --config.{key}=VALUE")
        overrides.append(f"{key}={value}")
    return rest, overrides


def config_from(args: argparse.Namespace) -> Config:
    """The config that ``args`` names: ``--config``, or else the one recorded in ``--workdir``.

    Raises:
      UserError: neither is given, or the config or the workdir is not there or is refused.
    """
    if args.config:
        return load_config(args.config, args.overrides)
    workdir = getattr(args, "workdir", None)
    if not workdir:
        raise UserError(
            "--config: give a config, e.g. --config quickstart (see moejax list configs)"
        )
    if args.overrides:
        raise UserError(
            f"--config.{args.overrides[0]}: needs --config; the run in {workdir} "
            "keeps the config that it was made with"
        )
    return workdir_config(workdir)


def workdir_config(workdir: str | os.PathLike) -> Config:
    """The config recorded in the ``config.json`` of a run, whose packages are imported first.

    UserError if there is none, or a package of the run is not there.
    """
    path = Path(workdir) / "config.json"
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"--workdir {workdir}: no run there (no config.json)") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    import_recorded(recorded, workdir)
    # Beside the config groups, config.json records what the run was made with (versions, flags).
    return freeze({key: value for key, value in recorded.items() if key in _GROUPS})


def default_workdir(args: argparse.Namespace, config: Config) -> Path:
    """``--workdir`` if given, else ``runs/<name of the config>`` in the current folder."""
    return Path(args.workdir) if args.workdir else Path("runs") / config.about.name


def print_json(document: Any) -> None:
    """Prints ``document`` as the one JSON document of ``--json``."""
    print(json.dumps(document, indent=2))


_GROUPS = tuple(Config.__dataclass_fields__)
