"""Writes what a comparison has found: comparison.csv, summary.json, .md, .png, index.html ..."""

from collections.abc import Sequence
from pathlib import Path

from moejax.analysis.compare.figures import comparison_png
from moejax.analysis.compare.plan import Plan
from moejax.analysis.compare.results import (
    ArmResult,
    Row,
    evaluation_rows,
    final_rows,
    summary_rows,
)
from moejax.analysis.compare.tables import (
    FINAL_HEAD,
    HEAD,
    NUMBERS,
    RATE_HEAD,
    baseline_cells,
    cells,
    comparison_markdown,
    csv_text,
    describe,
    final_cells,
    rate_cells,
    title,
)
from moejax.analysis.report_page import Section, data_uri, gallery, page, table
from moejax.data.record_io import replace_file, write_json


def write_comparison(plan: Plan, results: Sequence[ArmResult], workdir: Path) -> list[Row]:
    """Writes every file in one piece, and returns the rows of summary.json.

    Nothing is written before there are two arms.
    """
    if len(results) < 2:
        return []
    rows = summary_rows(results, plan.modalities)
    png = comparison_png(plan, results, rows)
    texts = {
        "comparison.csv": csv_text(evaluation_rows(results, plan.modalities)),
        "comparison.md": comparison_markdown(plan, results, rows),
        "index.html": _html(plan, results, rows, png),
    }
    if plan.also:
        texts["final.csv"] = csv_text(final_rows(results, plan.also))
    for name, text in texts.items():
        replace_file(workdir / name, lambda path, text=text: path.write_text(text, "utf-8"))
    replace_file(workdir / "comparison.png", lambda path: path.write_bytes(png))
    write_json(workdir / "summary.json", [row.document() for row in rows])
    return rows


def _html(plan: Plan, results: Sequence[ArmResult], rows: Sequence[Row], png: bytes) -> str:
    head = [*baseline_cells(results[0], plan.modalities), *map(cells, rows)]
    runs = [
        (
            run.folder,
            f"{run.rate:g}",
            str(run.seed),
            *(f"{one.curve(name, 1.0).lowest:.4f}" for name in plan.modalities),
            f"{one.seconds_per_step * one.steps[-1]:.0f}" if one.seconds_per_step else "",
        )
        for result in results
        for run, one in result.runs
    ]
    run_head = ("run", "learning rate", "seed", *plan.modalities, "seconds of training")
    sections = [
        Section("losses", "Loss against FLOPs", gallery("", [("", data_uri(png))])),
        Section("ratios", "To match the baseline", table(HEAD, head, NUMBERS)),
        Section("rates", "Arms", table(RATE_HEAD, rate_cells(results), (1, 2, 3))),
        Section("runs", "Runs", table(run_head, runs, range(1, len(run_head)))),
    ]
    if plan.also:
        final = table(FINAL_HEAD, final_cells(results, plan.also), (2, 3))
        sections.insert(2, Section("final", "At the end", final))
    return page(
        title(results), "a comparison of moejax", describe(plan), "", sections, "comparison"
    )
