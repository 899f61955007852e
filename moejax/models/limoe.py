"""LIMoE: patches and the tokens of texts through the same blocks (arXiv 2206.02770).

A row holds the tokens of a picture and then those of its text. They see only their own kind, and
meet the same weights and the same experts, for whose places they compete. The patches, the words,
the pooling and the way into the common space are of each kind by itself.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax.config.checks import require
from moejax.config.contrastive import LIMoEConfig
from moejax.data.vocabulary import PAD
from moejax.models.registry import MODELS
from moejax.models.text_tower import TextEmbedding, pool_text, seeing_all
from moejax.models.two_towers import PairHead, PairOutput
from moejax.models.vit import ViT
from moejax.nn.block import check_blocks
from moejax.nn.layers import Norm, param_dtype
from moejax.nn.pooling import MapHead
from moejax.nn.stack import Stack
from moejax.parallel.local import constrain_tokens
from moejax.routing import ROUTERS

IMAGE, TEXT = range(2)


class LIMoE(ViT):
    """See the module docstring."""

    config: LIMoEConfig

    @nn.compact
    def __call__(
        self,
        batch: dict[str, jax.Array],
        *,
        train: bool = False,
        step: jax.Array | None = None,
        record: bool = False,
    ) -> PairOutput:
        """As moejax.models.two_towers.TwoTowers says."""
        cfg, tokens = self.config, jnp.asarray(batch["tokens"])
        image_btd = self._embed(batch["images"])
        text_btd = TextEmbedding(cfg, name="text_embedding")(tokens)
        b, patches = image_btd.shape[:2]
        # A patch is known by its place, a word by its id above all places.
        places = jnp.broadcast_to(jnp.arange(patches, dtype=jnp.int32)[None], (b, patches))
        of_text = jnp.where(tokens == PAD, 0, TEXT + 1)
        ones = jnp.ones_like(places)
        ctx = seeing_all(
            cfg,
            jnp.concatenate([places, patches + tokens], axis=1),
            jnp.concatenate([IMAGE * ones, jnp.full_like(tokens, TEXT)], axis=1),
            jnp.concatenate([(IMAGE + 1) * ones, of_text], axis=1),
            jnp.asarray(batch["weights"]),
            self.make_rng("dropout") if train and self.has_rng("dropout") else None,
            train=train,
            step=step,
            record=record,
        )
        x_btd = constrain_tokens(jnp.concatenate([image_btd, text_btd], axis=1))
        x_btd, _, aux = Stack(cfg, name="stack")(x_btd, {}, ctx)
        towers = len(cfg.modalities) if cfg.untie.final_norm else 1
        norm = Norm(cfg.norm, cfg.norm_eps, towers, param_dtype(cfg), name="final_norm")
        x_btd = norm(x_btd, ctx.modality_bt)
        image_btd, text_btd = x_btd[:, :patches], x_btd[:, patches:]
        segments = ctx.segments_bt
        image_bd = self._pool(image_btd, ctx.replace(segments_bt=segments[:, :patches]))
        of_text = ctx.replace(segments_bt=segments[:, patches:])
        text_bd = pool_text(cfg, text_btd, of_text, "text_map_head")
        return PairHead(cfg, name="head")(image_bd, text_bd, aux)

    def _pool(self, x_btd: jax.Array, ctx) -> jax.Array:
        """The features of a picture, as those of ViT are."""
        cfg = self.config
        if cfg.head == "map":
            return MapHead(cfg, name="image_map_head")(x_btd, ctx)
        if cfg.head == "mean":
            return x_btd[:, -cfg.num_patches :].mean(axis=1)
        return x_btd[:, 0]


@MODELS.register("limoe")
def build_limoe(config: LIMoEConfig) -> LIMoE:
    check_blocks(config)
    require(
        ROUTERS.get(config.moe.router.name).slots is None,
        "model.moe.router.name",
        f"{config.moe.router.name!r} mixes pictures into their own texts, which are to be found",
    )
    return LIMoE(config)
