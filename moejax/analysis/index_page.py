"""``moejax report --index``: one HTML file that lists all the runs below a folder.

Like the report of a run it fetches nothing. Its links lead to the reports and comparisons that lie
there already, relative to the page, so a folder that is copied keeps them.
"""

import dataclasses
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moejax.analysis.charts import MANY_COLORS, Line, Point, chart_legend, line_chart
from moejax.analysis.report_page import Link, Section, grid, page, table, write_page
from moejax.analysis.run import Run, is_record, read_run
from moejax.errors import UserError
from moejax.train.workdir import read_record

# Runs in one chart; more cannot be told apart.
MOST_DRAWN = len(MANY_COLORS)
# What a comparison (or the fits over several sizes) has beside its plan.json.
_RESULTS = {"summary.json", "isoflop.json"}
# Columns that are no numbers.
_TEXTS = {"run", "config", "status", "split", "family", "paper"}
_NOTE = (
    "Losses are the last ones on the named split; those of unlike data or tokenizers do "
    "not compare. Parameters are what the config says of itself. Tokens a second: the median. "
    "Minutes: from the first row to the last, breaks included."
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the page shows of one run; its rows are not kept, for there can be many runs.

    Attributes:
      folder: the run.
      before, after: text by column, to both sides of the losses.
      losses: the held-out losses by modality; "" stands for all targets together.
      newest: when the last row was written.
    """

    folder: Path
    before: dict[str, str]
    after: dict[str, str]
    losses: dict[str, list[Point]]
    newest: float


@dataclasses.dataclass(frozen=True)
class Found:
    """What lies below a folder, in the order of the paths.

    Attributes:
      entries: the runs that can be shown.
      broken: (folder, what is wrong) of the others.
      comparisons: folders of comparisons.
    """

    entries: list[Entry]
    broken: list[tuple[Path, str]]
    comparisons: list[Path]


def write_index(
    folder: str | os.PathLike, out: str | os.PathLike | None = None
) -> tuple[Path, int, int]:
    """Writes the page of all the runs below ``folder``, in one piece.

    Args:
      folder: is searched with all that is below it, but for what is in a run, hidden folders and
        links.
      out: the file; default ``folder/index.html``.

    Returns:
      (the file, how many runs there are, how many of them cannot be shown).

    Raises:
      UserError: there is no such folder or no run below it, or ``out`` is something else than such
        a page.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise UserError(f"--index {folder}: {what}; name a folder with runs, e.g. --index runs")
    found = find_runs(folder)
    count = len(found.entries) + len(found.broken)
    if not count:
        raise UserError(
            f"--index {folder}: no run below it (no config.json of one); name a folder with runs, "
            "e.g. --index runs"
        )
    path = Path(out) if out is not None else folder / "index.html"
    write_page(path, index_html(folder, found, path), "index")
    return path, count, len(found.broken)


def find_runs(folder: Path) -> Found:
    """Reads every run below ``folder``, or ``folder`` itself if it is one."""
    found = Found([], [], [])
    for place, folders, files in os.walk(folder):
        here = Path(place)
        if "plan.json" in files and _RESULTS & set(files):
            found.comparisons.append(here)
        if "config.json" in files and _is_run(here):
            folders.clear()
            try:
                found.entries.append(_entry(read_run(here)))
            except UserError as error:
                found.broken.append((here, str(error)))
        # In place: where, and in which order, the walk goes on.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    return found


def _is_run(folder: Path) -> bool:
    """Whether the config.json is that of a run; one that cannot be read is listed as broken."""
    try:
        return is_record(read_record(folder))
    except UserError:
        return True


def _entry(run: Run) -> Entry:
    keys = {name: f"eval/{name}/loss" for name in run.field("model.modalities", [])}
    losses = {name: run.points(key) for name, key in keys.items()}
    losses = {name: points for name, points in losses.items() if points}
    if not losses and run.points("eval/loss"):
        losses[""] = run.points("eval/loss")
    speeds = [speed for _, speed in run.points("train/tokens_per_second")]
    times = [row["wall_time"] for row in run.rows if "wall_time" in row]
    before = {
        "config": run.field("about.name"),
        "status": _status(run),
        "step": f"{run.step:,}",
    }
    after = {
        "params (M)": _millions(run.field("about.total_params", 0)),
        "active (M)": _millions(run.field("about.active_params", 0)),
        "learning rate": run.field("optim.learning_rate"),
        "seed": run.field("train.seed"),
        "tokens a second": f"{statistics.median(speeds):,.0f}" if speeds else "",
        "minutes": f"{(times[-1] - times[0]) / 60:,.1f}" if times else "",
        "split": run.field("eval.split"),
        "family": run.field("about.family"),
        "paper": run.field("about.paper"),
    }
    newest = times[-1] if times else -math.inf
    return Entry(run.workdir, _texts(before), _texts(after), losses, newest)


def _texts(facts: dict[str, Any]) -> dict[str, str]:
    """What is not recorded becomes ""."""
    return {column: "" if value is None else str(value) for column, value in facts.items()}


def _status(run: Run) -> str:
    if run.finished:
        return "done"
    if run.patience.exhausted:
        return "stopped early"
    return f"step {run.step:,} of {run.field('train.steps', run.step):,}"


def _millions(count: int) -> str:
    """Of one unit, so that the longer number is the larger one; a config that counts none has 0."""
    return f"{count / 1e6:,.2f}" if count else ""


def index_html(folder: Path, found: Found, path: Path) -> str:
    """The page. ``path`` is where it will lie: its links start from there."""
    names = list(dict.fromkeys(name for entry in found.entries for name in entry.losses))
    sections = [
        Section("runs", "Runs", _runs(folder, found.entries, names, path)),
        Section("losses", "Held-out loss", _charts(folder, found.entries, names)),
        Section("comparisons", "Comparisons", _comparisons(folder, found, path)),
        Section("broken", "Cannot be shown", _broken(folder, found)),
    ]
    status = _count(len(found.entries) + len(found.broken), "run")
    status += f", {len(found.broken)} of them cannot be shown" if found.broken else ""
    status += f"; {_count(len(found.comparisons), 'comparison')}" if found.comparisons else ""
    return page(
        f"Runs in {folder.resolve().name}",
        str(folder),
        status,
        "",
        [section for section in sections if section.body],
        kind="index",
    )


def _runs(folder: Path, entries: Sequence[Entry], names: Sequence[str], path: Path) -> str:
    if not entries:
        return ""
    losses = [f"{name} loss".lstrip() for name in names]
    head = ("run", *entries[0].before, *losses, *entries[0].after)
    rows = []
    for entry in entries:
        last = {name: f"{points[-1][1]:.4f}" for name, points in entry.losses.items()}
        report = entry.folder / "report" / "index.html"
        name = _link(_name(folder, entry.folder), report, path)
        cells = (last.get(modality, "") for modality in names)
        rows.append((name, *entry.before.values(), *cells, *entry.after.values()))
    numbers = [i for i, title in enumerate(head) if title not in _TEXTS]
    return table(head, rows, numbers, wide=True) + f"<p>{_NOTE}</p>"


def _charts(folder: Path, entries: Sequence[Entry], names: Sequence[str]) -> str:
    """A chart for each modality under one legend: a run has the same colour in all of them."""
    evaluated = [entry for entry in entries if entry.losses]
    newest = sorted(evaluated, key=lambda entry: entry.newest)[-MOST_DRAWN:]
    drawn = sorted(newest, key=lambda entry: entry.folder)
    if not drawn:
        return ""
    lines: dict[str, list[Line]] = {name: [] for name in names}
    keys = []
    for entry, color in zip(drawn, MANY_COLORS, strict=False):
        keys.append(Line(_name(folder, entry.folder), [], color))
        for name, points in entry.losses.items():
            lines[name].append(dataclasses.replace(keys[-1], points=points, dots=True))
    charts = [
        line_chart(name or "all targets", each, legend=False)
        for name, each in lines.items()
        if each
    ]
    left_out = len(evaluated) - len(drawn)
    note = f"<p>The {len(drawn)} runs with the newest rows; {left_out} more are left out.</p>"
    return (note if left_out else "") + chart_legend(keys) + grid(charts)


def _comparisons(folder: Path, found: Found, path: Path) -> str:
    runs = [entry.folder for entry in found.entries] + [place for place, _ in found.broken]
    rows = [
        (
            _link(_name(folder, place), place / "index.html", path),
            str(sum(run.is_relative_to(place) for run in runs)),
        )
        for place in found.comparisons
    ]
    return table(("comparison", "runs"), rows, numbers=(1,)) if rows else ""


def _broken(folder: Path, found: Found) -> str:
    rows = [(_name(folder, place), fault) for place, fault in found.broken]
    return table(("run", "what is wrong"), rows) if rows else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _name(folder: Path, place: Path) -> str:
    return place.relative_to(folder).as_posix()


def _link(text: str, target: Path, path: Path) -> Link | str:
    """Leads from the page at ``path`` to ``target``; plain text where there is no such file."""
    if not target.is_file():
        return text
    return Link(text, quote(os.fsencode(os.path.relpath(target, path.parent))))
