"""The vision transformer: patches of a picture through the blocks of ``model.block_pattern``.

Dosovitskiy et al. (arXiv 2010.11929); with blocks of experts V-MoE (arXiv 2106.05974), with the
router "soft" Soft MoE (arXiv 2308.00951). The stack is the decoder's, under a mask that lets all
tokens of a picture see each other. Departures: no biases but those of patches and classes; RMS norm
and SwiGLU unless ``model.norm`` and ``model.ffn_activation`` say otherwise.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from moejax import axes
from moejax.config.checks import require
from moejax.config.schema import ViTConfig
from moejax.errors import UserError
from moejax.models.autoencoder import CHANNELS, to_signed
from moejax.models.registry import MODELS
from moejax.nn.block import check_blocks
from moejax.nn.context import Context
from moejax.nn.layers import Norm, compute_dtype, fan_in_normal, param_dtype, partitioned
from moejax.nn.pooling import MapHead
from moejax.nn.stack import Stack
from moejax.ops.attention import multimodal_mask
from moejax.ops.patchify import patchify
from moejax.ops.positions import grid_positions, sincos_table
from moejax.parallel.local import constrain_tokens


@struct.dataclass
class ViTOutput:
    """What the vision transformer says of each picture.

    Attributes:
      pooled: [b, d], the features of the picture.
      patches: [b, p, d], the features of its patches, row by row, after the last norm.
      aux: statistics of the blocks.
      logits: [b, v] of the classes, in float32 or wider; None without classes.
    """

    pooled: jax.Array
    patches: jax.Array
    aux: dict
    logits: jax.Array | None = None


class ViT(nn.Module):
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
            only fill up a batch and take no part in the routing.
          train: apply dropout and the noise of routers (with the rng stream "dropout").
          step: of the training run, [] i32, for what changes in the course of it.
          record: give each token's experts, weights and logits in ``aux``.

        Raises UserError, when it is traced, if the pictures are not of ``model.image_size``.
        """
        cfg = self.config
        x_btd = constrain_tokens(self._embed(batch["images"]))
        ctx = self._context(batch, x_btd, train=train, step=step, record=record)
        x_btd, _, aux = Stack(cfg, name="stack")(x_btd, {}, ctx)
        norm = Norm(cfg.norm, cfg.norm_eps, 1, param_dtype(cfg), name="final_norm")
        x_btd = norm(x_btd, ctx.modality_bt)
        patches_bpd = x_btd[:, -cfg.num_patches :]
        if cfg.head == "map":
            pooled_bd = MapHead(cfg, name="map_head")(x_btd, ctx)
        elif cfg.head == "mean":
            pooled_bd = patches_bpd.mean(axis=1)
        else:
            pooled_bd = x_btd[:, 0]
        logits = self._classify(pooled_bd) if cfg.num_classes else None
        return ViTOutput(pooled_bd, patches_bpd, aux, logits)

    def _embed(self, images: jax.Array) -> jax.Array:
        """[b, h, w, 3] uint8 -> tokens [b, t, d]: class token, registers, patches with places."""
        cfg, dtype = self.config, compute_dtype(self.config)
        if images.shape[1:3] != (cfg.image_size, cfg.image_size):
            raise UserError(
                f"model.image_size={cfg.image_size}: the pictures are of {images.shape[1]} pixels "
                "(data.image_size); make the two equal"
            )
        d, pixels = cfg.d_model, cfg.patch_size**2 * CHANNELS
        weight = partitioned(fan_in_normal((0,)), None, axes.EMBED)
        patch_fd = self.param("patch_fd", weight, (pixels, d), param_dtype(cfg))
        zeros = partitioned(nn.initializers.zeros, axes.EMBED)
        bias_d = self.param("patch_bias_d", zeros, (d,), param_dtype(cfg))
        x_bijf = patchify(to_signed(images).astype(dtype), cfg.patch_size)
        x_bpf = x_bijf.reshape(images.shape[0], cfg.num_patches, pixels)
        x_bpd = jnp.einsum("bpf,fd->bpd", x_bpf, patch_fd.astype(dtype))
        x_bpd = x_bpd + bias_d.astype(dtype)[None, None]
        drawn = partitioned(nn.initializers.normal(0.02), None, axes.EMBED)
        table = lambda name, rows: self.param(name, drawn, (rows, d), param_dtype(cfg))
        if cfg.positions == "learned":
            x_bpd = x_bpd + table("position_pd", cfg.num_patches).astype(dtype)[None]
        elif cfg.positions == "sincos":
            places = sincos_table(grid_positions(*cfg.grid), d)
            x_bpd = x_bpd + jnp.asarray(places, dtype)[None]
        first = [table("class_token_td", 1)] if cfg.head == "class_token" else []
        first += [table("register_td", cfg.registers)] if cfg.registers else []
        rows = [jnp.broadcast_to(x.astype(dtype)[None], (len(images), *x.shape)) for x in first]
        return jnp.concatenate([*rows, x_bpd], axis=1)

    def _context(self, batch: dict, x_btd: jax.Array, **given) -> Context:
        """One segment a row, in which all see all; tokens without a patch lie in the corner."""
        cfg, (b, t) = self.config, x_btd.shape[:2]
        ones = jnp.ones((b, t), jnp.int32)
        places = jnp.pad(jnp.asarray(grid_positions(*cfg.grid)), ((t - cfg.num_patches, 0), (0, 0)))
        valid = ones > 0
        if "weights" in batch:
            valid &= (jnp.asarray(batch["weights"]) > 0)[:, None]
        draws = given["train"] and self.has_rng("dropout")
        return Context(
            # A token is known by its place.
            tokens_bt=jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t)),
            positions_bt=jnp.broadcast_to(places[None], (b, t, 2)),
            modality_bt=jnp.zeros((b, t), jnp.int32),
            valid_bt=valid,
            segments_bt=ones,
            image_id_bt=ones,
            mask_bts=multimodal_mask(ones, ones),
            layout=None,
            rng=self.make_rng("dropout") if draws else None,
            **given,
        )

    def _classify(self, pooled_bd: jax.Array) -> jax.Array:
        cfg, wide = self.config, param_dtype(self.config)
        shape = (cfg.d_model, cfg.num_classes)
        zeros = partitioned(nn.initializers.zeros, axes.EMBED, None)
        head_dv = self.param("head_dv", zeros, shape, wide)
        begin = partitioned(nn.initializers.constant(cfg.class_bias), None)
        bias_v = self.param("head_bias_v", begin, shape[1:], wide)
        head_dv = head_dv.astype(pooled_bd.dtype)
        logits = jnp.einsum("bd,dv->bv", pooled_bd, head_dv, preferred_element_type=wide)
        return logits + bias_v[None]


@MODELS.register("vit")
def build_vit(config: ViTConfig) -> ViT:
    check_blocks(config)
    require(not config.by_modality, "model.untie", "a picture has one modality; leave all False")
    return ViT(config)
