"""The tables of a comparison: CSV, JSON and Markdown."""

import csv
import io
from collections.abc import Sequence

from moejax.analysis.compare.matching import Interval, mean_interval
from moejax.analysis.compare.plan import Plan
from moejax.analysis.compare.results import ArmResult, Row

HEAD = (
    "arm",
    "modality",
    "FLOPs to match",
    "baseline matches it in",
    "seconds to match",
    "lowest loss",
    "less the baseline's",
    "turned",
    "verdict",
)
NUMBERS = (2, 3, 4, 5, 6, 7)


def csv_text(rows: Sequence[dict]) -> str:
    """A line for each row, the fields of the first one as head."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def ratio_text(ratio: Interval | None) -> str:
    """``"0.62 [0.55, 0.70]"``; ``"> 1.00 (3 of 3 not reached)"`` where seeds are censored."""
    if ratio is None:
        return "not known"
    if ratio.censored and ratio.early:
        return "not known (some not reached, some from the start)"
    if ratio.censored:
        return f"> {ratio.mean:.2f} ({ratio.censored} of {ratio.seeds} not reached)"
    if ratio.early:
        return f"< {ratio.mean:.2f} ({ratio.early} of {ratio.seeds} from the start)"
    return interval_text(ratio, "{:.2f}")


def interval_text(interval: Interval, number: str = "{:.3f}") -> str:
    """``"5.123 [5.101, 5.145]"``; the mean alone with one seed."""
    text = number.format(interval.mean)
    if interval.low is None or interval.high is None:
        return text
    return f"{text} [{number.format(interval.low)}, {number.format(interval.high)}]"


def baseline_cells(baseline: ArmResult, modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """The rows of the baseline: its losses, and how many of its seeds had turned."""
    cells = []
    for modality in modalities:
        curves = baseline.flops_curves(modality)
        loss = interval_text(mean_interval([curve.lowest for curve in curves]))
        turned = f"{sum(curve.turned for curve in curves)} of {len(curves)}"
        cells.append((baseline.arm.name, modality, "1", "1", "1", loss, "", turned, "baseline"))
    return cells


def cells(row: Row) -> tuple[str, ...]:
    """One row of the table, in the order of ``HEAD``."""
    return (
        row.arm,
        row.modality,
        ratio_text(row.ratio),
        ratio_text(row.reverse),
        ratio_text(row.seconds),
        interval_text(row.loss),
        interval_text(row.difference, "{:+.3f}"),
        f"{row.turned} of {row.ratio.seeds}",
        row.verdict,
    )


def rate_cells(results: Sequence[ArmResult]) -> list[tuple[str, ...]]:
    """Each arm with its steps, its FLOPs and the sweep of its learning rate."""
    rows = []
    for result in results:
        arm = result.arm
        tried = ", ".join(f"{rate:g}: {score:.4f}" for rate, score in result.tried)
        chosen = f"{result.rate:g}" + (" (at the edge)" if result.at_edge else "")
        rows.append((arm.name, f"{arm.steps:,}", f"{arm.flops:.3g}", chosen, tried))
    return rows


FINAL_HEAD = ("metric", "arm", "at the end", "less the baseline's")


def final_cells(results: Sequence[ArmResult], metrics: Sequence[str]) -> list[tuple[str, ...]]:
    """Means of the metrics at the end with intervals over seeds, and of the paired differences."""
    rows = []
    for metric in metrics:
        own = results[0].final(metric)
        for result in results:
            values = result.final(metric)
            less = [a - b for a, b in zip(values, own, strict=False)]
            difference = interval_text(mean_interval(less), "{:+.4f}")
            value = interval_text(mean_interval(values), "{:.4f}")
            rows.append(
                (metric, result.arm.name, value, "" if result is results[0] else difference)
            )
    return rows


RATE_HEAD = ("arm", "steps", "training FLOPs", "learning rate", "mean loss of each, seed 0")


def describe(plan: Plan) -> str:
    """One sentence on what was held equal."""
    budget = f"{plan.budget.amount:g} training FLOPs"
    if plan.match != "flops":
        budget = f"{plan.arms[0].tokens:,} {plan.arms[0].unit} (not equal FLOPs)"
    rates = "each arm at its best learning rate" if plan.swept else "one learning rate for all"
    return (
        f"{budget} in every run; {plan.seeds} paired seed{'s' * (plan.seeds > 1)}; the same "
        f"batches in the same order; {plan.schedule} schedule; {rates}. Ratios are of FLOPs to the "
        "baseline's lowest held-out loss; brackets are 95% intervals over seeds."
    )


def title(results: Sequence[ArmResult]) -> str:
    """``"b, c against a"``."""
    baseline, *others = (result.arm.name for result in results)
    return f"{', '.join(others)} against {baseline}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
    """A table in Markdown, ``numbers`` to the right."""
    lines = [list(head), ["--:" if i in numbers else "---" for i in range(len(head))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def comparison_markdown(plan: Plan, results: Sequence[ArmResult], rows: Sequence[Row]) -> str:
    """The document comparison.md."""
    table = [*baseline_cells(results[0], plan.modalities), *map(cells, rows)]
    final = [markdown(FINAL_HEAD, final_cells(results, plan.also), (2, 3))] if plan.also else []
    return (
        "\n\n".join(
            (
                f"# {title(results)}",
                describe(plan),
                markdown(HEAD, table, NUMBERS),
                *final,
                markdown(RATE_HEAD, rate_cells(results), (1, 2, 3)),
                "![loss against FLOPs](comparison.png)",
            )
        )
        + "\n"
    )
