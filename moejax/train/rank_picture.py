"""The picture of the ranks of the layers' attention."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

# Bars, the space at their sides and the height of a line.
_BAR, _GAP, _LINE = 420, 10, 20
_INK, _FAINT = "#202020", "#707070"
_PROPOSED, _LEFT = "#d55e00", "#8fb8d8"


def draw_ranks(
    ranks: Mapping[int, float],
    kinds: Sequence[str],
    proposed: Sequence[int],
    rows: int,
    length: int,
    fields: str,
) -> UInt8[np.ndarray, "h w 3"]:
    """A bar for each layer, from 0 to the highest rank that there can be.

    Args:
      ranks: of the layers that were measured.
      kinds: of all blocks.
      proposed: layers to make mixtures of depths of.
      rows: that were looked at.
      length: tokens of a row.
      fields: for the command line, with which the layers are that.
    """
    font = ImageFont.load_default(12)
    names = [f"layer {layer}  {kind}" for layer, kind in enumerate(kinds)]
    labels = 2 * _GAP + round(max(font.getlength(name) for name in names))
    wide = labels + _BAR + 60
    caption = _wrapped(f"proposed: {fields}" if proposed else "nothing is proposed", font, wide)
    top = 2 * _LINE + _GAP
    canvas = Image.new("RGB", (wide, top + _LINE * (len(names) + len(caption)) + 2 * _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    title = f"rank of attention below the diagonal, of {length - 1} at the most"
    draw.text((_GAP, 4), title, fill=_INK, font=font)
    key = f"mean over heads and {rows} rows; orange: proposed as mixtures of depths"
    draw.text((_GAP, 4 + _LINE), key, fill=_FAINT, font=font)
    for layer, name in enumerate(names):
        y = top + layer * _LINE
        middle = y + _LINE // 2
        draw.text((labels - _GAP, middle), name, fill=_INK, font=font, anchor="rm")
        if layer not in ranks:
            draw.text((labels + 6, middle), "not measured", fill=_FAINT, font=font, anchor="lm")
            continue
        end = labels + round(_BAR * ranks[layer] / (length - 1))
        color = _PROPOSED if layer in proposed else _LEFT
        draw.rectangle((labels, y + 3, end, y + _LINE - 4), fill=color)
        draw.text((end + 6, middle), f"{ranks[layer]:.1f}", fill=_INK, font=font, anchor="lm")
    bottom = top + _LINE * len(names)
    draw.line((labels, top, labels, bottom), fill=_FAINT)
    for number, line in enumerate(caption):
        draw.text((_GAP, bottom + _GAP + number * _LINE), line, fill=_INK, font=font)
    return np.asarray(canvas)


def _wrapped(text: str, font, wide: int) -> list[str]:
    """Lines that fit, broken at spaces and after commas."""
    lines = [""]
    for word in text.replace(",", ",\0").replace(" ", " \0").split("\0"):
        if font.getlength(lines[-1] + word) > wide - 2 * _GAP:
            lines.append("")
        lines[-1] += word
    return lines
