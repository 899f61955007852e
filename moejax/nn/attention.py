"""Self-attention over all modalities with projections shared or per modality."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax import axes
from moejax.config.schema import DecoderConfig, UntieConfig
from moejax.nn.context import Context
from moejax.nn.layers import (
    Norm,
    fan_in_normal,
    param_dtype,
    partitioned,
    project,
    project_back,
)
from moejax.ops.attention import attend
from moejax.ops.rope import apply_rope
from moejax.parallel.local import FEATURES, ROW_FEATURES, TOKENS, axis_size, run_local


class Attention(nn.Module):
    """Global attention, arXiv 2411.04996 eq. 2: untied QKV and output, one softmax over all.

    QK-norm is per modality, over the head, before RoPE; keys are cached after both.
    """

    config: DecoderConfig
    untie: UntieConfig

    @nn.compact
    def __call__(
        self, x_btd: jax.Array, cache: dict[str, jax.Array] | None, ctx: Context
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns (output [b, t, d], this call's keys and values {"k", "v"} [b, t, g, h]).

        ``cache`` holds earlier keys and values [b, s, g, h] that ``ctx.mask_bts`` covers too.
        """
        cfg, num = self.config, len(self.config.modalities)
        n, g, h = cfg.num_heads, cfg.kv_heads, cfg.head_dim
        b, t, d = x_btd.shape
        qkv_mdnh = self.param(
            "qkv_mdnh",
            partitioned(fan_in_normal((1,)), axes.MODALITY, axes.EMBED, axes.HEADS, axes.HEAD_SIZE),
            (num if self.untie.qkv else 1, d, n + 2 * g, h),
            param_dtype(cfg),
        )
        out_mnhd = self.param(
            "out_mnhd",
            partitioned(
                fan_in_normal((1, 2)), axes.MODALITY, axes.HEADS, axes.HEAD_SIZE, axes.EMBED
            ),
            (num if self.untie.out else 1, n, h, d),
            param_dtype(cfg),
        )
        towers = qkv_mdnh.shape[0]
        parts = (n * h, g * h, g * h)
        qkv = project(x_btd, qkv_mdnh.reshape(towers, d, -1), ctx, cfg.kernel_backend, parts)
        # Each slice of the tensor axis holds its own queries, keys and values.
        shards = axis_size("tensor")
        qkv = qkv.reshape(b, t, shards, (n + 2 * g) // shards, h)
        cuts = (n // shards, (n + g) // shards)
        q, k, v = (x.reshape(b, t, -1, h) for x in jnp.split(qkv, cuts, axis=3))
        if cfg.qk_norm != "none":
            scales = num if self.untie.norms else 1
            options: dict[str, Any] = {
                "kind": cfg.qk_norm,
                "eps": cfg.norm_eps,
                "num": scales,
                "param_dtype": param_dtype(cfg),
            }
            q = Norm(**options, name="q_norm")(q, ctx.modality_bt)
            k = Norm(**options, name="k_norm")(k, ctx.modality_bt)
        q = apply_rope(q, ctx.positions_bt, cfg.rope_theta)
        k = apply_rope(k, ctx.positions_bt, cfg.rope_theta)
        rows = {"k": k, "v": v}
        if cache is not None:
            k = jnp.concatenate([cache["k"].astype(k.dtype), k], axis=1)
            v = jnp.concatenate([cache["v"].astype(v.dtype), v], axis=1)
        # A device's own queries meet the keys and values of the whole sequence.
        heads = run_local(
            functools.partial(attend, block=cfg.attention_block),
            (q, FEATURES),
            (k, ROW_FEATURES),
            (v, ROW_FEATURES),
            (ctx.mask_bts, TOKENS),
            tokens=(b, t),
            out=FEATURES,
        ).reshape(b, t, n * h)
        out_mfd = out_mnhd.reshape(out_mnhd.shape[0], n * h, d)
        return project_back(heads, out_mfd, ctx, cfg.kernel_backend), rows
