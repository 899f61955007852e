"""Self-attention over all modalities with projections shared or per modality."""

import functools

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
        cfg = self.config
        n, g = cfg.num_heads, cfg.kv_heads
        b, t, d = x_btd.shape
        parts = (n,) if given and ctx.place_bc is None else (n, g, g)
        q, *keys_and_values = self._project(x_btd, parts, ctx)
        q = self._rotate(self._to_common(self._normed(q, "q", ctx), "q", ctx), ctx)
        rows = {}
        if given and ctx.place_bc is None:
            k, v = given["k"], given["v"]
        else:
            k, v = keys_and_values
            k = self._rotate(self._to_common(self._normed(k, "k", ctx), "k", ctx), ctx)
            v = self._to_common(v, "v", ctx)
            rows = {"k": k, "v": v, "kept": ctx.valid_bt}
            if ctx.separate:
                rows["modality"] = ctx.modality_bt
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
        if ctx.separate:
            modality_bs = ctx.modality_bt
            if cache is not None:
                modality_bs = jnp.concatenate([cache["modality"], modality_bs], axis=1)
            mask_bts &= ctx.modality_bt[:, :, None] == modality_bs[:, None, :]
        # A device's own queries meet the keys and values of the whole sequence.
        heads_btnh = run_local(
            functools.partial(attend, block=cfg.attention_block),
            (q, FEATURES),
            (k, ROW_FEATURES),
            (v, ROW_FEATURES),
            (mask_bts, TOKENS),
            tokens=(b, t),
            out=FEATURES,
        )
        return self._output(heads_btnh, d, ctx), rows

    def _project(self, x_btd, heads: tuple[int, ...], ctx: Context) -> list[jax.Array]:
        """Queries, and keys and values if there are heads for them, [b, t, n, h] each."""
        cfg, d, h = self.config, x_btd.shape[-1], self.config.head_dim
        num, total = len(cfg.modalities) if self.untie.qkv else 1, cfg.num_heads + 2 * cfg.kv_heads
        qkv_mdnh = self.param(
            "qkv_mdnh",
            partitioned(fan_in_normal((1,)), axes.MODALITY, axes.EMBED, axes.HEADS, axes.HEAD_SIZE),
            (num, d, total, h),
            param_dtype(cfg),
        )
        w_mdf = qkv_mdnh[:, :, : sum(heads)].reshape(num, d, -1)
        parts = tuple(number * h for number in heads)
        return split_heads(project(x_btd, w_mdf, ctx, cfg.kernel_backend, parts), heads, h)

    def _normed(self, x_btnh: jax.Array, which: str, ctx: Context) -> jax.Array:
        cfg = self.config
        if cfg.qk_norm == "none":
            return x_btnh
        num = len(cfg.modalities) if self.untie.norms else 1
        norm = Norm(cfg.qk_norm, cfg.norm_eps, num, param_dtype(cfg), name=f"{which}_norm")
        return norm(x_btnh, ctx.modality_bt)

    def _to_common(self, x_btnh: jax.Array, which: str, ctx: Context) -> jax.Array:
        """Queries ("q"), keys ("k") or values ("v") of each tower in the heads of all of them."""
        del which, ctx
        return x_btnh

    def _output(self, heads_btnh: jax.Array, d: int, ctx: Context) -> jax.Array:
        """What the heads found, [b, t, d]."""
        cfg = self.config
        b, t, n, h = heads_btnh.shape
        out_mnhd = self.param(
            "out_mnhd",
            partitioned(
                fan_in_normal((1, 2)), axes.MODALITY, axes.HEADS, axes.HEAD_SIZE, axes.EMBED
            ),
            (len(cfg.modalities) if self.untie.out else 1, n, h, d),
            param_dtype(cfg),
        )
        out_mfd = out_mnhd.reshape(len(out_mnhd), n * h, d)
        return project_back(heads_btnh.reshape(b, t, n * h), out_mfd, ctx, cfg.kernel_backend)

    def _rotate(self, x_btnh: jax.Array, ctx: Context) -> jax.Array:
        if not self.config.rope_axes:
            return x_btnh
        return apply_rope(x_btnh, ctx.positions_bt, self.config.rope_theta)


def split_heads(out_btf: jax.Array, heads: tuple[int, ...], h: int) -> list[jax.Array]:
    """The parts of a projection, [b, t, n, h] each, where there are so many ``heads``."""
    b, t, _ = out_btf.shape
    # Each slice of the tensor axis holds its own of each.
    shards = axis_size("tensor")
    out = out_btf.reshape(b, t, shards, -1, h)
    cuts = [sum(heads[: i + 1]) // shards for i in range(len(heads) - 1)]
    return [x.reshape(b, t, -1, h) for x in jnp.split(out, cuts, axis=3)]
