"""Pictures of which tokens run the blocks that can be skipped."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from moejax.analysis.charts import spread
from moejax.data.vocabulary import BOI, EOI
from moejax.train.routing_pictures import panels_of

# Side of a picture, space between two, between two frames of a clip, height of a line; blocks that
# have a column or a line.
_SIDE, _GAP, _NARROW, _LINE, _MOST_BLOCKS = 96, 14, 2, 18, 8
_INK, _FAINT, _RAN, _EDGE = "#202020", "#b8b8b8", "#d4e6f4", "#d8d8d8"


def draw_blocks(
    share_lm: np.ndarray, names: Sequence[str], modalities: Sequence[str]
) -> UInt8[np.ndarray, "h w 3"]:
    """The share of each modality's tokens that ran each block, a panel for each modality."""
    panels = [(f"ran, {name}", share_lm[:, m : m + 1]) for m, name in enumerate(modalities)]
    return panels_of(panels, names, "", float(share_lm.max(initial=0)))


def draw_tokens(
    *,
    names: list[str],
    kept: np.ndarray,
    pieces: np.ndarray,
    valid: np.ndarray,
    pictures: np.ndarray,
    places: np.ndarray,
    grid: np.ndarray,
) -> UInt8[np.ndarray, "h w 3"]:
    """A line of pictures for each block, what skipped it faded to white; then words, the same.

    Frames of a clip lie close together.

    Args:
      names: of the blocks, [l].
      kept: [l, b, t] bool, who ran them.
      pieces: [b, t], the text of each token.
      valid: [b, t], False for padding.
      pictures: [p, h, w, 3], those in the rows.
      places: [p, 2], row and first token of each.
      grid: [2], rows and columns of a picture's tokens.
    """
    shown = spread(range(len(names)), _MOST_BLOCKS)
    font = ImageFont.load_default(12)
    labels = 16 + round(max(font.getlength(name) for name in ("as it is", *names)))
    lines = _sentences(pieces, valid)
    lefts = _lefts(places, int(grid.prod()))
    wide = labels + max([5 * (_SIDE + _GAP), *(left + _SIDE + _GAP for left in lefts)])
    tall_pictures = (len(shown) + 1) * (_SIDE + _GAP) if len(pictures) else 0
    tall = _LINE + tall_pictures + len(lines) * (len(shown) + 1) * _LINE + _LINE
    canvas = Image.new("RGB", (wide, tall), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((4, 2), "faded: skipped the block", fill=_INK, font=font)
    y = _LINE
    if len(pictures):
        for name, block in [("as it is", None), *((names[i], i) for i in shown)]:
            draw.text((4, y + _SIDE // 2), name, fill=_INK, font=font, anchor="lm")
            for p, picture in enumerate(pictures):
                ran = None if block is None else _on_grid(kept[block], places[p], grid)
                x = labels + lefts[p]
                # A line around it: pictures are on white, as the page is.
                draw.rectangle((x - 1, y - 1, x + _SIDE, y + _SIDE), outline=_EDGE)
                canvas.paste(_faded(picture, ran), (x, y))
            y += _SIDE + _GAP
    for row, columns in lines:
        for block in shown:
            draw.text((4, y), names[block], fill=_INK, font=font)
            x = labels
            for t in columns:
                piece = pieces[row, t].replace("\n", " ")
                width = round(font.getlength(piece))
                if x + width > wide - 4:
                    break
                if kept[block, row, t]:
                    draw.rectangle((x, y, x + width, y + _LINE - 3), fill=_RAN)
                ink = _INK if kept[block, row, t] else _FAINT
                draw.text((x, y), piece, fill=ink, font=font)
                x += width + 3
            y += _LINE
        y += _LINE
    return np.asarray(canvas)


def _lefts(places: np.ndarray, tokens: int) -> list[int]:
    """Where each picture of so many tokens begins in a line: [p] pixels."""
    lefts: list[int] = []
    for p, (row, start) in enumerate(places):
        # Between two frames of a clip there are only the marks.
        follows = p and (row, start - tokens - len((EOI, BOI))) == tuple(places[p - 1])
        gap = _NARROW if follows else _GAP
        lefts.append(lefts[-1] + _SIDE + gap if lefts else 0)
    return lefts


def _sentences(pieces: np.ndarray, valid: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(row, columns) of the words of each row."""
    found = [(row, np.flatnonzero((pieces[row] != "") & valid[row])) for row in range(len(pieces))]
    return [(row, columns) for row, columns in found if len(columns)]


def _on_grid(kept_bt: np.ndarray, place: np.ndarray, grid: np.ndarray) -> np.ndarray:
    row, start = place
    rows, columns = (int(side) for side in grid)
    return kept_bt[row, start : start + rows * columns].reshape(rows, columns)


def _faded(picture: np.ndarray, ran: np.ndarray | None) -> Image.Image:
    """A picture of ``_SIDE``, its tokens that did not run faded."""
    image = Image.fromarray(picture).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    if ran is None:
        return image
    mask = Image.fromarray((~ran * 205).astype(np.uint8))
    mask = mask.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", image.size, "white"), image, mask)
