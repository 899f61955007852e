"""The folder of a run: config.json, and the refusal of a folder that belongs to another config."""

import dataclasses
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from moejax.config import to_dict
from moejax.config.checks import refuse_url
from moejax.config.schema import Config
from moejax.errors import UserError

# What a run may change when it goes on: nothing here changes a step.
MAY_DIFFER = (
    "about.",
    "data.prefetch",
    "eval.",
    "log.",
    "train.checkpoint_every",
    "train.checkpoint_keep",
    "train.compilation_cache_dir",
    "train.profile_",
)


def read_record(workdir: Path) -> dict | None:
    """The config.json of ``workdir``; None if there is none."""
    path = workdir / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); use another --workdir") from error


def check_workdir(workdir: Path, config: Config) -> dict | None:
    """Refuses a workdir of another config.

    Returns:
      The record that is there, or None for a new workdir. Writes nothing.

    Raises:
      UserError: naming the fields that differ, or that ``workdir`` is no folder of a run or a URL.
    """
    refuse_url(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir}: is a file; name a folder")
    record = read_record(workdir)
    if record is None:
        if (workdir / "checkpoints").exists() or (workdir / "metrics.jsonl").exists():
            raise UserError(f"--workdir {workdir}: holds a run without config.json; use another")
        return None
    there, here = flatten(record), flatten(_jsonable(to_dict(config)))
    defaults = _defaults(config)
    groups = {name.partition(".")[0] for name in here}
    differing = []
    for name in sorted(there.keys() | here.keys()):
        if name.partition(".")[0] not in groups or name.startswith(MAY_DIFFER):
            continue
        old, new = there.get(name, defaults.get(name, "absent")), here.get(name, "absent")
        if old == new or (name == "train.steps" and isinstance(old, int) and new > old):
            continue
        differing.append(f"{name} ({old} there, {new} now)")
    if differing:
        raise UserError(
            f"--workdir {workdir}: belongs to another config: {', '.join(differing)}; use another "
            "--workdir or the config it was made with"
        )
    return record


def _defaults(config: Config) -> dict[str, Any]:
    """The defaults of ``config``'s fields: what a run was made with that is older than a field.

    Each group by itself: the defaults of a model and of an objective need not fit each other.
    """
    groups = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    defaults = {name: to_dict(type(group)()) for name, group in groups.items()}
    return flatten(_jsonable(defaults))


def check_data_version(workdir: Path, record: dict | None, version: str) -> None:
    """UserError when the data behind the config changed since the run began."""
    before = (record or {}).get("made_with", {}).get("data_version", version)
    if before != version:
        raise UserError(
            f"data.source: the data changed since {workdir} was made (version {before} then, "
            f"{version} now); use another --workdir"
        )


def write_record(workdir: Path, config: Config, made_with: dict[str, Any]) -> None:
    """Makes ``workdir`` and writes its config.json in one piece."""
    workdir.mkdir(parents=True, exist_ok=True)
    record = {**to_dict(config), "made_with": made_with}
    path = workdir / "config.json"
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def await_record(workdir: Path, timeout: float) -> None:
    """Waits for the config.json that the first process of a run wrote.

    Raises:
      UserError: it does not come to ``workdir`` as this host has it within ``timeout`` seconds.
    """
    # A file system of a network may take a while to show it.
    until = time.monotonic() + timeout
    while not (workdir / "config.json").exists():
        if time.monotonic() > until:
            raise UserError(
                f"--workdir {workdir}: host {socket.gethostname()} does not see what the first "
                "process wrote there; name a folder that all hosts share"
            )
        time.sleep(0.2)


def changed_surroundings(record: dict | None, made_with: dict[str, Any]) -> list[str]:
    """What else differs from the record: such a run goes on, but not bit for bit."""
    before = (record or {}).get("made_with", {})
    return [
        f"{name} was {before[name]!r}, is {value!r}"
        for name, value in made_with.items()
        if name in before and before[name] != value
    ]


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else key))
    return flat


def _jsonable(tree: Any) -> Any:
    # Tuples become lists, as they are in the file.
    return json.loads(json.dumps(tree))
