"""Pictures with their texts, and what says which of them belong together."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from moejax.config.schema import Config
from moejax.data.image_codes import ImageCodec
from moejax.data.pipeline import Batch, ImagePipeline, recipe_hash
from moejax.data.record_io import replace_file
from moejax.data.sources import RecordSource
from moejax.data.text_tokenizer import load_text_tokenizer
from moejax.data.vocabulary import BOS, EOS, NUM_SPECIAL, PAD
from moejax.errors import UserError


class PairPipeline(ImagePipeline):
    """Rows of :class:`ImagePipeline` with the text of the record, reshuffled every epoch.

    Beside its arrays a row has ``tokens`` [t] i32, ``BOS text EOS`` and padding, and the numbers
    ``family``, ``concept``, ``style`` and ``cluster`` i32. Records of a source that does not say
    have a family and a concept of their own, and style -1. Each language (and style) of a picture
    is a record. Clusters of training records are those of ``data.clusters``; all others have 0.

    Attributes:
      categories: names of the labels, () where the source has none.
      styles: names of the styles.
      truncated: how many texts were cut to fit.

    Raises UserError for records without texts, and for a model whose vocabulary or length of texts
    is not that of the data.
    """

    def __init__(self, config: Config, source: RecordSource, codec: ImageCodec | None = None):
        super().__init__(config, source, codec)
        if "text" not in source[0]:
            raise UserError(
                f"data.source={source.name}: its records have no text, which data.format='pairs' "
                "needs; use another source"
            )
        data, model = config.data, config.model
        self.tokenizer = load_text_tokenizer(data.text_tokenizer)
        size = NUM_SPECIAL + self.tokenizer.size
        if model.vocab_size < size:
            raise UserError(
                f"model.vocab_size={model.vocab_size}: data.text_tokenizer={data.text_tokenizer} "
                f"needs {size}"
            )
        if data.sequence_length < 3:
            raise UserError("data.sequence_length: must be at least 3, for one token and its marks")
        texts = [source.text_at(index) for index in range(len(source))]
        self.tokens = self.encode(texts)
        full = (self.tokens[:, -1] == EOS).nonzero()[0]
        again = self.tokenizer.encode_batch([texts[index] for index in full])
        self.truncated = sum(len(ids) + 2 > data.sequence_length for ids in again)
        self.categories = tuple(getattr(source, "categories", ()))
        self.families, _ = _numbers(source, "family")
        self.concepts, _ = _numbers(source, "concept")
        self.style_of, self.styles = _numbers(source, "style", absent=-1)
        self.clusters, digest = np.zeros(len(source), np.int32), ""
        if data.clusters and source.split == "train":
            ids = [source[index]["id"] for index in range(len(source))]
            self.clusters, digest = read_clusters(Path(data.clusters).expanduser(), ids)
        self.version = recipe_hash(
            images=self.version,
            text=self.tokenizer.version,
            length=data.sequence_length,
            clusters=digest,
        )

    def encode(self, texts: Sequence[str]) -> Int32[np.ndarray, "n t"]:
        """``BOS text EOS`` of each text, cut to ``data.sequence_length`` or padded."""
        length = self.config.data.sequence_length
        tokens = np.full((len(texts), length), PAD, np.int32)
        for row, ids in zip(tokens, self.tokenizer.encode_batch(texts), strict=True):
            kept = ids[: length - 2]
            row[: len(kept) + 2] = [BOS, *(NUM_SPECIAL + i for i in kept), EOS]
        return tokens

    def record_row(self, number: int) -> Batch:
        """The row of record ``number`` of the source."""
        row = super().record_row(number)
        row["tokens"] = self.tokens[number]
        row["family"] = self.families[number]
        row["concept"] = self.concepts[number]
        row["style"] = self.style_of[number]
        row["cluster"] = self.clusters[number]
        return row


def write_clusters(path: Path, ids: Sequence[str], clusters: Int32[np.ndarray, " n"]) -> None:
    """The file of ``data.clusters``: an npz of record ids and their clusters."""
    held = {"ids": np.asarray(ids), "clusters": np.asarray(clusters, np.int32)}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **held)

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, write)


def read_clusters(path: Path, ids: Sequence[str]) -> tuple[Int32[np.ndarray, " n"], str]:
    """The cluster of each of these records, and a hash of all of them.

    Raises UserError for a file that is none, or is of other records.
    """
    try:
        with np.load(path) as held:
            cluster_of = dict(zip(held["ids"].tolist(), held["clusters"].tolist(), strict=True))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"data.clusters={path}: no file of clusters ({error}); write one with "
            "moejax convert clusters"
        ) from error
    missing = next((name for name in ids if name not in cluster_of), None)
    if missing is not None:
        raise UserError(
            f"data.clusters={path}: knows no record {missing}; it was written for other data"
        )
    clusters = np.asarray([cluster_of[name] for name in ids], np.int32)
    return clusters, hashlib.sha256(clusters.tobytes()).hexdigest()[:16]


def _numbers(
    source: RecordSource, field: str, absent: int | None = None
) -> tuple[Int32[np.ndarray, " n"], tuple[str, ...]]:
    """The number of each record's ``field``, and the names in the order of their numbers.

    Where the records have no such field, ``absent`` for all, or a number of its own for each.
    """
    if field not in source[0]:
        own = np.arange(len(source)) if absent is None else np.full(len(source), absent)
        return own.astype(np.int32), ()
    names = [source[index][field] for index in range(len(source))]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.asarray([number[name] for name in names], np.int32), tuple(number)
