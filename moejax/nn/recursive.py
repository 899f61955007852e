"""Layers that are run several times with the same weights, by all tokens or by fewer each time."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax import axes
from moejax.config.checks import require
from moejax.config.depth import STEP_BIAS, DepthConfig, RecursionConfig
from moejax.config.trunk import TrunkConfig
from moejax.depth import Selection, choose, gate_of, number_of, select, warmed_up
from moejax.nn.block import BLOCKS
from moejax.nn.context import Context
from moejax.nn.depth import Scores, decide, find_room, is_cached, run_selected, who_runs
from moejax.nn.layers import fan_in_normal, param_dtype, partitioned
from moejax.nn.stack import Stack
from moejax.ops.attention import put_rows

# Dropout differs from step to step.
_STEP = 256


class RecursiveBlock(nn.Module):
    """Mixture-of-Recursions, arXiv 2507.10524; without a router a recursive transformer.

    ``F`` is a stack of ``model.recursion.layers`` blocks, residuals included.

    - "none": ``x <- F(x)``, ``steps`` times.
    - "expert": before step r each token that ran the step before is scored by a router of the
      step's own, and the best, a share of the whole row, run it: ``x <- x + g F(x)`` as
      ``model.depth`` has it (eq. 2.1; the first step takes all, and is weighed too).
    - "token": one router at the start gives each token its number of steps i, the arg max of p =
      softmax(W x), to which a controller may add a bias: ``x <- F(x)`` so often, then ``x_0 + p_i
      x`` (the authors' code). With ``gate_steps`` it is ``x <- p_r F(x)`` in step r, then ``x_0 +
      x`` (eq. 2.2).

    Shared keys and values are those of the first step, of all tokens; with ``update_kv`` those of
    the last step that a token ran.
    """

    config: TrunkConfig

    @nn.compact
    def __call__(self, x_btd: jax.Array, carry: dict, layer_state: dict, ctx: Context):
        cfg, depth, recursion = self.config, self.config.depth, self.config.recursion
        layers, states, shared, kept, decisions = self._layers(), {}, {}, [], []
        ones_bt = jnp.ones(x_btd.shape[:2], param_dtype(cfg))
        depths = self._depths(x_btd) if recursion.router == "token" else None
        begin_btd, alive_bt, cached = x_btd, ctx.valid_bt, is_cached(layer_state)
        for index in range(recursion.steps):
            own = layer_state.get(f"step_{index}", {})
            score_bt, gate_bt = ones_bt, ones_bt
            if recursion.router == "expert":
                alive_bt, score_bt, sums = self._best(index, x_btd, alive_bt, cached, ctx)
                gate_bt = gate_of(depth.gate, score_bt, depth.gate_scale)
                decisions += [sums] if sums else []
            if depths is not None:
                alive_bt, score_bt = alive_bt & (depths.steps_bt > index), depths.weight_bt
            alive_bt, room = self._room(index, alive_bt, own, ctx)
            selection = select(alive_bt, room, score_bt)
            # Who finds no room is done.
            alive_bt = who_runs(selection, x_btd.shape[1])
            x_btd, state = self._step(
                layers, index, x_btd, layer_state, shared, ctx, selection, gate_bt
            )
            if depths is not None and recursion.gate_steps:
                weight_bt = jnp.where(alive_bt, depths.probs_btr[..., index], 1)
                x_btd = x_btd * weight_bt[..., None].astype(x_btd.dtype)
            shared = state if index == 0 or recursion.update_kv else shared
            states[f"step_{index}"] = state
            kept.append(alive_bt)
        aux: dict[str, Any] = {}
        if depths is not None:
            weight_bt = ones_bt if recursion.gate_steps else depths.weight_bt
            ended_btd = begin_btd + x_btd * weight_bt[..., None].astype(x_btd.dtype)
            # Padding, and tokens without room in the first step.
            x_btd = jnp.where(kept[0][..., None], ended_btd, begin_btd)
            aux["recursion"] = recursion_sums(depths.logits_btr, depths.steps_bt, ctx.valid_bt)
        if decisions:
            aux["sums"] = jax.tree.map(lambda *one: jnp.stack(one), *decisions)
        if ctx.record and recursion.router != "none":
            aux["kept"] = jnp.stack(kept)
        return x_btd, carry, {} if ctx.train else states, {"depth": aux} if aux else {}

    def _layers(self) -> nn.Module:
        cfg = self.config
        own = dataclasses.replace(
            cfg,
            num_layers=cfg.recursion.layers,
            block_pattern=(cfg.depth.block,),
            first_blocks=(),
            last_blocks=(),
        )
        return _Layers(own, name="layers")

    def _best(self, index: int, x_btd, alive_bt, cached: bool, ctx: Context):
        """The router "expert" of a step: who runs it, scores [b, t], sums of the decision."""
        depth = self.config.depth
        share: Any = self.config.recursion.shares[index]
        scores = Scores(self.config, decides=share < 1, name=f"router_{index}")
        score_bt, decision_bt = scores(x_btd, ctx)
        if share == 1:
            return alive_bt, score_bt, {}
        if depth.warmup_steps and ctx.train and ctx.step is not None:
            share = warmed_up(share, ctx.step, depth.warmup_steps)
        with_sight = functools.partial(
            choose,
            jax.lax.stop_gradient(score_bt),
            alive_bt,
            share,
            depth.rounding,
            counted_bt=ctx.valid_bt,
        )
        alive_bt, sums = decide(depth, decision_bt, alive_bt, with_sight, ctx, cached=cached)
        return alive_bt, score_bt, sums

    def _depths(self, x_btd) -> "_Depths":
        """The router "token"."""
        cfg, steps, dtype = self.config, self.config.recursion.steps, param_dtype(self.config)
        router_dr = self.param(
            "router_dr",
            partitioned(fan_in_normal((0,)), axes.EMBED, None),
            (cfg.d_model, steps),
            dtype,
        )
        logits = jnp.einsum("btd,dr->btr", x_btd.astype(dtype), router_dr, precision="highest")
        probs = jax.nn.softmax(logits)
        biased = probs
        if cfg.recursion.balance.name != "none":
            zeros = partitioned(nn.initializers.zeros, None)
            bias_r = self.param(STEP_BIAS, zeros, (steps,), dtype)
            biased = probs + bias_r[None, None]
        chosen_bt = biased.argmax(axis=-1)
        # The bias takes part in the choice alone.
        weight_bt = jnp.take_along_axis(probs, chosen_bt[..., None], axis=-1)[..., 0]
        return _Depths(chosen_bt + 1, weight_bt, probs, logits)

    def _room(self, index: int, wanted_bt, own: dict, ctx: Context):
        """Who finds room in a step, and its places."""
        cfg = self.config
        if ctx.train:
            return wanted_bt, training_room(cfg, index, wanted_bt.shape[1])
        return find_room(cfg.depth, _share(cfg.recursion, index), wanted_bt, own, ctx)

    def _step(self, layers, index: int, x_btd, layer_state, shared, ctx, selection, gate_bt):
        """One step on the selected tokens; (x, state)."""
        recursion = self.config.recursion
        given = recursion.share_kv and index > 0
        updated = given and recursion.update_kv
        own = layer_state.get(f"step_{index}", {})
        if given:
            own = _given(shared, own if updated else layer_state.get("step_0", {}))
        ctx = ctx.replace(
            rng=None if ctx.rng is None else jax.random.fold_in(ctx.rng, _STEP + index),
            keep_rows=recursion.share_kv and (index == 0 or updated),
            place_bc=selection.index_bc if updated else None,
            stored=ctx.stored and ctx.stored["layers"]["stack"],
            skippable=recursion.router != "none",
        )
        x_btd, _, state, _ = run_selected(
            layers, x_btd, {}, own, ctx, selection, gate_bt, self._merge(), keys_of_all=given
        )
        return x_btd, _updated(shared, state, selection) if updated else state

    def _merge(self) -> TrunkConfig:
        """Only the router "expert" weighs a step."""
        cfg = self.config
        if cfg.recursion.router == "expert":
            return cfg
        depth = dataclasses.replace(cfg.depth, branch="delta", gate_on="block")
        return dataclasses.replace(cfg, depth=depth)


class _Depths(NamedTuple):
    """What the router "token" says: numbers of steps, from 1 on, and their probabilities."""

    steps_bt: jax.Array
    weight_bt: jax.Array
    probs_btr: jax.Array
    logits_btr: jax.Array


def training_room(config: TrunkConfig, index: int, length: int) -> int:
    """Tokens of a row of that length that a step runs on in training."""
    recursion, share = config.recursion, _share(config.recursion, index)
    if recursion.router == "token":
        room = recursion.room
        return number_of(min(1.0, room * share), length, "up") if room else length
    if config.depth.warmup_steps:
        return length
    return max(1, number_of(share, length, config.depth.rounding))


def _share(recursion: RecursionConfig, index: int) -> float:
    """Of the tokens that run a step; of the router "token", if each number of steps is as usual."""
    if recursion.router == "none":
        return 1.0
    if recursion.router == "expert":
        return recursion.shares[index]
    return (recursion.steps - index) / recursion.steps


class _Layers(nn.Module):
    """A stack as a block; nothing is carried from layer to layer."""

    config: TrunkConfig

    @nn.compact
    def __call__(self, x_btd: jax.Array, carry: dict, layer_state: dict, ctx: Context):
        x_btd, state, aux = Stack(self.config, name="stack")(x_btd, layer_state, ctx)
        return x_btd, carry, state, aux


def _given(shared: dict, cached: dict) -> dict:
    """The layer state of a later step: keys and values of earlier steps, new and cached."""
    given = {
        segment: {
            block: {"given": {"k": rows["cache"]["k"], "v": rows["cache"]["v"]}}
            for block, rows in blocks.items()
        }
        for segment, blocks in shared.items()
    }
    for segment, blocks in cached.items():
        for block, rows in blocks.items():
            given[segment][block]["cache"] = rows["cache"]
    return given


def _updated(shared: dict, own: dict, selection: Selection) -> dict:
    """``shared`` with the keys and values of a step's own tokens in the place of theirs."""
    put = jax.vmap(put_rows, in_axes=(0, 0, None, None))

    def of_block(rows: dict, new: dict) -> dict:
        own_rows = {name: put(rows[name], new[name], *selection) for name in ("k", "v")}
        return {"cache": {**rows, **own_rows}}

    return {
        segment: {
            block: of_block(rows["cache"], own[segment][block]["cache"])
            for block, rows in blocks.items()
        }
        for segment, blocks in shared.items()
    }


def recursion_sums(logits_btr, steps_bt, valid_bt) -> dict[str, jax.Array]:
    """Sums over the tokens for the losses of the router "token": counts, probabilities, z."""
    steps = logits_btr.shape[-1]
    keep = valid_bt[..., None].astype(logits_btr.dtype)
    return {
        "chosen_r": (jax.nn.one_hot(steps_bt - 1, steps) * keep).sum(axis=(0, 1)),
        "probs_r": (jax.nn.softmax(logits_btr) * keep).sum(axis=(0, 1)),
        "z": (jnp.square(jax.nn.logsumexp(logits_btr, axis=-1)) * keep[..., 0]).sum(),
        "count": keep.sum(),
    }


def check_recursion(config: TrunkConfig) -> None:
    """UserError, by field, for layers that cannot be run again."""
    inner, _ = config.for_block(config.depth.block)
    require(
        inner in ("untied", "dense"),
        "model.depth.block",
        f"{config.depth.block!r} cannot be run several times by model.recursion; untied or dense",
    )
    recursion: RecursionConfig = config.recursion
    unused = ("group", "within", "modality", "room", "weigh_skipped")
    for name in (*unused, "random_choice", "router_shared"):
        require(
            getattr(config.depth, name) == getattr(DepthConfig, name),
            f"model.depth.{name}",
            "is of 'mod', not of 'recursive'; leave it as it is by default",
        )
    require(
        recursion.router == "expert" or not config.depth.warmup_steps,
        "model.depth.warmup_steps",
        "is 0 where model.recursion.router is not 'expert'",
    )
    require(
        not (config.depth.eval_room and recursion.share_kv),
        "model.depth.eval_room",
        "is 0 where later steps have no keys of their own (model.recursion.share_kv)",
    )
    require(
        recursion.router != "expert" or config.depth.gate_on == "block",
        "model.depth.gate_on",
        "is 'block' where model.recursion.router is 'expert'",
    )


@BLOCKS.register("recursive")
def recursive_block(config: TrunkConfig, name: str) -> nn.Module:
    """``model.recursion.layers`` blocks, run several times (Mixture-of-Recursions)."""
    check_recursion(config)
    return RecursiveBlock(config, name=name)
