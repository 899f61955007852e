"""Casts for ``custom_vjp`` inside ``shard_map``."""

import jax
from jax import lax


def cast_to_common_varying(*arrays):
    """The arrays, each marked as varying over every manual mesh axis that any of them varies over.

    A ``custom_vjp`` inside ``shard_map`` must return cotangents of the types of its inputs; with
    inputs of unequal variation the backward would have to know which sums to take. After this
    cast all agree, and the transpose of the cast is the sum over the missing axes.
    """
    wanted = frozenset().union(*(varying_axes(array) for array in arrays))
    return tuple(_cast(array, wanted - varying_axes(array)) for array in arrays)


def varying_axes(array) -> frozenset:
    """The manual mesh axes along which the array differs; none outside of ``shard_map``."""
    manual = getattr(jax.typeof(array), "manual_axis_type", None)
    return frozenset(manual.varying) if manual is not None else frozenset()


def _cast(array, axes: frozenset):
    return lax.pcast(array, tuple(sorted(axes)), to="varying") if axes else array
