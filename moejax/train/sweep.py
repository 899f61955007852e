"""Runs the points of a sweep one after the other, each in a workdir of its own."""

import csv
import io
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from moejax.config.schema import Config
from moejax.config.sweep import SweepPoint
from moejax.errors import UserError
from moejax.train.checkpoint import saved_steps
from moejax.train.loop import NonFiniteLoss, last_values, recorded_patience, train
from moejax.train.progress import format_seconds
from moejax.train.workdir import check_workdir

# A row of sweep.json: the point, how far it is, and its last values.
Row = dict[str, Any]


def run_sweep(points: Sequence[SweepPoint], workdir: str | os.PathLike) -> list[Row]:
    """Trains every point in ``workdir/<name of the point>``, and prints a table at the end.

    Finished points are skipped, a stopped one goes on where it was: the same sweep again continues.
    A point that fails is reported and does not stop the others; the same sweep again tries it once
    more. ``workdir/sweep.json`` and ``sweep.csv`` are written anew after each point.

    Args:
      points: from :func:`moejax.config.sweep.plan_sweep`.
      workdir: folder of the sweep.

    Returns:
      A row for each point: ``point``, ``status`` ("done", "failed", "stopped" or "pending"),
      ``fields``, ``workdir``, ``step``, ``metrics`` (the last values of metrics.jsonl), and
      ``error`` where it failed.

    Raises:
      UserError: ``workdir``, or that of a point, belongs to something else; nothing was written.
    """
    workdir = Path(workdir)
    if (workdir / "config.json").exists():
        raise UserError(f"--workdir {workdir}: holds a run; name another folder for the sweep")
    for point in points:
        check_workdir(workdir / point.name, point.config)
    rows = [_row(point, workdir / point.name) for point in points]
    waiting = [i for i, row in enumerate(rows) if row["status"] != "done"]
    _say(f"sweep of {len(points)} points in {workdir}, {len(points) - len(waiting)} of them done")
    began = time.monotonic()
    for ran, i in enumerate(waiting):
        left = ""
        if ran:
            seconds = (time.monotonic() - began) / ran * (len(waiting) - ran)
            left = f"  (ETA of the sweep {format_seconds(seconds)})"
        _say(f"point {i + 1} of {len(points)}: {points[i].name}{left}")
        rows[i] = _run_point(points[i], workdir / points[i].name)
        _write(workdir, rows)
        if rows[i]["status"] == "stopped":
            break
    # Also when nothing was left to do: the files are then those of this very sweep.
    _write(workdir, rows)
    _say(format_rows(rows))
    return rows


def train_apart(config: Config, folder: Path) -> None:
    """:func:`train` as one of several runs of this process, of which nothing is left for others."""
    settings: Any = jax.config
    wide = settings.jax_enable_x64
    try:
        train(config, folder)
    finally:
        # The next run starts like the first: no float64 and no programs are left of this one.
        jax.config.update("jax_enable_x64", wide)
        jax.clear_caches()


def _run_point(point: SweepPoint, folder: Path) -> Row:
    """Trains one point; whatever goes wrong in it ends in its row."""
    failure = ""
    try:
        train_apart(point.config, folder)
    except (UserError, NonFiniteLoss) as error:
        failure = " ".join(str(error).split())
    except Exception as error:
        traceback.print_exc()
        failure = " ".join(f"{type(error).__name__}: {error}".split())
    row = _row(point, folder)
    if failure:
        _say(f"point {point.name} failed: {failure}", file=sys.stderr)
        return {**row, "status": "failed", "error": failure}
    # Only a signal ends an unfinished run without an error.
    return row if row["status"] == "done" else {**row, "status": "stopped"}


def _row(point: SweepPoint, folder: Path) -> Row:
    """The row of a point as its folder has it."""
    values = last_values(folder)
    step = values.pop("step", 0)
    values.pop("wall_time", None)
    return {
        "point": point.name,
        "status": "done" if is_finished(point.config, folder) else "pending",
        "fields": point.fields,
        "workdir": str(folder),
        "step": step,
        "metrics": values,
    }


def is_finished(config: Config, folder: Path) -> bool:
    """Whether the run in ``folder`` has come to its last step, or stopped early."""
    steps = saved_steps(folder / "checkpoints")
    if not steps:
        return False
    last = steps[-1]
    return last >= config.train.steps or recorded_patience(config, folder, last).exhausted


def format_rows(rows: Sequence[Row]) -> str:
    """The table of a sweep: a line for each point, with its evaluation losses."""
    metrics = loss_names(rows)
    head = ("point", "status", "step", *(_title(name) for name in metrics))
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        values = [row["metrics"].get(name) for name in metrics]
        shown = ["" if value is None else f"{value:.4f}" for value in values]
        lines.append((row["point"], row["status"], str(row["step"]), *shown))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join(table + [f"{row['point']}: {row['error']}" for row in rows if "error" in row])


def loss_names(rows: Sequence[Row]) -> list[str]:
    """``eval/loss``, ``eval/text/loss``, ... of any row; training losses where none evaluates."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    found = [name for name in names if re.fullmatch(r"eval/(\w+/)*loss", name)]
    return found or [name for name in names if re.fullmatch(r"train/loss(/\w+)?", name)]


def _title(name: str) -> str:
    """``eval/text/loss`` -> ``text loss``; ``train/loss/text`` -> ``train text loss``."""
    if name.startswith("train/loss"):
        return " ".join(["train", *name.split("/")[2:], "loss"])
    return name.removeprefix("eval/").replace("/", " ")


def _write(workdir: Path, rows: Sequence[Row]) -> None:
    """sweep.json and sweep.csv, each in one piece."""
    if jax.process_index() != 0:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    fields = list(dict.fromkeys(field for row in rows for field in row["fields"]))
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["point", "status", "step", *fields, *metrics])
    for row in rows:
        fixed = [row["point"], row["status"], row["step"]]
        table.writerow([*fixed, *_cells(row["fields"], fields), *_cells(row["metrics"], metrics)])
    _replace(workdir / "sweep.csv", text.getvalue())
    _replace(workdir / "sweep.json", json.dumps({"points": list(rows)}, indent=2) + "\n")


def _cells(values: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    return [values.get(name, "") for name in names]


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _say(text: str, file: Any = None) -> None:
    if jax.process_index() == 0:
        print(text, file=file, flush=True)
