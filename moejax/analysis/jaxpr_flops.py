"""FLOPs of a program, counted from its jaxpr.

XLA's own count sees the body of a scan once and believes whatever a kernel claims; here a body
counts as often as it runs, and a kernel by the tiles that it visits (:mod:`pallas_kernels.costs`).
Only contractions are counted (dot, ragged dot, convolution), a multiply-add as two: what is left is
a percent or two, and is not what a matrix unit is measured by.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

import pallas_kernels  # noqa: F401  (registers the costs)
from pallas_kernels.costs import COSTS, Cost


class UncountableError(Exception):
    """The program holds a loop or kernel whose FLOPs cannot be read from the jaxpr."""


def count_flops(function: Callable, *args, **kwargs) -> Cost:
    """FLOPs of ``function(*args, **kwargs)`` over all devices, by tracing alone.

    Args:
      function: any traceable function.
      *args: arrays or ``jax.ShapeDtypeStruct``; nothing is computed.
      **kwargs: as ``args``.

    Returns:
      ``Cost(nominal, visited)``: FLOPs by the mathematics, and those of the rows that are really
      multiplied: tile padding and static worst-case rows included.

    Raises:
      UncountableError: a loop of unknown length, or a kernel without a cost, holds a contraction.
    """
    return count_jaxpr(jax.make_jaxpr(function)(*args, **kwargs))


def count_jaxpr(jaxpr: Any) -> Cost:
    """FLOPs of a jaxpr, open or closed. See :func:`count_flops`."""
    return _sum([_count_eqn(eqn) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns])


def _sum(costs: list[Cost], times: int = 1) -> Cost:
    nominal, visited = sum(c.nominal for c in costs), sum(c.visited for c in costs)
    return Cost(float(times * nominal), float(times * visited))


def _count_eqn(eqn: core.JaxprEqn) -> Cost:
    name = eqn.primitive.name
    if name in _CONTRACTIONS:
        return _CONTRACTIONS[name](eqn)
    if name == "jit" and eqn.params["name"] in COSTS:
        return _kernel(eqn)
    inner = [count_jaxpr(jaxpr) for jaxpr in inner_jaxprs(eqn)]
    if name == "cond":
        # Also the branches of platform_dependent: the dearest one, as the worst case.
        return Cost(max(c.nominal for c in inner), max(c.visited for c in inner))
    if name in ("while", "pallas_call") and _sum(inner).visited:
        what = "a while loop of unknown length" if name == "while" else "a kernel"
        raise UncountableError(
            f"{_source(eqn)}: {what} holds a contraction; run it inside a jax.jit whose name has "
            "an entry in pallas_kernels.costs.COSTS"
        )
    return _sum(inner, _times(eqn))


def _kernel(eqn: core.JaxprEqn) -> Cost:
    """The recorded cost, unless the equation is what partial evaluation moved out of a loop."""
    if not any(_contracts(jaxpr) for jaxpr in inner_jaxprs(eqn)):
        return Cost(0.0, 0.0)
    return COSTS[eqn.params["name"]]


def _contracts(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name in _CONTRACTIONS or any(map(_contracts, inner_jaxprs(eqn)))
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns
    )


def inner_jaxprs(eqn: core.JaxprEqn) -> Iterator[Any]:
    """The jaxprs that an equation runs: a loop's body, branches, a called function."""
    for key, param in eqn.params.items():
        # A scatter's update function is applied to scalars, not run once for each call.
        if key == "update_jaxpr":
            continue
        for entry in param if isinstance(param, (tuple, list)) else (param,):
            if hasattr(getattr(entry, "jaxpr", entry), "eqns"):
                yield entry


def _times(eqn: core.JaxprEqn) -> int:
    """How often the body of an equation runs, over all devices."""
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    return local_copies(eqn)


def local_copies(eqn: core.JaxprEqn) -> int:
    """How many devices run the body of an equation side by side: those of a shard_map, else 1."""
    if eqn.primitive.name != "shard_map":
        return 1
    sizes = dict(eqn.params["mesh"].shape)
    return math.prod(sizes[axis] for axis in eqn.params["newly_manual_axes"])


def _shape(var: Any) -> tuple[int, ...]:
    return var.aval.shape


def _both(flops: float) -> Cost:
    return Cost(float(flops), float(flops))


def _dot(eqn: core.JaxprEqn) -> Cost:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    lhs, out = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    return _both(2 * math.prod(out) * math.prod(lhs[axis] for axis in contracting))


def _ragged_dot(eqn: core.JaxprEqn) -> Cost:
    """Each row of the ragged axis meets the weight of its own group only, whichever axis it is."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracting), (_, batch) = numbers.dot_dimension_numbers
    lhs, rhs = _shape(eqn.invars[0]), _shape(eqn.invars[1])
    known = {*contracting, *batch, *numbers.rhs_group_dimensions}
    return _both(
        2 * math.prod(lhs) * math.prod(n for axis, n in enumerate(rhs) if axis not in known)
    )


def _conv(eqn: core.JaxprEqn) -> Cost:
    numbers = eqn.params["dimension_numbers"]
    kernel, out = _shape(eqn.invars[1]), _shape(eqn.outvars[0])
    # All axes of the kernel but its output features meet each output entry; padding counts as data.
    per_output = math.prod(n for axis, n in enumerate(kernel) if axis != numbers.rhs_spec[0])
    visited = 2.0 * math.prod(out) * per_output
    # A dilated input (a transposed convolution) is mostly zeros that the mathematics leaves out.
    return Cost(visited / math.prod(eqn.params["lhs_dilation"]), visited)


_CONTRACTIONS = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _conv,
}


def _source(eqn: core.JaxprEqn) -> str:
    """``file:line (function)`` of the user's code that made the equation."""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        if "/jax/_src/" not in frame.file_name:
            return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
    return str(eqn.source_info.name_stack) or "unknown source"
