"""Self-attention over all modalities with projections shared or per modality."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax import axes
from moejax.config.trunk import TrunkConfig, UntieConfig
from moejax.nn.context import Context
from moejax.nn.layers import (
    Norm,
    fan_in_normal,
    param_dtype,
    partitioned,
    project,
    project_back,
)
from moejax.ops.attention import attend, cached_mask, put_rows
from moejax.ops.rope import apply_rope
from moejax.parallel.local import FEATURES, ROW_FEATURES, TOKENS, axis_size, run_local


class Attention(nn.Module):
    """Global attention, arXiv 2411.04996 eq. 2: untied QKV and output, one softmax over all.

    QK-norm is per modality, over the head, before RoPE; keys are cached after both.
    """

    config: TrunkConfig
    untie: UntieConfig

    @nn.compact
    def __call__(
        self,
        x_btd: jax.Array,
        cache: dict[str, jax.Array] | None,
        ctx: Context,
        given: dict[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns (output [b, t, d], what of this call belongs into a cache).

        That is {"k", "v"} [b, t, g, h] and "kept" [b, t], False for padding. With ``ctx.record``
        the queries are there too, "q" [b, t, n, h], which no cache has a place for.

        Args:
          x_btd: tokens.
          cache: keys and values of earlier tokens, {"k", "v"} [b, s, g, h] and how many slots of
            each row are in use, "filled" [b].
          ctx: its mask is about the new tokens.
          given: keys and values to use instead of the tokens' own, {"k", "v"} [b, n, g, h] for
            a mask [b, t, n]; nothing of this call then belongs into a cache. With
            ``ctx.place_bc`` those of the tokens are replaced by their own, which are returned.
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
        parts = (n,) if given and ctx.place_bc is None else (n, g, g)
        q, *keys_and_values = self._heads(x_btd, qkv_mdnh[:, :, : sum(parts)], parts, ctx)
        if cfg.qk_norm != "none":
            scales = num if self.untie.norms else 1
            options: dict[str, Any] = {
                "kind": cfg.qk_norm,
                "eps": cfg.norm_eps,
                "num": scales,
                "param_dtype": param_dtype(cfg),
            }
            q = Norm(**options, name="q_norm")(q, ctx.modality_bt)
        q = self._rotate(q, ctx)
        rows = {}
        if given and ctx.place_bc is None:
            k, v = given["k"], given["v"]
        else:
            k, v = keys_and_values
            if cfg.qk_norm != "none":
                k = Norm(**options, name="k_norm")(k, ctx.modality_bt)
            k = self._rotate(k, ctx)
            rows = {"k": k, "v": v, "kept": ctx.valid_bt}
            if ctx.record:
                rows["q"] = q
            if given and ctx.place_bc is not None:
                k = put_rows(given["k"], k, ctx.place_bc, ctx.valid_bt)
                v = put_rows(given["v"], v, ctx.place_bc, ctx.valid_bt)
        mask_bts = ctx.mask_bts
        if cache is not None:
            slots = cache["k"].shape[1]
            mask_bts = cached_mask(mask_bts, ctx.valid_bt, cache["filled"], slots)
            k = jnp.concatenate([cache["k"].astype(k.dtype), k], axis=1)
            v = jnp.concatenate([cache["v"].astype(v.dtype), v], axis=1)
        # A device's own queries meet the keys and values of the whole sequence.
        heads = run_local(
            functools.partial(attend, block=cfg.attention_block),
            (q, FEATURES),
            (k, ROW_FEATURES),
            (v, ROW_FEATURES),
            (mask_bts, TOKENS),
            tokens=(b, t),
            out=FEATURES,
        ).reshape(b, t, n * h)
        out_mfd = out_mnhd.reshape(out_mnhd.shape[0], n * h, d)
        return project_back(heads, out_mfd, ctx, cfg.kernel_backend), rows

    def _rotate(self, x_btnh: jax.Array, ctx: Context) -> jax.Array:
        if not self.config.rope_axes:
            return x_btnh
        return apply_rope(x_btnh, ctx.positions_bt, self.config.rope_theta)

    def _heads(self, x_btd, w_mdnh, heads: tuple[int, ...], ctx: Context) -> list[jax.Array]:
        """Projections to so many heads each, [b, t, n, h]."""
        b, t, d = x_btd.shape
        towers, _, total, h = w_mdnh.shape
        w_mdf = w_mdnh.reshape(towers, d, -1)
        parts = tuple(number * h for number in heads)
        out = project(x_btd, w_mdf, ctx, self.config.kernel_backend, parts)
        # Each slice of the tensor axis holds its own of each.
        shards = axis_size("tensor")
        out = out.reshape(b, t, shards, total // shards, h)
        cuts = [sum(heads[: i + 1]) // shards for i in range(len(heads) - 1)]
        return [x.reshape(b, t, -1, h) for x in jnp.split(out, cuts, axis=3)]
