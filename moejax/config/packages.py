"""Packages of the user's own: importing one registers its blocks, sources, objectives, ...

``--import my_package`` names them. A run records the names in its config.json, and what reads a
run imports them again by itself.
"""

import importlib
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from moejax.errors import UserError

# In the order in which they were first asked for.
_IMPORTED: list[str] = []


def import_packages(names: Iterable[str]) -> None:
    """Imports packages, found on ``sys.path`` or in the current folder.

    Raises:
      UserError: a package that is not there, or that needs one that is not installed. Another
        error inside a package keeps its traceback.
    """
    for name in names:
        _import(name, f"--import {name}")


def import_recorded(record: Mapping[str, Any], workdir: str | os.PathLike) -> None:
    """Imports the packages that the run of a config.json was made with.

    Raises:
      UserError: naming the package that is not there.
    """
    for name in record.get("made_with", {}).get("imports", ()):
        _import(name, f"--workdir {workdir} was made with --import {name}")


def imported_packages() -> list[str]:
    """The packages imported so far, for config.json."""
    return list(_IMPORTED)


def _import(name: str, what: str) -> None:
    # The console script, unlike `python -m`, does not look in the current folder.
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A package that is there but lacks one of its own imports is another mistake.
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise UserError(f"{what}: it needs {error.name!r}, which is not installed") from error
        raise UserError(
            f"{what}: no such package; install it or run from the folder that holds it"
        ) from error
    if name not in _IMPORTED:
        _IMPORTED.append(name)
