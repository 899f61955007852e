"""Prepared sets: a folder of ArrayRecord files, one for each split, and ``dataset.json``.

A row is one concept: what is the same for all its pictures and texts in a JSON header, and beside
it named byte strings. One stored row yields a record for each of its pictures and languages
(moejax/data/local.py), so no picture and no utterance is stored twice::

    u32 little endian   length of the header
    header              UTF-8 JSON {"id", "family", "label", "mirror", "names": {language: text},
                        "keywords": {language: [text, ...]}, "parts": [[name, bytes], ...]}
    parts               the byte strings in that order: "image/STYLE" is a PNG, "speech/LANGUAGE"
                        the units of an utterance, one byte each

``dataset.json`` says what the files hold (:func:`write_set`).
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moejax.errors import UserError

FORMAT = 1
DESCRIPTION = "dataset.json"
# Keys of dataset.json that a reader relies on.
REQUIRED = ("format", "name", "version", "languages", "styles", "categories", "splits")


class Row(NamedTuple):
    """One concept: JSON values and named byte strings."""

    header: dict[str, Any]
    parts: dict[str, bytes]


def encode_row(row: Row) -> bytes:
    """The bytes of a row. ``header`` must not hold the key ``parts``."""
    table = [[name, len(part)] for name, part in row.parts.items()]
    header = json.dumps({**row.header, "parts": table}, ensure_ascii=False, separators=(",", ":"))
    encoded = header.encode()
    return b"".join([len(encoded).to_bytes(4, "little"), encoded, *row.parts.values()])


def decode_row(content: bytes) -> Row:
    """The row that :func:`encode_row` made ``content`` from."""
    start = 4 + int.from_bytes(content[:4], "little")
    header = json.loads(content[4:start])
    parts = {}
    for name, length in header.pop("parts"):
        parts[name] = content[start : start + length]
        start += length
    if start != len(content):
        raise ValueError(f"a row of {len(content)} bytes, of which its header names {start}")
    return Row(header, parts)


class RowFile:
    """The rows of one split by index, in any order. Close it, or use it in a ``with``."""

    def __init__(self, path: str | os.PathLike):
        import array_record.python.array_record_module as array_record

        self._reader = array_record.ArrayRecordReader(str(path))
        self._length = self._reader.num_records()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self._length:
            raise IndexError(index)
        return decode_row(self._reader.read([index])[0])

    def read_all(self) -> list[Row]:
        """All rows, in one pass."""
        return [decode_row(content) for content in self._reader.read_all()]

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes an ArrayRecord file."""
    import array_record.python.array_record_module as array_record

    def write(temporary: Path) -> None:
        # Groups of one row: a reader that wants one row decodes one.
        writer = array_record.ArrayRecordWriter(str(temporary), "group_size:1")
        for row in rows:
            writer.write(encode_row(row))
        writer.close()

    replace_file(path, write)


def write_set(
    folder: Path,
    splits: Mapping[str, Sequence[Row]],
    description: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
) -> dict[str, Any]:
    """Writes a prepared set over what ``folder`` holds; ``dataset.json`` comes last.

    Args:
      folder: made if it does not exist.
      splits: the rows of each split.
      description: the rest of dataset.json, with ``version``, which must change whenever a record
        does; ``description["splits"][split]``, where it is there, is what else to say of a split.
      files: others to put beside them.

    Returns:
      dataset.json: ``description`` with ``format`` and, for each split, ``file``, ``bytes`` and
      ``rows``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Without it the folder is no set: a run that is cut off here leaves none that is half new.
    (folder / DESCRIPTION).unlink(missing_ok=True)
    for name, content in (files or {}).items():
        replace_file(
            folder / name, lambda temporary, content=content: temporary.write_bytes(content)
        )
    about = {}
    for split, rows in splits.items():
        path = folder / f"{split}.array_record"
        write_rows(path, rows)
        stored = {"file": path.name, "bytes": path.stat().st_size, "rows": len(rows)}
        about[split] = stored | dict(description.get("splits", {}).get(split, {}))
    document = {"format": FORMAT, **description, "splits": about}
    write_json(folder / DESCRIPTION, document)
    return document


def read_description(folder: Path) -> dict[str, Any]:
    """``dataset.json`` of a prepared set, its format and the sizes of the files checked.

    Raises:
      FileNotFoundError: there is none.
      UserError: it is not that of a set that this version can read, or a file is not whole.
    """
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); prepare the set again") from error
    if not isinstance(description, dict) or "format" not in description:
        raise UserError(f"{path}: it does not describe a prepared set (no key 'format')")
    if description["format"] != FORMAT:
        raise UserError(
            f"{path}: format {description['format']!r}, but this moejax reads {FORMAT}; "
            "prepare the set again"
        )
    for key in REQUIRED:
        if key not in description:
            raise UserError(f"{path}: the key {key!r} is missing; prepare the set again")
    for split, stored in description["splits"].items():
        file = folder / stored["file"]
        size = file.stat().st_size if file.is_file() else None
        if size != stored["bytes"]:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise UserError(
                f"{file} {found}, where {split} has {stored['bytes']:,}; prepare the set again"
            )
    return description


def write_json(path: Path, document: Any) -> None:
    """Writes JSON for people to read, under a temporary name that is then replaced."""
    text = json.dumps(document, ensure_ascii=False, indent=1) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Tries to lock ``folder`` and yields whether it could; False where another process has it.

    The lock goes with the process, also when that is killed; the file ``lock`` in it stays.
    """
    import fcntl  # Not there on Windows, where what else this module holds is used too.

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls ``write`` with a temporary path and gives what it wrote the name ``path``.

    Whoever reads ``path`` finds the old content, or the new, or none; never a part.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    write(temporary)
    # On the disk before the name is: a machine that loses power keeps one or the other.
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
