"""``tuxpaint:default`` or ``tuxpaint:DIR``: 950 stamps of Tux Paint, photographs and drawings.

A domain to test on that no other source looks like. GPL-2: it is read where it is installed
(``default`` is the folder of Debian's package tuxpaint-stamps-default) and never copied. A stamp is
``NAME.txt``, whose first line is its English description, with a picture ``NAME.png`` or, where
there is none, a drawing ``NAME.svg``; the folder at the top is its category.

Stamps of one thing are one family: of one description, or of one name up to a number or
"cartoon". Letters, coins, chessmen and the like are a family for each series, and in train. Of the
other families of each category a tenth is val and a tenth test, by a hash of their names.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import UInt8

from moejax.data.images import decode_image, decode_images
from moejax.data.records import Record
from moejax.errors import UserError

PACKAGE_FOLDER = Path("/usr/share/tuxpaint/stamps")
INSTALL = "apt-get install tuxpaint-stamps-default"
SERIES = (
    "space/moon",
    "symbols/alphabets",
    "symbols/chess",
    "symbols/math",
    "symbols/money",
    "symbols/music",
    "town/flags",
)
SALT = "moejax tuxpaint split 1:"
# What tells two pictures of one thing apart in their names.
_VARIANT = re.compile(r"([-_]?\d+|[-_](mirror|flip|small|new|old|photo|outline))+$")


class TuxpaintSource:
    """One split; ids like ``animals/birds/penguin``. The label is an index into ``categories``."""

    def __init__(self, rest: str, split: str, *, image_size: int):
        self.name = f"tuxpaint:{rest}"
        self.split = split
        self.image_size = image_size
        folder = PACKAGE_FOLDER if rest == "default" else Path(rest).expanduser()
        captions = _captions(folder)
        self.categories = tuple(sorted({_category(stamp) for stamp in captions}))
        families = families_of(captions)
        splits = split_families(families)
        self._rows = [stamp for stamp in captions if splits[families[stamp]] == split]
        self._captions, self._families = captions, families
        self._pictures, digest = _pictures(folder, self._rows, image_size, self.name)
        # The words "nomirror" in NAME.dat, or a mirrored picture drawn apart.
        self._one_way = {stamp for stamp in self._rows if _one_way(folder / stamp)}
        texts = hashlib.sha256(str(sorted(captions.items())).encode()).hexdigest()
        options = [SALT, split, image_size, texts, digest, sorted(self._one_way)]
        self.version = hashlib.sha256(str(options).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        stamp = self._rows[index]
        return Record(
            id=stamp,
            image=self._pictures[stamp],
            text=self._captions[stamp],
            label=self.categories.index(_category(stamp)),
            family=self._families[stamp],
            mirror=stamp not in self._one_way,
        )

    def text_at(self, index: int) -> str:
        return self._captions[self._rows[index]]


def families_of(captions: dict[str, str]) -> dict[str, str]:
    """The family of each stamp, which is called by its first stamp, or by its series."""
    family: dict[str, str] = {}
    first_with: dict[tuple[str, str], str] = {}
    for stamp in sorted(captions):
        series = next((name for name in SERIES if stamp.startswith(f"{name}/")), None)
        if series:
            family[stamp] = series
            continue
        family[stamp] = stamp
        for key in (("text", captions[stamp].casefold()), ("name", _thing(stamp))):
            other = family[first_with.setdefault(key, stamp)]
            mine = family[stamp]
            # Both of one family: what was two so far becomes one.
            joined = min(mine, other)
            family.update({s: joined for s, name in family.items() if name in (mine, other)})
    return family


def split_families(families: dict[str, str]) -> dict[str, str]:
    """The split of each family."""
    splits = {name: "train" for name in SERIES}
    for category in sorted({_category(stamp) for stamp in families}):
        names = {name for name in families.values() if _category(name) == category}
        ranked = sorted(names - set(SERIES), key=_hash)
        part = max(1, round(len(ranked) / 10)) if len(ranked) > 2 else 0
        for rank, name in enumerate(ranked):
            splits[name] = "val" if rank < part else "test" if rank < 2 * part else "train"
    return splits


def _hash(family: str) -> bytes:
    return hashlib.sha256((SALT + family).encode()).digest()


def _category(stamp: str) -> str:
    return stamp.partition("/")[0]


def _thing(stamp: str) -> str:
    """Folder and name of a stamp without what tells its variants apart."""
    path = PurePosixPath(stamp.lower())
    folders = [part for part in path.parent.parts if part != "cartoon"]
    return "/".join([*folders, _VARIANT.sub("", path.name) or path.name])


def _captions(folder: Path) -> dict[str, str]:
    """English description of each stamp with a picture, in the order of their names.

    Raises UserError if there are none.
    """
    mend = f"install it: {INSTALL}"
    if folder != PACKAGE_FOLDER:
        mend = f"give the folder of the stamps, or install them ({INSTALL}) and write default"
    if not folder.is_dir():
        raise UserError(f"data.source: the folder {folder} does not exist; {mend}")
    captions = {}
    for file in sorted(folder.glob("*/**/*.txt")):
        stamp = file.relative_to(folder).with_suffix("").as_posix()
        if not _picture_file(folder, stamp):
            continue
        try:
            text = file.read_text(encoding="utf-8").partition("\n")[0].strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: byte {error.start + 1} is not UTF-8; replace it") from error
        if not text:
            raise UserError(f"{file}: its first line, the description, is empty; fill it in")
        captions[stamp] = text
    if not captions:
        raise UserError(f"data.source: {folder} has no stamps (NAME.txt with NAME.png); {mend}")
    return captions


def _picture_file(folder: Path, stamp: str) -> str | None:
    """The path of its picture in the folder; a photograph comes before a drawing."""
    names = (f"{stamp}.png", f"{stamp}.svg")
    return next((name for name in names if (folder / name).is_file()), None)


def _one_way(path: Path) -> bool:
    facts = path.parent / f"{path.name}.dat"
    drawn = any((path.parent / f"{path.name}_mirror{end}").exists() for end in (".png", ".svg"))
    return drawn or (facts.is_file() and b"nomirror" in facts.read_bytes().lower())


def _pictures(
    folder: Path, stamps: Iterable[str], size: int, name: str
) -> tuple[dict[str, UInt8[np.ndarray, "size size 3"]], str]:
    """The picture of each stamp, on white, and a hash of their files."""
    files = {stamp: _picture_file(folder, stamp) or "" for stamp in stamps}
    photographs = [file for file in files.values() if file.endswith(".png")]
    where = dict.fromkeys(photographs, f"data.source={name}")
    images, digest = decode_images(folder, photographs, size, where, keep=photographs)
    hashed = hashlib.sha256(digest.encode())
    for file in files.values():
        if file.endswith(".svg"):
            content = (folder / file).read_bytes()
            hashed.update(content)
            images[file] = _drawing(content, folder / file, size)
    return {stamp: images[file] for stamp, file in files.items()}, hashed.hexdigest()


def _drawing(content: bytes, path: Path, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """An SVG file on white, drawn at twice the size that is wanted."""
    from moejax.data.prepare.drawings import require_rasteriser

    require_rasteriser()
    import resvg_py

    try:
        # Without fonts: those of a machine would make pictures differ between machines.
        png = resvg_py.svg_to_bytes(
            svg_string=content.decode("utf-8"), width=2 * size, dpi=96, skip_system_fonts=True
        )
        return decode_image(bytes(png), size)
    except Exception as error:  # The drawing library raises many kinds for a damaged file.
        raise UserError(f"{path} cannot be drawn ({error}); replace it") from error
