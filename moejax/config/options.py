"""Options of a registered function: a frozen mapping of plain values inside a config."""

from collections.abc import Mapping
from typing import Any


class Options(dict):
    """A dict that never changes and can be hashed; equal to a dict of the same items.

    What it may hold is for the function to say that it belongs to: its keyword arguments.
    """

    def __init__(self, items: Mapping[str, Any] | Any = (), /, **more: Any):
        items = dict(items, **more)
        super().__init__({name: _plain(value) for name, value in sorted(items.items())})

    def __hash__(self) -> int:
        return hash(tuple(self.items()))

    def __deepcopy__(self, memo: dict) -> "Options":
        return self

    def _refuse(self: Any, *_: Any, **__: Any) -> Any:
        raise TypeError("options of a config do not change; make new ones")

    __setitem__ = __delitem__ = update = pop = clear = setdefault = popitem = _refuse


def _plain(value: Any) -> Any:
    # Lists come from config.json, where a tuple is one.
    return tuple(_plain(item) for item in value) if isinstance(value, (list, tuple)) else value
