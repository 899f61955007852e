"""Rows of a batch on the devices that hold them, on one host or on many."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from moejax.parallel.mesh import batch_sharding


class HostRows(NamedTuple):
    """The part of a batch that one process makes.

    Attributes:
      batch_size: rows of the whole batch.
      held: the rows that devices of this process hold, ascending.
    """

    batch_size: int
    held: tuple[int, ...]


def host_rows(mesh: Mesh, batch_size: int) -> HostRows:
    """The rows of a batch on ``mesh`` that this process makes: all, if it is alone."""
    places: Any = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    held = {row for (rows,) in places.values() for row in range(batch_size)[rows]}
    return HostRows(batch_size, tuple(sorted(held)))


def put_batch(batch: dict, mesh: Mesh, rows: HostRows | None = None) -> dict:
    """The numpy arrays ``[b, ...]`` of ``batch`` on the devices, rows over the batch axes.

    ``rows`` says which rows of the whole batch these are; left out, they are all of it, and each
    process takes from them what its devices hold.
    """
    sharding = batch_sharding(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)

    def put(x: np.ndarray) -> jax.Array:
        size, held = rows or (len(x), range(len(x)))

        def part(index: Any) -> np.ndarray:
            places = np.searchsorted(held, range(size)[index[0]])
            return x[(places, *index[1:])]

        return jax.make_array_from_callback((size, *x.shape[1:]), sharding, part)

    return jax.tree.map(put, batch)
