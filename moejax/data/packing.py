"""Packing as a plan: bin j of epoch e is a function of (lengths, seed, e, j).

Which lengths share a bin is decided once, by best fit over the multiset of item lengths; an epoch
only decides which items of equal length take which slot, and the order of the bins. So every
epoch has the same number of bins, and the batch of any step is found without replaying the run.
"""

import functools

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Bins of positions into ``lengths``, each of total length at most ``capacity``.

    Best fit decreasing: the longest item first, into the fullest bin that still takes it.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"an item of {int(lengths.max())} tokens does not fit in {capacity}")
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    for position in np.argsort(-lengths, kind="stable"):
        length = int(lengths[position])
        room = next((r for r in range(length, capacity + 1) if by_room[r]), None)
        if room is None:
            bins.append([])
            index, room = len(bins) - 1, capacity
        else:
            index = by_room[room].pop()
        bins[index].append(int(position))
        by_room[room - length].append(index)
    return bins


def first_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Bins of positions into ``lengths``, each of total length at most ``capacity``.

    Each item goes into the first bin that still takes it, in the order that they come in: unlike
    :func:`best_fit`, which brings items of one length together, it fills a bin with what is next to
    each other.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"an item of {int(lengths.max())} tokens does not fit in {capacity}")
    least = int(lengths.min()) if len(lengths) else 0
    bins: list[list[int]] = []
    # Bins that take at least the shortest item, and their room.
    rooms: dict[int, int] = {}
    for position, length in enumerate(map(int, lengths)):
        index = next((i for i, room in rooms.items() if room >= length), len(bins))
        if index == len(bins):
            bins.append([])
            rooms[index] = capacity
        bins[index].append(position)
        rooms[index] -= length
        if rooms[index] < least:
            del rooms[index]
    return bins


class PackingPlan:
    """The bins of every epoch for items of the given lengths (tokens)."""

    def __init__(self, lengths, capacity: int, seed: int, *, shuffle: bool = True):
        self.lengths = np.asarray(lengths, np.int64)
        self.seed = seed
        self.shuffle = shuffle
        # Slots are positions in the items sorted by length: a slot's length is known by its place.
        self._by_length = np.argsort(self.lengths, kind="stable")
        self._bins = [
            np.asarray(slots) for slots in best_fit(self.lengths[self._by_length], capacity)
        ]
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def __len__(self) -> int:
        """Bins per epoch."""
        return len(self._bins)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if not self.shuffle:
            return np.arange(len(self._bins)), self._by_length
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self._bins))
        sorted_lengths = self.lengths[self._by_length]
        # Equal lengths stay together, so each slot gets some item of its own length.
        within = np.lexsort((rng.random(len(sorted_lengths)), sorted_lengths))
        return order, self._by_length[within]

    def items(self, index: int) -> tuple[int, np.ndarray]:
        """(epoch, items) of the ``index``-th bin since the start of training."""
        epoch, place = divmod(index, len(self._bins))
        order, items = self._epoch(epoch)
        return epoch, items[self._bins[order[place]]]
