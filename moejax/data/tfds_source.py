"""``tfds:NAME[/CONFIG][:VERSION]``: a set of TensorFlow Datasets, read without TensorFlow.

The set lies under ``data.data_dir``, prepared as ArrayRecord; nothing is downloaded or prepared
here. ``data.image_feature``, ``text_feature`` and ``label_feature`` name its features, nested ones
by their path (``captions/text``); ``""`` leaves one out.

- A list of texts gives one record for each, all of one family; a picture without any gives none.
- A set without the feature "text" (the default) takes the names of its label for texts.
- A set without a split ``val`` or ``validation`` gives up a tenth of the families of train for
  it, the first in the order of a hash. A family is one example of the set, unless the set says
  more (sets made by ``moejax prepare folder`` keep the ids and families of the folder).
- Pictures are fitted as those of ``folder:`` are, and decoded when they are asked for.
"""

import hashlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from moejax.config.schema import DataConfig
from moejax.data.images import PROGRESS_AFTER, decode_image, fit_image
from moejax.data.records import Record
from moejax.data.tfds_set import METADATA, choose_fields, find_set, open_set, subset
from moejax.errors import UserError

SALT = "moejax tfds split 1:"
# Ours -> what TFDS sets call it.
SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation"), "test": ("test",)}


class TfdsSource:
    """The records of one split of a prepared set, in the set's order; ids like ``train/17``.

    ``categories`` are the names of the labels, ``()`` where there are none.
    """

    def __init__(self, rest: str, split: str, data: DataConfig):
        import tensorflow_datasets as tfds

        self.name = f"tfds:{rest}"
        self.split = split
        self.image_size = data.image_size
        self.folder = find_set(rest, data.data_dir)
        builder = open_set(self.folder)
        features = builder.info.features
        self._fields = choose_fields(features, data, self.name)
        self.categories = tuple(
            self._fields["label"].class_names or () if "label" in self._fields else ()
        )
        self._part, divided = _match_split(split, list(builder.info.splits), self.name)
        self._raw = builder.as_data_source(
            self._part,
            deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
            file_format="array_record",
        )
        for path in builder.info.splits[self._part].filepaths:
            if not Path(path).is_file():
                raise UserError(f"{path} is missing; copy it there or prepare the set again")
        # Text, id and family are read without the bytes of the picture being decoded.
        self._all = subset(features, self._fields.values())
        words = [self._fields[kind] for kind in ("text", "id", "family") if kind in self._fields]
        self._words = subset(features, words)
        self._rows: Sequence[int] | np.ndarray = range(len(self._raw))
        if divided:
            self._rows = self._divide_train(split)
        # Where texts are lists: (its number among the texts of its picture, text) of each record.
        self._captions: list[tuple[int, str]] | None = None
        if "text" in self._fields and self._fields["text"].lists:
            self._rows, self._captions = self._read_captions()
        self.version = self._make_version(data)
        if len(self):
            self[0]  # A feature that cannot be read shows now, not in the middle of a run.

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = int(self._rows[index])
        values = self._all.deserialize_example_np(self._raw[row])
        nth, text = self._captions[index] if self._captions else (1, None)
        suffix = f"#{nth}" if nth > 1 else ""
        record = Record(id=self._word("id", values, row) + suffix)
        if "image" in self._fields:
            record["image"] = self._fit(self._fields["image"].value(values), record["id"])
        if "text" in self._fields:
            record["text"] = self._word("text", values, row) if text is None else text
        if "label" in self._fields:
            label = int(self._fields["label"].value(values))
            if label >= 0:
                record["label"] = label
        record["family"] = self._word("family", values, row)
        return record

    def text_at(self, index: int) -> str:
        """The record's text; ``""`` where ``data.text_feature`` is."""
        if self._captions:
            return self._captions[index][1]
        row = int(self._rows[index])
        return self._word("text", self._read_words(row), row) if "text" in self._fields else ""

    def _read_words(self, row: int) -> dict:
        return self._words.deserialize_example_np(self._raw[row])

    def _word(self, kind: str, values: dict, row: int) -> str:
        """Text, id or family of an example; the last two are its place in a set without them."""
        field = self._fields.get(kind)
        if field is None:
            return f"{self._part}/{row}"
        value = field.value(values)
        if field.class_names is None:
            return self._decode(kind, value, row)
        if value < 0:  # The usual sign of a test split whose labels are kept secret.
            raise UserError(
                f"{self.name}: {self._part}/{row} has no label to take its text from; "
                "set data.text_feature, or choose a split that has labels"
            )
        return field.class_names[value]

    def _decode(self, kind: str, value: bytes, row: int) -> str:
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            path = "/".join(self._fields[kind].keys)
            raise UserError(
                f"{self.name}: {path!r} of {self._part}/{row} is not UTF-8; prepare the set again, "
                "or choose another data.text_feature"
            ) from error

    def _fit(self, value: bytes | np.ndarray, record_id: str) -> UInt8[np.ndarray, "size size 3"]:
        from PIL import Image

        if isinstance(value, np.ndarray):
            picture = value[..., 0] if value.shape[2:] == (1,) else value
            return fit_image(Image.fromarray(picture), self.image_size)
        try:
            return decode_image(value, self.image_size)
        except Exception as error:  # Pillow's decoders raise many kinds for a damaged file.
            raise UserError(
                f"{self.name}: the picture of {record_id} is not a whole PNG or JPEG file "
                f"({error}); prepare the set again without it"
            ) from error

    def _divide_train(self, split: str) -> np.ndarray:
        """The rows of train that are ("val"), or are not ("train"), in the tenth held out."""
        rows = range(len(self._raw))
        if "family" in self._fields:
            families = [self._word("family", self._read_words(row), row) for row in _bar(rows)]
        else:
            families = [self._word("family", {}, row) for row in rows]
        ranked = sorted(set(families), key=lambda f: hashlib.sha256((SALT + f).encode()).digest())
        if len(ranked) < 2:
            raise UserError(
                f"{self.name}: {len(ranked)} families cannot be divided into train and val; "
                "prepare more pictures, or a split val"
            )
        held_out = set(ranked[: max(1, int(len(ranked) * 0.1 + 0.5))])
        return np.asarray([r for r in rows if (families[r] in held_out) == (split == "val")])

    def _read_captions(self) -> tuple[np.ndarray, list[tuple[int, str]]]:
        """One record for each text: the row of its picture, and (its number, the text)."""
        rows, captions = [], []
        for row in _bar(self._rows):
            texts = self._fields["text"].value(self._read_words(int(row)))
            rows += [row] * len(texts)
            captions += [(n, self._decode("text", text, row)) for n, text in enumerate(texts, 1)]
        return np.asarray(rows, np.int64), captions

    def _make_version(self, data: DataConfig) -> str:
        options = [SALT, self.split, data.image_size]
        options += [data.image_feature, data.text_feature, data.label_feature]
        # TFDS keeps the names of labels in files of their own.
        options += [field.class_names for field in self._fields.values()]
        digest = hashlib.sha256(repr(options).encode())
        for file in METADATA:
            digest.update(hashlib.sha256((self.folder / file).read_bytes()).digest())
        return digest.hexdigest()[:16]


def _match_split(split: str, available: list[str], source: str) -> tuple[str, bool]:
    """(the set's name of a split, whether train and val must share it)."""
    held_out = [name for name in SPLIT_NAMES["val"] if name in available]
    if split in ("train", "val") and not held_out and "train" in available:
        return "train", True
    for name in SPLIT_NAMES[split]:
        if name in available:
            return name, False
    raise UserError(f"{source} has no split {split!r}; it has: {', '.join(sorted(available))}")


def _bar(rows: Iterable[int]) -> Iterable[int]:
    """A bar on a terminal, if it takes long."""
    if not sys.stderr.isatty():
        return rows
    from tqdm import tqdm

    return tqdm(rows, "reading texts", delay=PROGRESS_AFTER, leave=False)
