"""The vision transformer: patches of a picture through the blocks of ``model.block_pattern``.

Dosovitskiy et al. (arXiv 2010.11929); with blocks of experts V-MoE (arXiv 2106.05974), with the
router "soft" Soft MoE (arXiv 2308.00951). The stack is the decoder's, under a mask that lets all
tokens of a picture see each other. Departures: no biases but those of patches and classes; RMS norm
and SwiGLU unless ``model.norm`` and ``model.ffn_activation`` say otherwise.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from moejax import axes
from moejax.config.checks import require
from moejax.config.schema import ViTConfig
from moejax.errors import UserError
from moejax.models.autoencoder import to_signed
from moejax.models.patches import PatchModel
from moejax.models.registry import MODELS
from moejax.nn.block import check_blocks
from moejax.nn.context import Context
from moejax.nn.layers import Norm, compute_dtype, param_dtype, partitioned
from moejax.nn.pooling import MapHead
from moejax.nn.stack import Stack
from moejax.ops.attention import multimodal_mask
from moejax.ops.patchify import patchify
from moejax.parallel.local import constrain_tokens


@struct.dataclass
class ViTOutput:
    """What the vision transformer says of each picture.

    Attributes:
      pooled: [b, d], the features of the picture.
      patches: [b, p, d], the features of its patches, row by row, after the last norm.
      aux: statistics of the blocks.
      logits: [b, v] of the classes, in float32 or wider; None without classes.

    Of rows with places for i pictures ``pooled`` is [b, i, d] and ``logits`` [b, i, v].
    """

    pooled: jax.Array
    patches: jax.Array
    aux: dict
    logits: jax.Array | None = None


class Rows(NamedTuple):
    """Patches of the pictures in each row.

    Attributes:
      pixels: [b, p, f] of each patch.
      places: [b, p, 2], row and column of each in its picture's grid.
      image: [b, p], which of the row's pictures it is of, from 1 on; 0 for padding.
      kept: [b, i], which pictures count.
    """

    pixels: jax.Array
    places: jax.Array
    image: jax.Array
    kept: jax.Array


class ViT(PatchModel):
    """See the module docstring."""

    config: ViTConfig

    @nn.compact
    def __call__(
        self,
        batch: dict[str, jax.Array],
        *,
        train: bool = False,
        step: jax.Array | None = None,
        record: bool = False,
    ) -> ViTOutput:
        """Features of each picture, and logits of its class.

        Args:
          batch: ``images`` [b, h, w, 3] uint8; ``weights`` [b] f32 (absent: 1), 0 for rows that
            only fill up a batch and take no part in the routing. Or rows of several pictures of any
            size, which do not see each other: ``patches`` [b, p, f] uint8, ``image_id`` [b, p],
            ``places`` [b, p, 2] and ``weights`` [b, i] (moejax/data/packed_images.py).
          train: apply dropout and the noise of routers (with the rng stream "dropout").
          step: of the training run, [] i32, for what changes in the course of it.
          record: give each token's experts, weights and logits in ``aux``.

        Raises UserError, when it is traced, if the pictures are not of ``model.image_size``.
        """
        cfg, packed = self.config, "patches" in batch
        rows = self._rows(batch)
        x_btd = constrain_tokens(self._embed_rows(rows, packed))
        ctx = self._context(batch, x_btd, train=train, step=step, record=record)
        x_btd, _, aux = Stack(cfg, name="stack")(x_btd, {}, ctx)
        norm = Norm(cfg.norm, cfg.norm_eps, 1, param_dtype(cfg), name="final_norm")
        x_btd = norm(x_btd, ctx.modality_bt)
        patches_bpd = x_btd[:, -rows.pixels.shape[1] :]
        number_i = jnp.arange(1, rows.kept.shape[1] + 1, dtype=jnp.int32)
        if cfg.head == "map":
            member_bit = ctx.segments_bt[:, None, :] == number_i[None, :, None]
            pooled_bid = MapHead(cfg, name="map_head")(x_btd, ctx, member_bit)
        elif cfg.head == "class_token":
            pooled_bid = x_btd[:, : len(number_i)]
        elif packed:
            member_bip = rows.image[:, None, :] == number_i[None, :, None]
            share = member_bip / jnp.maximum(member_bip.sum(axis=-1, keepdims=True), 1)
            pooled_bid = jnp.einsum("bip,bpd->bid", share.astype(x_btd.dtype), patches_bpd)
        else:
            pooled_bid = patches_bpd.mean(axis=1, keepdims=True)
        logits = self._classify(pooled_bid) if cfg.num_classes else None
        if not packed:
            pooled_bid = pooled_bid[:, 0]
            logits = None if logits is None else logits[:, 0]
        return ViTOutput(pooled_bid, patches_bpd, aux, logits)

    def _rows(self, batch: dict) -> Rows:
        if "patches" in batch:
            return packed_rows(batch)
        return self._whole(batch["images"], batch.get("weights"))

    def _whole(self, images: jax.Array, weights: jax.Array | None = None) -> Rows:
        """One picture of ``model.image_size`` in each row."""
        cfg = self.config
        if images.shape[1:3] != (cfg.image_size, cfg.image_size):
            raise UserError(
                f"model.image_size={cfg.image_size}: the pictures are of {images.shape[1]} pixels "
                "(data.image_size); make the two equal"
            )
        shape = (len(images), cfg.num_patches)
        places = jnp.broadcast_to(self._places()[None], (*shape, 2))
        kept = jnp.ones((len(images), 1), bool)
        if weights is not None:
            kept = (jnp.asarray(weights) > 0)[:, None]
        pixels = patchify(jnp.asarray(images), cfg.patch_size).reshape(*shape, -1)
        return Rows(pixels, places, jnp.ones(shape, jnp.int32), kept)

    def _embed(self, images: jax.Array) -> jax.Array:
        """[b, h, w, 3] uint8 -> tokens [b, t, d]: class token, registers, patches with places."""
        return self._embed_rows(self._whole(images), packed=False)

    def _embed_rows(self, rows: Rows, packed: bool) -> jax.Array:
        """Tokens [b, t, d]: a class token and registers for each picture, patches with places."""
        cfg, dtype = self.config, compute_dtype(self.config)
        if packed and cfg.positions == "learned":
            raise UserError(
                "model.positions: 'learned' places are those of one grid, and the pictures of "
                "a row have several; use 'sincos' or 'rope'"
            )
        x_bpd = self._project(to_signed(rows.pixels))
        vectors_pd = self._place_vectors()
        if vectors_pd is not None and packed:
            number_bp = rows.places[..., 0] * cfg.grid[1] + rows.places[..., 1]
            x_bpd = x_bpd + vectors_pd[number_bp]
        elif vectors_pd is not None:
            x_bpd = x_bpd + vectors_pd[None]
        first = [self._table("class_token_td", 1)] if cfg.head == "class_token" else []
        first += [self._table("register_td", cfg.registers)] if cfg.registers else []
        images = rows.kept.shape[1]
        each = [jnp.tile(x.astype(dtype), (images, 1))[None] for x in first]
        each = [jnp.broadcast_to(x, (len(x_bpd), *x.shape[1:])) for x in each]
        return jnp.concatenate([*each, x_bpd], axis=1)

    def _images_of_tokens(self, rows: Rows) -> jax.Array:
        """[b, t], which of a row's pictures each token is of, from 1 on; 0 for padding."""
        cfg, (b, images) = self.config, rows.kept.shape
        number_i = jnp.arange(1, images + 1, dtype=jnp.int32)
        first = [number_i] if cfg.head == "class_token" else []
        first += [jnp.repeat(number_i, cfg.registers)]
        front = jnp.concatenate(first)
        return jnp.concatenate([jnp.broadcast_to(front[None], (b, len(front))), rows.image], axis=1)

    def _context(self, batch: dict, x_btd: jax.Array, **given) -> Context:
        """A segment for each picture, in which all see all.

        Tokens without a patch lie in the corner.
        """
        rows, (b, t) = self._rows(batch), x_btd.shape[:2]
        image_bt = self._images_of_tokens(rows)
        corner = ((0, 0), (t - rows.places.shape[1], 0), (0, 0))
        kept = jnp.pad(rows.kept, ((0, 0), (1, 0)))
        draws = given["train"] and self.has_rng("dropout")
        return Context(
            # A token is known by its place.
            tokens_bt=jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t)),
            positions_bt=jnp.pad(rows.places, corner),
            modality_bt=jnp.zeros((b, t), jnp.int32),
            valid_bt=jnp.take_along_axis(kept, image_bt, axis=1),
            segments_bt=image_bt,
            image_id_bt=image_bt,
            mask_bts=multimodal_mask(image_bt, image_bt),
            layout=None,
            rng=self.make_rng("dropout") if draws else None,
            **given,
        )

    def _classify(self, pooled_bid: jax.Array) -> jax.Array:
        cfg, wide = self.config, param_dtype(self.config)
        shape = (cfg.d_model, cfg.num_classes)
        zeros = partitioned(nn.initializers.zeros, axes.EMBED, None)
        head_dv = self.param("head_dv", zeros, shape, wide)
        begin = partitioned(nn.initializers.constant(cfg.class_bias), None)
        bias_v = self.param("head_bias_v", begin, shape[1:], wide)
        head_dv = head_dv.astype(pooled_bid.dtype)
        logits = jnp.einsum("bid,dv->biv", pooled_bid, head_dv, preferred_element_type=wide)
        return logits + bias_v[None, None]


def packed_rows(batch: dict) -> Rows:
    """The rows of a batch of several pictures each."""
    kept = jnp.asarray(batch["weights"]) > 0
    patches, places, owners = (
        jnp.asarray(batch[name]) for name in ("patches", "places", "image_id")
    )
    return Rows(patches, places, owners, kept)


@MODELS.register("vit")
def build_vit(config: ViTConfig) -> ViT:
    check_blocks(config)
    require(not config.by_modality, "model.untie", "a picture has one modality; leave all False")
    return ViT(config)
