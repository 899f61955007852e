"""Line charts as inline SVG: no script is needed to see them, no file beside the page.

``HOVER`` is a script of a few lines that shows the values under the pointer where scripts run.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

Point = tuple[float, float]

_WIDTH, _HEIGHT = 400, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 34
# More points than this are averaged in groups: a page of a long run stays small.
_MOST_POINTS = 300
# Told apart also without colour vision (Okabe and Ito), and dark enough on white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#8a3ffc", "#b8860b", "#cc3377")
# For a line each of many runs; beyond the first six, names are better read under the pointer.
MANY_COLORS = (*COLORS, "#2f9fd0", "#7a4a1e", "#6b7f00", "#1f3a93", "#e0559a", "#555555")
LEVEL_COLOR = "#5f6b7a"


@dataclasses.dataclass(frozen=True)
class Line:
    """One quantity over the steps.

    Attributes:
      name: in the legend.
      points: (step, value), in the order of the steps.
      color: of the line.
      dots: whether the points themselves are drawn (few of them, as evaluations are).
    """

    name: str
    points: Sequence[Point]
    color: str
    dots: bool = False


@dataclasses.dataclass(frozen=True)
class Level:
    """A value to compare with: a dashed line across the chart."""

    name: str
    value: float


def line_chart(
    title: str,
    lines: Sequence[Line],
    levels: Sequence[Level] = (),
    *,
    last_step: int = 0,
    percent: bool = False,
    zero: bool = False,
    legend: bool = True,
) -> str:
    """A ``<figure>`` with title, chart and legend.

    Args:
      title: above the chart.
      lines: at least one, each with at least one point.
      levels: values to compare with.
      last_step: where the axis of the steps ends, at the least; it begins at 0.
      percent: values are fractions of 1, shown as percentages.
      zero: the axis of the values begins at 0.
      legend: whether the lines are named below.
    """
    lines = [dataclasses.replace(line, points=thin(line.points)) for line in lines]
    levels = [level for level in levels if math.isfinite(level.value)]
    steps = [x for line in lines for x, _ in line.points]
    values = [y for line in lines for _, y in line.points] + [level.value for level in levels]
    x0, x1 = 0.0, float(max(1, last_step, *steps))
    y0, y1 = _span(0.0 if zero else min(values), max(values), 0.06)
    y0 = 0.0 if zero else y0
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - x0) / (x1 - x0) * (right - _LEFT)
        return round(across, 1), round(bottom - (y - y0) / (y1 - y0) * (bottom - _TOP), 1)

    parts = []
    for tick in ticks(y0, y1, 4):
        y = at(x0, tick)[1]
        parts.append(f'<line class="tick" x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">')
        parts.append(f"{tick_label(tick, percent)}</text>")
    for tick in ticks(x0, x1, 6):
        x = at(tick, y0)[0]
        parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{x}" y="{bottom + 17}" text-anchor="middle">')
        parts.append(f"{tick_label(tick)}</text>")
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text x="{right}" y="{_HEIGHT - 4}" text-anchor="end">step</text>')
    for level in levels:
        y = at(x0, level.value)[1]
        parts.append(f'<line class="level" x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
    for line in lines:
        places = [at(x, y) for x, y in line.points]
        if len(places) > 1:
            path = " ".join(f"{x},{y}" for x, y in places)
            parts.append(f'<polyline points="{path}" stroke="{line.color}"/>')
        if line.dots or len(places) == 1:
            parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{line.color}"/>' for x, y in places]
    parts.append(f'<line class="pointer" y1="{_TOP}" y2="{bottom}" x1="-9" x2="-9"/>')
    data = {
        "box": [_LEFT, right, x0, x1],
        "percent": percent,
        "lines": [
            {
                "name": line.name,
                "color": line.color,
                "points": [(round(x), float(f"{y:.6g}")) for x, y in line.points],
            }
            for line in lines
        ],
        "levels": [{"name": level.name, "value": level.value} for level in levels],
    }
    return (
        f"<figure class='chart'><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'data-chart="{escape(json.dumps(data, separators=(",", ":")))}">{"".join(parts)}</svg>'
        f"{chart_legend(lines, levels) if legend else ''}</figure>"
    )


def chart_legend(lines: Sequence[Line], levels: Sequence[Level] = ()) -> str:
    """What the lines and levels of a chart are called; one can stand for several charts."""
    named = [(line.name, line.color, "solid") for line in lines]
    named += [(level.name, LEVEL_COLOR, "dashed") for level in levels]
    keys = "".join(
        f'<span><i style="border-top:2px {style} {color}"></i>{escape(name)}</span>'
        for name, color, style in named
    )
    return f"<div class='legend'>{keys}</div>"


def thin(points: Sequence[Point]) -> list[Point]:
    """At most ``_MOST_POINTS`` points: groups of neighbours by their means, the last one kept."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    groups = np.array_split(np.asarray(points, np.float64), _MOST_POINTS - 1)
    return [*(tuple(group.mean(axis=0).tolist()) for group in groups), points[-1]]


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` of ``items``, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def ticks(low: float, high: float, count: int) -> list[float]:
    """At most about ``count`` round numbers in [low, high]: 1, 2, 2.5 or 5 times a power of ten."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next((f for f in (1, 2, 2.5, 5) if f * power >= raw * 0.999), 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def tick_label(value: float, percent: bool = False) -> str:
    """``12500`` -> ``"12.5k"``, ``0.003`` -> ``"0.003"``, ``0.05`` as percentage ``"5%"``."""
    if percent:
        return f"{100 * value:.3g}%"
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{unit}"
    return f"{value:.4g}"


def _span(low: float, high: float, pad: float) -> tuple[float, float]:
    """A range that is not empty, wider by the fraction ``pad`` on both sides."""
    if high <= low:
        width = abs(low) or 1.0
        return low - width / 2, low + width / 2
    return low - pad * (high - low), high + pad * (high - low)


HOVER = """
const tip = document.getElementById('tip');
for (const svg of document.querySelectorAll('svg[data-chart]')) {
  const chart = JSON.parse(svg.dataset.chart), rule = svg.querySelector('.pointer');
  const [left, right, x0, x1] = chart.box;
  const shown = v => chart.percent ? (100 * v).toPrecision(3) + '%' : +v.toPrecision(5);
  const steps = chart.lines.flatMap(line => line.points.map(p => p[0]));
  const nearest = (xs, x) => xs.reduce((a, b) => Math.abs(b - x) < Math.abs(a - x) ? b : a);
  svg.addEventListener('mouseleave', () => {
    tip.hidden = true;
    rule.setAttribute('x1', -9);
    rule.setAttribute('x2', -9);
  });
  svg.addEventListener('mousemove', event => {
    const to = svg.getScreenCTM().inverse();
    const px = new DOMPoint(event.clientX, event.clientY).matrixTransform(to).x;
    const step = nearest(steps, x0 + (px - left) / (right - left) * (x1 - x0));
    const x = left + (step - x0) / (x1 - x0) * (right - left);
    rule.setAttribute('x1', x);
    rule.setAttribute('x2', x);
    const rows = [['step ' + step, '']];
    for (const line of chart.lines) {
      const at = nearest(line.points.map(p => p[0]), step);
      if (Math.abs(at - step) > (x1 - x0) / 40) continue;
      rows.push([line.name, shown(line.points.find(p => p[0] === at)[1])]);
    }
    for (const level of chart.levels) rows.push([level.name, shown(level.value)]);
    tip.textContent = rows.map(row => row.join('  ')).join('\\n');
    tip.hidden = false;
    const width = tip.offsetWidth, over = event.clientX + width + 24 > innerWidth;
    tip.style.left = event.pageX + (over ? -width - 14 : 14) + 'px';
    tip.style.top = event.pageY + 14 + 'px';
  });
}
"""
