"""What an emoji shows (its concept family), what it is called, and which split it belongs to.

The split is made so that nothing held out can be answered from memory:

1. A *family* is what is one concept: skin tones, genders, hair, directions are folded together,
   series that differ in one parameter (clocks, keycaps, coloured hearts ...) are one family, and
   so are families that share a picture (flags of territories).
2. Families that look almost like another one (also in a mirror), share a name with another one in
   any language, or have more than six members are train.
3. The others are taken, category by category, in the order of the SHA-256 of their key, for val
   until it holds 10 % of the category's emoji, then for test, the rest is train. So a further
   language or style of drawing moves nothing.
"""

import collections
import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np

from moejax.data.prepare.packages import DERIVED_NAMES, NAMES, read_member

LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "ru", "hi", "sw", "tr", "pl", "ja")
SALT = "moejax emoji32 split 1:"
HELD_OUT = 0.1

SKIN_TONES = {0x1F3FB, 0x1F3FC, 0x1F3FD, 0x1F3FE, 0x1F3FF}
# Joiner, emoji style, gender signs, hair, "facing right".
DROPPED = {0x200D, 0xFE0F, 0x2640, 0x2642, 0x27A1, *range(0x1F9B0, 0x1F9B4)}
UNGENDERED = {
    **dict.fromkeys((0x1F468, 0x1F469), 0x1F9D1),  # man, woman: person
    **dict.fromkeys((0x1F466, 0x1F467), 0x1F9D2),  # boy, girl: child
    **dict.fromkeys((0x1F474, 0x1F475), 0x1F9D3),  # old man, old woman: older person
    **dict.fromkeys((0x1F934, 0x1F478), 0x1FAC5),  # prince, princess: person with crown
    **dict.fromkeys((0x1F936,), 0x1F385),  # Mrs. Claus: Santa Claus
    **dict.fromkeys((0x1F57A,), 0x1F483),  # man dancing: woman dancing
}


def _points(first: int, last: int) -> list[str]:
    return [f"{point:X}" for point in range(first, last + 1)]


SERIES_BY_KEY = {
    "clocks": _points(0x1F550, 0x1F567),
    "moons": _points(0x1F311, 0x1F31D),
    "globes": _points(0x1F30D, 0x1F30F),
    "hearts": [
        *("2764", "1F5A4", "1F9E1", "1F90D", "1F90E", "1FA75", "1FA76", "1FA77"),
        *_points(0x1F499, 0x1F49C),
    ],
    "books": _points(0x1F4D5, 0x1F4D9),
    "mailboxes": _points(0x1F4EA, 0x1F4ED),
    "speakers": _points(0x1F507, 0x1F50A),
    "medals": _points(0x1F947, 0x1F949),
    "pointing-hands": _points(0x1F446, 0x1F449),
    "santa": ["1F385", "1F9D1-1F384"],
    "couples": [
        *("1F46A", "1F46B", "1F46C", "1F46D", "1F48F", "1F491", "1F9D1-1F91D-1F9D1"),
        *("1F9D1-1F9D2", "1F9D1-1F9D2-1F9D2", "1F9D1-1F9D1-1F9D2", "1F9D1-1F9D1-1F9D2-1F9D2"),
    ],
}
SERIES_BY_SUBCATEGORY = {
    "keycap": "keycaps",
    "arrow": "arrows",
    "geometric": "shapes",
    "family": "couples",
    "skin-tone": "skin-tones",
}


def read_annotations(packages: Path) -> tuple[dict[str, dict], str]:
    """Names and keywords from the CLDR packages in the folder ``packages``.

    Returns:
      language -> characters without U+FE0F -> {"tts": [name], "default": keywords}; the licence.
    """
    annotations = {language: {} for language in LANGUAGES}
    licence = ""
    for package, folder in ((DERIVED_NAMES, "annotationsDerived"), (NAMES, "annotations")):
        with tarfile.open(packages / package.file) as archive:
            licence = read_member(archive, "package/LICENSE").decode()
            for language in LANGUAGES:
                content = read_member(archive, f"package/{folder}/{language}/annotations.json")
                table = json.loads(content)[folder]["annotations"]
                annotations[language] |= {k.replace("\ufe0f", ""): v for k, v in table.items()}
    return annotations, licence


def annotation_key(unified: str) -> str:
    """Code points as in emoji.json -> the key of :func:`read_annotations`."""
    return "".join(chr(int(point, 16)) for point in unified.split("-")).replace("\ufe0f", "")


def family_key(unified: str, subcategory: str) -> str:
    """The concept family of an emoji, e.g. ``1F9D1-1F33E`` for farmers, ``clocks``."""
    points = [int(point, 16) for point in unified.split("-")]
    # The gender signs are also emoji of their own: then nothing else is left.
    points = [p for p in points if p not in SKIN_TONES and p not in DROPPED] or points
    key = "-".join(f"{UNGENDERED.get(point, point):X}" for point in points)
    if subcategory in SERIES_BY_SUBCATEGORY:
        return SERIES_BY_SUBCATEGORY[subcategory]
    for series, keys in SERIES_BY_KEY.items():
        if key in keys:
            return series
    return key


def merge_identical(families: list[str], pictures: np.ndarray) -> tuple[list[str], int]:
    """Gives families that share a picture the smallest of their keys; how many keys vanished."""
    sharing = collections.defaultdict(set)
    for family, picture in zip(families, pictures, strict=True):
        sharing[picture.tobytes()].add(family)
    merged = {family: family for family in families}
    for group in sharing.values():
        names = {merged[family] for family in group}
        merged |= {family: min(names) for family in merged if merged[family] in names}
    return [merged[family] for family in families], len(merged) - len(set(merged.values()))


def namesakes(rows: list[dict]) -> set[str]:
    """Families that share a case-folded name with another family in some language."""
    owners = collections.defaultdict(set)
    for row in rows:
        for language, name in row["names"].items():
            owners[language, name.casefold()].add(row["family"])
    return set().union(*(group for group in owners.values() if len(group) > 1))


def assign_splits(rows: list[dict], train_only: set[str]) -> dict[str, str]:
    """Family -> split: by salted hash within each category, ``train_only`` always in train."""
    size = collections.Counter(row["family"] for row in rows)
    category = {}
    for row in rows:
        category.setdefault(row["family"], row["category"])
    total = collections.Counter(row["category"] for row in rows)
    held = collections.Counter()
    splits = {}
    for family in sorted(size, key=lambda f: hashlib.sha256((SALT + f).encode()).digest()):
        target = int(total[category[family]] * HELD_OUT + 0.5)
        splits[family] = "train"
        for split in ("val", "test") if family not in train_only else ():
            if held[category[family], split] + size[family] <= target:
                held[category[family], split] += size[family]
                splits[family] = split
                break
    return splits
