"""Tables and numbers as commands print them."""

from collections.abc import Sequence


def columns(rows: list[tuple[str, ...]], right: tuple[int, ...]) -> list[str]:
    """Lines of a table; the columns numbered in ``right`` are set flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def show_spec(spec: Sequence) -> str:
    """The mesh axis of each axis of an array, ``"-"`` for a whole one."""
    return ", ".join("-" if axis is None else str(axis) for axis in spec)


def show_count(value: float) -> str:
    """``13_489_430_528`` -> ``"13.49G"``."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return f"{value:.0f}"


def show_bytes(value: float) -> str:
    """``1_572_864`` -> ``"1.5 MiB"``."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"
