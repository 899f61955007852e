"""Runs a function on each device's own rows."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P

from moejax.axes import BATCH_AXES


def run_local(function: Callable, sharded: tuple, replicated: tuple = ()):
    """``function(*sharded, *replicated)`` inside one ``shard_map`` over the context mesh.

    Leading axes of ``sharded`` (pytrees) and of every output are split over the batch axes;
    ``replicated`` (weights) is whole on every device. Without a mesh the function is just called:
    in a notebook a model needs none.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function(*sharded, *replicated)
    in_specs = (P(BATCH_AXES),) * len(sharded) + (P(),) * len(replicated)
    mapped = jax.shard_map(function, in_specs=in_specs, out_specs=P(BATCH_AXES))
    return mapped(*sharded, *replicated)
