"""What is asked for: budgets, and arms as configs with fields changed."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from moejax.config.load import flag_text, load_config
from moejax.config.schema import DecoderConfig
from moejax.config.sweep import split_commas
from moejax.errors import UserError

# Widths of feed-forward layers are rounded to a multiple of this.
_MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every run may spend: ``unit`` is flops (of training), tokens or steps."""

    unit: str
    amount: float


def parse_budget(text: str) -> Budget:
    """``"flops=3e12"``, ``"tokens=1e6"`` or ``"steps=200"``."""
    unit, _, amount = text.partition("=")
    try:
        value = float(amount)
    except ValueError:
        value = 0.0
    if unit not in ("flops", "tokens", "steps") or not 0 < value < float("inf"):
        raise UserError(f"--budget {text}: write flops=3e12, tokens=1e6 or steps=200")
    return Budget(unit, value)


@dataclasses.dataclass(frozen=True)
class ArmSpec:
    """One arm as asked for: a name, a config and what is changed in it (each ``"a.b=v"``)."""

    name: str
    spec: str
    overrides: tuple[str, ...] = ()


def parse_arm(text: str) -> ArmSpec:
    """``"half=quickstart,model.num_layers=2"``: a name, a config, and what is changed in it."""
    name, equals, rest = text.partition("=")
    spec, *overrides = split_commas(rest)
    if not (equals and name.strip() and spec.strip()) or not all("=" in part for part in overrides):
        raise UserError(f"--arm {text}: write --arm NAME=CONFIG,FIELD=VALUE,FIELD=VALUE")
    return ArmSpec(name.strip(), spec.strip(), tuple(part.strip() for part in overrides))


def arms_of(configs: str, arms: Sequence[str]) -> list[ArmSpec]:
    """The arms of ``--configs a,b`` and of each ``--arm``; of one config twice the second is b_2.

    The first is the baseline. UserError for fewer than two.
    """
    found: list[ArmSpec] = []
    for spec in filter(None, (part.strip() for part in configs.split(","))):
        copies = sum(arm.spec == spec for arm in found)
        found.append(ArmSpec(f"{spec}_{copies + 1}" if copies else spec, spec))
    found += map(parse_arm, arms)
    if len(found) < 2:
        raise UserError("--configs: name at least two, the baseline first: --configs mot,chameleon")
    return found


def at_width(model: DecoderConfig, width: int, flag: str) -> tuple[str, ...]:
    """Overrides for a model of another width: as many heads of the same size, layers in proportion.

    Feed-forward layers and experts keep their ratio to ``d_model``, rounded to a multiple of 8.
    UserError, naming ``flag``, for a width that the head size does not divide.
    """
    if width < 1 or width % model.head_dim:
        raise UserError(f"{flag}: {width} is no multiple of the head size {model.head_dim}")

    def scaled(value: int) -> int:
        return max(_MULTIPLE, round(value * width / model.d_model / _MULTIPLE) * _MULTIPLE)

    heads = width // model.head_dim
    changes: dict[str, Any] = {
        "model.d_model": width,
        "model.num_heads": heads,
        "model.num_kv_heads": max(1, heads * model.kv_heads // model.num_heads),
        "model.head_size": model.head_dim,
        "model.ffn_hidden": tuple(map(scaled, model.ffn_hidden)),
    }
    for name in ("hidden", "shared_hidden"):
        value = getattr(model.moe, name)
        if value:
            changes[f"model.moe.{name}"] = scaled(value)
    return tuple(f"{name}={flag_text(value)}" for name, value in changes.items())


def compared(model: Any) -> tuple[str, ...]:
    """The modalities of a model that have a held-out loss, ``NAME/loss``; () for none."""
    modalities = getattr(model, "modalities", ())
    return getattr(model, "loss_modalities", modalities)


def folder_name(arm: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", arm)


def widened(arm: ArmSpec, width: int, overrides: Sequence[str]) -> ArmSpec:
    """The arm at another width; ``overrides`` are those of all arms."""
    model = load_config(arm.spec, [*overrides, *arm.overrides]).model
    if model.name != "decoder":
        raise UserError(f"--width: scales decoders; {arm.name} is a {model.name}")
    changes = at_width(model, width, "--width")
    return dataclasses.replace(arm, overrides=(*arm.overrides, *changes))
