"""Pictures of samples: nearest training pictures, and PNG grids with captions."""

import dataclasses
import functools
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

_TILE = 96  # pixels; a picture is enlarged by a whole factor, or shrunk
_GAP = 10
_TITLE_WIDTH = 190
_FONT_SIZE = 13
_LINE = 16
_LABEL_LINES = 3  # at most
_BACKGROUND, _INK, _FAINT, _RULE = "white", "#202020", "#707070", "#d8d8d8"


def nearest_images(
    images: UInt8[np.ndarray, "n h w 3"], train: UInt8[np.ndarray, "m h w 3"]
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The nearest picture of ``train`` to each of ``images``, and its distance.

    The distance is Euclidean per number: the root of the mean squared difference of all pixels
    and channels, 0 to 255. Exact: an equal picture has distance 0.
    """
    flat = images.reshape(len(images), -1).astype(np.float64)
    best = np.full(len(images), np.inf)
    index = np.zeros(len(images), np.int64)
    for start in range(0, len(train), 1024):
        chunk = train[start : start + 1024].reshape(-1, flat.shape[1]).astype(np.float64)
        # Whole numbers below 2^53, so nothing is lost in the differences.
        squares = (flat**2).sum(1)[:, None] - 2 * flat @ chunk.T + (chunk**2).sum(1)[None]
        here = squares.argmin(axis=1)
        distance = squares[np.arange(len(images)), here]
        closer = distance < best
        best[closer], index[closer] = distance[closer], start + here[closer]
    return index, np.sqrt(best / flat.shape[1])


@dataclasses.dataclass(frozen=True)
class Tile:
    """A picture [h, w, 3] uint8 and the words under it."""

    image: np.ndarray
    label: str = ""


@dataclasses.dataclass(frozen=True)
class GridRow:
    """A title on the left (``note`` fainter below it), and tiles."""

    title: str
    note: str
    tiles: Sequence[Tile]


def draw_grid(
    rows: Sequence[GridRow], header: str, *, columns: int, panels: int = 1
) -> Image.Image:
    """A picture of all rows under ``header``.

    Args:
      rows: a row of more than ``columns`` tiles goes on in the next line.
      header: shown above, at most three lines.
      columns: tiles in a line.
      panels: the rows are shared out over so many columns of rows.
    """
    height = -(-len(rows) // panels)
    shares = [rows[start : start + height] for start in range(0, len(rows), height)]
    drawn = [_draw_panel(share, columns) for share in shares]
    width = sum(panel.width for panel in drawn)
    header_lines = wrap(header, width - 2 * _GAP, lines=3)
    top = 2 * _GAP + len(header_lines) * _LINE
    canvas = Image.new("RGB", (width, top + max(panel.height for panel in drawn)), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    _write(draw, (_GAP, _GAP), header_lines, _INK)
    draw.line((_GAP, top - _GAP // 2, width - _GAP, top - _GAP // 2), fill=_RULE)
    left = 0
    for panel in drawn:
        canvas.paste(panel, (left, top))
        left += panel.width
    return canvas


def _draw_panel(rows: Sequence[GridRow], columns: int) -> Image.Image:
    titled = any(row.title or row.note for row in rows)
    left = _GAP + (_TITLE_WIDTH + _GAP if titled else 0)
    step = _TILE + _GAP
    labels = [wrap(tile.label, _TILE, _LABEL_LINES) for row in rows for tile in row.tiles]
    line_height = _TILE + max(map(len, labels), default=0) * _LINE + _GAP
    lines = [max(1, -(-len(row.tiles) // columns)) for row in rows]
    widest = max(min(len(row.tiles), columns) for row in rows)
    size = (left + widest * step, line_height * sum(lines))
    canvas = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    y = 0
    for row, count in zip(rows, lines, strict=True):
        if titled:
            draw.line((_GAP, y - _GAP // 2, size[0] - _GAP, y - _GAP // 2), fill=_RULE)
            # Title and note share the height of one line of tiles.
            note = wrap(row.note, _TITLE_WIDTH, lines=3)
            title = wrap(row.title, _TITLE_WIDTH, lines=line_height // _LINE - len(note))
            _write(draw, (_GAP, y), title, _INK)
            _write(draw, (_GAP, y + len(title) * _LINE), note, _FAINT)
        for i, tile in enumerate(row.tiles):
            x, down = left + (i % columns) * step, y + (i // columns) * line_height
            canvas.paste(_fit(tile.image), (x, down))
            label = wrap(tile.label, _TILE, _LABEL_LINES)
            _write(draw, (x, down + _TILE), label, _FAINT)
        y += count * line_height
    return canvas


def save_png(picture: Image.Image, path: Path) -> None:
    """Writes ``path`` in one piece: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        picture.save(temporary, format="PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def drawable(text: str, fallback: str = "") -> str:
    """``text`` if the font has all of it, else without its accents, else ``fallback``.

    Pillow's own font knows little beyond ASCII; it is used because every machine has it.
    """
    # U+FFFD stands for bytes that are no character, as a model may write them.
    decomposed = unicodedata.normalize("NFKD", text.replace("\ufffd", "?"))
    plain = "".join(char for char in decomposed if not unicodedata.combining(char))
    for candidate in (text, plain):
        if all(map(_has_glyph, candidate)):
            return candidate
    return fallback


def wrap(text: str, width: int, lines: int) -> list[str]:
    """``text`` in at most ``lines`` lines of ``width`` pixels, cut off with an ellipsis."""
    found: list[str] = []
    for paragraph in text.split("\n") if text else []:
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}" if line else word
            if _font().getlength(joined) <= width:
                line = joined
                continue
            if line:
                found.append(line)
            while _font().getlength(word) > width:
                cut = _prefix(word, width)
                found.append(word[:cut])
                word = word[cut:]
            line = word
        found.append(line)
    if len(found) > lines:
        last = found[lines - 1]
        while last and _font().getlength(f"{last}...") > width:
            last = last[:-1]
        found = [*found[: lines - 1], f"{last.rstrip()}..."]
    return found


def _prefix(word: str, width: int) -> int:
    cut = 1
    while cut < len(word) and _font().getlength(word[: cut + 1]) <= width:
        cut += 1
    return cut


@functools.cache
def _font():
    return ImageFont.load_default(_FONT_SIZE)


@functools.cache
def _has_glyph(char: str) -> bool:
    if char.isspace():
        return True
    # Pillow's annotation of a mask leaves out that it is a buffer.
    masks: list[Any] = [_font().getmask(c) for c in (char, "\uffff")]
    mask, missing = masks
    return (mask.size, bytes(mask)) != (missing.size, bytes(missing))


def _fit(image: np.ndarray) -> Image.Image:
    """A picture of at most ``_TILE`` pixels a side."""
    picture = Image.fromarray(np.asarray(image, np.uint8))
    longest = max(picture.size)
    if longest <= _TILE:
        factor = _TILE // longest
        size = (picture.width * factor, picture.height * factor)
        return picture.resize(size, Image.Resampling.NEAREST)
    picture.thumbnail((_TILE, _TILE), Image.Resampling.LANCZOS)
    return picture


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], lines: Sequence[str], ink: str):
    x, y = place
    for i, line in enumerate(lines):
        draw.text((x, y + i * _LINE), line, fill=ink, font=_font())
