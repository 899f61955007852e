"""From records to batches; the batch of a step is a function of the step alone."""

import abc
import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from moejax.config.schema import Config
from moejax.data.image_codes import ImageCodec, image_codes
from moejax.data.packing import PackingPlan
from moejax.data.sources import RecordSource, open_source
from moejax.data.text_tokenizer import load_text_tokenizer
from moejax.data.vocabulary import BOI, BOS, EOI, EOS, NUM_SPECIAL, PAD, Vocabulary
from moejax.errors import UserError

# Raise when the same data and options give other batches than before.
RECIPE_VERSION = 1

Batch = dict[str, np.ndarray]


class Pipeline(Protocol):
    """What the training loop and the evaluators read."""

    source: RecordSource
    steps_per_epoch: int
    version: str

    def batch(self, step: int) -> Batch:
        """The batch of training step ``step`` (from 0)."""
        ...

    def record_ids(self, step: int) -> list[str]:
        """Ids of the records in that batch."""
        ...

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches from ``start_step`` on, for ever, made ahead by a thread."""
        ...

    def eval_batches(self, limit: int = 0) -> Iterator[Batch]:
        """One pass in fixed order (at most ``limit`` batches); filler rows have weight 0."""
        ...


def build_pipeline(config: Config, split: str, *, codec: ImageCodec | None = None) -> Pipeline:
    """The pipeline of ``config.data`` over one split.

    ``codec`` is the frozen image tokenizer, needed for ``data.format="tokens"`` with pictures.
    Raises UserError for data that cannot be read or does not fit the model.
    """
    data = config.data
    source = open_source(
        data.source,
        split,
        image_size=data.image_size,
        languages=data.languages,
        caption=data.caption,
    )
    if len(source) == 0:
        raise UserError(f"data.source={data.source}: split {split!r} has no records")
    if data.format == "images":
        return ImagePipeline(config, source)
    return TokenPipeline(config, source, codec)


class _PlanSource:
    """A grain source of an unbounded sequence: row ``index`` of the run."""

    def __init__(self, row):
        self._row = row

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index):
        return self._row(int(index))


class _Pipeline(abc.ABC):
    """Batching that all formats share; a subclass says what a row is."""

    def __init__(self, config: Config, source: RecordSource, rows_per_epoch: int):
        self.config = config
        self.source = source
        self.rows_per_epoch = rows_per_epoch
        self.steps_per_epoch = max(1, rows_per_epoch // config.data.batch_size)

    @abc.abstractmethod
    def row(self, index: int) -> Batch:
        """Row ``index`` since the start of training."""

    @abc.abstractmethod
    def row_records(self, index: int) -> list[int]:
        """The records (indices into the source) that the row holds."""

    def filler(self) -> Batch:
        """A row that counts for nothing."""
        row = self.row(0)
        return {**row, "weights": np.zeros_like(row["weights"])}

    def batch(self, step: int) -> Batch:
        size = self.config.data.batch_size
        return _stack([self.row(step * size + i) for i in range(size)])

    def record_ids(self, step: int) -> list[str]:
        size = self.config.data.batch_size
        rows = range(step * size, (step + 1) * size)
        return [self.source[record]["id"] for row in rows for record in self.row_records(row)]

    def batches(self, start_step: int) -> Iterator[Batch]:
        import grain

        size, ahead = self.config.data.batch_size, self.config.data.prefetch
        rows = grain.MapDataset.source(_PlanSource(self.row))
        rows = rows.slice(slice(start_step * size, None)).batch(size)
        # Batches are cheap to make: one thread is enough to stay ahead of the step.
        options = grain.ReadOptions(num_threads=min(ahead, 1), prefetch_buffer_size=ahead)
        return iter(rows.to_iter_dataset(options))

    def eval_batches(self, limit: int = 0) -> Iterator[Batch]:
        size = self.config.data.batch_size
        count = -(-self.rows_per_epoch // size)
        for step in range(min(count, limit) if limit else count):
            last = min((step + 1) * size, self.rows_per_epoch)
            rows = [self.row(index) for index in range(step * size, last)]
            yield _stack(rows + [self.filler()] * (size - len(rows)))


def _stack(rows: list[Batch]) -> Batch:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _hash(**parts) -> str:
    text = json.dumps({"recipe": RECIPE_VERSION, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class TokenPipeline(_Pipeline):
    """Packed sequences of text and image codes.

    A record is ``BOS text BOI codes EOI EOS`` or, picture first, ``BOS BOI codes EOI text EOS``;
    several share a row as segments 1, 2, ... Training draws the order, and whether the caption is
    left out (its place then stays padding), by (seed, epoch, record).
    """

    def __init__(self, config: Config, source: RecordSource, codec: ImageCodec | None):
        data = config.data
        for name in ("text", "image"):
            if name not in config.model.modalities:
                raise UserError(f"model.modalities: {data.source} needs {name!r}")
        assert codec is not None, "a token pipeline needs the image tokenizer"
        self.text_modality = config.model.modalities.index("text")
        self.image_modality = config.model.modalities.index("image")
        self.tokenizer = load_text_tokenizer(data.text_tokenizer)
        self.vocabulary = Vocabulary(self.tokenizer.size, codec.num_codes, codec.codes_per_image)
        if config.model.vocab_size < self.vocabulary.size:
            raise UserError(
                f"model.vocab_size={config.model.vocab_size}: the tokenizers of text and "
                f"pictures need {self.vocabulary.size}"
            )
        room = data.sequence_length - codec.codes_per_image - len((BOS, BOI, EOI, EOS))
        if room < 1:
            raise UserError(
                f"data.sequence_length={data.sequence_length}: a picture and its marks take "
                f"{data.sequence_length - room}; give at least {data.sequence_length - room + 1}"
            )
        texts = [source.text_at(index) for index in range(len(source))]
        captions = self.tokenizer.encode_batch(texts)
        self.truncated = sum(len(ids) > room for ids in captions)
        self.captions = [ids[:room] for ids in captions]
        self.codes = image_codes(source, codec)
        marks = data.sequence_length - room
        lengths = [len(ids) + marks for ids in self.captions]
        self.training = source.split == "train"
        self.plan = PackingPlan(lengths, data.sequence_length, data.seed, shuffle=self.training)
        self._draws = functools.lru_cache(maxsize=2)(self._make_draws)
        super().__init__(config, source, len(self.plan))
        self.version = _hash(
            source=source.version,
            text=self.tokenizer.version,
            image=codec.version,
            length=data.sequence_length,
            order=data.order,
            drop_text=data.drop_text,
            seed=data.seed,
        )

    def _make_draws(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """For each record: is the picture first, is the caption left out."""
        data, count = self.config.data, len(self.captions)
        rng = np.random.default_rng([data.seed, epoch, 1])
        image_first = rng.random(count) < 0.5
        if data.order != "random":
            image_first[:] = data.order == "image_first"
        drop = rng.random(count) < (data.drop_text if self.training else 0)
        return image_first, drop

    def item(self, record: int, image_first: bool, drop_text: bool) -> np.ndarray:
        """The token ids of one record, [n] i32."""
        text = self.vocabulary.text_ids([] if drop_text else self.captions[record])
        picture = np.concatenate([[BOI], self.vocabulary.image_ids(self.codes(record)), [EOI]])
        parts = (picture, text) if image_first else (text, picture)
        return np.concatenate([[BOS], *parts, [EOS]]).astype(np.int32)

    def row_records(self, index: int) -> list[int]:
        return [int(record) for record in self.plan.items(index)[1]]

    def row(self, index: int) -> Batch:
        epoch, records = self.plan.items(index)
        image_first, drop = self._draws(epoch)
        length = self.config.data.sequence_length
        row: Batch = {
            name: np.zeros(length, np.int32)
            for name in ("tokens", "modality", "segments", "positions", "targets")
        }
        row["tokens"][:] = PAD
        row["modality"][:] = self.text_modality
        row["weights"] = np.zeros(length, np.float32)
        start = 0
        for segment, record in enumerate(records, 1):
            tokens = self.item(int(record), bool(image_first[record]), bool(drop[record]))
            here = slice(start, start + len(tokens))
            row["tokens"][here] = tokens
            is_image = tokens >= self.vocabulary.image_offset
            row["modality"][here] = np.where(is_image, self.image_modality, self.text_modality)
            row["segments"][here] = segment
            row["positions"][here] = np.arange(len(tokens))
            row["targets"][start : start + len(tokens) - 1] = tokens[1:]
            row["weights"][start : start + len(tokens) - 1] = 1
            start += len(tokens)
        return row

    def token_counts(self) -> np.ndarray:
        """How often each id is a target in one epoch, [v] i64: the unigram baseline's counts."""
        counts = np.zeros(self.vocabulary.size, np.int64)
        for record, caption in enumerate(self.captions):
            np.add.at(counts, self.vocabulary.text_ids(caption), 1)
            np.add.at(counts, self.vocabulary.image_ids(self.codes(record)), 1)
        counts[[BOI, EOI, EOS]] = len(self.captions)
        assert counts[NUM_SPECIAL:].sum() > 0
        return counts


class ImagePipeline(_Pipeline):
    """Pictures for an autoencoder or a classifier, reshuffled every epoch."""

    def __init__(self, config: Config, source: RecordSource):
        super().__init__(config, source, len(source))
        self.training = source.split == "train"
        self._order = functools.lru_cache(maxsize=2)(self._make_order)
        self.version = _hash(source=source.version, seed=config.data.seed)

    def _make_order(self, epoch: int) -> np.ndarray:
        if not self.training:
            return np.arange(len(self.source))
        return np.random.default_rng([self.config.data.seed, epoch]).permutation(len(self.source))

    def row_records(self, index: int) -> list[int]:
        epoch, place = divmod(index, len(self.source))
        return [int(self._order(epoch)[place])]

    def row(self, index: int) -> Batch:
        (record,) = self.row_records(index)
        return {
            "images": self.source[record]["image"],
            "index": np.asarray(record, np.int32),
            "weights": np.asarray(1, np.float32),
        }
