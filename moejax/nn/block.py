"""Blocks of the decoder, and the registry a config's ``model.block_pattern`` names them from.

A kind may carry the number of its experts, ``"moe:16"``, where layers differ in it.

A block is ``block(x, carry, layer_state, ctx) -> (x, carry, layer_state, aux)``: ``carry`` goes
from layer to layer, ``layer_state`` is this layer's own (its cache going in, its new rows coming
out), ``aux`` holds statistics. None of them is stored by a side effect.
"""

import dataclasses

import flax.linen as nn
import jax

from moejax.config.checks import require
from moejax.config.registry import Registry
from moejax.config.trunk import AROUND_OTHERS, TrunkConfig, UntieConfig
from moejax.nn.attention import Attention
from moejax.nn.context import Context
from moejax.nn.layers import FeedForward, Norm, dropout, param_dtype
from moejax.nn.modulation import Modulation, modulate
from moejax.nn.moe import MoE
from moejax.nn.moe_checks import check_moe
from moejax.nn.tower_attention import TowerAttention
from moejax.nn.words import Words

# kind -> function(config, name of the submodule) -> Linen module with the signature above
BLOCKS: Registry = Registry("block")


class TransformerBlock(nn.Module):
    """Attention and a feed-forward layer or one of experts, with residuals; shared or per modality.

    ``norm_placement``: "post_branch" is ``x + norm(f(x))`` (arXiv 2411.04996 eq. 3; Chameleon
    34B), "pre" is ``x + f(norm(x))``. In models with a condition ("pre" alone) norms have no scale
    of their own and it is as moejax/nn/modulation.py says; in those that read the words of a text,
    what these say comes in between the two (moejax/nn/words.py).
    """

    config: TrunkConfig
    untie: UntieConfig
    experts: bool = False

    @nn.compact
    def __call__(self, x_btd: jax.Array, carry, layer_state: dict, ctx: Context):
        cfg = self.config
        num = len(cfg.modalities)
        kind = TowerAttention if cfg.tower_shapes else Attention
        attention = kind(cfg, self.untie, name="attention")
        rows, aux = {}, {}
        vectors = []
        if cfg.modulated:
            assert ctx.condition_bd is not None, "the model puts its condition into the context"
            vectors = Modulation(cfg, 6, name="modulation")(ctx.condition_bd, x_btd.dtype)

        def attention_branch(x):
            cache, given = layer_state.get("cache"), layer_state.get("given")
            out, new_rows = attention(x, cache, ctx, given)
            rows.update(new_rows)
            return out

        def expert_branch(x):
            nonlocal carry
            out, carry, aux["moe"] = moe(x, carry, ctx)
            return out

        x_btd = self._residual("attention_norm", x_btd, attention_branch, ctx, 0, vectors[:3])
        if cfg.reads_words:
            x_btd = Words(cfg, name="words")(x_btd, ctx)
        if self.experts:
            moe = MoE(cfg, name="moe")
            ffn_branch = expert_branch
        else:
            ffn = FeedForward(cfg, num if self.untie.ffn else 1, cfg.ffn_hidden, name="ffn")
            ffn_branch = lambda x: ffn(x, ctx)
        gate = ctx.ffn_gate_bt
        x_btd = self._residual("ffn_norm", x_btd, ffn_branch, ctx, 1, vectors[3:], gate)
        return x_btd, carry, {"cache": rows}, aux

    def _residual(
        self, name: str, x_btd: jax.Array, branch, ctx: Context, index: int, vectors, gate=None
    ):
        cfg = self.config
        if vectors:
            shift, scale, strength = vectors
            out = strength * branch(modulate(cfg, x_btd, shift, scale))
        elif cfg.norm_placement == "pre":
            out = branch(make_norm(cfg, self.untie, name)(x_btd, ctx.modality_bt))
        else:
            out = make_norm(cfg, self.untie, name)(branch(x_btd), ctx.modality_bt)
        if gate is not None:
            out = out * gate[..., None].astype(out.dtype)
        return x_btd + dropout(out, cfg.dropout, ctx, index)


class ShortcutBlock(nn.Module):
    """Two attentions and two dense layers, with one layer of experts beside them (ScMoE).

    ``a = x + Attn(x); m = MoE(n a); b = a + MLP(n a); c = b + Attn(b); y = c + MLP(c) + m``: the
    experts have two sublayers' time to answer (arXiv 2509.01322, section 2; norms are in front).
    """

    config: TrunkConfig
    untie: UntieConfig

    @nn.compact
    def __call__(self, x_btd: jax.Array, carry, layer_state: dict, ctx: Context):
        cfg = self.config
        num = len(cfg.modalities) if self.untie.ffn else 1
        cache, rows = layer_state.get("cache", {}), {}
        drop = lambda out, index: dropout(out, cfg.dropout, ctx, index)
        experts_out, aux = None, {}
        for i, half in enumerate(("first", "second")):
            normed = make_norm(cfg, self.untie, f"{half}_attention_norm")(x_btd, ctx.modality_bt)
            attention = Attention(cfg, self.untie, name=f"{half}_attention")
            out, rows[half] = attention(normed, cache.get(half), ctx)
            x_btd = x_btd + drop(out, 3 * i)
            normed = make_norm(cfg, self.untie, f"{half}_ffn_norm")(x_btd, ctx.modality_bt)
            if experts_out is None:
                experts_out, carry, aux["moe"] = MoE(cfg, name="moe")(normed, carry, ctx)
            ffn = FeedForward(cfg, num, cfg.ffn_hidden, name=f"{half}_ffn")
            x_btd = x_btd + drop(ffn(normed, ctx), 3 * i + 1)
        return x_btd + drop(experts_out, 2), carry, {"cache": rows}, aux


def make_norm(config: TrunkConfig, untie: UntieConfig, name: str) -> Norm:
    num = len(config.modalities) if untie.norms else 1
    return Norm(
        config.norm, config.norm_eps, num, param_dtype(config), config.tower_shapes, name=name
    )


@BLOCKS.register("untied")
def untied_block(config: TrunkConfig, name: str) -> nn.Module:
    """The block with the config's own ``model.untie`` flags (MoT where they are set)."""
    return TransformerBlock(config, config.untie, name=name)


@BLOCKS.register("dense")
def dense_block(config: TrunkConfig, name: str) -> nn.Module:
    """The block with everything shared, whatever ``model.untie`` says."""
    shared = dataclasses.replace(config, ffn_hidden=(max(config.ffn_hidden),), untie=UntieConfig())
    return TransformerBlock(shared, UntieConfig(), name=name)


@BLOCKS.register("moe")
def moe_block(config: TrunkConfig, name: str) -> nn.Module:
    """The block with experts (``model.moe``) for a feed-forward layer."""
    check_moe(config)
    return TransformerBlock(config, config.untie, experts=True, name=name)


@BLOCKS.register("shortcut_moe")
def shortcut_moe_block(config: TrunkConfig, name: str) -> nn.Module:
    """Two attentions, two dense layers and experts beside them (``model.moe``)."""
    require(
        not config.modulated,
        "model.block_pattern",
        f"'shortcut_moe' has no place for the condition of model {config.name!r}; use 'moe'",
    )
    check_moe(config)
    return ShortcutBlock(config, config.untie, name=name)


def check_blocks(config: TrunkConfig) -> None:
    """UserError for blocks of the config that cannot be made, those inside of others too."""
    for kind in sorted(set(config.block_kinds())):
        make_block(config, kind, name="block")
        base, own = config.for_block(kind)
        if base in AROUND_OTHERS:
            make_block(own, own.depth.block, name="block")


def make_block(config: TrunkConfig, kind: str, name: str) -> nn.Module:
    """The block that an entry of ``model.block_pattern`` names.

    Raises:
      UserError: no such block, or what it cannot be made of.
    """
    base, own = config.for_block(kind)
    return BLOCKS.get(base, field="model.block_pattern")(own, name)
