"""A tower of texts: the blocks of ``model.block_pattern`` over tokens that all see each other."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax import axes
from moejax.config.contrastive import PairConfig, TextTowerConfig
from moejax.config.trunk import TrunkConfig
from moejax.data.vocabulary import PAD
from moejax.errors import UserError
from moejax.nn.context import Context
from moejax.nn.layers import Norm, compute_dtype, modality_layout_of, param_dtype, partitioned
from moejax.nn.pooling import MapHead
from moejax.nn.stack import Stack
from moejax.ops.attention import multimodal_mask
from moejax.parallel.local import constrain_tokens


class TextEmbedding(nn.Module):
    """Tokens [b, t] i32 -> [b, t, d]: a row for each word, and a learned one for each place."""

    config: PairConfig | TextTowerConfig

    @nn.compact
    def __call__(self, tokens_bt: jax.Array) -> jax.Array:
        cfg, dtype = self.config, compute_dtype(self.config)
        if tokens_bt.shape[1] != cfg.text_length:
            raise UserError(
                f"model.text_length={cfg.text_length}: the texts are of {tokens_bt.shape[1]} "
                "tokens (data.sequence_length); make the two equal"
            )
        drawn = nn.initializers.normal(0.02)
        embedding_vd = self.param(
            "embedding_vd",
            partitioned(drawn, axes.VOCABULARY, axes.EMBED),
            (cfg.vocab_size, cfg.d_model),
            param_dtype(cfg),
        )
        position_td = self.param(
            "position_td",
            partitioned(drawn, None, axes.EMBED),
            (cfg.text_length, cfg.d_model),
            param_dtype(cfg),
        )
        return embedding_vd.astype(dtype)[tokens_bt] + position_td.astype(dtype)[None]


def seeing_all(
    config: TrunkConfig,
    tokens_bt: jax.Array,
    modality_bt: jax.Array,
    segments_bt: jax.Array,
    weights_b: jax.Array,
    rng: jax.Array | None,
    **given,
) -> Context:
    """The context of rows in which the tokens of a segment all see each other.

    ``segments_bt`` is 0 for padding; rows of weight 0 only fill up a batch.
    """
    b, t = tokens_bt.shape
    return Context(
        tokens_bt=tokens_bt,
        positions_bt=jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t)),
        modality_bt=modality_bt,
        valid_bt=(segments_bt > 0) & (weights_b > 0)[:, None],
        segments_bt=segments_bt,
        image_id_bt=segments_bt,
        mask_bts=multimodal_mask(segments_bt, segments_bt),
        layout=modality_layout_of(config, modality_bt),
        rng=rng,
        **given,
    )


def pool_text(
    config: PairConfig | TextTowerConfig, x_btd: jax.Array, ctx: Context, name: str
) -> jax.Array:
    """[b, d] of tokens, by ``model.head``; padding (``ctx.segments_bt`` 0) takes no part.

    Call it inside of a compact module, of which the head called ``name`` then is a part.
    """
    if config.head == "map":
        return MapHead(config, name=name)(x_btd, ctx)
    if config.head == "class_token":
        return x_btd[:, 0]
    kept_bt1 = (ctx.segments_bt > 0)[..., None].astype(x_btd.dtype)
    return (x_btd * kept_bt1).sum(axis=1) / jnp.maximum(kept_bt1.sum(axis=1), 1)


class TextTower(nn.Module):
    """See the module docstring."""

    config: TextTowerConfig

    @nn.compact
    def __call__(
        self, batch: dict[str, jax.Array], *, train: bool, step: jax.Array | None, record: bool
    ) -> tuple[jax.Array, jax.Array, dict]:
        """``tokens`` [b, t] i32, ``weights`` [b] f32 of the batch -> ([b, d], [b, t, d], aux).

        That is each text as one vector, and its tokens, normalised.
        """
        cfg = self.config
        tokens = jnp.asarray(batch["tokens"])
        x_btd = constrain_tokens(TextEmbedding(cfg, name="embedding")(tokens))
        ctx = seeing_all(
            cfg,
            tokens,
            jnp.zeros_like(tokens),
            (tokens != PAD).astype(jnp.int32),
            jnp.asarray(batch["weights"]),
            self.make_rng("dropout") if train and self.has_rng("dropout") else None,
            train=train,
            step=step,
            record=record,
        )
        x_btd, _, aux = Stack(cfg, name="stack")(x_btd, {}, ctx)
        norm = Norm(cfg.norm, cfg.norm_eps, 1, param_dtype(cfg), name="final_norm")
        x_btd = norm(x_btd, ctx.modality_bt)
        return pool_text(cfg, x_btd, ctx, "map_head"), x_btd, aux
