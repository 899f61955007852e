"""``local:NAME`` and ``arrayrecord:DIR``: prepared sets (moejax/data/record_io.py).

``local:emoji3m`` is the set that ``moejax prepare emoji3m`` makes in ``data.data_dir``;
``arrayrecord:DIR`` opens any folder of that format. Options: ``data.languages``, ``data.styles``,
``data.caption`` and ``data.image_size``.
"""

import hashlib
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from moejax.config.schema import DataConfig
from moejax.data.emoji import MAX_KEYWORDS, compose_caption
from moejax.data.images import decode_image
from moejax.data.record_io import DESCRIPTION, Row, RowFile, read_description
from moejax.data.records import Record
from moejax.errors import UserError, did_you_mean

# Sets that `moejax prepare NAME` makes -> how. Raise when it makes other records than before.
RECIPES = {"emoji3m": 1}
# A split above this stays on the disk, and its pictures are decoded each time.
MAX_BYTES_IN_MEMORY = 1 << 30


class PreparedSource:
    """The records of one split: each picture of each row once per language.

    Ids are like ``1F600/noto/en``; records of one row lie side by side, and of these those of one
    picture. ``label`` is an index into ``categories``. A record has ``audio_codes`` if there is an
    utterance in its language; ``num_audio_codes``, where the set has any, is above all of them.
    """

    def __init__(self, name: str, folder: Path, split: str, data: DataConfig):
        description = _describe(name, folder, data)
        self.name = name
        self.split = split
        self.image_size = data.image_size
        self.categories = tuple(description["categories"])
        if description.get("num_audio_codes"):
            self.num_audio_codes = int(description["num_audio_codes"])
        languages = _choose(data.languages, description["languages"], "data.languages", name)
        styles = _choose(data.styles, description["styles"], "data.styles", name)
        self._caption = data.caption
        stored = description["splits"].get(split)
        if stored is None:
            has = ", ".join(description["splits"])
            raise UserError(f"{name} has no split {split!r}; it has: {has}")
        self._keep = stored["bytes"] <= MAX_BYTES_IN_MEMORY
        self._file = RowFile(folder / stored["file"])
        rows = self._read_rows(folder / stored["file"])
        self._headers = [row.header for row in rows]
        # What a row is read for again where the file is too large to keep.
        self._parts = [row.parts for row in rows] if self._keep else None
        self._pictures: dict[tuple[int, str], np.ndarray] = {}
        self._items = [
            (index, style, language)
            for index, row in enumerate(rows)
            for style in styles
            if f"image/{style}" in row.parts
            for language in languages
            if language in row.header["names"]
        ]
        if self._keep:
            self._file.close()
        options = [split, data.image_size, languages, styles, data.caption, MAX_KEYWORDS]
        digest = hashlib.sha256(f"{description['version']} {options}".encode())
        self.version = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Record:
        row, style, language = self._items[index]
        header = self._headers[row]
        parts = self._parts[row] if self._parts is not None else self._file[row].parts
        record = Record(
            id=f"{header['id']}/{style}/{language}",
            image=self._picture(row, style, parts),
            text=self.text_at(index),
            family=header.get("family", header["id"]),
            concept=header["id"],
            style=style,
            mirror=header.get("mirror", False),
        )
        if "label" in header:
            record["label"] = header["label"]
        if f"speech/{language}" in parts:
            units = np.frombuffer(parts[f"speech/{language}"], np.uint8)
            record["audio_codes"] = units.astype(np.int32)
        return record

    def text_at(self, index: int) -> str:
        row, _, language = self._items[index]
        header = self._headers[row]
        keywords = header.get("keywords", {}).get(language, [])
        return compose_caption(header["names"][language], keywords, self._caption)

    def _read_rows(self, path: Path) -> list[Row]:
        try:
            if self._keep:
                return self._file.read_all()
            # The names of the parts are kept, not their bytes.
            rows = (self._file[index] for index in range(len(self._file)))
            return [Row(row.header, dict.fromkeys(row.parts, b"")) for row in rows]
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            raise UserError(f"{path} is damaged ({error}); prepare the set again") from error

    def _picture(self, row: int, style: str, parts: dict) -> UInt8[np.ndarray, "size size 3"]:
        key = row, style
        picture = self._pictures.get(key)
        if picture is None:
            picture = decode_image(parts[f"image/{style}"], self.image_size)
            if self._keep:
                self._pictures[key] = picture
        return picture


def open_local_set(rest: str, split: str, data: DataConfig) -> PreparedSource:
    """The prepared set ``data.data_dir/rest``. UserError with the command if it is not there."""
    if "/" in rest or rest in (".", ".."):
        raise UserError(
            f"data.source: local:{rest} is not the name of a set in data.data_dir; "
            f"a folder is opened by arrayrecord:{rest}"
        )
    return PreparedSource(f"local:{rest}", Path(data.data_dir).expanduser() / rest, split, data)


def prepare_command(name: str, data_dir: str) -> str:
    """The command that makes a set where ``local:NAME`` looks for it."""
    where = "" if data_dir == DataConfig().data_dir else f" --data-dir {shlex.quote(data_dir)}"
    return f"moejax prepare {name}{where}"


def _describe(name: str, folder: Path, data: DataConfig) -> dict[str, Any]:
    """dataset.json, of this recipe."""
    _, _, rest = name.partition(":")
    try:
        description = read_description(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        if name.startswith("local:") and rest in RECIPES:
            raise UserError(
                f"data.source: {name} is not in {data.data_dir}; make it with: "
                f"{prepare_command(rest, data.data_dir)}"
            ) from error
        hint = did_you_mean(rest, RECIPES) if name.startswith("local:") else ""
        raise UserError(
            f"data.source: {name}: no {DESCRIPTION} in {folder}, so there is no prepared set{hint}"
        ) from error
    known = RECIPES.get(description["name"])
    if known is not None and description.get("recipe") != known:
        raise UserError(
            f"data.source: {name} in {folder} was made by recipe {description.get('recipe')!r}, "
            f"but this moejax makes and reads recipe {known}; make it again with: "
            f"{prepare_command(description['name'], data.data_dir)}"
        )
    return description


def _choose(asked: tuple[str, ...], has: list[str], field: str, name: str) -> tuple[str, ...]:
    """``asked``, or all that the set has; UserError for what it has not."""
    for choice in asked:
        if choice not in has:
            raise UserError(f"{field}: {name} has no {choice!r}; choose from: {', '.join(has)}")
    if len(set(asked)) != len(asked):
        raise UserError(f"{field}: {asked!r} must name each once")
    return tuple(asked or has)
