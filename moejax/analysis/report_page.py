"""The HTML of a report: tables, pictures, and the page around the sections."""

import base64
import dataclasses
import io
import os
from collections.abc import Collection, Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from moejax.analysis.charts import HOVER, LEVEL_COLOR
from moejax.analysis.heatmaps import MAP_HOVER
from moejax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page; ``anchor`` is its id, ``body`` HTML."""

    anchor: str
    title: str
    body: str


@dataclasses.dataclass(frozen=True)
class Link:
    """A cell of a table that leads to ``address``, a URL that is quoted already."""

    text: str
    address: str


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str | Link]],
    numbers: Collection[int] = (),
    *,
    wide: bool = False,
) -> str:
    """A table of text and links.

    Args:
      head: titles of the columns; all "" for none.
      rows: the cells.
      numbers: columns that are set to the right.
      wide: many columns: no cell is broken into lines, and the first stays when the rest scrolls.
    """

    def inner(cell: str | Link) -> str:
        if isinstance(cell, Link):
            return f'<a href="{escape(cell.address)}">{escape(cell.text)}</a>'
        return escape(cell)

    def row(cells: Sequence[str | Link], tag: str) -> str:
        marked = (
            f"<{tag}{' class=number' if i in numbers else ''}>{inner(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(marked)}</tr>"

    top = f"<thead>{row(head, 'th')}</thead>" if any(head) else ""
    body = "".join(row(cells, "td") for cells in rows)
    kind = "scroll wide" if wide else "scroll"
    return f"<div class='{kind}'><table>{top}<tbody>{body}</tbody></table></div>"


def cards(figures: Sequence[tuple[str, str, str]]) -> str:
    """Small boxes of (title, value, remark)."""
    boxes = (
        f"<div><span>{escape(title)}</span><b>{escape(value)}</b><span>{escape(remark)}</span></div>"
        for title, value, remark in figures
    )
    return f"<div class='cards'>{''.join(boxes)}</div>"


def gallery(title: str, pictures: Sequence[tuple[str, str]]) -> str:
    """Pictures side by side: (caption, data URI) of each."""
    figures = (
        f'<figure><figcaption>{escape(caption)}</figcaption><img alt="{escape(caption)}" '
        f'src="{escape(uri)}"></figure>'
        for caption, uri in pictures
    )
    return f"<h3>{escape(title)}</h3><div class='gallery'>{''.join(figures)}</div>"


def grid(charts: Iterable[str]) -> str:
    """Charts beside each other; those that are "" are left out."""
    found = [chart for chart in charts if chart]
    return f"<div class='grid'>{''.join(found)}</div>" if found else ""


def data_uri(png: bytes) -> str:
    """The address of a picture that lies in the page itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def picture_uri(image: np.ndarray) -> str:
    """:func:`data_uri` of [h, w, 3] uint8."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return data_uri(file.getvalue())


def page(
    title: str,
    about: str,
    status: str,
    summary: str,
    sections: Sequence[Section],
    kind: str = "report",
) -> str:
    """The whole document; its first line is what a page of its ``kind`` is told by."""
    links = "".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in sections)
    body = "".join(
        f'<section id="{s.anchor}"><h2>{escape(s.title)}</h2>{s.body}</section>' for s in sections
    )
    return f"""<!doctype html><!-- moejax {kind} -->
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p>{escape(about)}</p><p><b>{escape(status)}</b></p></header>
{summary}
<nav>{links}</nav>
<main>{body}</main>
<div id="tip" hidden></div>
<script>{HOVER}{MAP_HOVER}</script>
</body>
</html>
"""


def write_page(path: Path, text: str, kind: str = "report") -> None:
    """Writes a :func:`page` in one piece, over an older one of its kind and over nothing else.

    Raises:
      UserError: ``path`` is a folder or another file, or cannot be written.
    """
    if path.is_dir():
        raise UserError(f"--out {path}: is a folder; name a file such as {path / f'{kind}.html'}")
    first = text[: text.index("\n")]
    try:
        if path.exists() and not path.read_text("utf-8", errors="replace").startswith(first):
            raise UserError(f"--out {path}: is there already and no {kind}; name another file")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        # Names of files can hold what is no text.
        temporary.write_text(text, "utf-8", errors="replace")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror})") from error


# Nothing is fetched, from wherever the page is opened.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_STYLE = f"""
:root {{ color-scheme: light; }}
body {{ margin: 0 auto; max-width: 1120px; padding: 1.5rem 1.25rem 4rem; background: #fff;
  color: #1c2128; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
h1 {{ margin: 0; font-size: 1.7rem; }}
h2 {{ margin: 2.4rem 0 .8rem; padding-bottom: .3rem; font-size: 1.25rem;
  border-bottom: 1px solid #d5dae1; }}
h3 {{ margin: 1.3rem 0 .6rem; font-size: 1rem; }}
header p {{ margin: .25rem 0 0; color: #4a5361; overflow-wrap: anywhere; }}
header b {{ font-weight: 600; color: #1c2128; }}
section {{ scroll-margin-top: 3rem; }}
nav {{ position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem;
  margin-top: 1.2rem; padding: .55rem 0; background: #fff; border-bottom: 1px solid #d5dae1; }}
nav a {{ color: #0b5cad; text-decoration: none; }}
nav a:hover {{ text-decoration: underline; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .7rem;
  margin-top: 1.2rem; }}
.cards div {{ display: flex; flex-direction: column; padding: .6rem .8rem; border-radius: 8px;
  border: 1px solid #d5dae1; }}
.cards b {{ font-size: 1.35rem; font-variant-numeric: tabular-nums; line-height: 1.3; }}
.cards span {{ color: #4a5361; font-size: .82rem; }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr));
  gap: 1.2rem 1.4rem; }}
figure {{ margin: 0; }}
figcaption {{ font-weight: 600; font-size: .92rem; }}
.chart svg {{ display: block; width: 100%; height: auto; }}
svg text {{ font-size: 11px; fill: #4a5361; }}
svg line, svg polyline {{ fill: none; stroke-width: 1; }}
svg polyline {{ stroke-width: 1.8; stroke-linejoin: round; }}
svg .tick {{ stroke: #e8ebef; }}
svg .axis {{ stroke: #8b95a3; }}
svg .level {{ stroke: {LEVEL_COLOR}; stroke-width: 1.6; stroke-dasharray: 5 4; }}
svg .pointer {{ stroke: #8b95a3; }}
svg .frame {{ fill: none; stroke: #8b95a3; }}
svg .over {{ opacity: .78; }}
svg use {{ filter: grayscale(1); }}
.tokens span {{ display: inline-block; min-width: .7em; padding: 0 .18em; text-align: center;
  white-space: pre; border: 1px solid #fff; border-radius: 3px; }}
.patches td {{ padding: .2rem .5rem .2rem 0; border: 0; vertical-align: middle; }}
.patches svg {{ display: block; }}
code {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .9em; }}
.legend {{ display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; padding-left: 2.5rem;
  font-size: .84rem; color: #333b46; }}
.legend i {{ display: inline-block; width: 1.5rem; margin-right: .4rem; vertical-align: middle; }}
.gallery {{ display: grid; gap: 1.2rem 1.6rem;
  grid-template-columns: repeat(auto-fill, minmax(min(460px, 100%), 1fr)); }}
.gallery img {{ display: block; max-width: 100%; margin-top: .3rem; border: 1px solid #d5dae1; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; }}
th, td {{ padding: .28rem 1.4rem .28rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #e8ebef; overflow-wrap: anywhere; }}
td:first-child {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  font-size: .84rem; }}
td a {{ color: #0b5cad; }}
.wide th, .wide td {{ white-space: nowrap; }}
.wide :is(th, td):first-child {{ position: sticky; left: 0; background: #fff; }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
details {{ margin-top: 1rem; }}
summary {{ cursor: pointer; color: #0b5cad; }}
#tip {{ position: absolute; z-index: 2; padding: .35rem .55rem; pointer-events: none;
  white-space: pre; font-size: .82rem; color: #1c2128; background: #fff; border-radius: 6px;
  border: 1px solid #b6bec9; box-shadow: 0 2px 8px #0002; font-variant-numeric: tabular-nums; }}
@media print {{ nav {{ position: static; }} body {{ max-width: none; }} }}
"""
