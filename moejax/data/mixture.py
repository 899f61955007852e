"""Rows of several sources in fixed shares, each row a function of its number alone."""

import functools
from collections.abc import Sequence

import numpy as np

from moejax.config.schema import Config
from moejax.data.pipeline import Batch, RowPipeline, recipe_hash
from moejax.data.records import Record
from moejax.data.sources import RecordSource
from moejax.data.token_pipeline import TokenPipeline

# So many consecutive rows hold each source in its share, rounded to whole rows.
BLOCK = 1000


def block_counts(weights: Sequence[float], size: int = BLOCK) -> np.ndarray:
    """How many of ``size`` rows each source gets, [sources]: largest remainders, at least one."""
    shares = np.asarray(weights, np.float64) / np.sum(weights) * size
    counts = np.maximum(np.floor(shares).astype(np.int64), 1)
    for place in np.argsort(counts - shares, kind="stable")[: max(0, size - counts.sum())]:
        counts[place] += 1
    counts[np.argmax(counts)] -= counts.sum() - size
    return counts


class MixturePipeline(RowPipeline):
    """Token rows of several sources; a source's weight is its share of the rows.

    The order within a block of BLOCK rows is drawn by (seed, block); each source goes through its
    own packing plan, epoch after epoch, whatever the others do. ``sources`` [b, n] f32 marks the
    source of each row, for losses by source. The held-out pass takes the sources one after another.
    """

    def __init__(self, config: Config, parts: Sequence[TokenPipeline]):
        self.parts = parts
        self.counts = block_counts([weight for _, weight in config.data.sources])
        self.vocabulary = parts[0].vocabulary
        self.truncated = sum(part.truncated for part in parts)
        self.training = parts[0].training
        self._block = functools.lru_cache(maxsize=4)(self._make_block)
        records = MixedRecords([part.source for part in parts])
        self.starts = records.starts
        super().__init__(config, records, sum(len(part.plan) for part in parts))
        self.version = recipe_hash(
            parts=[part.version for part in parts],
            counts=self.counts.tolist(),
            seed=config.data.seed,
        )

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source of each row of the block, how many rows of it came before in the block)."""
        rng = np.random.default_rng([self.config.data.seed, block, 2])
        source = rng.permutation(np.repeat(np.arange(len(self.counts)), self.counts))
        rank = np.zeros(BLOCK, np.int64)
        for index in range(len(self.counts)):
            rank[source == index] = np.arange(self.counts[index])
        return source, rank

    def _place(self, index: int) -> tuple[int, int]:
        """(source, row of it) of row ``index``."""
        if not self.training:
            for number, part in enumerate(self.parts):
                if index < part.rows_per_epoch:
                    return number, index
                index -= part.rows_per_epoch
            raise IndexError("past the end of the held-out pass")
        block, place = divmod(index, BLOCK)
        source, rank = self._block(block)
        number = int(source[place])
        return number, int(block * self.counts[number] + rank[place])

    def row(self, index: int) -> Batch:
        number, row = self._place(index)
        marks = np.zeros(len(self.parts), np.float32)
        marks[number] = 1
        return {**self.parts[number].row(row), "sources": marks}

    def row_records(self, index: int) -> list[int]:
        number, row = self._place(index)
        first = self.starts[number]
        return [first + record for record in self.parts[number].row_records(row)]

    def token_counts(self) -> np.ndarray:
        """As TokenPipeline's, of each source in its share; rounded."""
        total = sum(
            part.token_counts() * (share / part.rows_per_epoch)
            for part, share in zip(self.parts, self.counts, strict=True)
        )
        return np.round(total * self.rows_per_epoch / BLOCK).astype(np.int64)


class MixedRecords:
    """The records of several sources, one after another; ids are led by the source's name."""

    def __init__(self, sources: Sequence[RecordSource]):
        self.sources = sources
        self.name = " + ".join(source.name for source in self.sources)
        self.split = self.sources[0].split
        self.version = recipe_hash(sources=[source.version for source in self.sources])
        self.starts = np.cumsum([0, *map(len, self.sources)]).tolist()

    def __len__(self) -> int:
        return self.starts[-1]

    def _find(self, index: int) -> tuple[RecordSource, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.sources[number], index - self.starts[number]

    def __getitem__(self, index: int) -> Record:
        source, place = self._find(index)
        record = source[place]
        return Record(**{**record, "id": f"{source.name}/{record['id']}"})

    def text_at(self, index: int) -> str:
        source, place = self._find(index)
        return source.text_at(place)
