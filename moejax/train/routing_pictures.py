"""Pictures of a routing record for ``samples/`` and the writers; ``moejax report`` has its own."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from moejax.analysis.charts import spread
from moejax.analysis.heatmaps import shade
from moejax.analysis.routing import co_activation
from moejax.analysis.routing_record import RoutingRecord

# Panels beside each other, and layers that have one of their own.
_COLUMNS, _MOST_LAYERS = 4, 12
_GAP, _LINE = 14, 16
_INK, _FAINT = "#202020", "#707070"


def draw_experts(record: RoutingRecord) -> UInt8[np.ndarray, "h w 3"]:
    """Layer x expert, the share of the choices: of all tokens, and of each modality."""
    loads = [("all tokens", record.load())]
    loads += [(str(name), record.load(m)) for m, name in enumerate(record.modalities)]
    top = max(float(np.nanmax(load, initial=0)) for _, load in loads)
    return panels_of(loads, record.layer_names, "expert", top)


def draw_together(record: RoutingRecord) -> UInt8[np.ndarray, "h w 3"]:
    """For each layer, the share of an expert's tokens (row) that have another one (column) too."""
    shown = spread(range(len(record.layers)), _MOST_LAYERS)
    shares = co_activation(record.together)
    panels = [(record.layer_names[i], shares[i]) for i in shown]
    rows = [f"expert {i}" for i in range(shares.shape[1])]
    return panels_of(panels, rows, "also expert", float(np.nanmax(shares[shown], initial=0)))


def panels_of(
    panels: Sequence[tuple[str, np.ndarray]], rows: Sequence[str], columns: str, top: float
) -> UInt8[np.ndarray, "h w 3"]:
    """Heat maps of one scale with their titles, in lines of ``_COLUMNS``.

    ``columns`` is what their columns are the numbers of; "": of nothing.
    """
    top = top or 1.0
    height, width = panels[0][1].shape
    cell = int(np.clip(320 / max(height, width), 3, 22))
    font = ImageFont.load_default(12)
    labels = 8 + round(max(font.getlength(name) for name in rows))
    wide = labels + max(cell * width, 110) + _GAP
    tall = 2 * _LINE + cell * height + _GAP
    across = min(_COLUMNS, len(panels))
    scale = f"white: none, darkest: {top:.1%}, grey: not there"
    least = round(font.getlength(scale)) + _GAP
    size = (max(wide * across, least) + _GAP, tall * -(-len(panels) // across) + _LINE + _GAP)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for number, (title, values) in enumerate(panels):
        x = _GAP + labels + (number % across) * wide
        y = _GAP + _LINE + (number // across) * tall
        draw.text((x, y - _LINE), title, fill=_INK, font=font)
        pixels = np.asarray([[shade(value / top) for value in row] for row in values], np.uint8)
        cells = Image.fromarray(pixels).resize((cell * width, cell * height), Image.Resampling.BOX)
        canvas.paste(cells, (x, y))
        box = (x - 1, y - 1, x + cell * width, y + cell * height)
        draw.rectangle(box, outline=_FAINT)
        every = max(1, -(-12 // cell))
        for r in range(0, height, every):
            place = (x - 5, y + (r + 0.5) * cell)
            draw.text(place, rows[r], fill=_FAINT, font=font, anchor="rm")
        if columns:
            legend = f"{columns} 0 to {width - 1}"
            draw.text((x, y + cell * height + 3), legend, fill=_FAINT, font=font)
    draw.text((_GAP, size[1] - _LINE - 4), scale, fill=_FAINT, font=font)
    return np.asarray(canvas)
