"""Pictures of a routing record for ``samples/`` and the writers; ``moejax report`` has its own."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageColor, ImageDraw, ImageFont

from moejax.analysis.charts import spread
from moejax.analysis.heatmaps import expert_color, ink, shade
from moejax.analysis.routing import NONE, co_activation
from moejax.analysis.routing_record import RoutingRecord

# Panels beside each other, and layers that have one of their own.
_COLUMNS, _MOST_LAYERS = 4, 12
_GAP, _LINE = 14, 16
# Maps of single experts: layers and experts that have one.
_MAP_LAYERS, _MAP_EXPERTS = 4, 8
# Side of a picture under the colours of its experts, and how much of those there is.
_SIDE, _OVER = 96, 0.5
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


def draw_classes(record: RoutingRecord) -> UInt8[np.ndarray, "h w 3"]:
    """For each layer class x expert, the share of the choices of the class's tokens."""
    shown = spread(record.picture_layers, _MOST_LAYERS)
    shares = record.class_share()
    panels = [(record.layer_names[i], shares[i]) for i in shown]
    names = [str(name) for name in record.classes]
    return panels_of(panels, names, "expert", float(np.nanmax(shares[shown], initial=0)))


def draw_times(record: RoutingRecord) -> UInt8[np.ndarray, "h w 3"]:
    """For each layer noise level x expert, the share of the choices at that level."""
    shown = spread(range(len(record.layers)), _MOST_LAYERS)
    shares = record.time_share()
    panels = [(record.layer_names[i], shares[i]) for i in shown]
    names = [f"time {time:.2f}" for time in record.times]
    return panels_of(panels, names, "expert", float(np.nanmax(shares[shown], initial=0)))


def draw_places(record: RoutingRecord) -> UInt8[np.ndarray, "h w 3"]:
    """For each layer and expert the grid of patches, the share of a place's choices."""
    rows, columns = map(int, record.grid)
    shares = record.patch_share()
    panels = [
        (
            f"{record.layer_names[i]}, expert {record.expert_name(i, e)}",
            shares[i, :, e].reshape(rows, columns),
        )
        for i in spread(record.picture_layers, _MAP_LAYERS)
        for e in spread(range(int(record.experts[i])), _MAP_EXPERTS)
    ]
    top = max(float(np.nanmax(values, initial=0)) for _, values in panels)
    return panels_of(panels, [""] * rows, "", top)


def draw_patches(record: RoutingRecord) -> UInt8[np.ndarray, "h w 3"]:
    """Pictures; below them, for each layer, the same in the colours of the patches' first experts.

    A patch without an expert is grey.
    """
    rows, columns = map(int, record.grid)
    shown = spread(record.picture_layers, _MOST_LAYERS)
    names = ["picture", *(record.layer_names[i] for i in shown)]
    font = ImageFont.load_default(12)
    left = 12 + round(max(font.getlength(name) for name in names))
    step = _SIDE + _GAP
    wide = max(left + step * len(record.pictures), 480)
    chips = _chips(record, font, wide)
    tall = _GAP + step * len(names) + _LINE * (1 + chips[-1][1]) + _GAP
    canvas = Image.new("RGB", (wide, tall), "white")
    draw = ImageDraw.Draw(canvas)
    for number, name in enumerate(names):
        y = _GAP + number * step
        draw.text((4, y + _SIDE // 2), name, fill=_INK, font=font, anchor="lm")
        for p, (row, start) in enumerate(record.places):
            picture = Image.fromarray(record.pictures[p])
            picture = picture.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
            if number:
                layer = shown[number - 1]
                first = record.row_experts[layer, row, start : start + rows * columns, 0]
                colors = np.asarray([_rgb(record, layer, e) for e in first], np.uint8)
                over = Image.fromarray(colors.reshape(rows, columns, 3))
                over = over.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
                picture = Image.blend(picture, over, _OVER)
            canvas.paste(picture, (left + p * step, y))
    below = _GAP + step * len(names)
    for x, line, width, text, color in chips:
        y = below + line * _LINE
        draw.rectangle((x, y, x + width, y + _LINE - 3), fill=color)
        draw.text((x + 4, y), text, fill=ink(color), font=font)
    return np.asarray(canvas)


def _rgb(record: RoutingRecord, layer: int, expert: int) -> tuple[int, ...]:
    return ImageColor.getrgb(expert_color(record.color_index(layer, expert)))


def _chips(record: RoutingRecord, font, wide: int) -> list[tuple[int, int, int, str, str]]:
    """(x, line, width, text, color) of the legend: the experts of all layers, and none."""
    names = [*map(str, range(int(record.num_ffn.max()))), *map(str, record.weightless)]
    entries = [(f"expert {name}", expert_color(i)) for i, name in enumerate(names)]
    placed, x, line = [], 4, 0
    for text, color in [*entries, ("none", expert_color(NONE))]:
        width = 8 + round(font.getlength(text))
        if x + width > wide - 4:
            x, line = 4, line + 1
        placed.append((x, line, width, text, color))
        x += width + 4
    return placed


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
