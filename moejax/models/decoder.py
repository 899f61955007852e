"""The early-fusion decoder: dense and Mixture-of-Transformers are options of one config.

One sequence of text, image, ... tokens, one vocabulary, one causal self-attention
(Chameleon, arXiv 2405.09818); any of QKV, output projection, feed-forward and norms may be of
each modality's own (Mixture-of-Transformers, arXiv 2411.04996). With ``model.latents`` pictures
are no codes of the vocabulary but noisy latent vectors, which the same stack denoises
(Transfusion, arXiv 2408.11039). Towers may see each other in some layers only, differ in width
(HBridge, arXiv 2511.20520), and go by role: pictures that are clean are read by the tower of text
(BAGEL, arXiv 2505.14683).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from moejax import axes
from moejax.config.schema import DecoderConfig
from moejax.models.registry import MODELS
from moejax.nn.block import check_blocks
from moejax.nn.context import Context
from moejax.nn.layers import (
    Norm,
    compute_dtype,
    fan_in_normal,
    modality_layout_of,
    param_dtype,
    partitioned,
)
from moejax.nn.patch_adapter import Reader, patch_adapter
from moejax.nn.stack import Stack
from moejax.ops.attention import multimodal_mask
from moejax.ops.pictures import one_position_each, patch_numbers
from moejax.ops.positions import grid_positions, sincos_table
from moejax.ops.untied import untied_linear, widen
from moejax.parallel.local import (
    FEATURES,
    PER_DEVICE,
    TOKENS,
    constrain_tokens,
    run_local,
)


@struct.dataclass
class DecoderOutput:
    """What the decoder says of each token.

    Attributes:
      logits: [b, t, v] in float32 or wider; of no meaning at patches of latents, which predict no
        token (zeros, but for those that the tower of text reads).
      aux: statistics of the blocks.
      rows: the keys and values of these tokens, keyed by segment of the stack, leaves
        [l, b, t, ...] (None in training; moejax.nn.attention says which).
      denoised: [b, t, z], the prediction for each patch of latents (moejax.ops.diffusion says of
        what); None without latents.
    """

    logits: jax.Array
    aux: dict
    rows: dict
    denoised: jax.Array | None = None


class Decoder(nn.Module):
    """See the module docstring."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        batch: dict[str, jax.Array],
        *,
        train: bool = False,
        cache: dict | None = None,
        step: jax.Array | None = None,
        record: bool = False,
        row_length: int | None = None,
    ) -> DecoderOutput:
        """Logits of the next token after each token.

        Args:
          batch: ``tokens``, ``modality``, ``segments``, ``positions``, all [b, t] i32. For
            pictures as latents also ``latents`` [b, t, z] (noisy), ``image_id`` [b, t] i32 and
            ``times`` [b, t] f32 in [0, 1] (absent: 0, clean); else no picture is in the batch.
          train: keep no keys and values, apply dropout (with the rng stream "dropout").
          cache: keys and values of earlier tokens (moejax.generate.cache), as in ``rows`` with
            slots for t and how many of them are in use.
          step: of the training run, [] i32, for what changes in the course of it.
          record: give each token's experts, weights and logits in ``aux``, and queries in ``rows``.
          row_length: tokens that a row is going to have, where these are its first ones, for
            blocks that have room for some of them (``model.depth.eval_room``).
        """
        cfg = self.config
        dtype = compute_dtype(cfg)
        batch = jax.tree.map(jnp.asarray, batch)
        tokens, modality, segments = batch["tokens"], batch["modality"], batch["segments"]
        embedding_vd = self.param(
            "embedding_vd",
            partitioned(nn.initializers.normal(0.02), axes.VOCABULARY, axes.EMBED),
            (cfg.vocab_size, cfg.d_model),
            param_dtype(cfg),
        )
        x_btd = embedding_vd.astype(dtype)[tokens]
        adapter, memory, positions = None, None, batch["positions"]
        if "latents" in batch:
            adapter = patch_adapter(cfg, name="patch_adapter")
            x_btd, modality, memory = self._place_pictures(x_btd, batch, adapter)
            if cfg.latents.one_position:
                positions = one_position_each(positions, batch["image_id"], segments)
        seen_as_one = pictures_seen_as_one(cfg, batch)
        ctx = Context(
            tokens_bt=tokens,
            positions_bt=positions,
            modality_bt=modality,
            valid_bt=_valid(batch),
            segments_bt=segments,
            image_id_bt=seen_as_one,
            mask_bts=multimodal_mask(segments, seen_as_one),
            layout=(layout := modality_layout_of(cfg, modality)),
            rng=self.make_rng("dropout") if train and self.has_rng("dropout") else None,
            step=step,
            train=train,
            record=record,
            row_length=row_length,
        )
        x_btd = constrain_tokens(x_btd)
        x_btd, rows, aux = Stack(cfg, name="stack")(x_btd, cache or {}, ctx)
        num = len(cfg.modalities) if cfg.untie.final_norm else 1
        norm = Norm(
            cfg.norm, cfg.norm_eps, num, param_dtype(cfg), cfg.tower_shapes, name="final_norm"
        )
        x_btd = norm(x_btd, modality)
        if cfg.tie_embeddings:
            head_dv = embedding_vd.T
        else:
            head_dv = self.param(
                "head_dv",
                partitioned(fan_in_normal((0,)), axes.EMBED, axes.VOCABULARY),
                (cfg.d_model, cfg.vocab_size),
                param_dtype(cfg),
            )
        if not cfg.latents.channels:
            logits = jnp.einsum(
                "btd,dv->btv", x_btd, head_dv.astype(dtype), preferred_element_type=param_dtype(cfg)
            )
            return DecoderOutput(logits, aux, rows)
        # Patches predict no token: only the rows of text are multiplied.
        text = cfg.modalities.index("text")
        logits = run_local(
            lambda x, layout, head: untied_linear(
                x, head[None], layout, cfg.kernel_backend, group_offset=text
            ),
            (x_btd, TOKENS),
            (layout, PER_DEVICE),
            (head_dv.astype(dtype), P("fsdp", "tensor")),
            tokens=tokens.shape,
            out=FEATURES,
        ).astype(param_dtype(cfg))
        denoised = None
        if adapter is not None:
            drawn_btd = x_btd[..., : cfg.width_of("image")]
            denoised = adapter.decode(drawn_btd, memory).astype(param_dtype(cfg))
        return DecoderOutput(logits, aux, rows, denoised)

    def _place_pictures(self, x_btd, batch: dict, adapter: Any) -> tuple[jax.Array, jax.Array, Any]:
        """(tokens with patches in their places, modality by role, the adapter's memory)."""
        cfg, d = self.config, x_btd.shape[-1]
        image_id, modality = batch["image_id"], batch["modality"]
        latents = batch["latents"].astype(x_btd.dtype)
        times = batch.get("times", jnp.zeros(image_id.shape, jnp.float32))

        def placed(patches_btd: jax.Array) -> jax.Array:
            if cfg.latents.places == "sincos":
                side = cfg.latents.grid // cfg.latents.patch
                table_pd = sincos_table(grid_positions(side, side), patches_btd.shape[-1])
                number = patch_numbers(image_id, batch["segments"])
                patches_btd = patches_btd + jnp.asarray(table_pd, x_btd.dtype)[number]
            return widen(patches_btd, d)

        patches_btd, memory = adapter.encode(latents, times, image_id)
        patches_btd = placed(patches_btd)
        if cfg.latents.read_by:
            read = (image_id > 0) & (times == 0)
            modality = jnp.where(read, cfg.modalities.index(cfg.latents.read_by), modality)
            read_btd = placed(Reader(cfg, name="reader")(latents))
            patches_btd = jnp.where(read[..., None], read_btd, patches_btd)
        return jnp.where(image_id[..., None] > 0, patches_btd, x_btd), modality, memory


def pictures_seen_as_one(config: DecoderConfig, batch: dict) -> jax.Array | None:
    """[b, t], the pictures whose tokens see each other in both directions; None: there are none."""
    return batch.get("image_id") if config.latents.bidirectional else None


def _valid(batch: dict) -> jax.Array:
    """[b, t] False for padding, and for rows that only fill up a batch of an evaluation."""
    valid = batch["segments"] > 0
    if "weights" in batch:
        valid &= (batch["weights"] > 0).any(axis=1, keepdims=True)
    return valid


@MODELS.register("decoder")
def build_decoder(config: DecoderConfig) -> Decoder:
    check_blocks(config)
    return Decoder(config)
