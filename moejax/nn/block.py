"""Blocks of the decoder, and the registry a config's ``model.block_pattern`` names them from.

A block is ``block(x, carry, layer_state, ctx) -> (x, carry, layer_state, aux)``: ``carry`` goes
from layer to layer, ``layer_state`` is this layer's own (its cache going in, its new rows coming
out), ``aux`` holds statistics. None of them is stored by a side effect.
"""

import dataclasses

import flax.linen as nn
import jax

from moejax.config.registry import Registry
from moejax.config.schema import DecoderConfig, UntieConfig
from moejax.nn.attention import Attention
from moejax.nn.context import Context
from moejax.nn.layers import Norm, SwiGLU, param_dtype

# kind -> function(config, name of the submodule) -> Linen module with the signature above
BLOCKS: Registry = Registry("block")


class TransformerBlock(nn.Module):
    """Attention and SwiGLU with residuals; each parameter shared or per modality.

    ``norm_placement``: "post_branch" is ``x + norm(f(x))`` (arXiv 2411.04996 eq. 3; Chameleon
    34B), "pre" is ``x + f(norm(x))``.
    """

    config: DecoderConfig
    untie: UntieConfig

    @nn.compact
    def __call__(self, x_btd: jax.Array, carry, layer_state: dict, ctx: Context):
        cfg = self.config
        num = len(cfg.modalities)
        attention = Attention(cfg, self.untie, name="attention")
        ffn = SwiGLU(cfg, num if self.untie.ffn else 1, cfg.ffn_hidden, name="ffn")
        rows = {}

        def attention_branch(x):
            out, new_rows = attention(x, layer_state.get("cache"), ctx)
            rows.update(new_rows)
            return out

        x_btd = self._residual("attention_norm", x_btd, attention_branch, ctx, 0)
        x_btd = self._residual("ffn_norm", x_btd, lambda x: ffn(x, ctx), ctx, 1)
        return x_btd, carry, {"cache": rows}, {}

    def _residual(self, name: str, x_btd: jax.Array, branch, ctx: Context, index: int):
        cfg = self.config
        towers = len(cfg.modalities) if self.untie.norms else 1
        norm = Norm("rms", cfg.norm_eps, towers, param_dtype(cfg), name=name)
        if cfg.norm_placement == "pre":
            out = branch(norm(x_btd, ctx.modality_bt))
        else:
            out = norm(branch(x_btd), ctx.modality_bt)
        return x_btd + _dropout(out, cfg.dropout, ctx, index)


def _dropout(x: jax.Array, rate: float, ctx: Context, index: int) -> jax.Array:
    if not ctx.train or rate == 0:
        return x
    assert ctx.rng is not None, "dropout needs the rng of the training step"
    keep = jax.random.bernoulli(jax.random.fold_in(ctx.rng, index), 1 - rate, x.shape)
    return x * keep / (1 - rate)


@BLOCKS.register("untied")
def untied_block(config: DecoderConfig, name: str) -> nn.Module:
    """The block with the config's own ``model.untie`` flags (MoT where they are set)."""
    return TransformerBlock(config, config.untie, name=name)


@BLOCKS.register("dense")
def dense_block(config: DecoderConfig, name: str) -> nn.Module:
    """The block with everything shared, whatever ``model.untie`` says."""
    shared = dataclasses.replace(config, ffn_hidden=(max(config.ffn_hidden),), untie=UntieConfig())
    return TransformerBlock(shared, UntieConfig(), name=name)
