"""What patches take from the words of a text: attention to them, and experts of their places.

RAPHAEL (arXiv 2305.18295): between self-attention and the feed-forward layer of a block patches
look at words, and where many look at one it is run through the expert that the word's gate chooses
(moejax/experts/space.py). No code of the authors is public; that both branches are shifted, scaled
and gated by the condition, as those of DiT are, is ours, and so is the noise of the gate.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax import axes
from moejax.config.dit import DiTConfig, WordsConfig
from moejax.config.trunk import TrunkConfig
from moejax.experts.activations import activate
from moejax.experts.space import attention_masks, space_moe
from moejax.nn.context import Context
from moejax.nn.layers import Norm, dropout, fan_in_normal, param_dtype, partitioned
from moejax.nn.modulation import Modulation, modulate
from moejax.ops.attention import attend_with_maps

# Of the noise of the gate, apart from what dropout draws.
_DRAW = 1 << 11


class Words(nn.Module):
    """``x + gate Attn(x, words)``, then ``x + gate mean_i E_{r(i)}(x M_i)`` over the words i.

    The marks of the begin and the end of a text are words too. A row whose text is padding alone is
    left as it is. ``model.attention_block`` has no effect here: a text is short, and the maps that
    masks are made of are whole.
    """

    config: TrunkConfig

    @nn.compact
    def __call__(self, x_bpd: jax.Array, ctx: Context) -> jax.Array:
        """Patches [b, p, d] with ``ctx.words_bsz``, ``ctx.said_bs`` and the condition -> the same.

        M_i is where a word's attention, the mean of all heads, is above ``model.words.threshold``
        times its largest.
        """
        cfg, words = self.config, self._words
        condition_bd, words_bsz, said_bs = ctx.condition_bd, ctx.words_bsz, ctx.said_bs
        assert condition_bd is not None, "the model puts its condition into the context"
        assert words_bsz is not None and said_bs is not None, "and the text"
        vectors = Modulation(cfg, 6 if words.num_experts else 3, name="modulation")
        shift, scale, strength, *of_places = vectors(condition_bd, x_bpd.dtype)
        seen_bpd = modulate(cfg, x_bpd, shift, scale)
        out_bpd, maps_bps = self._attend(seen_bpd, words_bsz, said_bs, ctx)
        x_bpd = x_bpd + dropout(strength * out_bpd, cfg.dropout, ctx, 2)
        if not words.num_experts:
            return x_bpd
        shift, scale, strength = of_places
        out_bpd = space_moe(
            modulate(cfg, x_bpd, shift, scale),
            # Patches that take no part in the block are no places of a word.
            attention_masks(maps_bps.swapaxes(1, 2) * ctx.valid_bt[:, None], words.threshold),
            self._gate(words_bsz, ctx),
            said_bs,
            self._experts(x_bpd.dtype),
            outside=words.outside,
        )
        return x_bpd + dropout(strength * out_bpd, cfg.dropout, ctx, 3)

    @property
    def _words(self) -> WordsConfig:
        assert isinstance(self.config, DiTConfig), "of all trunks it alone reads words"
        return self.config.words

    def _attend(
        self, x_bpd: jax.Array, words_bsz: jax.Array, said_bs: jax.Array, ctx: Context
    ) -> tuple[jax.Array, jax.Array]:
        """([b, p, d], the mean of the heads' maps [b, p, s])."""
        cfg, dtype, wide = self.config, x_bpd.dtype, param_dtype(self.config)
        n, g, h, d = cfg.num_heads, cfg.kv_heads, cfg.head_dim, cfg.d_model
        words_bsz = words_bsz.astype(dtype)
        into = partitioned(fan_in_normal((0,)), axes.EMBED, axes.HEADS, axes.HEAD_SIZE)
        back = partitioned(fan_in_normal((0, 1)), axes.HEADS, axes.HEAD_SIZE, axes.EMBED)
        query_dnh = self.param("query_dnh", into, (d, n, h), wide).astype(dtype)
        shape = (words_bsz.shape[-1], 2 * g, h)
        key_value_zgh = self.param("key_value_zgh", into, shape, wide).astype(dtype)
        out_nhd = self.param("out_nhd", back, (n, h, d), wide).astype(dtype)
        q = jnp.einsum("bpd,dnh->bpnh", x_bpd, query_dnh)
        k, v = jnp.split(jnp.einsum("bsz,zgh->bsgh", words_bsz, key_value_zgh), 2, axis=2)
        if cfg.qk_norm != "none":
            norm = functools.partial(Norm, cfg.qk_norm, cfg.norm_eps, 1, wide)
            q = norm(name="q_norm")(q, ctx.modality_bt)
            k = norm(name="k_norm")(k, jnp.zeros_like(said_bs, jnp.int32))
        mask_bps = jnp.broadcast_to(said_bs[:, None], (*x_bpd.shape[:2], said_bs.shape[1]))
        heads, maps_bnps = attend_with_maps(q, k, v, mask_bps)
        # Without a word the heads have the mean of what padding is projected to.
        heads = heads * said_bs.any(axis=1)[:, None, None, None].astype(dtype)
        return jnp.einsum("bpnh,nhd->bpd", heads, out_nhd), maps_bnps.mean(axis=1)

    def _gate(self, words_bsz: jax.Array, ctx: Context) -> jax.Array:
        """Logits of each word's experts [b, s, e], in float32 or wider."""
        words, wide = self._words, param_dtype(self.config)
        e, z = words.num_experts, words_bsz.shape[-1]
        drawn = partitioned(fan_in_normal((0,)), axes.EMBED, None)
        gate_ze = self.param("gate_ze", drawn, (z, e), wide)
        logits_bse = jnp.einsum("bsz,ze->bse", words_bsz.astype(wide), gate_ze)
        if ctx.train and ctx.rng is not None and words.noise:
            key = jax.random.fold_in(ctx.rng, _DRAW)
            noise_bse = jax.random.normal(key, logits_bse.shape, logits_bse.dtype)
            logits_bse = logits_bse + noise_bse * (words.noise / e)
        return logits_bse

    def _experts(self, dtype: jnp.dtype):
        """[b, p, d] -> [b, p, e, d]: MLPs, with biases lest zeros be mapped to zeros."""
        cfg, words, wide = self.config, self._words, param_dtype(self.config)
        e, d, f = words.num_experts, cfg.d_model, words.hidden
        inner = f * (2 if words.activation == "swiglu" else 1)
        matrix, zeros = fan_in_normal((1,)), nn.initializers.zeros

        def weight(name: str, init, shape: tuple[int, ...], *names: str | None) -> jax.Array:
            return self.param(name, partitioned(init, *names), shape, wide).astype(dtype)

        # Not of the mesh axis of experts: all of them are run on every patch.
        local = axes.LOCAL_EXPERT
        wi_edf = weight("wi_edf", matrix, (e, d, inner), local, axes.EMBED, axes.MLP)
        wi_bias_ef = weight("wi_bias_ef", zeros, (e, inner), local, axes.MLP)
        wo_efd = weight("wo_efd", matrix, (e, f, d), local, axes.MLP, axes.EMBED)
        wo_bias_ed = weight("wo_bias_ed", zeros, (e, d), local, axes.EMBED)

        def run(x_bpd: jax.Array) -> jax.Array:
            hidden = jnp.einsum("bpd,edf->bpef", x_bpd, wi_edf) + wi_bias_ef[None, None]
            hidden = activate(hidden, words.activation)
            return jnp.einsum("bpef,efd->bped", hidden, wo_efd) + wo_bias_ed[None, None]

        return run
