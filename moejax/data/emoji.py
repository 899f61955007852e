"""``builtin:emoji32``: 1,910 Noto emoji of 32x32 pixels with CLDR names in 12 languages.

Made by tools/build_emoji32.py, which says how the splits keep apart what is alike; origin and
licences are in builtin/NOTICE. One record is one emoji with its text in one language.
"""

import functools
import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from moejax.data.records import Record
from moejax.errors import UserError, did_you_mean

FOLDER = Path(__file__).parent / "builtin"
CAPTIONS = ("name", "keywords")
MAX_KEYWORDS = 5
# Pictures that mean another thing, or show letters, when mirrored: these categories, and English
# names with one of these words.
ONE_WAY_CATEGORIES = ("Flags", "Symbols")
ONE_WAY_WORDS = re.compile(
    r"\b(left|right|clockwise|o.clock|thirty|moon|globe|map|chart|sign|points|zzz|calendar|"
    r"newspaper|medal|bank|store|station|office|ATM|violin|guitar|banjo)\b",
    re.IGNORECASE,
)


@functools.cache
def load_emoji32() -> tuple[dict, UInt8[np.ndarray, "emoji 32 32 3"], str]:
    """The table of emoji32.json, the picture of each of its rows, and a hash of both files."""
    from PIL import Image

    table_bytes = (FOLDER / "emoji32.json").read_bytes()
    table = json.loads(table_bytes)
    sheet_bytes = (FOLDER / table["sheet"]).read_bytes()
    sheet = np.asarray(Image.open(io.BytesIO(sheet_bytes)).convert("RGB"))
    size, columns = table["size"], table["columns"]
    cells = sheet.reshape(-1, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    pictures = np.ascontiguousarray(cells[: len(table["rows"])])
    pictures.setflags(write=False)
    digest = hashlib.sha256(hashlib.sha256(table_bytes).digest() + sheet_bytes).hexdigest()
    return table, pictures, digest


def compose_caption(name: str, keywords: list[str], caption: str) -> str:
    """``name``, or ``name: keyword, ...`` with at most five keywords that are not the name."""
    if caption == "name":
        return name
    others = [word for word in keywords if word.casefold() != name.casefold()]
    return f"{name}: {', '.join(others[:MAX_KEYWORDS])}" if others else name


def may_mirror(english_name: str, category: str) -> bool:
    """Whether the mirrored picture of an emoji still shows what its name says."""
    return category not in ONE_WAY_CATEGORIES and not ONE_WAY_WORDS.search(english_name)


class EmojiSource:
    """The emoji of one split, each once per language; ids like ``1F600/en``.

    A record's label is its category, an index into ``categories``.
    """

    name = "builtin:emoji32"

    def __init__(self, split: str, *, image_size: int, languages: tuple[str, ...], caption: str):
        table, self._pictures, digest = load_emoji32()
        for language in languages:
            if language not in table["languages"]:
                raise UserError(
                    f"data.languages: builtin:emoji32 has no {language!r}; "
                    f"choose from: {', '.join(table['languages'])}"
                )
        if not languages or len(set(languages)) != len(languages):
            raise UserError(f"data.languages: {languages!r} must name each language once")
        if caption not in CAPTIONS:
            raise UserError(f"data.caption: no {caption!r}{did_you_mean(caption, CAPTIONS)}")
        self.split = split
        self.categories = tuple(table["categories"])
        self.image_size = image_size
        options = [split, image_size, languages, caption, MAX_KEYWORDS]
        self.version = hashlib.sha256(f"{digest} {options}".encode()).hexdigest()[:16]
        # (row of the table, id, text): an emoji's languages lie side by side.
        self._items = [
            (
                index,
                f"{row['id']}/{language}",
                compose_caption(row["names"][language], row["keywords"][language], caption),
            )
            for index, row in enumerate(table["rows"])
            if row["split"] == split
            for language in languages
        ]
        self._rows = table["rows"]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Record:
        row_index, record_id, text = self._items[index]
        row = self._rows[row_index]
        return Record(
            id=record_id,
            image=self._picture(row_index),
            text=text,
            label=self.categories.index(row["category"]),
            family=row["family"],
            concept=row["id"],
            mirror=may_mirror(row["names"]["en"], row["category"]),
        )

    def text_at(self, index: int) -> str:
        return self._items[index][2]

    def _picture(self, row_index: int) -> UInt8[np.ndarray, "size size 3"]:
        picture = self._pictures[row_index]
        if self.image_size == picture.shape[0]:
            return picture
        from PIL import Image

        size = (self.image_size, self.image_size)
        return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
