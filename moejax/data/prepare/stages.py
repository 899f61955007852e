"""Long preparations in stages: what one stage has made is kept, so that a killed run goes on."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moejax.data.record_io import locked, replace_file
from moejax.errors import UserError

T = TypeVar("T")
# Seconds between two lines of progress where stderr is no terminal.
LINE_EVERY = 10.0


def saved_arrays(path: Path, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays in ``path`` (.npz); made and written there first if it does not exist."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = dict(make())

        def write(temporary: Path) -> None:
            # By file, as savez would append .npz to a name.
            with temporary.open("wb") as file:
                np.savez(file, **arrays)

        replace_file(path, write)
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


def saved_json(path: Path, make: Callable[[], Any]) -> Any:
    """The JSON document in ``path``; made and written there first if it does not exist."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(make(), ensure_ascii=False)
        replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Holds the lock of ``folder``. UserError if another process does."""
    with locked(folder) as mine:
        if not mine:
            raise UserError(f"{folder}: another process prepares this set; wait for it, or end it")
        yield


def track(items: Iterable[T], label: str, total: int, *, start: int = 0) -> Iterator[T]:
    """Yields ``items`` and says on stderr how far it is, with an ETA.

    Args:
      items: what is left to do.
      label: of the stage.
      total: how many there are with those done before.
      start: how many were done before.
    """
    began = last = time.monotonic()
    terminal = sys.stderr.isatty()
    for done, item in enumerate(items, start + 1):
        yield item
        now = time.monotonic()
        if now - last < (0.2 if terminal else LINE_EVERY):
            continue
        last = now
        seconds = round((now - began) / (done - start) * (total - done))
        line = f"{label}: {done:,} of {total:,}, ETA {seconds // 60}:{seconds % 60:02}"
        print(f"\r\x1b[K{line}" if terminal else line, end="" if terminal else "\n",
              file=sys.stderr, flush=True)  # fmt: skip
    if terminal:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)
