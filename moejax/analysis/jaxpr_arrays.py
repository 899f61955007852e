"""The largest arrays of a program, read from its jaxpr: where no compiler says what they are."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from moejax.analysis.jaxpr_flops import inner_jaxprs, local_copies


@dataclasses.dataclass(frozen=True)
class Array:
    """The result of an equation.

    Attributes:
      shape: of all devices together; inside of a shard_map that of one device.
      bytes: of all devices together.
      scope: the modules and functions that it is made in.
    """

    shape: tuple[int, ...]
    dtype: str
    bytes: int
    scope: str


def largest_arrays(jaxpr: Any, number: int = 10) -> list[Array]:
    """The largest results of equations, one of each shape.

    They are what the program is written with: a compiler may fuse some away.
    """
    found: dict[tuple, Array] = {}
    for array in _arrays(jaxpr, 1, ""):
        found.setdefault((array.shape, array.dtype, array.bytes), array)
    return sorted(found.values(), key=lambda array: -array.bytes)[:number]


def _arrays(jaxpr: Any, copies: int, scope: str) -> Iterator[Array]:
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        # The names in an inner jaxpr begin anew.
        here = "/".join(filter(None, (scope, str(eqn.source_info.name_stack))))
        inner = list(inner_jaxprs(eqn))
        for one in inner:
            yield from _arrays(one, copies * local_copies(eqn), here)
        for var in () if inner else eqn.outvars:
            aval: Any = var.aval
            # Tokens have no shape, keys of random numbers no size.
            if not hasattr(aval, "shape") or not hasattr(aval.dtype, "itemsize"):
                continue
            size = copies * math.prod(aval.shape) * aval.dtype.itemsize
            made_by = f"{here}/{eqn.primitive.name}".lstrip("/")
            yield Array(tuple(aval.shape), aval.dtype.name, size, made_by)
