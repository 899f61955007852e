"""Named functions and classes that a config chooses by a string."""

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from moejax.errors import UserError, did_you_mean

T = TypeVar("T")
E = TypeVar("E")  # an entry, as its definition says it


class Registry(Generic[T]):
    """Maps a name in a config to the function or class registered under it.

    ``kind`` is the word used in error messages, e.g. ``"data source"``.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[E], E]:
        """Decorator. Raises ValueError if another object already holds the name."""

        def add(entry: E) -> E:
            known = self._entries.get(name)
            # A notebook that runs its cell again registers an equal definition again.
            if known is not None and _identity(known) != _identity(entry):
                raise ValueError(f"{self.kind} {name!r} is registered twice: {known} and {entry}")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str, *, field: str = "") -> T:
        """The entry called ``name``; UserError naming ``field`` and the nearest name if unknown."""
        if name not in self._entries:
            where = f"{field}: " if field else ""
            raise UserError(f"{where}no {self.kind} {name!r}{did_you_mean(name, self._entries)}")
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))


def _identity(entry) -> tuple:
    # What a decorator wraps with more facts is the same entry if its function is.
    entry = getattr(entry, "function", entry)
    return getattr(entry, "__module__", None), getattr(entry, "__qualname__", repr(entry))


# Dataclasses that a config's groups ``model`` and ``objective`` are, by their field ``name``.
MODEL_CONFIGS: Registry[type] = Registry("model")
OBJECTIVE_CONFIGS: Registry[type] = Registry("objective")
