"""Towers of unequal size, and layers in which they do not see each other (HBridge)."""

import dataclasses
from typing import Any, NamedTuple

from moejax.config.checks import require


@dataclasses.dataclass(frozen=True)
class TowersConfig:
    """How wide the tower of each modality is (HBridge, arXiv 2511.20520; nn/tower_attention.py).

    A token's vector has model.d_model features, of which a narrower tower reads and writes the
    first ones alone. All weights are each tower's own, and heads are of one size.
    """

    # Width of each modality's tower, the largest model.d_model; (): towers are alike.
    widths: tuple[int, ...] = ()
    # Heads of each; those of the first of the widest towers are model.num_heads, and the others
    # have no more. (): as many for all.
    heads: tuple[int, ...] = ()


class Tower(NamedTuple):
    """One of several towers of their own sizes.

    Attributes:
      name: its modality.
      width: features of the tokens that it reads and writes.
      heads: of its queries.
      kv_heads: of its keys and values, in the same proportion for all towers.
      bridged: whether linear maps lead from its heads to the common ones and back, in layers that
        share attention: in all towers but the first of the widest, whose heads those are.
    """

    name: str
    width: int
    heads: int
    kv_heads: int
    bridged: bool


def towers_of(model: Any) -> tuple[Tower, ...]:
    """Those of a ``TrunkConfig``; () where all are alike."""
    widths = model.towers.widths
    if not widths:
        return ()
    heads = model.towers.heads or (model.num_heads,) * len(widths)
    common = widths.index(model.d_model)
    return tuple(
        Tower(name, width, own, own * model.kv_heads // model.num_heads, i != common)
        for i, (name, width, own) in enumerate(zip(model.modalities, widths, heads, strict=True))
    )


def check_towers(model: Any) -> None:
    """UserError unless ``model.towers`` of a ``TrunkConfig`` fits the rest of it."""
    widths, heads, count = model.towers.widths, model.towers.heads, len(model.modalities)
    if not widths:
        require(not heads, "model.towers.heads", "needs model.towers.widths")
        return
    for name, sizes in (("widths", widths), ("heads", heads or widths)):
        require(
            len(sizes) == count and min(sizes) > 0,
            f"model.towers.{name}",
            f"give a positive number for each of {count} modalities, got {sizes}",
        )
    require(
        max(widths) == model.d_model,
        "model.towers.widths",
        f"the widest of {widths} must be model.d_model={model.d_model}",
    )
    own_heads = heads or (model.num_heads,) * count
    require(
        own_heads[widths.index(model.d_model)] == max(own_heads) == model.num_heads,
        "model.towers.heads",
        f"the widest tower has the most, model.num_heads={model.num_heads}; got {heads}",
    )
    require(
        all(own * model.kv_heads % model.num_heads == 0 for own in own_heads),
        "model.towers.heads",
        f"{own_heads} in proportion to model.num_heads={model.num_heads} leave no whole number of "
        f"model.num_kv_heads={model.kv_heads}",
    )
    require(
        all(dataclasses.astuple(model.untie)),
        "model.towers.widths",
        "towers of their own widths share no weights: set all of model.untie",
    )
    require(
        set(model.block_kinds()) == {"untied"},
        "model.towers.widths",
        f"need blocks of kind 'untied' alone, got {sorted(set(model.block_kinds()))}",
    )


def check_share_attention(model: Any) -> None:
    """UserError unless ``model.share_attention`` of a ``TrunkConfig`` fits the rest of it."""
    share = model.share_attention
    require(
        len(share) in (0, model.num_layers),
        "model.share_attention",
        f"give True or False for each of model.num_layers={model.num_layers}, got {len(share)}",
    )
    if not share:
        return
    require(len(model.modalities) > 1, "model.share_attention", "there is one modality alone")
    require(
        "recursive" not in model.base_kinds(),
        "model.share_attention",
        "a 'recursive' block is several layers in one, of which it cannot speak; leave it ()",
    )
    require(
        model.moe.pool_layers == 1,
        "model.share_attention",
        "layers that share their experts (model.moe.pool_layers) are cut into no other segments; "
        "leave it ()",
    )
