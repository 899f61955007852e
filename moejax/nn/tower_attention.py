"""Self-attention of towers that differ in width and heads."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax import axes
from moejax.nn.attention import Attention, split_heads
from moejax.nn.context import Context
from moejax.nn.layers import (
    fan_in_normal,
    param_dtype,
    partitioned,
    project,
    project_back,
)
from moejax.ops.untied import widen


class TowerAttention(Attention):
    """Attention where each modality has a width and heads of its own (HBridge, arXiv 2511.20520).

    A tower with fewer heads than ``model.num_heads`` has the first ones; the others are zero for
    its tokens. In separate layers that is all: each tower attends as if it were alone. Where
    attention is shared, learned linear maps lead from the heads of a tower to the common ones,
    after QK-norm and before RoPE, and back from what these found, before the tower's own output
    projection. The widest tower has none, its heads are the common ones. The maps begin as the
    identity on the heads that there are (the paper does not say), so that a tower begins as it was.

    Departure: heads are of one size in all towers.
    """

    def _project(self, x_btd, heads: tuple[int, ...], ctx: Context) -> list[jax.Array]:
        cfg, h = self.config, self.config.head_dim
        found = [jnp.zeros((*x_btd.shape[:2], number, h), x_btd.dtype) for number in heads]
        for i, tower in enumerate(cfg.tower_shapes):
            own_heads = (tower.heads, tower.kv_heads, tower.kv_heads)
            qkv_mdnh = self.param(
                f"qkv_mdnh_{tower.name}",
                partitioned(
                    fan_in_normal((1,)), axes.MODALITY, axes.EMBED, axes.HEADS, axes.HEAD_SIZE
                ),
                (1, tower.width, sum(own_heads), h),
                param_dtype(cfg),
            )
            out = project(
                x_btd[..., : tower.width],
                qkv_mdnh.reshape(1, tower.width, -1),
                ctx,
                cfg.kernel_backend,
                tuple(number * h for number in own_heads),
                tower=i,
            )
            own = split_heads(out, own_heads, h)
            found = [x + _more_heads(part, x.shape[2]) for x, part in zip(found, own, strict=True)]
        return found

    def _to_common(self, x_btnh: jax.Array, which: str, ctx: Context) -> jax.Array:
        cfg = self.config
        b, t, n, h = x_btnh.shape
        for i, tower in enumerate(cfg.tower_shapes):
            if ctx.separate or not tower.bridged:
                continue
            own = tower.heads if which == "q" else tower.kv_heads
            bridge_mfnh = self.param(
                f"bridge_{which}_mfnh_{tower.name}",
                partitioned(
                    _identity(own * h), axes.MODALITY, axes.EMBED, axes.HEADS, axes.HEAD_SIZE
                ),
                (1, own * h, n, h),
                param_dtype(cfg),
            )
            out = project(
                x_btnh[:, :, :own].reshape(b, t, own * h),
                bridge_mfnh.reshape(1, own * h, n * h),
                ctx,
                cfg.kernel_backend,
                (n * h,),
                tower=i,
            )
            here = (ctx.modality_bt == i)[..., None, None]
            x_btnh = jnp.where(here, out.reshape(b, t, n, h), x_btnh)
        return x_btnh

    def _output(self, heads_btnh: jax.Array, d: int, ctx: Context) -> jax.Array:
        b, t, n, h = heads_btnh.shape
        backend = self.config.kernel_backend
        out_btd = jnp.zeros((b, t, d), heads_btnh.dtype)
        for i, tower in enumerate(self.config.tower_shapes):
            if ctx.separate or not tower.bridged:
                own_btf = heads_btnh[:, :, : tower.heads].reshape(b, t, -1)
            else:
                name = f"bridge_out_mnhf_{tower.name}"
                back_mnhf = self._back(name, n, tower.heads * h, _identity(n * h))
                all_btf = heads_btnh.reshape(b, t, n * h)
                own_btf = project_back(all_btf, back_mnhf, ctx, backend, tower=i)
            name = f"out_mnhd_{tower.name}"
            out_mfd = self._back(name, tower.heads, tower.width, fan_in_normal((1, 2)))
            own_btd = project_back(own_btf, out_mfd, ctx, backend, tower=i)
            out_btd = out_btd + widen(own_btd, d)
        return out_btd

    def _back(self, name: str, heads: int, width: int, init: Callable) -> jax.Array:
        """A weight from so many heads to a width, [1, n h, d]."""
        h = self.config.head_dim
        names = (axes.MODALITY, axes.HEADS, axes.HEAD_SIZE, axes.EMBED)
        shape = (1, heads, h, width)
        weight = self.param(name, partitioned(init, *names), shape, param_dtype(self.config))
        return weight.reshape(1, heads * h, width)


def _more_heads(x_btnh: jax.Array, number: int) -> jax.Array:
    """With heads of zeros after its own."""
    return widen(x_btnh.swapaxes(2, 3), number).swapaxes(2, 3)


def _identity(inputs: int) -> Callable:
    """A matrix of so many rows that leaves the first features what they are."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        del key
        return jnp.eye(inputs, math.prod(shape) // inputs, dtype=dtype).reshape(shape)

    return init
