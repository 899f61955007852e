"""Writes isoflop.json, isoflop.md and isoflop.png."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moejax.analysis.compare.figures import log_x, png_of
from moejax.analysis.compare.isoflop import Fit, fit_modality, points_of
from moejax.analysis.compare.plan import Plan
from moejax.analysis.compare.results import ArmResult, evaluation_rows
from moejax.analysis.compare.tables import (
    RATE_HEAD,
    csv_text,
    describe,
    interval_text,
    markdown,
    rate_cells,
)
from moejax.analysis.report_page import Section, data_uri, gallery, page, table
from moejax.data.record_io import replace_file, write_json

_SIZE_HEAD = ("modality", "FLOPs", "best N")
_LAW_HEAD = ("modality", "E", "alpha", "beta", "best size ~ C^", "the same by parabolas", "turned")


def write_isoflop(plan: Plan, results: Sequence[ArmResult], workdir: Path) -> list[Fit]:
    """Fits every modality and writes the files, each in one piece."""
    budget, evaluations = plan.budget.amount, plan.evaluations
    fits = [fit_modality(results, modality, budget, evaluations) for modality in plan.modalities]
    png = isoflop_png(plan, results, fits)
    tables = (
        (_LAW_HEAD, law_cells(results, fits), range(1, 7)),
        (_SIZE_HEAD, size_cells(fits), (1, 2)),
        (RATE_HEAD, rate_cells(results), (1, 2, 3)),
    )
    sections = [
        Section("losses", "Losses at equal FLOPs", gallery("", [("", data_uri(png))])),
        *(
            Section(anchor, title, table(*parts))
            for anchor, title, parts in zip(
                ("laws", "sizes", "arms"), ("Laws", "Best sizes", "Arms"), tables, strict=True
            )
        ),
    ]
    texts = {
        "comparison.csv": csv_text(evaluation_rows(results, plan.modalities)),
        "isoflop.md": isoflop_markdown(plan, results, fits),
        "index.html": page("IsoFLOP fits", describe(plan), "", "", sections, "comparison"),
    }
    for name, text in texts.items():
        replace_file(workdir / name, lambda path, text=text: path.write_text(text, "utf-8"))
    replace_file(workdir / "isoflop.png", lambda path: path.write_bytes(png))
    write_json(workdir / "isoflop.json", [fit.document() for fit in fits])
    return fits


def isoflop_markdown(plan: Plan, results: Sequence[ArmResult], fits: Sequence[Fit]) -> str:
    """The laws, the best size at each budget, and the arms."""
    return (
        "\n\n".join(
            (
                "# IsoFLOP fits",
                "L = E + A / N^alpha + B / D^beta, N the training FLOPs of a token over six, D the "
                f"tokens; {plan.seeds} seeds, brackets are 95% intervals over them.",
                markdown(_LAW_HEAD, law_cells(results, fits), range(1, 7)),
                markdown(_SIZE_HEAD, size_cells(fits), (1, 2)),
                markdown(RATE_HEAD, rate_cells(results), (1, 2, 3)),
                "![isoFLOP curves](isoflop.png)",
            )
        )
        + "\n"
    )


def law_cells(results: Sequence[ArmResult], fits: Sequence[Fit]) -> list[tuple[str, ...]]:
    """The law of each modality."""
    runs = sum(len(result.runs) for result in results)
    shown = ("e", "alpha", "beta", "size_exponent")
    return [
        (
            fit.modality,
            *(interval_text(fit.law[name], "{:.2f}") for name in shown),
            "none inside" if fit.exponent is None else interval_text(fit.exponent, "{:.2f}"),
            f"{fit.turned} of {runs}",
        )
        for fit in fits
    ]


def size_cells(fits: Sequence[Fit]) -> list[tuple[str, ...]]:
    """The best size of each modality at each budget."""
    return [
        (
            fit.modality,
            f"{flops:.3g}",
            "outside of the sizes" if best is None else interval_text(best, "{:.3g}"),
        )
        for fit in fits
        for flops, best in zip(fit.budgets, fit.best, strict=True)
    ]


def isoflop_png(plan: Plan, results: Sequence[ArmResult], fits: Sequence[Fit]) -> bytes:
    """For each modality the losses over size at each budget, and the bottoms of the parabolas."""
    figure = Figure(figsize=(4.8 * len(fits), 3.8), layout="constrained")
    panels = figure.subplots(1, len(fits), squeeze=False)[0]
    for panel, fit in zip(panels, fits, strict=True):
        _panel(panel, plan, results, fit)
    return png_of(figure)


def _panel(panel: Axes, plan: Plan, results: Sequence[ArmResult], fit: Fit) -> None:
    seeds = range(min(len(result.runs) for result in results))
    points = [
        points_of(results, fit.modality, seed, plan.budget.amount, plan.evaluations)
        for seed in seeds
    ]
    n, losses = points[0].n, np.mean([one.losses for one in points], axis=0)
    for j, flops in enumerate(fit.budgets):
        shade = 0.25 + 0.7 * j / max(1, len(fit.budgets) - 1)
        color = (0.0, 0.45 * shade, 0.7 * shade + 0.1)
        panel.plot(n, losses[:, j], "o", color=color, markersize=4, label=f"{flops:.2g}")
        x = np.log(n)
        parabola = np.polyfit(x, losses[:, j], 2)
        between = np.linspace(x.min(), x.max(), 60)
        panel.plot(np.exp(between), np.polyval(parabola, between), color=color, linewidth=1)
        best = fit.best[j]
        if best is not None:
            panel.plot(best.mean, np.polyval(parabola, np.log(best.mean)), "*", color="#d55e00")
    log_x(panel)
    panel.set_title(f"{fit.modality}: held-out loss at equal FLOPs", fontsize=10)
    panel.set_xlabel("N (training FLOPs a token / 6)")
    panel.legend(title="FLOPs", fontsize=7, title_fontsize=8, frameon=False)
    panel.grid(alpha=0.25)
