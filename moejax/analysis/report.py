"""``moejax report``: one HTML file that shows a run, from its workdir alone.

Nothing in it is fetched from anywhere: charts are inline SVG, pictures are data URIs, and a content
security policy forbids the rest.
"""

import dataclasses
import datetime
import json
import math
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moejax.analysis.charts import COLORS, Level, Line, line_chart, spread
from moejax.analysis.report_page import (
    Section,
    cards,
    data_uri,
    gallery,
    grid,
    page,
    table,
    write_page,
)
from moejax.analysis.report_routing import routing_keys, routing_section
from moejax.analysis.run import Run, read_run
from moejax.config import schema
from moejax.data.records import SPLITS
from moejax.train.evaluate import BASELINES
from moejax.train.workdir import flatten

# Pictures of one name that are shown, spread evenly over the steps.
MOST_PICTURES = 8
_TRAIN, _EVAL = COLORS[0], COLORS[1]


def write_report(
    workdir: str | os.PathLike, out: str | os.PathLike | None = None
) -> tuple[Path, int]:
    """Writes the report of a run, in one piece.

    Args:
      workdir: the run.
      out: the file; default ``workdir/report/index.html``.

    Returns:
      (the file, the last step that it shows).

    Raises:
      UserError: there is no run, it has no rows yet, or ``out`` is something else than a report.
    """
    run = read_run(workdir)
    path = Path(out) if out is not None else run.workdir / "report" / "index.html"
    write_page(path, report_html(run))
    return path, run.step


def report_html(run: Run) -> str:
    """The page."""
    about = run.record.get("about", {})
    title = about.get("name") or run.workdir.resolve().name
    described = [about.get("family"), about.get("paper"), str(run.workdir)]
    sections = [
        Section("losses", "Loss per modality", _losses(run)),
        Section("samples", "Samples over time", _samples(run)),
        Section("routing", "Routing", routing_section(run)),
        Section("measures", "Other measures", _measures(run)),
        Section("speed", "Speed and input", _speed(run)),
        Section("optimisation", "Optimisation", _optimisation(run)),
        Section("metrics", "Last values", _metrics(run)),
        Section("checkpoints", "Checkpoints", _checkpoints(run)),
        Section("config", "Config", _config(run)),
        Section("environment", "Environment", _environment(run)),
    ]
    return page(
        title,
        ", ".join(part for part in described if part),
        _status(run),
        cards(_figures(run)),
        [section for section in sections if section.body],
    )


def _status(run: Run) -> str:
    total = run.field("train.steps", run.step)
    if run.finished:
        return f"trained to step {total}"
    patience = run.patience
    if patience.exhausted:
        return f"stopped early at step {run.step} of {total}: {patience.describe()}"
    return f"at step {run.step} of {total}: under way, or stopped to be gone on with"


def _figures(run: Run) -> list[tuple[str, str, str]]:
    """(title, value, remark) of the cards at the top."""
    found = [("step", f"{run.step:,}", f"of {run.field('train.steps', run.step):,}")]
    for name in _loss_names(run)[0]:
        key = f"eval/{name}/loss" if name else "eval/loss"
        value = run.last(key)
        if value is None:
            continue
        levels = _levels(run, key)
        split = run.field("eval.split", "eval")
        remark = f"{levels[0].name} {levels[0].value:.3f}" if levels else f"nats, {split} split"
        found.append((f"{name} loss ({split})".lstrip(), f"{value:.3f}", remark))
    if not any("loss" in title for title, _, _ in found):
        value = run.last("train/loss")
        found += [("training loss", f"{value:.4g}", "")] if value is not None else []
    for unit in ("tokens", "examples"):
        rates = [y for _, y in run.points(f"train/{unit}_per_second")]
        if rates:
            found.append((f"{unit} a second", f"{statistics.median(rates):,.0f}", "median"))
    waits = [y for _, y in run.points("train/input_wait_fraction")]
    if waits:
        share = statistics.mean(waits)
        found.append(("input wait", f"{share:.2%}", "mean share of the steps' time"))
    return found


def _loss_names(run: Run) -> tuple[list[str], list[str]]:
    """(the total "" and the modalities, other terms) that have a loss."""
    named = {""}
    for key in run.keys:
        if key.startswith("train/loss/"):
            named.add(key.removeprefix("train/loss/"))
        elif key.startswith("eval/") and key.endswith("/loss"):
            middle = key.removeprefix("eval/").removesuffix("/loss")
            parts = middle.split("/") if middle else []
            named.add("/".join(parts[1:] if parts and parts[0] in SPLITS else parts))
    modalities = [name for name in run.field("model.modalities", []) if name in named]
    return ["", *modalities], sorted(named - {"", *modalities})


def _losses(run: Run) -> str:
    main, others = _loss_names(run)
    charts = [_loss_chart(run, name, name or "all targets") for name in main]
    more = [_loss_chart(run, name, name) for name in others]
    return grid(charts) + (f"<h3>Other terms</h3>{grid(more)}" if any(more) else "")


def _loss_chart(run: Run, name: str, title: str) -> str:
    ending = f"{name}/loss" if name else "loss"
    lines = [Line("train", run.points(f"train/loss/{name}" if name else "train/loss"), _TRAIN)]
    lines += _eval_lines(run, ending)
    lines = [line for line in lines if line.points]
    levels = _levels(run, f"eval/{ending}")
    return line_chart(title, lines, levels, last_step=run.step) if lines else ""


def _eval_lines(run: Run, ending: str) -> list[Line]:
    """The values ``ending`` of each split that was evaluated."""
    split = run.field("eval.split", "eval")
    named = [(f"eval/{ending}", split)]
    named += [(f"eval/{other}/{ending}", f"{other} split") for other in SPLITS if other != split]
    colors = (_EVAL, *COLORS[2:])
    return [
        Line(name, run.points(key), color, dots=True)
        for (key, name), color in zip(named, colors, strict=False)
    ]


def _levels(run: Run, key: str) -> list[Level]:
    """The baselines of an evaluated value."""
    group, slash, quantity = key.rpartition("/")
    found = []
    for prefix, title in BASELINES.items():
        value = run.last(f"{group}{slash}{prefix}{quantity}")
        if value is not None:
            found.append(Level(title, value))
    return found


def _samples(run: Run) -> str:
    by_name: dict[str, list[tuple[int, Path]]] = {}
    for path in (run.workdir / "samples").glob("step_*/*.png"):
        number = path.parent.name.removeprefix("step_")
        if number.isdecimal() and not path.name.startswith("."):
            by_name.setdefault(path.stem, []).append((int(number), path))
    parts = []
    for name, files in sorted(by_name.items()):
        files = sorted(files)
        shown = spread(files, MOST_PICTURES)
        note = f", {len(shown)} of {len(files)} shown" if len(shown) < len(files) else ""
        pictures = [(f"step {step}", data_uri(path.read_bytes())) for step, path in shown]
        parts.append(gallery(f"{name.replace('_', ' ')}{note}", pictures))
    return "".join(parts)


def _measures(run: Run) -> str:
    """Everything evaluated that is neither a loss nor a baseline, and the training accuracies."""
    endings = []
    elsewhere = routing_keys(run)
    for key in run.keys:
        if key.startswith("eval/") and key not in elsewhere:
            middle = key.removeprefix("eval/")
            head, slash, rest = middle.partition("/")
            endings.append(rest if slash and head in SPLITS else middle)
    charts = []
    for ending in dict.fromkeys(endings):
        quantity = ending.rpartition("/")[2]
        if quantity == "loss" or quantity.startswith(tuple(BASELINES)):
            continue
        lines = _eval_lines(run, ending)
        group, _, quantity = ending.rpartition("/")
        if quantity == "accuracy":
            lines.insert(0, Line("train", run.points(f"train/accuracy/{group}"), _TRAIN))
        lines = [line for line in lines if line.points]
        title = ending.replace("/", " ").replace("_", " ")
        percent = quantity == "accuracy"
        levels = _levels(run, f"eval/{ending}")
        charts.append(line_chart(title, lines, levels, last_step=run.step, percent=percent))
    return grid(charts)


def _speed(run: Run) -> str:
    wanted = (
        ("train/tokens_per_second", "tokens a second", False),
        ("train/examples_per_second", "examples a second", False),
        ("train/input_wait_fraction", "input wait, share of the steps' time", True),
        ("train/utilisation", "utilisation (model FLOPs over the peak)", True),
    )
    return grid(_single(run, key, title, percent) for key, title, percent in wanted)


def _optimisation(run: Run) -> str:
    wanted = (("learning_rate", "learning rate"), ("grad_norm", "gradient norm before clipping"))
    charts = [_single(run, f"train/{key}", title) for key, title in wanted]
    if run.last("train/skipped"):
        charts.append(_single(run, "train/skipped", "steps skipped"))
    return grid(charts)


def _single(run: Run, key: str, title: str, percent: bool = False) -> str:
    """One training value, from 0 up; nothing where the run has none."""
    points = run.points(key)
    if not points:
        return ""
    line = Line("train", points, _TRAIN)
    return line_chart(title, [line], last_step=run.step, percent=percent, zero=True, legend=False)


def _metrics(run: Run) -> str:
    rows = []
    for key in sorted(run.keys, key=lambda key: (not key.startswith("eval/"), key)):
        if "/" not in key or key.rpartition("/")[2].startswith(tuple(BASELINES)):
            continue
        points = run.points(key)
        levels = _levels(run, key)
        baseline = f"{levels[0].value:.4f} ({levels[0].name})" if levels else ""
        rows.append((key, f"{points[-1][1]:.5g}", baseline, f"{points[-1][0]:,}"))
    return table(("value", "last", "baseline", "at step"), rows, numbers=(1, 3))


def _checkpoints(run: Run) -> str:
    if not run.checkpoints:
        return "<p>None yet.</p>"
    metric = run.field("eval.best_metric", "")
    name = metric.removeprefix("-")
    measured = dict(run.points(f"eval/{name}")) if name else {}
    scored = {s: measured[s] for s in run.checkpoints if s in measured}
    best = (max if metric.startswith("-") else min)(scored, key=scored.__getitem__, default=None)
    rows = []
    for step in run.checkpoints:
        files = (run.workdir / "checkpoints" / str(step)).rglob("*")
        size = sum(file.stat().st_size for file in files if file.is_file())
        remarks = ["newest"] * (step == run.checkpoints[-1]) + ["best"] * (step == best)
        value = f"{scored[step]:.5g}" if step in scored else ""
        rows.append((f"{step:,}", f"{size / 1e6:,.1f} MB", value, ", ".join(remarks)))
    return table(("step", "size", name or "", ""), rows, numbers=(0, 1, 2))


def _config(run: Run) -> str:
    defaults = flatten(_default_record(run.record))
    fields = flatten({k: v for k, v in run.record.items() if k in _groups() and k != "about"})
    changed, same = [], []
    for name, value in sorted(fields.items()):
        default = defaults.get(name)
        if name in defaults and default == value:
            same.append((name, _shown(value)))
        else:
            changed.append((name, _shown(value), _shown(default) if name in defaults else "none"))
    parts = ["<h3>Other than the defaults</h3>", table(("field", "value", "default"), changed)]
    if same:
        rest = table(("field", "value"), same)
        parts.append(f"<details><summary>The {len(same)} other fields</summary>{rest}</details>")
    return "".join(parts)


def _groups() -> set[str]:
    return {field.name for field in dataclasses.fields(schema.Config)}


def _default_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of every group, in JSON's types; a model that is not known has none."""
    registries = {"model": schema.MODEL_CONFIGS, "objective": schema.OBJECTIVE_CONFIGS}
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(schema.Config):
        make: Any = field.default_factory
        if field.name in registries:
            name = record.get(field.name, {}).get("name", "")
            if name not in registries[field.name]:
                continue
            make = registries[field.name].get(name)
        groups[field.name] = dataclasses.asdict(make())
    return json.loads(json.dumps(groups))


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _environment(run: Run) -> str:
    rows = [
        (key.replace("_", " "), _shown(v)) for key, v in run.record.get("made_with", {}).items()
    ]
    times = [row["wall_time"] for row in run.rows if math.isfinite(row.get("wall_time", math.nan))]
    for title, stamp in (("first row", times[:1]), ("last row", times[-1:])):
        for seconds in stamp:
            moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
            rows.append((title, f"{moment:%Y-%m-%d %H:%M:%S} UTC"))
    return table(("", ""), rows)
