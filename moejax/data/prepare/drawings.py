"""Drawings of emoji in several art styles, from their packages to 32x32 RGB on white."""

import io
import json
import re
import tarfile
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import UInt8

from moejax.data.prepare.packages import read_member
from moejax.errors import UserError

SIZE = 32
# emoji-datasource-google 16.0.0 draws the flag of Saudi Arabia for Sark.
WRONG_PICTURES = {("google", "1F1E8-1F1F6")}
# Standard deviation of all values of a picture (of 255) below which there is nothing to see.
BLANK = 4.0

Picture: TypeAlias = UInt8[np.ndarray, "32 32 3"]


def read_emoji_table(package: Path) -> tuple[list[dict], str]:
    """The emoji of an emoji-datasource package in CLDR order, and the package's licence."""
    with tarfile.open(package) as archive:
        table = json.loads(read_member(archive, "package/emoji.json"))
        licence = read_member(archive, "package/LICENSE").decode()
    return sorted(table, key=lambda row: row["sort_order"]), licence


def read_png_drawings(package: Path, vendor: str, emoji: Sequence[Mapping]) -> dict[str, Picture]:
    """Code points -> picture, of those ``emoji`` that the package draws rightly."""
    folder = f"package/img/{vendor}/64/"
    with tarfile.open(package) as archive:
        files = {
            member.name.removeprefix(folder): read_member(archive, member.name)
            for member in archive
            if member.isfile() and member.name.startswith(folder)
        }
    return {
        row["unified"]: lay_on_white(files[row["image"]])
        for row in emoji
        if row["image"] in files and (vendor, row["unified"]) not in WRONG_PICTURES
    }


def read_svg_drawings(package: Path, names: Mapping[str, str]) -> dict[str, Picture]:
    """Code points -> picture, of those of ``names`` that an Iconify package draws.

    Args:
      package: the tarball; its chars.json says which code points an icon draws.
      names: code points -> English CLDR name, by which an icon is looked for that chars.json lacks.
    """
    with tarfile.open(package) as archive:
        icons = json.loads(read_member(archive, "package/icons.json"))
        characters = json.loads(read_member(archive, "package/chars.json"))
    by_points = {plain_points(points): icon for points, icon in characters.items()}
    pictures = {}
    for unified, name in names.items():
        for icon in (by_points.get(plain_points(unified)), slug(name)):
            svg = icon and svg_of(icons, icon)
            if svg:
                pictures[unified] = lay_on_white(rasterise(svg))
                break
    return pictures


def plain_points(unified: str) -> str:
    """``0023-fe0f-20e3`` -> ``23-20E3``: without the emoji style selector."""
    points = (int(point, 16) for point in unified.split("-"))
    return "-".join(f"{point:X}" for point in points if point != 0xFE0F)


def slug(name: str) -> str:
    """``flag: Åland Islands`` -> ``flag-aland-islands``, as icons are called."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub("[^a-z0-9]+", "-", plain.replace("&", "and")).strip("-")


def svg_of(icons: Mapping, name: str) -> str | None:
    """The square SVG document of an icon of an Iconify set, or of another's alias; or None."""
    alias = icons.get("aliases", {}).get(name)
    flips = False, False
    while alias is not None:
        if alias.get("rotate"):
            raise ValueError(f"icon {name!r} is another one turned, which is not supported")
        flips = flips[0] ^ alias.get("hFlip", False), flips[1] ^ alias.get("vFlip", False)
        name = alias["parent"]
        alias = icons["aliases"].get(name)
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    body = icon["body"]
    if any(flips):
        x, y = (-1 if flip else 1 for flip in flips)
        dx, dy = flips[0] * (2 * left + width), flips[1] * (2 * top + height)
        body = f'<g transform="translate({dx} {dy}) scale({x} {y})">{body}</g>'
    side = max(width, height)
    left, top = left - (side - width) / 2, top - (side - height) / 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left:g} {top:g} {side} {side}" width="{side}" height="{side}">{body}</svg>'
    )


def rasterise(svg: str) -> bytes:
    """A PNG of twice ``SIZE``, with transparency."""
    return bytes(_resvg().svg_to_bytes(svg_string=svg, width=2 * SIZE, height=2 * SIZE))


def lay_on_white(png: bytes) -> Picture:
    """An RGBA drawing of twice ``SIZE``, on white, reduced by the exact mean of 2x2 pixels."""
    from PIL import Image

    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    if drawing.size != (2 * SIZE, 2 * SIZE):
        raise ValueError(f"a drawing has the size {drawing.size}, not {(2 * SIZE, 2 * SIZE)}")
    canvas = Image.new("RGBA", drawing.size, "white")
    canvas.alpha_composite(drawing)
    # No ringing on white, and the same in every Pillow.
    return np.asarray(canvas.convert("RGB").reduce(2))


def is_blank(picture: Picture) -> bool:
    """Whether there is nothing to see in the picture."""
    return float(picture.std()) < BLANK


def require_rasteriser() -> None:
    """UserError with the command that installs it, if SVG cannot be rasterised."""
    _resvg()


def _resvg():
    try:
        import resvg_py
    except ImportError as error:
        raise UserError(
            "resvg-py is not installed, which draws the SVG pictures: pip install 'moejax[prepare]'"
        ) from error
    return resvg_py
