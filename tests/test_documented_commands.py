"""The commands that the documentation gives: their configs load, with all that they change."""

import re
import shlex
from pathlib import Path

import pytest

from moejax.cli.common import split_overrides
from moejax.config import load_config
from moejax.config.load import short_names

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "experiments").glob("*/README.md")),
    *sorted(short_names().values()),
)
# Parts of a reader's own, which pages show how to write.
OWN = ("my_", "--import", "...")


def commands(page: Path) -> list[list[str]]:
    """The words of each command of ``page`` that names a config."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    found = []
    for line in re.findall(r"^ *(moejax (?:train|inspect|compile|launch) .*)$", text, re.MULTILINE):
        if "--config " in line and not any(own in line for own in OWN):
            found.append(shlex.split(line.rstrip("&"), comments=True))
    return found


def test_commands_are_found():
    assert len(commands(ROOT / "README.md")) > 10
    assert len(commands(ROOT / "docs" / "dit.md")) > 10
    assert sum(len(commands(page)) for page in PAGES) > 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_configs_of_commands_load(page):
    for words in commands(page):
        rest, overrides = split_overrides(words)
        load_config(rest[rest.index("--config") + 1], overrides)
