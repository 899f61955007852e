"""Layers that are run several times with the same weights, by all tokens or by fewer each time."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax import axes
from moejax.config.checks import require
from moejax.config.depth import DepthConfig, RecursionConfig
from moejax.config.trunk import TrunkConfig
from moejax.depth import choose, gate_of, number_of, select
from moejax.nn.block import BLOCKS
from moejax.nn.context import Context
from moejax.nn.depth import Scores, decide, find_room, is_cached, run_selected, who_runs
from moejax.nn.layers import fan_in_normal, param_dtype, partitioned
from moejax.nn.stack import Stack

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
      softmax(W x): ``x <- F(x)`` so often, then ``x_0 + p_i x`` (the authors' code; eq. 2.2 weighs
      each step, ``gate_steps``).

    Shared keys and values are those of the first step, of all tokens.
    """

    config: TrunkConfig

    @nn.compact
    def __call__(self, x_btd: jax.Array, carry: dict, layer_state: dict, ctx: Context):
        run = {"none": self._plain, "expert": self._expert, "token": self._token}
        x_btd, state, aux = run[self.config.recursion.router](x_btd, layer_state, ctx)
        return x_btd, carry, state, aux

    def _layers(self, layer_state: dict) -> nn.Module:
        cfg = self.config
        own = dataclasses.replace(
            cfg,
            num_layers=cfg.recursion.layers,
            block_pattern=(cfg.depth.block,),
            first_blocks=(),
            last_blocks=(),
            # A loop inside of a choice begins with a copy of all weights that it reads.
            unroll=cfg.unroll or is_cached(layer_state),
        )
        return _Layers(own, name="layers")

    def _step(self, layers, index: int, x_btd, first: dict, layer_state, ctx, selection, gate_bt):
        """One step on the selected tokens; (x, state)."""
        share_kv = self.config.recursion.share_kv
        own = dict(layer_state.get(f"step_{index}", {}))
        given = share_kv and index > 0
        if given:
            own = _given(first, layer_state.get("step_0", {}))
        rng = None if ctx.rng is None else jax.random.fold_in(ctx.rng, _STEP + index)
        ctx = ctx.replace(rng=rng, keep_rows=share_kv and index == 0)
        x_btd, _, state, _ = run_selected(
            layers, x_btd, {}, own, ctx, selection, gate_bt, self._merge(), keys_of_all=given
        )
        return x_btd, state

    def _merge(self) -> TrunkConfig:
        """Only the router "expert" weighs a step."""
        cfg = self.config
        if cfg.recursion.router == "expert":
            return cfg
        depth = dataclasses.replace(cfg.depth, branch="delta", gate_on="block")
        return dataclasses.replace(cfg, depth=depth)

    def _states(self, states: dict, ctx: Context) -> dict:
        return {} if ctx.train else states

    def _plain(self, x_btd, layer_state: dict, ctx: Context):
        layers, states = self._layers(layer_state), {}
        ones_bt = jnp.ones(x_btd.shape[:2], param_dtype(self.config))
        everyone = select(ctx.valid_bt, x_btd.shape[1])
        for index in range(self.config.recursion.steps):
            x_btd, states[f"step_{index}"] = self._step(
                layers,
                index,
                x_btd,
                states.get("step_0", {}),
                layer_state,
                ctx,
                everyone,
                ones_bt,
            )
        return x_btd, self._states(states, ctx), {}

    def _expert(self, x_btd, layer_state: dict, ctx: Context):
        cfg, depth, recursion = self.config, self.config.depth, self.config.recursion
        layers, states, sums, kept = self._layers(layer_state), {}, [], []
        alive_bt = ctx.valid_bt
        for index, share in enumerate(recursion.shares):
            scores = Scores(cfg, decides=share < 1, name=f"router_{index}")
            score_bt, decision_bt = scores(x_btd, ctx)
            own = layer_state.get(f"step_{index}", {})
            if share < 1:
                with_sight = functools.partial(
                    choose,
                    jax.lax.stop_gradient(score_bt),
                    alive_bt,
                    share,
                    depth.rounding,
                    counted_bt=ctx.valid_bt,
                )
                cached = is_cached(layer_state)
                alive_bt, one = decide(depth, decision_bt, alive_bt, with_sight, ctx, cached=cached)
                sums += [one] if one else []
            alive_bt, room = self._room(index, alive_bt, own, ctx)
            selection = select(alive_bt, room, score_bt)
            gate_bt = gate_of(depth.gate, score_bt, depth.gate_scale)
            x_btd, states[f"step_{index}"] = self._step(
                layers, index, x_btd, states.get("step_0", {}), layer_state, ctx, selection, gate_bt
            )
            kept.append(alive_bt)
        aux = {"sums": jax.tree.map(lambda *one: jnp.stack(one), *sums)} if sums else {}
        return x_btd, self._states(states, ctx), _aux(aux, kept, ctx)

    def _token(self, x_btd, layer_state: dict, ctx: Context):
        cfg, recursion = self.config, self.config.recursion
        t, dtype = x_btd.shape[1], param_dtype(self.config)
        router_dr = self.param(
            "router_dr",
            partitioned(fan_in_normal((0,)), axes.EMBED, None),
            (cfg.d_model, recursion.steps),
            dtype,
        )
        logits = jnp.einsum("btd,dr->btr", x_btd.astype(dtype), router_dr, precision="highest")
        probs = jax.nn.softmax(logits)
        steps_bt = probs.argmax(axis=-1) + 1
        weight_bt = probs.max(axis=-1)
        gate_bt = weight_bt if recursion.gate_steps else jnp.ones_like(weight_bt)
        begin, layers, states, kept = x_btd, self._layers(layer_state), {}, []
        alive_bt = ctx.valid_bt
        for index in range(recursion.steps):
            alive_bt = alive_bt & (steps_bt > index)
            own = layer_state.get(f"step_{index}", {})
            alive_bt, room = self._room(index, alive_bt, own, ctx)
            selection = select(alive_bt, room, weight_bt)
            # Who finds no room is done.
            alive_bt = who_runs(selection, t)
            x_btd, states[f"step_{index}"] = self._step(
                layers,
                index,
                x_btd,
                states.get("step_0", {}),
                layer_state,
                ctx,
                selection,
                jnp.ones_like(gate_bt),
            )
            if recursion.gate_steps:
                scale_bt = jnp.where(alive_bt, gate_bt, 1)
                x_btd = x_btd * scale_bt[..., None].astype(x_btd.dtype)
            kept.append(alive_bt)
        last_bt = jnp.ones_like(weight_bt) if recursion.gate_steps else weight_bt
        x_btd = begin + x_btd * last_bt[..., None].astype(x_btd.dtype)
        aux = {"recursion": recursion_sums(logits, steps_bt, ctx.valid_bt)}
        return x_btd, self._states(states, ctx), _aux(aux, kept, ctx)

    def _room(self, index: int, wanted_bt, layer_state: dict, ctx: Context):
        """Who finds room in a step, and its places."""
        cfg = self.config
        if ctx.train:
            return wanted_bt, training_room(cfg, index, wanted_bt.shape[1])
        share = _share(cfg.recursion, index)
        return find_room(cfg.depth, share, wanted_bt, layer_state, ctx)


def training_room(config: TrunkConfig, index: int, length: int) -> int:
    """Tokens of a row of that length that a step runs on in training."""
    recursion, share = config.recursion, _share(config.recursion, index)
    if recursion.router == "none":
        return length
    if recursion.router == "token":
        room = recursion.room
        if not room:
            return length
        return min(length, number_of(min(1.0, room * share), length, "up"))
    return max(1, number_of(share, length, config.depth.rounding))


def _share(recursion: RecursionConfig, index: int) -> float:
    """Of the tokens that run a step; of the router "token", if each number of steps is as usual."""
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


def _given(first: dict, cached: dict) -> dict:
    """The layer state of a later step: the first step's keys and values, new and cached."""
    given = {
        segment: {
            block: {"given": {"k": rows["cache"]["k"], "v": rows["cache"]["v"]}}
            for block, rows in blocks.items()
        }
        for segment, blocks in first.items()
    }
    for segment, blocks in cached.items():
        for block, rows in blocks.items():
            given[segment][block]["cache"] = rows["cache"]
    return given


def _aux(sums: dict[str, Any], kept: list[jax.Array], ctx: Context) -> dict:
    if ctx.record:
        sums = {**sums, "kept": jnp.stack(kept)}
    return {"depth": sums} if sums else {}


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
    unused = ("group", "within", "modality", "room", "weigh_skipped", "warmup_steps")
    for name in (*unused, "random_choice", "router_shared"):
        require(
            getattr(config.depth, name) == getattr(DepthConfig, name),
            f"model.depth.{name}",
            "is of 'mod', not of 'recursive'; leave it as it is by default",
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
