"""Blocks by their number: the same layers, cut into other segments.

A stack is a scan over segments of repeating blocks (moejax/nn/stack.py), so that a parameter of
``stack/segment_1/block_0`` holds several layers, one in each row of its first axis. Two models of
one depth can be cut differently: all blocks dense, or every other one with experts.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config.trunk import TrunkConfig
from moejax.nn.stack import segments_of

# What a layer's parameter is made of: the path there, and the row of its first axis.
Rows = tuple[tuple[str, int], ...]
_BLOCK = re.compile(r"^(stack/segment_(\d+)/block_(\d+)/)(.+)$")


def layers_of_blocks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The numbers of the layers that lie in each block, by ``"stack/segment_1/block_0/"``.

    Args:
      shapes: of the parameters by path; others than those of blocks are not looked at.
    """
    repeats: dict[int, int] = {}
    blocks: dict[int, int] = {}
    for name, shape in shapes.items():
        if found := _BLOCK.match(name):
            segment, block = int(found[2]), int(found[3])
            repeats[segment] = shape[0]
            blocks[segment] = max(blocks.get(segment, 0), block + 1)
    layers, first = {}, 0
    for segment in sorted(repeats):
        period = blocks[segment]
        for block in range(period):
            numbers = tuple(first + period * i + block for i in range(repeats[segment]))
            layers[f"stack/segment_{segment}/block_{block}/"] = numbers
        first += period * repeats[segment]
    return layers


def block_of(name: str) -> str:
    """``"stack/segment_1/block_0/"`` of a parameter's path; "" for one that is in no block."""
    match = _BLOCK.match(name)
    return match[1] if match else ""


def recut(
    here: Mapping[str, tuple[int, ...]], there: Mapping[str, tuple[int, ...]], names: Iterable[str]
) -> dict[str, tuple[Rows, tuple[int, ...]]] | None:
    """Of what the ``names`` are made that a model cut as ``here`` would call parameters there.

    Args:
      here: shapes by path of the model that is to begin.
      there: shapes by path of the parameters that are there.
      names: paths as ``here`` has them, such as ``"stack/segment_1/block_0/ffn/wi_mdf"``.

    Returns:
      By name the rows there and the shape that they have together, for those names of which all
      layers are there in one shape. None where both are cut alike, or differ in depth.
    """
    ours, theirs = layers_of_blocks(here), layers_of_blocks(there)
    places = {
        number: (block, row)
        for block, numbers in theirs.items()
        for row, number in enumerate(numbers)
    }
    if ours == theirs or sum(map(len, ours.values())) != len(places):
        return None
    found = {}
    for name in names:
        match = _BLOCK.match(name)
        if match is None or match[1] not in ours:
            continue
        rows = tuple((places[i][0] + match[4], places[i][1]) for i in ours[match[1]])
        shapes = {there.get(path, ())[1:] for path, _ in rows}
        if all(path in there for path, _ in rows) and len(shapes) == 1:
            found[name] = rows, (len(rows), *shapes.pop())
    return found


def layers_of(config: TrunkConfig, stack: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parameters of each block of a stack, in order."""
    layers = []
    for i, segment in enumerate(segments_of(config)):
        held = stack[f"segment_{i}"]
        for repeat in range(segment.repeats):
            for j in range(len(segment.kinds)):
                take = lambda leaf, repeat=repeat: leaf[repeat]
                layers.append(jax.tree.map(take, held[f"block_{j}"]))
    return layers


def as_stack(config: TrunkConfig, layers: Sequence[Any]) -> dict[str, Any]:
    """The inverse of :func:`layers_of`."""
    stack = {}
    for i, segment in enumerate(segments_of(config)):
        period = len(segment.kinds)
        last = segment.first + period * segment.repeats
        stack[f"segment_{i}"] = {
            f"block_{j}": jax.tree.map(
                lambda *leaves: jnp.stack(leaves), *layers[segment.first + j : last : period]
            )
            for j in range(period)
        }
    return stack
