"""Blocks that some of the tokens run and the others skip: mixture of depths and its relatives.

score -> choice (with all tokens in sight in training, by a causal rule else) -> the block on the
few tokens, at their own positions -> what it did, weighed, added to theirs. The others pass
unchanged.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax import axes
from moejax.config.checks import require, require_one_of
from moejax.config.depth import DepthConfig
from moejax.config.trunk import TrunkConfig
from moejax.depth import (
    Selection,
    choose,
    decision_sums,
    first_come,
    gate_of,
    number_of,
    runs_of,
    select,
    warmed_up,
)
from moejax.nn.block import BLOCKS, make_block
from moejax.nn.context import Context
from moejax.nn.layers import fan_in_normal, modality_layout_of, param_dtype, partitioned
from moejax.ops.attention import multimodal_mask
from moejax.ops.norms import rms_normalise
from pallas_kernels import gather_tokens, scatter_tokens

# Blocks that "mod" can weigh the feed-forward branch of.
_ONE_FFN = ("untied", "dense", "moe")
# What a layer's key is folded with for a choice at random.
_DRAW = 64


class RouterWeights(nn.Module):
    """Of a token's score: [d, 1], or [d, 2] of two classes; and a bias or None."""

    config: TrunkConfig

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array | None]:
        cfg, depth = self.config, self.config.depth
        classes = 2 if depth.gate == "softmax" else 1
        init = nn.initializers.zeros if depth.router_zeros else fan_in_normal((0,))
        router_dk = self.param(
            "router_dk",
            partitioned(init, axes.EMBED, None),
            (cfg.d_model, classes),
            param_dtype(cfg),
        )
        if not depth.router_bias:
            return router_dk, None
        zeros = partitioned(nn.initializers.zeros, None)
        return router_dk, self.param("bias_k", zeros, (classes,), param_dtype(cfg))


class Scores(nn.Module):
    """The score of each token, and that by which it is decided without later tokens in sight.

    Where nothing is to be decided both are the same.
    """

    config: TrunkConfig
    decides: bool = True

    @nn.compact
    def __call__(self, x_btd: jax.Array, ctx: Context) -> tuple[jax.Array, jax.Array]:
        """Both [b, t], in float32 or wider."""
        cfg, depth, dtype = self.config, self.config.depth, param_dtype(self.config)
        weights = ctx.depth_router
        if weights is None:
            weights = RouterWeights(cfg, name="own")()
        router_dk, bias_k = weights
        seen_btd = x_btd.astype(dtype)
        if depth.router_norm:
            seen_btd = rms_normalise(seen_btd, cfg.norm_eps)
        logits = jnp.einsum("btd,dk->btk", seen_btd, router_dk, precision="highest")
        if bias_k is not None:
            logits = logits + bias_k[None, None]
        score_bt = logits[..., 1] - logits[..., 0] if depth.gate == "softmax" else logits[..., 0]
        if depth.causal_rule != "predictor" or not self.decides:
            return score_bt, score_bt
        width = depth.predictor_hidden or cfg.d_model // 2
        wi_df = self.param(
            "predictor_wi_df",
            partitioned(fan_in_normal((0,)), axes.EMBED, None),
            (cfg.d_model, width),
            dtype,
        )
        wo_f = self.param("predictor_wo_f", partitioned(fan_in_normal((0,)), None), (width,), dtype)
        # It learns from the model and teaches it nothing (arXiv 2404.02258, section 3.5).
        seen_btd = jax.lax.stop_gradient(x_btd).astype(dtype)
        hidden = nn.silu(jnp.einsum("btd,df->btf", seen_btd, wi_df, precision="highest"))
        return score_bt, jnp.einsum("btf,f->bt", hidden, wo_f, precision="highest")


class DepthBlock(nn.Module):
    """``model.depth.block`` on some of the tokens (Mixture-of-Depths, arXiv 2404.02258).

    ``x + g (block(x) - x)`` for the tokens that run it, ``x`` for the others; attention is among
    those that run it. Mixture-of-Depths-and-Experts, staged, is this around a block of experts.
    """

    config: TrunkConfig

    @nn.compact
    def __call__(self, x_btd: jax.Array, carry: dict, layer_state: dict, ctx: Context):
        cfg, depth = self.config, self.config.depth
        b, t, _ = x_btd.shape
        scores = Scores(cfg, decides=depth.capacity < 1, name="router")
        score_bt, decision_bt = scores(x_btd, ctx)
        competes_bt = ctx.valid_bt
        if depth.modality:
            competes_bt &= ctx.modality_bt == cfg.modalities.index(depth.modality)
        chosen_bt, sums = competes_bt, {}
        if depth.capacity < 1:
            chosen_bt, sums = decide(
                depth,
                decision_bt,
                competes_bt,
                lambda: self._choose(score_bt, competes_bt, ctx),
                ctx,
                cached=is_cached(layer_state),
            )
        protected_bt = ctx.valid_bt & ~competes_bt
        kept_bt = chosen_bt | protected_bt
        if ctx.train:
            room = training_room(depth, together(depth, b) * t)
        else:
            kept_bt, room = find_room(depth, depth.capacity, kept_bt, layer_state, ctx)
        gate_bt = jnp.where(competes_bt, gate_of(depth.gate, score_bt, depth.gate_scale), 1)
        rows = together(depth, b) if ctx.train else 1
        fold = lambda value: value.reshape(b // rows, rows * t, *value.shape[2:])
        selection = select(fold(kept_bt), room, fold(score_bt), fold(protected_bt))
        block = make_block(cfg, depth.block, "block")
        stored = None if ctx.stored is None else ctx.stored["block"]
        out, carry, state, inner_aux = run_selected(
            functools.partial(run_or_skip, block),
            fold(x_btd),
            jax.tree.map(fold, carry),
            layer_state,
            _folded(ctx, rows).replace(stored=stored),
            selection,
            fold(gate_bt),
            cfg,
            weighed_bt=fold(competes_bt) if depth.weigh_skipped else None,
        )
        aux = {"block": inner_aux, "depth": _recorded(sums, kept_bt, ctx)}
        unfold = lambda value: value.reshape(b, t, *value.shape[2:])
        return unfold(out), jax.tree.map(unfold, carry), state, aux

    def _choose(self, score_bt, competes_bt, ctx: Context):
        """As in training, with all tokens in sight."""
        depth = self.config.depth
        b, t = score_bt.shape
        rows = together(depth, b)
        share: Any = depth.capacity
        if depth.warmup_steps and ctx.train and ctx.step is not None:
            share = warmed_up(share, ctx.step, depth.warmup_steps)
        if depth.random_choice:
            key = jax.random.fold_in(jax.random.key(0), ctx.layer)
            if ctx.rng is not None:
                key = jax.random.fold_in(ctx.rng, _DRAW)
            score_bt = jax.random.uniform(key, score_bt.shape)
        class_bt = None
        if depth.within != "row":
            own = (
                ctx.segments_bt
                if depth.within == "segment"
                else runs_of(competes_bt, ctx.segments_bt)
            )
            # Of each row of the batch its own, also where rows compete with each other.
            class_bt = own + (t + 1) * jnp.arange(b)[:, None]
            class_bt = class_bt.reshape(b // rows, rows * t)
        fold = lambda value: value.reshape(b // rows, rows * t)
        chosen = choose(
            fold(jax.lax.stop_gradient(score_bt)),
            fold(competes_bt),
            share,
            depth.rounding,
            class_bt,
        )
        return chosen.reshape(b, t)


def decide(
    depth: DepthConfig,
    decision_bt: jax.Array,
    competes_bt: jax.Array,
    with_sight: Callable[[], jax.Array],
    ctx: Context,
    *,
    cached: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Who runs a block [b, t], and how well that can be told without later tokens in sight.

    ``with_sight`` chooses as in training. The sums of :class:`moejax.depth.DecisionSums` are not
    there where earlier tokens are in a cache, and not in sight.
    """
    as_trained = ctx.train or depth.causal_rule == "none"
    told_bt = competes_bt & (jax.nn.sigmoid(decision_bt) > depth.threshold)
    if cached and not as_trained:
        return told_bt, {}
    chosen_bt = with_sight()
    sums = decision_sums(decision_bt, chosen_bt, competes_bt, depth.threshold)
    return (chosen_bt if as_trained else told_bt), sums._asdict()


def find_room(
    depth: DepthConfig, share: float, wanted_bt: jax.Array, layer_state: dict, ctx: Context
) -> tuple[jax.Array, int]:
    """Who of those that want to run a block finds room outside of training, and the places.

    It depends on how many came before in the whole row, not on how many are read at once.
    """
    t = wanted_bt.shape[1]
    row = max(t, ctx.row_length or 0)
    limit = row
    if depth.eval_room:
        limit = min(row, number_of(min(1.0, depth.eval_room * share), row, "up"))
    cached = is_cached(layer_state)
    kept_bt = first_come(wanted_bt, free_slots(layer_state, limit))
    # What is recorded is of each token.
    return kept_bt, t if cached or ctx.record else min(t, limit)


def _recorded(sums: dict[str, jax.Array], kept_bt: jax.Array, ctx: Context) -> dict[str, Any]:
    found: dict[str, Any] = {"sums": sums} if sums else {}
    return {**found, "kept": kept_bt} if ctx.record else found


def training_room(depth: DepthConfig, length: int) -> int:
    """Tokens that a block runs on in training, of so many that compete."""
    if depth.room:
        return number_of(depth.room, length, "up")
    if depth.modality or depth.warmup_steps or depth.within != "row":
        return length
    return max(1, number_of(depth.capacity, length, depth.rounding))


def together(depth: DepthConfig, b: int) -> int:
    """Rows of a batch of b whose tokens compete."""
    return depth.group if b % depth.group == 0 else b


def _folded(ctx: Context, rows: int) -> Context:
    """So many rows of the batch as one, whose tokens do not see each other."""
    if rows == 1:
        return ctx
    b, t = ctx.modality_bt.shape
    row_b1 = (jnp.arange(b) % rows)[:, None]
    fold = lambda value: value.reshape(b // rows, rows * t, *value.shape[2:])
    own = lambda ids: jnp.where(ids > 0, (ids - 1) * rows + row_b1 + 1, 0)
    image_id = None if ctx.image_id_bt is None else fold(own(ctx.image_id_bt))
    segments = fold(own(ctx.segments_bt))
    return ctx.replace(
        tokens_bt=fold(ctx.tokens_bt),
        positions_bt=fold(ctx.positions_bt),
        modality_bt=fold(ctx.modality_bt),
        valid_bt=fold(ctx.valid_bt),
        segments_bt=segments,
        image_id_bt=image_id,
    )


def is_cached(layer_state: dict) -> bool:
    """Whether earlier tokens lie in a cache."""
    return _a_cache(layer_state) is not None


def free_slots(layer_state: dict, room: int) -> jax.Array | int:
    """Tokens of each row that can still run a block: [b, 1], or the room without a cache."""
    cache = _a_cache(layer_state)
    if cache is None:
        return room
    # All attentions of a block have seen the same tokens.
    filled_b = cache["filled"].reshape(-1, cache["filled"].shape[-1])[0]
    return (cache["k"].shape[-3] - filled_b)[:, None]


def _a_cache(layer_state: dict) -> dict | None:
    """The first attention's."""
    if "filled" in layer_state:
        return layer_state
    inner = (_a_cache(value) for value in layer_state.values() if isinstance(value, dict))
    return next((cache for cache in inner if cache is not None), None)


def run_selected(
    run: Any,
    x_btd: jax.Array,
    carry: dict,
    layer_state: dict,
    ctx: Context,
    selection: Selection,
    gate_bt: jax.Array,
    config: TrunkConfig,
    *,
    weighed_bt: jax.Array | None = None,
    keys_of_all: bool = False,
):
    """A block on the selected tokens alone; (x, carry, state, aux) as of any block.

    Args:
      run: the block.
      x_btd: all tokens.
      carry: as of a block, of all tokens.
      layer_state: of the block.
      ctx: of all tokens.
      selection: which of them run it.
      gate_bt: weight of what it does.
      config: of the model; ``depth`` says what is weighed and added.
      weighed_bt: tokens that are multiplied by their weight if they skip the block.
      keys_of_all: the mask of the few tokens is over all of the row.
    """
    depth = config.depth
    index_bc, kept_bc = selection
    whole = index_bc.shape[1] == x_btd.shape[1]
    few = (lambda value: value) if whole else (lambda value: _few(value, index_bc))
    own = _selected_context(ctx, selection, few, config, keys_of_all)
    weight_bc = kept_bc.astype(gate_bt.dtype)
    if depth.gate_on == "ffn":
        own = own.replace(ffn_gate_bt=few(gate_bt))
    else:
        weight_bc = jnp.where(kept_bc, few(gate_bt), 0)
    before, carry_before = few(x_btd), jax.tree.map(few, carry)
    after, carry_after, state, aux = run(before, carry_before, layer_state, own)
    update_bcd = after - before if depth.branch == "delta" else after
    base = x_btd
    if weighed_bt is not None:
        kept_bt = who_runs(selection, x_btd.shape[1])
        skips_bt = weighed_bt & ~kept_bt
        base = jnp.where(skips_bt[..., None], x_btd * gate_bt[..., None].astype(x_btd.dtype), x_btd)
    out = scatter_tokens(base, update_bcd, index_bc, weight_bc)

    def carried(old, old_few, new_few):
        return scatter_tokens(old, new_few - old_few, index_bc, kept_bc.astype(old.dtype))

    carry = jax.tree.map(carried, carry, carry_before, carry_after)
    return out, carry, state, aux


def _few(value: jax.Array, index_bc: jax.Array) -> jax.Array:
    if value.ndim == 3 and jnp.issubdtype(value.dtype, jnp.floating):
        return gather_tokens(value, index_bc)
    index = index_bc.reshape(*index_bc.shape, *(1,) * (value.ndim - 2))
    return jnp.take_along_axis(value, index, axis=1)


def who_runs(selection: Selection, t: int) -> jax.Array:
    """[b, t]: the tokens of a selection that are kept."""
    index_bc, kept_bc = selection
    if kept_bc.shape[1] == t:
        return kept_bc
    row_b1 = jnp.arange(kept_bc.shape[0])[:, None]
    kept_bt = jnp.zeros((kept_bc.shape[0], t), bool)
    return kept_bt.at[row_b1, index_bc].set(kept_bc, unique_indices=True)


def _selected_context(
    ctx: Context, selection: Selection, few: Callable, config: TrunkConfig, keys_of_all: bool
) -> Context:
    """What the few tokens can read. Places that are left over are padding."""
    kept_bc = selection.kept_bc
    segments = jnp.where(kept_bc, few(ctx.segments_bt), 0)
    image_id = None if ctx.image_id_bt is None else few(ctx.image_id_bt)
    modality = few(ctx.modality_bt)
    # Their order is that of the row, so the mask follows from the same rule.
    mask_bcs = multimodal_mask(segments, image_id)
    if keys_of_all:
        mask_bcs = few(ctx.mask_bts) & kept_bc[:, :, None]
    return ctx.replace(
        tokens_bt=few(ctx.tokens_bt),
        positions_bt=few(ctx.positions_bt),
        modality_bt=modality,
        valid_bt=few(ctx.valid_bt) & kept_bc,
        segments_bt=segments,
        image_id_bt=image_id,
        mask_bts=mask_bcs,
        layout=modality_layout_of(config, modality),
    )


def run_or_skip(block: nn.Module, x_bcd, carry: dict, layer_state: dict, ctx: Context):
    """The block; in decoding nothing at all where no token of the batch runs it."""
    if not is_cached(layer_state) or block.is_initializing():
        return block(x_bcd, carry, layer_state, ctx)
    module, variables = block.clone(parent=None), dict(block.variables)
    own = ctx.replace(stored=None, repeats=(), skippable=False)

    def all_of_it(x_bcd, carry):
        # Not the block's own: a scan copies them out of their stack before anyone has chosen.
        variables["params"] = jax.tree.map(lambda leaf: leaf[ctx.repeats], ctx.stored)
        return module.apply(variables, x_bcd, carry, layer_state, own)

    def nothing(x_bcd, carry):
        _, _, state, aux = jax.eval_shape(all_of_it, x_bcd, carry)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (state, aux))
        return x_bcd, carry, *zeros

    return jax.lax.cond(ctx.valid_bt.any(), all_of_it, nothing, x_bcd, carry)


def check_depth(config: TrunkConfig) -> None:
    """UserError, by field, for what a block of few tokens cannot be made of."""
    depth = config.depth
    inner, _ = config.for_block(depth.block)
    require(
        depth.gate_on == "block" or inner in _ONE_FFN,
        "model.depth.gate_on",
        f"'ffn' needs a block with one feed-forward layer, not {depth.block!r}",
    )
    if depth.modality:
        require_one_of(depth.modality, config.modalities, "model.depth.modality")


@BLOCKS.register("mod")
def mod_block(config: TrunkConfig, name: str) -> nn.Module:
    """``model.depth.block`` on some of the tokens (Mixture-of-Depths); "mod:0.5:moe" says both."""
    check_depth(config)
    return DepthBlock(config, name=name)
