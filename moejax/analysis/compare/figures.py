"""The picture of a comparison: loss against FLOPs with bands, and the ratios with intervals."""

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, ScalarFormatter

from moejax.analysis.charts import MANY_COLORS
from moejax.analysis.compare.matching import mean_interval
from moejax.analysis.compare.plan import Plan
from moejax.analysis.compare.results import ArmResult, Row

_PANEL = (4.6, 3.6)
# Seconds and versions in the file would make equal pictures differ.
_METADATA = {"Software": None}
# Ticks of the ratios, all that lie inside: the finer ones where there are few.
_RATIO_TICKS = (
    (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0),
    (0.8, 0.9, 1.1, 1.2),
)


def comparison_png(plan: Plan, results: Sequence[ArmResult], rows: Sequence[Row]) -> bytes:
    """A panel for each modality, and one of the FLOPs-to-match ratios; a PNG."""
    modalities = plan.modalities
    count = len(modalities) + 1
    figure = Figure(figsize=(_PANEL[0] * count, _PANEL[1]), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for panel, modality in zip(panels, modalities, strict=False):
        _losses(panel, results, modality)
    panels[0].legend(fontsize=8, frameon=False)
    _ratios(panels[-1], rows)
    return png_of(figure)


def png_of(figure: Figure) -> bytes:
    """The figure as a PNG, the same bytes for the same figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, metadata=_METADATA)
    return file.getvalue()


def log_x(panel: Axes) -> None:
    """A logarithmic x axis with labels at 1, 2 and 5 of each decade: 2e+14."""
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:.0e}"))
    panel.xaxis.set_minor_formatter(NullFormatter())


def _losses(panel: Axes, results: Sequence[ArmResult], modality: str) -> None:
    """The mean over seeds of each arm, in a band of its 95% interval."""
    for i, result in enumerate(results):
        color = MANY_COLORS[i % len(MANY_COLORS)]
        curves = result.flops_curves(modality)
        spent = curves[0].spent
        # A run that diverged has fewer evaluations.
        spent = spent[: min(len(curve.losses) for curve in curves)]
        intervals = [
            mean_interval([curve.losses[j] for curve in curves]) for j in range(len(spent))
        ]
        panel.plot(
            spent,
            [interval.mean for interval in intervals],
            color=color,
            marker=".",
            label=result.arm.name,
        )
        if len(curves) > 1:
            low, high = ([getattr(one, end) for one in intervals] for end in ("low", "high"))
            panel.fill_between(spent, low, high, color=color, alpha=0.18, linewidth=0)
    target = mean_interval([curve.lowest for curve in results[0].flops_curves(modality)])
    panel.axhline(target.mean, color="#5f6b7a", linestyle="--", linewidth=1)
    log_x(panel)
    panel.set_title(f"{modality}: held-out loss", fontsize=10)
    panel.set_xlabel("training FLOPs")
    panel.grid(alpha=0.25)


def _inside(panel: Axes, value: float) -> bool:
    low, high = panel.get_xlim()
    return low <= value <= high


def _ratios(panel: Axes, rows: Sequence[Row]) -> None:
    """A line for each arm and modality; an arrow where the target was not reached."""
    arms = list(dict.fromkeys(row.arm for row in rows))
    for y, row in enumerate(rows):
        color = MANY_COLORS[(1 + arms.index(row.arm)) % len(MANY_COLORS)]
        ratio = row.ratio
        panel.plot(ratio.mean, y, marker=">" if ratio.censored else "o", color=color)
        if ratio.low is not None and ratio.high is not None:
            panel.plot((ratio.low, ratio.high), (y, y), color=color)
    panel.axvline(1.0, color="#5f6b7a", linestyle="--", linewidth=1)
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.xaxis.set_minor_formatter(NullFormatter())
    coarse, fine = ([x for x in ticks if _inside(panel, x)] for ticks in _RATIO_TICKS)
    panel.set_xticks(coarse if len(coarse) > 3 else sorted((*coarse, *fine)))
    panel.set_yticks(range(len(rows)), [f"{row.arm}, {row.modality}" for row in rows], fontsize=8)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_title("FLOPs to match, over the baseline's", fontsize=10)
    panel.set_xlabel("ratio (> : not reached within the budget)")
    panel.grid(alpha=0.25, axis="x")
