"""From records to batches; the batch of a step is a function of the step alone."""

import abc
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from moejax.config.schema import Config
from moejax.data.image_codes import ImageCodec, image_codes
from moejax.data.sources import RecordSource
from moejax.errors import UserError

# Raise when the same data and options give other batches than before.
RECIPE_VERSION = 1

Batch = dict[str, np.ndarray]


class Pipeline(Protocol):
    """What the training loop and the evaluators read."""

    source: RecordSource
    steps_per_epoch: int
    version: str

    def batch(self, step: int, rows: Sequence[int] | None = None) -> Batch:
        """The batch of training step ``step`` (from 0), or these ``rows`` of it."""
        ...

    def record_ids(self, step: int) -> list[str]:
        """Ids of the records in that batch."""
        ...

    def batches(self, start_step: int, rows: Sequence[int] | None = None) -> Iterator[Batch]:
        """:meth:`batch` of ``start_step``, and on for ever, made ahead by a thread."""
        ...

    def eval_batches(self, limit: int = 0) -> Iterator[Batch]:
        """One pass in fixed order (at most ``limit`` batches); filler rows have weight 0."""
        ...


class _PlanSource:
    """A grain source of an unbounded sequence: row ``index`` of the run."""

    def __init__(self, row):
        self._row = row

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index):
        return self._row(int(index))


class RowPipeline(abc.ABC):
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

    def batch(self, step: int, rows: Sequence[int] | None = None) -> Batch:
        size = self.config.data.batch_size
        held = range(size) if rows is None else rows
        return stack_rows([self.row(step * size + i) for i in held])

    def record_ids(self, step: int) -> list[str]:
        size = self.config.data.batch_size
        rows = range(step * size, (step + 1) * size)
        return [self.source[record]["id"] for row in rows for record in self.row_records(row)]

    def batches(self, start_step: int, rows: Sequence[int] | None = None) -> Iterator[Batch]:
        import grain

        size, ahead = self.config.data.batch_size, self.config.data.prefetch
        held = range(size) if rows is None else rows

        def row(index: int) -> Batch:
            step, place = divmod(index, len(held))
            return self.row(step * size + held[place])

        data = grain.MapDataset.source(_PlanSource(row))
        data = data.slice(slice(start_step * len(held), None)).batch(len(held))
        # Batches are cheap to make: one thread is enough to stay ahead of the step.
        options = grain.ReadOptions(num_threads=min(ahead, 1), prefetch_buffer_size=ahead)
        return iter(data.to_iter_dataset(options))

    def eval_batches(self, limit: int = 0) -> Iterator[Batch]:
        size = self.config.data.batch_size
        count = -(-self.rows_per_epoch // size)
        for step in range(min(count, limit) if limit else count):
            last = min((step + 1) * size, self.rows_per_epoch)
            rows = [self.row(index) for index in range(step * size, last)]
            yield stack_rows(rows + [self.filler()] * (size - len(rows)))


def stack_rows(rows: list[Batch]) -> Batch:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def recipe_hash(**parts) -> str:
    text = json.dumps({"recipe": RECIPE_VERSION, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class ImagePipeline(RowPipeline):
    """Pictures for a model of pictures, reshuffled every epoch.

    A row has the label of its record, -1 without one, and whether it may be mirrored; with a
    ``codec`` of latent vectors also ``latents`` f32 [rows, columns, z] of its grid.

    Raises UserError if the source does not have the ``model.num_classes`` of a model of classes.
    """

    def __init__(self, config: Config, source: RecordSource, codec: ImageCodec | None = None):
        if "image" not in source[0]:
            raise UserError(
                f"data.source={source.name}: its records are no single pictures, which "
                "data.format='images' needs; use another source"
            )
        super().__init__(config, source, len(source))
        _check_classes(config, source)
        self.training = source.split == "train"
        self._counts: np.ndarray | None = None
        self._order = functools.lru_cache(maxsize=2)(self._make_order)
        parts = {"source": source.version, "seed": config.data.seed}
        self._latents: Callable[..., np.ndarray | None] = lambda number: None
        if codec is not None:
            self._latents = image_codes(source, codec)
            parts["codec"] = codec.version
        self.version = recipe_hash(**parts)

    def _make_order(self, epoch: int) -> np.ndarray:
        if not self.training:
            return np.arange(len(self.source))
        return np.random.default_rng([self.config.data.seed, epoch]).permutation(len(self.source))

    def row_records(self, index: int) -> list[int]:
        epoch, place = divmod(index, len(self.source))
        return [int(self._order(epoch)[place])]

    def row(self, index: int) -> Batch:
        return self.record_row(*self.row_records(index))

    def record_row(self, number: int) -> Batch:
        """The row of record ``number`` of the source."""
        record, latents = self.source[number], self._latents(number)
        row = {
            "images": record["image"],
            "index": np.asarray(number, np.int32),
            "labels": np.asarray(record.get("label", -1), np.int32),
            "mirror": np.asarray(record.get("mirror", False)),
            "weights": np.asarray(1, np.float32),
        }
        if latents is not None:
            side = self.config.model.image_size
            row["latents"] = latents[0].reshape(side, side, -1).astype(np.float32)
        return row

    def label_counts(self, num_classes: int) -> np.ndarray:
        """How many records have each label [v]; those without one are not counted."""
        if self._counts is None:
            labels = [self.source[i].get("label", -1) for i in range(len(self.source))]
            self._counts = np.bincount([i for i in labels if i >= 0], minlength=num_classes)
        return self._counts


def _check_classes(config: Config, source: RecordSource) -> None:
    """UserError unless the labels of the source are those of the model."""
    wanted, categories = _label_classes(config), getattr(source, "categories", ())
    if not wanted:
        return
    # A folder does not say how many classes it has: the labels of its records do.
    labels = () if categories else {source[i].get("label", -1) for i in range(len(source))}
    found = len(categories) if categories else max(labels, default=-1) + 1
    if not found:
        raise UserError(f"data.source={source.name}: its records have no labels; choose another")
    if found > wanted or (categories and found != wanted):
        field = "task_classes" if config.objective.name == "multitask" else "num_classes"
        raise UserError(
            f"model.{field}={wanted}: {source.name} has {found} classes; make the two equal"
        )


def _label_classes(config: Config) -> int:
    """How many labels the objective counts on; 0 if it does not read any."""
    model = config.model
    if config.objective.name in ("classification", "diffusion"):
        return model.num_classes
    if config.objective.name == "multitask":
        counts = dict(zip(model.modalities, model.task_classes, strict=True))
        return counts.get("class") or len(config.objective.groups)
    return 0
