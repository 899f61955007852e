"""``folder:DIR``: PNG and JPEG files with ``DIR/captions.jsonl``, one JSON object per line.

    {"image": "photos/cat.jpg", "text": "a cat on a mat"}

Optional keys: ``id``, ``family`` (pictures of one thing, kept in one split; default the path),
``split`` and ``label`` (an integer); others are ignored. Rows without a split are divided 80/10/10
by family, in the order of a hash of its name. Everything is checked when the source is opened.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import posixpath
from collections.abc import Collection
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from moejax.data.images import decode_image, decode_images
from moejax.data.records import SPLITS, Record
from moejax.errors import UserError, did_you_mean

CAPTIONS_FILE = "captions.jsonl"
EXAMPLE = '{"image": "cat.png", "text": "a cat"}'
SALT = "moejax folder split 1:"
MIN_FAMILIES = 3
# Above this the pictures are decoded when they are asked for, not kept.
MAX_BYTES_IN_MEMORY = 1 << 30
# Key -> (type, word for it, must be there).
KEYS = {
    "image": (str, "a string", True),
    "text": (str, "a string", True),
    "id": (str, "a string", False),
    "family": (str, "a string", False),
    "split": (str, "a string", False),
    "label": (int, "an integer", False),
}


@dataclasses.dataclass
class Row:
    """One line of captions.jsonl."""

    line: int
    image: str
    text: str
    id: str
    family: str
    split: str
    label: int | None


class FolderSource:
    """The records of one split of a folder, in the order of captions.jsonl."""

    def __init__(self, rest: str, split: str, *, image_size: int):
        self.name = f"folder:{rest}"
        self.split = split
        self.image_size = image_size
        self._folder = Path(rest).expanduser()
        captions = self._folder / CAPTIONS_FILE
        rows, content = read_rows(self._folder)
        self._rows = [row for row in rows if row.split == split]
        if not self._rows:
            raise UserError(
                f'{captions}: no row has the split "{split}"; give it to some rows, '
                'or take "split" out of the rows to have them divided'
            )
        needed = set(row.image for row in self._rows)
        keep = len(needed) * 3 * image_size**2 <= MAX_BYTES_IN_MEMORY
        self._images, digest = read_pictures(
            self._folder, rows, image_size, keep=needed if keep else set()
        )
        options = [split, image_size, hashlib.sha256(content).hexdigest(), digest]
        self.version = hashlib.sha256(str(options).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        image = self._images.get(row.image)
        if image is None:
            image = decode_image((self._folder / row.image).read_bytes(), self.image_size)
        record = Record(id=row.id, image=image, text=row.text, family=row.family)
        if row.label is not None:
            record["label"] = row.label
        return record

    def text_at(self, index: int) -> str:
        return self._rows[index].text


def read_rows(folder: Path) -> tuple[list[Row], bytes]:
    """The checked rows of a folder, each with its split, and the bytes of its captions.jsonl."""
    captions = folder / CAPTIONS_FILE
    content = _read_captions(folder)
    rows = _parse_rows(content, captions)
    _fill_splits(rows, captions)
    return rows, content


def read_pictures(
    folder: Path, rows: list[Row], image_size: int, keep: Collection[str]
) -> tuple[dict[str, UInt8[np.ndarray, "size size 3"]], str]:
    """Decodes every picture of ``rows``; see moejax.data.images.decode_images."""
    captions = folder / CAPTIONS_FILE
    paths = list(dict.fromkeys(row.image for row in rows))
    # The first line that names a picture is the one to mend.
    where = {row.image: f"{captions} line {row.line}" for row in reversed(rows)}
    return decode_images(folder, paths, image_size, where, keep=keep)


def _read_captions(folder: Path) -> bytes:
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(
            f"data.source: the folder {folder} {what}; give the folder of your pictures"
        )
    captions = folder / CAPTIONS_FILE
    if not captions.is_file():
        inside = "" if any(folder.iterdir()) else " (the folder is empty)"
        raise UserError(f"{captions} does not exist{inside}; write rows such as {EXAMPLE} there")
    try:
        return captions.read_bytes()
    except OSError as error:
        raise UserError(f"{captions} cannot be read: {error.strerror}; mend its rights") from error


def _parse_rows(content: bytes, captions: Path) -> list[Row]:
    """The checked rows; their split is "" where the file gives none."""
    rows, lines_of_ids, times_seen = [], {}, {}
    # A byte order mark, which some editors write, is not a part of the first row.
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{captions} line {number}"
        values = _parse_line(line, where)
        image = _inside_folder(values["image"], where)
        times_seen[image] = times_seen.get(image, 0) + 1
        nth = f"#{times_seen[image]}" if times_seen[image] > 1 else ""
        row = Row(
            line=number,
            image=image,
            text=values["text"],
            id=values.get("id", image + nth),
            family=values.get("family", image),
            split=values.get("split", ""),
            label=values.get("label"),
        )
        if row.id in lines_of_ids:
            raise UserError(
                f'{where}: the id "{row.id}" is that of line {lines_of_ids[row.id]} too; '
                'give each row its own "id", or none'
            )
        lines_of_ids[row.id] = number
        rows.append(row)
    if not rows:
        raise UserError(f"{captions} has no rows; write rows such as {EXAMPLE} there")
    return rows


def _parse_line(line: bytes, where: str) -> dict:
    """The row's known keys, each of its type."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8"
        ) from error
    try:
        row = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(
            f"{where}: not JSON ({error}); write one object such as {EXAMPLE}"
        ) from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object; write one such as {EXAMPLE}")
    for key in row.keys() - KEYS.keys():
        # Columns of the user's own are welcome; a misspelt "split" would be no error but a leak.
        if difflib.get_close_matches(key, KEYS, n=1, cutoff=0.84):
            raise UserError(f'{where}: unknown key "{key}"{did_you_mean(key, KEYS)}')
    for key, (kind, word, required) in KEYS.items():
        value = row.get(key)
        if value is None:
            if required:
                raise UserError(f'{where}: the key "{key}" is missing; write {EXAMPLE}')
            row.pop(key, None)
        elif not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f'{where}: "{key}" is {json.dumps(value)}; it must be {word}')
        elif value == "":
            raise UserError(f'{where}: "{key}" is empty; fill it in or take the row out')
        elif isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise UserError(
                f'{where}: "{key}" has half a surrogate pair; write the whole character'
            )
    if row.get("split", SPLITS[0]) not in SPLITS:
        raise UserError(f'{where}: no split "{row["split"]}"{did_you_mean(row["split"], SPLITS)}')
    return row


def _inside_folder(image: str, where: str) -> str:
    """The normal form of a relative path; symbolic links inside the folder may lead anywhere."""
    path = posixpath.normpath(image)
    if os.path.isabs(image) or path.split("/")[0] == "..":
        raise UserError(
            f'{where}: the image "{image}" is outside the folder; '
            "give a path relative to the folder of captions.jsonl"
        )
    return path


def _fill_splits(rows: list[Row], captions: Path) -> None:
    """Gives each row its split: its family's, or by the family's rank among hashes."""
    given: dict[str, Row] = {}
    for row in rows:
        if not row.split:
            continue
        first = given.setdefault(row.family, row)
        if first.split != row.split:
            raise UserError(
                f'{captions} line {row.line}: the family "{row.family}" is in "{row.split}" here '
                f'but in "{first.split}" on line {first.line}; give all its rows one split'
            )
    families = {row.family for row in rows} - set(given)
    if families and len(families) < MIN_FAMILIES:
        raise UserError(
            f'{captions}: only {len(families)} of the pictures or families have no "split"; '
            f"{MIN_FAMILIES} or more are needed to divide them into train, val and test: "
            'add pictures, or give each row a "split"'
        )
    ranked = sorted(families, key=lambda f: hashlib.sha256((SALT + f).encode()).digest())
    held_out = max(1, int(len(ranked) * 0.1 + 0.5))
    split_of = {family: row.split for family, row in given.items()}
    for rank, family in enumerate(ranked):
        split_of[family] = ("val", "test", "train")[min(rank // held_out, 2)]
    for row in rows:
        row.split = split_of[row.family]
