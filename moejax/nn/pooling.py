"""From the tokens of a picture to its features."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax import axes
from moejax.config.trunk import TrunkConfig
from moejax.nn.context import Context
from moejax.nn.layers import FeedForward, Norm, fan_in_normal, param_dtype, partitioned
from moejax.ops.attention import attend


class MapHead(nn.Module):
    """Multi-head attention pooling: one learned query over all tokens, then ``y + MLP(norm(y))``.

    Scaling Vision Transformers (arXiv 2106.04560, section 3.2), by way of the Set Transformer
    (arXiv 1810.00825). No biases.
    """

    config: TrunkConfig

    @nn.compact
    def __call__(self, x_btd: jax.Array, ctx: Context) -> jax.Array:
        """Tokens [b, t, d], normalised, of which ``ctx.segments_bt`` > 0 count -> [b, d]."""
        cfg, dtype = self.config, x_btd.dtype
        n, g, h = cfg.num_heads, cfg.kv_heads, cfg.head_dim
        b, _, d = x_btd.shape
        into = partitioned(fan_in_normal((0,)), axes.EMBED, axes.HEADS, axes.HEAD_SIZE)
        back = partitioned(fan_in_normal((0, 1)), axes.HEADS, axes.HEAD_SIZE, axes.EMBED)
        probe_td = self.param(
            "probe_td",
            partitioned(nn.initializers.normal(0.02), None, axes.EMBED),
            (1, d),
            param_dtype(cfg),
        )
        query_dnh = self.param("query_dnh", into, (d, n, h), param_dtype(cfg)).astype(dtype)
        key_value_dgh = self.param("key_value_dgh", into, (d, 2 * g, h), param_dtype(cfg))
        out_nhd = self.param("out_nhd", back, (n, h, d), param_dtype(cfg)).astype(dtype)
        # As many rows as pictures, though all begin alike: it is what the count of FLOPs says.
        probe_btd = jnp.broadcast_to(probe_td.astype(dtype)[None], (b, 1, d))
        q = jnp.einsum("btd,dnh->btnh", probe_btd, query_dnh)
        k, v = jnp.split(jnp.einsum("bsd,dgh->bsgh", x_btd, key_value_dgh.astype(dtype)), 2, axis=2)
        heads = attend(q, k, v, (ctx.segments_bt > 0)[:, None, :])
        y_btd = jnp.einsum("btnh,nhd->btd", heads, out_nhd)
        norm = Norm(cfg.norm, cfg.norm_eps, 1, param_dtype(cfg), name="ffn_norm")
        ffn = FeedForward(cfg, 1, (max(cfg.ffn_hidden),), name="ffn")
        y_btd = y_btd + ffn(norm(y_btd, jnp.zeros((b, 1), jnp.int32)), ctx)
        return y_btd[:, 0]
