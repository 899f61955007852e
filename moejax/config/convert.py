"""ConfigDict <-> frozen dataclasses, with errors that name the field and the nearest name."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from moejax.config import schema
from moejax.config.options import Options
from moejax.errors import UserError, did_you_mean

_BY_NAME = {"model": schema.MODEL_CONFIGS, "objective": schema.OBJECTIVE_CONFIGS}


def default_config(model: str = "decoder", objective: str = "next_token"):
    """A ConfigDict with every field at its default, to be changed by a config file."""
    made = schema.MODEL_CONFIGS.get(model, field="model.name")()
    # Group by group: what does not fit together yet is for the config file to set.
    groups: dict = {
        field.name: field.default_factory()
        for field in dataclasses.fields(schema.Config)
        if field.default_factory is not dataclasses.MISSING
    }
    groups.update(
        model=made,
        data=schema.DataConfig(format=_format_of(made)),
        objective=schema.OBJECTIVE_CONFIGS.get(objective, field="objective.name")(),
    )
    return ml_collections.ConfigDict({name: to_dict(group) for name, group in groups.items()})


def _format_of(model: Any) -> str:
    """The ``data.format`` that a model reads."""
    if isinstance(model, schema.PairConfig):
        return "pairs"
    return "tokens" if isinstance(model, schema.DecoderConfig) else "images"


def to_dict(config) -> dict:
    """The plain nested dict of a config dataclass; tuples stay tuples."""
    return dataclasses.asdict(config)


def to_json(config: schema.Config) -> str:
    return json.dumps(to_dict(config), indent=2, sort_keys=True) + "\n"


def freeze(config: Mapping | ml_collections.ConfigDict) -> schema.Config:
    """Checks a ConfigDict (or the dict of a config.json) and returns the typed config.

    Raises UserError naming the field: unknown name, wrong type, or a value that the dataclass
    refuses.
    """
    plain = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    groups = {}
    for field in dataclasses.fields(schema.Config):
        if field.name not in plain:
            continue
        value = plain.pop(field.name)
        cls: Any = field.type
        if field.name in _BY_NAME:
            name = value.get("name", "") if isinstance(value, Mapping) else ""
            cls = _BY_NAME[field.name].get(name, field=f"{field.name}.name")
        groups[field.name] = _build(cls, value, field.name)
    for name in plain:
        known = [field.name for field in dataclasses.fields(schema.Config)]
        raise UserError(f"config has no group {name!r}{did_you_mean(name, known)}")
    return schema.Config(**groups)


def _build(cls: type, value: Any, path: str):
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: expected a group of fields, got {value!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    kwargs = {}
    for name, entry in value.items():
        if name not in fields:
            raise UserError(f"{path}.{name}: no such field{did_you_mean(name, fields)}")
        kwargs[name] = _coerce(hints[name], entry, f"{path}.{name}")
    return cls(**kwargs)


def _coerce(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, path)
    if hint is Options:
        if not isinstance(value, Mapping):
            raise UserError(f"{path}: expected a group of options, got {value!r}")
        return Options(value)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str) or not isinstance(value, (tuple, list)):
            value = (value,)
        items = typing.get_args(hint)
        if items[-1] is Ellipsis:
            items = items[:1] * len(value)
        if len(value) > len(items):
            raise UserError(f"{path}: expected {len(items)} values, got {value!r}")
        # One that is too short is for the dataclass to refuse.
        return tuple(
            _coerce(item, entry, f"{path}[{i}]")
            for i, (item, entry) in enumerate(zip(items, value, strict=False))
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if typing.get_origin(hint) is not None or not isinstance(hint, type):
        raise UserError(
            f"{path}: a config field is a bool, int, float, str, tuple or dataclass, not {hint}"
        )
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{path}: expected {hint.__name__}, got {value!r}")
    return value
