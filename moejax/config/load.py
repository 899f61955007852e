"""Finds a config by path or short name, applies command-line overrides, checks it."""

import ast
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from moejax.config.convert import freeze
from moejax.config.schema import Config
from moejax.errors import UserError, did_you_mean


def config_folder() -> Path:
    """The folder of the shipped configs: inside the wheel, or at the root of a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_configs"
    return installed if installed.is_dir() else package.parent / "configs"


def own_folders() -> list[Path]:
    """The user's own config folders: ``MOEJAX_CONFIG_PATH``, written as ``PATH`` is."""
    words = os.environ.get("MOEJAX_CONFIG_PATH", "").split(os.pathsep)
    folders = [Path(word).expanduser() for word in words if word]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"MOEJAX_CONFIG_PATH: no folder {str(folder)!r}; unset or correct it")
    return folders


def short_names() -> dict[str, Path]:
    """``{"quickstart": .../quickstart.py, "mot": .../papers/mot.py, ...}``.

    Where two folders hold a name, the first counts: the user's own, then the shipped ones.
    """
    shipped = config_folder()
    names: dict[str, Path] = {}
    for folder in (*own_folders(), shipped, shipped / "papers"):
        for file in sorted(folder.glob("*.py")):
            if not file.stem.startswith("_"):
                names.setdefault(file.stem, file)
    return names


def resolve(spec: str) -> tuple[Path, str]:
    """``FILE[:arg]`` or ``NAME[:arg]`` -> (path, arg). UserError if there is no such config."""
    name, _, arg = spec.partition(":")
    if not name:
        raise UserError("--config: give a file or a short name, e.g. --config quickstart")
    if name.endswith(".py"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"--config: no file {name!r}")
        return path, arg
    names = short_names()
    if name not in names:
        raise UserError(f"--config: no config {name!r}{did_you_mean(name, names)}")
    return names[name], arg


def config_module(path: Path):
    """The module of a config file (its docstring, ``ARGS`` and ``get_config``)."""
    spec = importlib.util.spec_from_file_location(f"moejax_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config: {path} defines no get_config(arg='')")
    return module


def load_config_dict(spec: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The locked ConfigDict of ``spec`` with ``--config.a.b=v`` overrides applied."""
    path, arg = resolve(spec)
    module = config_module(path)
    args = getattr(module, "ARGS", ("",))
    if arg and arg not in args:
        raise UserError(
            f"--config {spec}: no argument {arg!r}{did_you_mean(arg, filter(None, args))}"
        )
    config = module.get_config(arg)
    # Also of a config that is made from another one.
    config.about.name = f"{path.stem}_{arg}" if arg else path.stem
    return overridden(config, overrides)


def overridden(
    config: ml_collections.ConfigDict, overrides: Sequence[str]
) -> ml_collections.ConfigDict:
    """The ConfigDict, locked, with ``--config.a.b=v`` overrides applied; UserError for bad ones."""
    values = flags.FlagValues()
    # Of a field that is given twice the last value counts; absl would join tuples.
    given = dict(_normalised(override, config).split("=", 1) for override in overrides)
    argv = ["moejax", *(f"{field}={value}" for field, value in given.items())]
    config_flags.DEFINE_config_dict(
        "config", config, lock_config=True, flag_values=values, sys_argv=argv
    )
    try:
        values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
    return config


def _normalised(override: str, config: ml_collections.ConfigDict) -> str:
    """``a.b=v``, ``config.a.b=v`` or ``--config.a.b=v`` -> ``--config.a.b=v``, names checked."""
    key, equals, value = override.lstrip("-").partition("=")
    key = key.removeprefix("config.")
    if not equals:
        raise UserError(f"--config.{key}: write --config.{key}=VALUE")
    node = config
    path = []
    for part in key.split("."):
        if path and path[-1] == "options" and isinstance(node, ml_collections.ConfigDict):
            # Options are those of a function that is not known here; it checks their names.
            with node.unlocked():
                node[part] = _literal(value)
        if not isinstance(node, ml_collections.ConfigDict) or part not in node:
            known = list(node) if isinstance(node, ml_collections.ConfigDict) else []
            where = ".".join(path) or "config"
            raise UserError(
                f"--config.{key}: {where} has no field {part!r}{did_you_mean(part, known)}"
            )
        path.append(part)
        node = node[part]
    if isinstance(node, ml_collections.ConfigDict):
        raise UserError(f"--config.{key}: is a group; set one of {', '.join(node)}")
    return f"--config.{key}={value}"


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def load_config(spec: str, overrides: Sequence[str] | dict = ()) -> Config:
    """The checked config of a file or short name; ``moejax.load_config``.

    For example::

        config = moejax.load_config("quickstart:dense", {"train.steps": 10, "data.batch_size": 8})
        config.model.num_layers  # a tree of frozen dataclasses (moejax.config.schema)

    Args:
      spec: ``"quickstart"``, ``"mot:7b"``, ``"path/to/file.py:arg"``. A short name is a file of a
        folder in ``MOEJAX_CONFIG_PATH``, or one that comes with moejax.
      overrides: ``{"train.steps": 10}`` or ``["train.steps=10"]``.

    Raises:
      UserError: unknown config, argument or field, or a value that is refused.
    """
    if isinstance(overrides, dict):
        overrides = [f"{key}={flag_text(value)}" for key, value in overrides.items()]
    return freeze(load_config_dict(spec, overrides))


def flag_text(value) -> str:
    """``value`` as it is written after ``--config.a.b=``."""
    return repr(tuple(value)) if isinstance(value, (tuple, list)) else str(value)
