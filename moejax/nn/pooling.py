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
    """Multi-head attention pooling: one learned query over a picture, then ``y + MLP(norm(y))``.

    Scaling Vision Transformers (arXiv 2106.04560, section 3.2), by way of the Set Transformer
    (arXiv 1810.00825). No biases.
    """

    config: TrunkConfig

    @nn.compact
    def __call__(
        self, x_btd: jax.Array, ctx: Context, member_bit: jax.Array | None = None
    ) -> jax.Array:
        """Tokens [b, t, d], normalised, of which ``ctx.segments_bt`` > 0 count -> [b, d].

        With ``member_bit`` (bool) [b, i, d]: for each row's picture i of the tokens in it.
        """
        one = member_bit is None
        if member_bit is None:
            member_bit = (ctx.segments_bt > 0)[:, None, :]
        cfg, dtype = self.config, x_btd.dtype
        n, g, h = cfg.num_heads, cfg.kv_heads, cfg.head_dim
        (b, _, d), images = x_btd.shape, member_bit.shape[1]
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
        probe_bid = jnp.broadcast_to(probe_td.astype(dtype)[None], (b, images, d))
        q = jnp.einsum("bid,dnh->binh", probe_bid, query_dnh)
        k, v = jnp.split(jnp.einsum("bsd,dgh->bsgh", x_btd, key_value_dgh.astype(dtype)), 2, axis=2)
        heads = attend(q, k, v, member_bit)
        y_bid = jnp.einsum("binh,nhd->bid", heads, out_nhd)
        norm = Norm(cfg.norm, cfg.norm_eps, 1, param_dtype(cfg), name="ffn_norm")
        ffn = FeedForward(cfg, 1, (max(cfg.ffn_hidden),), name="ffn")
        y_bid = y_bid + ffn(norm(y_bid, jnp.zeros((b, images), jnp.int32)), ctx)
        return y_bid[:, 0] if one else y_bid
