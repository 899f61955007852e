"""Tiles that are looked up, by chip and shape, before any are searched for.

``tiles_tpu.csv`` and ``tiles_gpu.csv`` have a line for each entry: its key, the tiles, and where
they come from. No chip has been measured yet: a line that is "unmeasured" says what a kernel takes
without it, on TPUs what the search finds and on GPUs the default, so that the tables change nothing
so far. A measured line, with the measurement's name for its source, takes the place of such a one.

``python -m pallas_kernels.tabulate`` writes the unmeasured lines.
"""

import contextlib
import contextvars
import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

UNMEASURED = "unmeasured"
# Of more rows the ends of a group are a small part, whatever the tiles.
_MANY_ROWS = 4096
_PREFIX = "tile_"

_searched: contextvars.ContextVar[dict[Any, Any] | None] = contextvars.ContextVar(
    "searched", default=None
)


def rows_per_group(rows: int, groups: int) -> int:
    """As in a key: rounded down to a power of two, and 4,096 for all that is more."""
    return min(1 << (max(rows // groups, 1).bit_length() - 1), _MANY_ROWS)


def table_file(name: str) -> Path:
    """``tiles_tpu.csv`` or ``tiles_gpu.csv``, for "tpu" and "gpu"."""
    return Path(__file__).with_name(f"tiles_{name}.csv")


def read_table(name: str, key: Any, blocks: Any) -> dict[Any, Any]:
    """{key: blocks} of a table.

    Args:
      name: "tpu" or "gpu".
      key: a named tuple, of strings and numbers; its fields are columns.
      blocks: a class of tile sizes; its fields are the columns that begin with "tile_".
    """
    with table_file(name).open(newline="", encoding="utf-8") as file:
        return {
            key(*(_value(line[field]) for field in key._fields)): blocks(
                **{
                    column.removeprefix(_PREFIX): int(size)
                    for column, size in line.items()
                    if column.startswith(_PREFIX)
                }
            )
            for line in csv.DictReader(file)
        }


def write_table(name: str, entries: dict[Any, dict[str, int]]) -> None:
    """Writes ``{key: sizes}`` as unmeasured lines; measured ones stay, and come first."""
    path, kept = table_file(name), []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            kept = [line for line in csv.DictReader(file) if line["source"] != UNMEASURED]
    lines = [
        {
            **{field: str(value) for field, value in key._asdict().items()},
            **{_PREFIX + field: str(size) for field, size in sizes.items()},
            "source": UNMEASURED,
        }
        for key, sizes in entries.items()
    ]
    fields = next(iter(entries))._fields
    measured = [[line[field] for field in fields] for line in kept]
    lines = kept + [line for line in lines if [line[field] for field in fields] not in measured]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def look_up(table: dict[Any, Any], key: Any, search: Callable[[], Any]) -> Any:
    """The blocks of ``table``, else what ``search`` finds."""
    searched = _searched.get()
    if searched is not None:
        searched[key] = search()
        return searched[key]
    return table[key] if key in table else search()


@contextlib.contextmanager
def searching() -> Iterator[dict[Any, Any]]:
    """Within, tables are left out: {key: blocks} of all that is searched for meanwhile."""
    found: dict[Any, Any] = {}
    token = _searched.set(found)
    try:
        yield found
    finally:
        _searched.reset(token)


def _value(text: str) -> str | int:
    return int(text) if text.isdigit() else text
