"""Code that runs on each device's own tokens, with the weights it needs there."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.axes import BATCH_AXES
from pallas_kernels.varying import varying_axes

_BATCH, _LENGTH = "batch", "length"
# How an array lies over the mesh. Batch and length are placeholders: see TokenAxes.
TOKENS = P(_BATCH, _LENGTH)  # [b, t, ...]
FEATURES = P(_BATCH, _LENGTH, "tensor")  # [b, t, f, ...], f split over the tensor axis
ROWS = P(_BATCH)  # [b, ...]
# [b, s, f, ...]: every device of the sequence axis holds all s.
ROW_FEATURES = P(_BATCH, None, "tensor")
PER_DEVICE = P((_BATCH, _LENGTH))  # [1, ...] on each device, of its own tokens
# Weights [m or e, d, f] and [m or e, f, d], f split over the tensor axis; see _gathered for d.
COLUMNS = P(None, "fsdp", "tensor")
INNER = P(None, "tensor", "fsdp")


class TokenAxes(NamedTuple):
    """The mesh axes that tokens [b, t] are split over: those that divide them.

    A batch of a decoder's may be one row, and its length one token; what the axes left out would
    have split lies whole on each of their devices.
    """

    batch: tuple[str, ...]
    length: tuple[str, ...]


def token_axes(b: int, t: int) -> TokenAxes:
    """For tokens [b, t] on the context mesh; none without a mesh."""
    batch: list[str] = []
    for axis in BATCH_AXES:
        if b % (axis_size(axis) * math.prod(map(axis_size, batch))):
            break
        batch.append(axis)
    length = ("sequence",) if t % axis_size("sequence") == 0 else ()
    return TokenAxes(tuple(batch), length)


def axis_size(name: str) -> int:
    """Devices along an axis of the context mesh; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[name]


def run_local(function: Callable, *operands: tuple[Any, P], tokens: tuple[int, ...], out: P):
    """``function(*values)`` inside one ``shard_map`` over the context mesh.

    Without a mesh the function is just called: in a notebook a model needs none.

    Args:
      function: of the values as they lie on one device. Where it multiplies by what is split over
        the tensor axis and sums over that, it ends in :func:`tensor_sum`.
      operands: (pytree, spec) pairs, the specs from the constants above.
      tokens: (b, t), of the whole arrays.
      out: spec of everything that the function returns.
    """
    values = tuple(value for value, _ in operands)
    if jax.sharding.get_abstract_mesh().empty:
        return function(*values)
    b, t = tokens
    own = token_axes(b, t)
    in_specs = tuple(_resolve(spec, own) for _, spec in operands)

    def local(*values):
        whole = (_gathered(value, spec) for value, spec in zip(values, in_specs, strict=True))
        return function(*whole)

    return jax.shard_map(local, in_specs=in_specs, out_specs=_resolve(out, own))(*values)


def _gathered(weights: Any, spec: P) -> Any:
    """Weights whole along the fsdp axis, where ``spec`` splits them over it.

    Gathered here and not on the way in, their gradient is a reduce-scatter: what enters whole has
    an all-reduce of the whole gradient, which not every compiler turns into one.
    """
    entries = tuple(spec)
    if "fsdp" not in entries:
        return weights
    gather = functools.partial(
        jax.lax.all_gather, axis_name="fsdp", axis=entries.index("fsdp"), tiled=True
    )
    return jax.tree.map(gather, weights)


def _resolve(spec: P, own: TokenAxes) -> P:
    # Where tokens are not split over the fsdp axis, weights come whole.
    weights = ("fsdp",) if "fsdp" in own.batch else ()
    meaning = {_BATCH: own.batch, _LENGTH: own.length, "fsdp": weights}

    def axes_of(entry):
        names = entry if isinstance(entry, tuple) else (entry,)
        found = tuple(axis for name in names for axis in meaning.get(name, (name,)))
        # A name and a tuple of one mean the same to jax, but not to _gathered.
        return found if len(found) > 1 else next(iter(found), None)

    return P(*(None if entry is None else axes_of(entry) for entry in spec))


def tensor_sum(x: jax.Array) -> jax.Array:
    """The sum over the tensor axis, in float32 or wider, of what differs along it.

    Inside :func:`run_local`; elsewhere, and where nothing was split, it is ``x``.
    """
    if "tensor" not in varying_axes(x):
        return x
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jax.lax.psum(wide, "tensor").astype(x.dtype)


def interleave(w: jax.Array, parts: tuple[int, ...]) -> jax.Array:
    """Columns ``[a | b]`` reordered to ``[a_0 b_0 | a_1 b_1 | ...]`` for the tensor axis.

    Maps that belong together (gate and up; queries, keys and values) lie side by side in one
    weight. After this each device's slice of the columns holds a slice of each of them.

    Args:
      w: [..., f].
      parts: their widths, which the tensor axis divides; they sum to f.
    """
    shards = axis_size("tensor")
    if shards == 1 or len(parts) == 1:
        return w
    cuts = [sum(parts[: i + 1]) for i in range(len(parts) - 1)]
    pieces = [piece.reshape(*w.shape[:-1], shards, -1) for piece in jnp.split(w, cuts, axis=-1)]
    return jnp.concatenate(pieces, axis=-1).reshape(w.shape)


def constrain_tokens(x_btd: jax.Array) -> jax.Array:
    """Says that tokens lie split over batch and sequence axes; the same array without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x_btd
    spec = _resolve(TOKENS, token_axes(*x_btd.shape[:2]))
    return jax.lax.with_sharding_constraint(x_btd, spec)
