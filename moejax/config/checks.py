"""Checks of a field's value: one line that names the field."""

import re
from collections.abc import Iterable
from typing import Any

from moejax.errors import UserError


def require(condition: bool, field: str, message: str) -> None:
    """UserError ``"field: message"`` unless ``condition``."""
    if not condition:
        raise UserError(f"{field}: {message}")


def require_one_of(value: str, choices: tuple[str, ...], field: str) -> None:
    require(value in choices, field, f"{value!r} is none of {', '.join(choices)}")


def require_positive(config: Any, group: str, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{group}.{name}", f"must be positive, got {value}")


def refuse_url(workdir: Any) -> None:
    """UserError if ``--workdir`` names a bucket: runs are written to folders."""
    # A Path has one slash where the URL had two.
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(workdir or "")):
        raise UserError(
            f"--workdir {workdir}: is no folder; mount the bucket and name a folder in it "
            "(docs/cloud.md)"
        )


def require_patterns(patterns: Iterable[str], field: str) -> None:
    """UserError unless all are regular expressions and none is empty."""
    for pattern in patterns:
        require(pattern != "", field, "an empty pattern is found everywhere; write () for none")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{field}: {pattern!r} is no regular expression: {error}") from error
