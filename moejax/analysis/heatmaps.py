"""Heat maps as inline SVG, like the charts: the values appear under the pointer.

``MAP_HOVER`` is the script that shows them; without scripts the colours and the scale remain.
"""

import json
import math
from collections.abc import Sequence
from html import escape

import numpy as np

from moejax.analysis.charts import tick_label

_WIDTH, _RIGHT, _TOP, _BOTTOM = 400, 10, 8, 54
# Cells of equal shade are one path, so that a page of many experts stays small.
_SHADES = 48
_MOST_ROWS_HEIGHT, _CELL = 360, 24
_SCALE = ((255, 255, 255), (189, 215, 238), (74, 143, 196), (0, 90, 160), (4, 30, 66))
NOTHING = (226, 226, 226)

# Light ones first, then dark ones (after Paul Tol): told apart also without colour vision.
_PALETTE = (
    *("#77aadd", "#ee8866", "#eedd88", "#ffaabb", "#44bb99", "#bbcc33", "#99ddff", "#aaaa00"),
    *("#332288", "#cc3311", "#117733", "#882255", "#0077bb", "#997700", "#aa4499", "#555555"),
)


def shade(share: float) -> tuple[int, int, int]:
    """A colour from white (0) over blue to nearly black (1); grey for NaN."""
    if not math.isfinite(share):
        return NOTHING
    place = min(max(share, 0.0), 1.0) * (len(_SCALE) - 1)
    low = min(int(place), len(_SCALE) - 2)
    part = place - low
    r, g, b = (round(a + part * (z - a)) for a, z in zip(_SCALE[low], _SCALE[low + 1], strict=True))
    return r, g, b


def hex_color(rgb: Sequence[int]) -> str:
    """``(255, 0, 16)`` -> ``"#ff0010"``."""
    return "#" + "".join(f"{value:02x}" for value in rgb)


def expert_color(expert: int) -> str:
    """One of 16 colours that are easily told apart, then hues that are not."""
    if expert < 0:
        return hex_color(NOTHING)
    if expert < len(_PALETTE):
        return _PALETTE[expert]
    hue, light = round(expert * 137.508) % 360, 62 + 7 * (expert % 4)
    return f"hsl({hue}, {60 + 15 * (expert % 3)}%, {light}%)"


def ink(color: str) -> str:
    """Black or white, whichever is readable on ``color``."""
    if not color.startswith("#"):
        return "#000"
    r, g, b = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#000" if 0.299 * r + 0.587 * g + 0.114 * b > 120 else "#fff"


def heatmap(
    title: str,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    columns_title: str = "",
    top: float | None = None,
    percent: bool = True,
) -> str:
    """A ``<figure>`` with title, map and scale.

    Args:
      title: above the map.
      values: [rows, columns]; NaN is grey.
      rows: names, on the left.
      columns: names, below.
      columns_title: what the columns are.
      top: the value of the darkest colour (the lightest is 0); default the largest value.
      percent: values are fractions of 1, shown as percentages.
    """
    values = np.asarray(values, np.float64)
    if top is None:
        top = float(np.nanmax(values, initial=0))
    top = top or 1.0
    left = min(130, 12 + round(6.2 * max(map(len, rows), default=0)))
    cell = min(_CELL, _MOST_ROWS_HEIGHT / len(rows))
    width, height = _WIDTH - _RIGHT - left, cell * len(rows)
    across = width / len(columns)
    bottom = _TOP + height
    parts = _cells(values / top, left, across, cell)
    for i in _labelled(len(rows), cell, 12):
        y = _TOP + (i + 0.5) * cell + 4
        parts.append(f'<text x="{left - 6}" y="{y:.1f}" text-anchor="end">{escape(rows[i])}</text>')
    widest = 6.2 * max(map(len, columns), default=0) + 8
    for i in _labelled(len(columns), across, widest):
        x = left + (i + 0.5) * across
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14:.1f}" text-anchor="middle">')
        parts.append(f"{escape(columns[i])}</text>")
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{bottom + 30:.1f}" text-anchor="end">')
    parts.append(f"{escape(columns_title)}</text>")
    parts += _scale(top, percent, left, bottom + 38)
    data = {
        "box": [left, _TOP, width, height],
        "rows": list(rows),
        "columns": list(columns),
        "columnsTitle": columns_title,
        "percent": percent,
        "values": [
            [float(f"{v:.4g}") if math.isfinite(v) else None for v in row] for row in values
        ],
    }
    return (
        f"<figure class='chart'><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {bottom + _BOTTOM:.0f}" role="img" '
        f'aria-label="{escape(title)}" '
        f'data-map="{escape(json.dumps(data, separators=(",", ":")))}">{"".join(parts)}'
        f'<rect class="frame" x="{left}" y="{_TOP}" width="{width}" height="{height:.1f}"/>'
        "</svg></figure>"
    )


def _cells(shares: np.ndarray, left: float, across: float, cell: float) -> list[str]:
    paths: dict[int, list[str]] = {}
    for r, row in enumerate(shares):
        for c, share in enumerate(row):
            level = round(min(max(share, 0), 1) * _SHADES) if math.isfinite(share) else -1
            x, y = left + c * across, _TOP + r * cell
            path = f"M{x:.2f} {y:.2f}h{across:.2f}v{cell:.2f}h-{across:.2f}z"
            paths.setdefault(level, []).append(path)
    fill = {level: shade(level / _SHADES if level >= 0 else math.nan) for level in paths}
    return [
        f'<path shape-rendering="crispEdges" fill="{hex_color(fill[k])}" d="{"".join(v)}"/>'
        for k, v in paths.items()
    ]


def _labelled(count: int, size: float, needed: float) -> range:
    """Which of ``count`` places of ``size`` pixels have a label that needs ``needed``."""
    return range(0, count, max(1, math.ceil(needed / size)))


def _scale(top: float, percent: bool, left: float, y: float) -> list[str]:
    steps, width = 24, 96
    parts = [
        f'<rect x="{left + 30 + i * width / steps:.2f}" y="{y:.1f}" height="8" '
        f'width="{width / steps + 0.3:.2f}" fill="{hex_color(shade(i / (steps - 1)))}"/>'
        for i in range(steps)
    ]
    ends = ((left + 25, "end", 0.0), (left + 35 + width, "start", top))
    for x, anchor, value in ends:
        parts.append(f'<text x="{x:.1f}" y="{y + 8:.1f}" text-anchor="{anchor}">')
        parts.append(f"{tick_label(value, percent)}</text>")
    return parts


MAP_HOVER = """
for (const svg of document.querySelectorAll('svg[data-map]')) {
  const map = JSON.parse(svg.dataset.map), [left, top, width, height] = map.box;
  const shown = v => v === null ? 'none' :
    map.percent ? (100 * v).toPrecision(3) + '%' : String(+v.toPrecision(4));
  svg.addEventListener('mouseleave', () => { tip.hidden = true; });
  svg.addEventListener('mousemove', event => {
    const to = svg.getScreenCTM().inverse();
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(to);
    const r = Math.floor((at.y - top) / height * map.rows.length);
    const c = Math.floor((at.x - left) / width * map.columns.length);
    const inside = map.values[r] !== undefined && map.values[r][c] !== undefined;
    tip.hidden = !inside;
    if (!inside) return;
    tip.textContent = [map.rows[r], (map.columnsTitle + ' ' + map.columns[c]).trim(),
      shown(map.values[r][c])].join('\\n');
    const over = event.clientX + tip.offsetWidth + 24 > innerWidth;
    tip.style.left = event.pageX + (over ? -tip.offsetWidth - 14 : 14) + 'px';
    tip.style.top = event.pageY + 14 + 'px';
  });
}
"""
