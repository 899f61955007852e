"""Sweeps: many points of one config, as lists of ``{field: value}``.

A config file defines ``get_hyper(hyper)`` beside ``get_config``; ``hyper`` is this module (the
habit of V-MoE and big_vision)::

    def get_hyper(hyper):
        rates = hyper.sweep("optim.learning_rate", [1e-3, 3e-3])
        seeds = hyper.sweep("train.seed", range(3))
        return hyper.product(rates, seeds)  # 6 points
"""

import dataclasses
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from moejax.config.load import config_module, flag_text, load_config, resolve
from moejax.config.schema import Config
from moejax.errors import UserError

Point = dict[str, Any]

# Longer names are cut: file systems take 255 bytes, and a path holds more than one.
_LONGEST_NAME = 120


def sweep(field: str, values: Iterable[Any]) -> list[Point]:
    """One point for each value: ``sweep("train.seed", [0, 1])``."""
    field = field.removeprefix("config.")
    return [{field: value} for value in values]


def product(*parts: list[Point]) -> list[Point]:
    """Every point of each part with every point of the others; the last part varies fastest."""
    return [_merged(points) for points in itertools.product(*parts)]


def zip_(*parts: list[Point]) -> list[Point]:
    """The first points of all parts together, then the second ones, ..."""
    if len({len(part) for part in parts}) > 1:
        sizes = ", ".join(str(len(part)) for part in parts)
        raise UserError(f"--sweep: zip_ takes parts of equal length, got {sizes} points")
    return [_merged(points) for points in zip(*parts, strict=True)]


def chain(*parts: list[Point]) -> list[Point]:
    """The points of the first part, then those of the second, ..."""
    return list(itertools.chain(*parts))


def parse_sweep(text: str) -> list[Point]:
    """``"optim.learning_rate=1e-3,3e-3"`` -> two points; commas in brackets do not split."""
    field, equals, values = text.partition("=")
    split = split_commas(values)
    if not (field.strip() and equals) or not all(value.strip() for value in split):
        raise UserError(f"--sweep {text}: write --sweep FIELD=VALUE,VALUE")
    return sweep(field.strip(), [value.strip() for value in split])


def split_commas(text: str) -> list[str]:
    """``"1,(2,3),x=[4,5]"`` -> ``["1", "(2,3)", "x=[4,5]"]``: commas in brackets do not split."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def hyper_points(spec: str) -> list[Point]:
    """The points of ``get_hyper`` in the config file of ``spec``."""
    path, _ = resolve(spec)
    module = config_module(path)
    if not hasattr(module, "get_hyper"):
        raise UserError(
            f"--sweep: {path} defines no get_hyper(hyper); give the values, as in "
            "--sweep optim.learning_rate=1e-3,3e-3"
        )
    import moejax.config.sweep as hyper

    return list(module.get_hyper(hyper))


@dataclasses.dataclass(frozen=True)
class SweepPoint:
    """A point that has been checked.

    Attributes:
      name: readable, safe as the name of a folder; a function of the points of the sweep alone.
      fields: the swept fields with their values in the config.
      overrides: what the point changes, each ``"a.b=v"``.
      config: the config of the point.
    """

    name: str
    fields: dict[str, Any]
    overrides: tuple[str, ...]
    config: Config


def plan_sweep(
    spec: str, points: Sequence[Point], overrides: Sequence[str] = ()
) -> list[SweepPoint]:
    """Loads the config of every point, so that no mistake is found halfway.

    Args:
      spec: as ``load_config`` takes it.
      points: the sweep.
      overrides: of all points, each ``"a.b=v"``.

    Raises:
      UserError: a point that the config refuses, that is there twice, or that sets a field which
        ``overrides`` sets too.
    """
    fixed = {override.partition("=")[0] for override in overrides}
    checked: list[tuple[tuple[str, ...], dict[str, Any], Config]] = []
    for number, point in enumerate(points, 1):
        texts = tuple(f"{field}={flag_text(value)}" for field, value in point.items())
        where = f"--sweep: point {number} ({', '.join(texts) or 'nothing changed'})"
        for field in sorted(fixed & point.keys()):
            raise UserError(f"{where}: {field} is set by --config.{field} too; leave one out")
        try:
            config = load_config(spec, [*overrides, *texts])
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        checked.append((texts, {field: _value(config, field) for field in point}, config))
    if not checked:
        raise UserError("--sweep: no points")
    names = point_names([fields for _, fields, _ in checked])
    return [
        SweepPoint(name, fields, texts, config)
        for name, (texts, fields, config) in zip(names, checked, strict=True)
    ]


def point_names(points: Sequence[Point]) -> list[str]:
    """``["learning_rate=0.001,seed=0", ...]``: different for different points.

    A field is named by its last word, or whole where two swept fields share that word.

    Raises:
      UserError: two points are the same.
    """
    fields = {field for point in points for field in point}
    last = Counter(field.rpartition(".")[2] for field in fields)
    label = {f: f if last[f.rpartition(".")[2]] > 1 else f.rpartition(".")[2] for f in fields}
    keys = [json.dumps(point, sort_keys=True, default=str) for point in points]
    for key, count in Counter(keys).items():
        if count > 1:
            raise UserError(f"--sweep: {count} points are the same: {key}")
    plain = [
        ",".join(f"{label[field]}={_file_safe(value)}" for field, value in point.items()) or "base"
        for point in points
    ]
    # Some file systems do not tell upper from lower case.
    clashes = Counter(name.casefold() for name in plain)
    return [
        name
        if clashes[name.casefold()] == 1 and len(name) <= _LONGEST_NAME
        else f"{name[: _LONGEST_NAME - 9]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        for name, key in zip(plain, keys, strict=True)
    ]


def _merged(points: tuple[Point, ...]) -> Point:
    merged: Point = {}
    for point in points:
        for field in merged.keys() & point.keys():
            raise UserError(f"--sweep: {field} is swept twice")
        merged.update(point)
    return merged


def _value(config: Any, field: str) -> Any:
    for part in field.split("."):
        config = getattr(config, part)
    return config


def _file_safe(value: Any) -> str:
    text = "-".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text)
