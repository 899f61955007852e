"""The depth of a model: scans over segments of a repeating period of blocks."""

import functools
import itertools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from moejax import axes
from moejax.config.checks import require
from moejax.config.trunk import TrunkConfig
from moejax.nn.block import make_block
from moejax.nn.context import Context
from moejax.nn.depth import RouterWeights, run_or_skip
from moejax.nn.moe import Experts


class Segment(NamedTuple):
    """``repeats`` copies of a period of block kinds, from layer ``first`` on.

    In a ``separate`` one tokens see those of their own modality alone.
    """

    kinds: tuple[str, ...]
    repeats: int
    first: int
    separate: bool = False


def segments_of(config: TrunkConfig) -> tuple[Segment, ...]:
    """The fewest scans that cover the depth: first blocks, whole periods, rest, last blocks.

    Where some layers do not share attention, one for each run of blocks that are alike.
    """
    found: list[Segment] = []

    def add(kinds: tuple[str, ...], repeats: int, separate: bool = False):
        first = found[-1].first + len(found[-1].kinds) * found[-1].repeats if found else 0
        if kinds and repeats:
            found.append(Segment(kinds, repeats, first, separate))

    def add_runs(kinds: tuple[str, ...], share: tuple[bool, ...] = ()):
        layers = list(zip(kinds, share or (True,) * len(kinds), strict=True))
        for (kind, shared), run in itertools.groupby(layers):
            add((kind,), len(list(run)), separate=not shared)

    if not all(config.share_attention):
        add_runs(config.block_kinds(), config.share_attention)
        return tuple(found)
    period = config.block_pattern
    middle = config.num_layers - len(config.first_blocks) - len(config.last_blocks)
    add_runs(config.first_blocks)
    if config.moe.pool_layers == 1 and len(set(period)) == 1:
        add_runs(period[:1] * middle)
    else:
        add(period, middle // len(period))
        add_runs(period[: middle % len(period)])
    add_runs(config.last_blocks)
    return tuple(found)


class Period(nn.Module):
    """One period of blocks; the body that a segment scans over."""

    config: TrunkConfig
    kinds: tuple[str, ...]
    first: int

    @nn.compact
    def __call__(self, x_and_carry, layer_state, repeat, ctx: Context):
        x, carry = x_and_carry
        layer_index = self.first + repeat * len(self.kinds)
        states, auxes = {}, {}
        moe, pool = self.config.moe, None
        if moe.pool_layers > 1 and len(self.kinds) == moe.pool_layers:
            pool = Experts(self.config, moe.pool, name="pool")()
        for i, kind in enumerate(self.kinds):
            name = f"block_{i}"
            rng = None if ctx.rng is None else jax.random.fold_in(ctx.rng, layer_index + i)
            own = ctx.replace(rng=rng, pool=pool, pool_index=i, layer=layer_index + i)
            if ctx.stored is not None:
                own = own.replace(stored=ctx.stored.get(name), repeats=(*ctx.repeats, repeat))
            block = make_block(self.config, kind, name)
            run = functools.partial(run_or_skip, block) if ctx.skippable else block
            with jax.named_scope(kind):
                x, carry, states[name], auxes[name] = run(x, carry, layer_state.get(name, {}), own)
        if ctx.train and not ctx.keep_rows:
            # Training keeps no keys and values; without this the scan would stack them all.
            states = jax.tree.map(lambda _: None, states)
        return (x, carry), (states, auxes)


_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Stack(nn.Module):
    """All layers. ``carry`` goes on through segments of equal shape, else it starts anew."""

    config: TrunkConfig

    @nn.compact
    def __call__(self, x_btd: jax.Array, layer_state: dict, ctx: Context):
        """Returns (x, new layer_state, aux); both dicts are keyed by segment, leaves [l, ...]."""
        new_state, aux, carry = {}, {}, {}
        if self.config.depth.router_shared and "mod" in self.config.base_kinds():
            ctx = ctx.replace(depth_router=RouterWeights(self.config, name="depth_router")())
        stored = ctx.stored
        if stored is None and layer_state and not self.is_initializing():
            stored = meta.unbox(self.variables["params"])
        # Layer state and number are sliced, the context is not; Linen's annotation says "int".
        in_axes: Any = (0, 0, nn.broadcast)
        body = Period
        if self.config.remat != "none":
            policy = _REMAT_POLICIES[self.config.remat]
            body = nn.remat(Period, policy=policy, prevent_cse=False)
        for i, segment in enumerate(segments_of(self.config)):
            name = f"segment_{i}"
            scan = nn.scan(
                body,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=in_axes,
                length=segment.repeats,
                unroll=segment.repeats if self.config.unroll else 1,
                metadata_params={nn.PARTITION_NAME: axes.LAYERS},
            )
            own = ctx.replace(stored=stored and stored[name], separate=segment.separate)
            fresh = initial_carry(self.config, segment, x_btd)
            same = jax.tree.map(jnp.shape, carry) == jax.tree.map(jnp.shape, fresh)
            carry = carry if same else fresh
            (x_btd, carry), (new_state[name], aux[name]) = scan(
                self.config, segment.kinds, segment.first, name=name
            )((x_btd, carry), layer_state.get(name, {}), jnp.arange(segment.repeats), own)
        return x_btd, new_state, aux


def initial_carry(config: TrunkConfig, segment: Segment, x_btd: jax.Array) -> dict:
    """What the first layer of a segment is given from the layers before: zeros, or nothing."""
    kinds = [config.for_block(kind) for kind in segment.kinds]
    columns = {own.moe.columns for _, own in kinds if own.moe.score.gating_residual}
    if not columns:
        return {}
    require(
        len(columns) == 1,
        "model.moe.score.gating_residual",
        "needs as many experts in each block of model.block_pattern",
    )
    dtype = jnp.promote_types(x_btd.dtype, jnp.float32)
    return {"router_logits": jnp.zeros((*x_btd.shape[:2], columns.pop()), dtype)}
