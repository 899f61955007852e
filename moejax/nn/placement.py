"""Where the experts of a layer lie on the mesh, and how tokens come to them."""

import math
from typing import NamedTuple

from moejax.config.moe import MoEConfig
from moejax.parallel.exchange import choose_exchange
from moejax.parallel.local import axis_size, token_axes
from moejax.routing import RoutingPlan


class Placement(NamedTuple):
    """How the experts of a layer are run on the mesh.

    Attributes:
      exchange: a name of ``moejax.parallel.exchange``.
      spread: whether a device holds a part of the experts only.
      groups: the most routing groups whose tokens, all or some, may be computed on one device.
    """

    exchange: str
    spread: bool
    groups: int


def placement(
    moe: MoEConfig, plan: RoutingPlan, tokens: tuple[int, int, int], weights: int
) -> Placement:
    """For tokens [b, t, d] and experts of so many numbers, on the context mesh."""
    b, t, d = tokens
    own, devices = token_axes(b, t), axis_size("expert")
    way = choose_exchange(
        moe.exchange,
        devices=devices,
        split="expert" in own.batch,
        tokens=b * t // math.prod(map(axis_size, (*own.batch, *own.length))),
        k=plan.expert_ids.shape[-1],
        width=d,
        weights=weights,
        buffer=moe.exchange_buffer,
    )
    spread = way != "fsdp"
    rows = b // math.prod(map(axis_size, own.batch)) * (devices if spread else 1)
    size = b // plan.expert_ids.shape[0]
    # A row more than a whole number of groups can touch one more at either end.
    groups = -(-(rows + size - math.gcd(rows, size)) // size)
    return Placement(way, spread, groups)
