"""The diffusion transformer: noisy patches through the blocks of ``model.block_pattern``.

DiT (arXiv 2212.09748), and SiT (arXiv 2401.08740), which is the same network under another process;
with blocks of experts DiT-MoE (arXiv 2407.11633). What a picture shows and how noisy it is becomes
one vector, which shifts, scales and gates what blocks do (moejax/nn/modulation.py). Blocks and
output begin at zero: the identity, and the prediction 0. Departures: no biases in attention and
MLPs; their weights begin from a truncated normal by fan-in, those of DiT from Xavier's uniform.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from moejax import axes
from moejax.config.checks import require
from moejax.config.dit import DiTConfig
from moejax.data.vocabulary import PAD
from moejax.errors import UserError
from moejax.models.patches import PatchModel
from moejax.models.registry import MODELS
from moejax.models.text_tower import TextTower, seeing_all
from moejax.nn.block import check_blocks
from moejax.nn.context import Context
from moejax.nn.layers import compute_dtype, fan_in_normal, param_dtype, partitioned
from moejax.nn.modulation import Modulation, NoiseEmbedding, modulate
from moejax.nn.stack import Stack
from moejax.ops.patchify import patchify, unpatchify
from moejax.parallel.local import constrain_tokens


@struct.dataclass
class DiTOutput:
    """What the model says of each noisy picture.

    Attributes:
      prediction: [b, h, w, z] in float32 or wider; of what, the objective says. With
        ``model.learned_range`` [b, h, w, 2z], the second half of the variance.
      aux: statistics of the blocks.
    """

    prediction: jax.Array
    aux: dict


class DiT(PatchModel):
    """See the module docstring."""

    config: DiTConfig

    @nn.compact
    def __call__(
        self,
        batch: dict[str, jax.Array],
        *,
        train: bool = False,
        step: jax.Array | None = None,
        record: bool = False,
    ) -> DiTOutput:
        """Predictions for noisy pictures.

        Args:
          batch: ``x_t`` [b, h, w, z] float, ``times`` [b] f32, how noisy each is by the clock of
            the objective (moejax.ops.diffusion.network_input). With classes ``labels`` [b] i32:
            ``num_classes``, or any negative one, says nothing. With texts ``tokens`` [b, t] i32,
            of which padding alone says nothing. ``weights`` [b] f32 (absent: 1), 0 for rows that
            only fill up a batch and take no part in the routing.
          train: apply dropout and the noise of routers (with the rng stream "dropout").
          step: of the training run, [] i32, for what changes in the course of it.
          record: give each token's experts, weights and logits in ``aux``.

        Raises UserError, when it is traced, if pictures are not of the size that the config says.
        """
        cfg = self.config
        batch = self._noisy(batch)
        given = {"train": train, "step": step, "record": record}
        noise_bd = NoiseEmbedding(cfg, name="noise_embedding")(batch["times"])
        condition_bd, aux, told = noise_bd, {}, {}
        silent_b = jnp.ones(len(noise_bd), bool)
        if cfg.num_classes:
            label_bd, none_b = self._of_labels(batch["labels"])
            condition_bd, silent_b = condition_bd + label_bd, silent_b & none_b
        if cfg.text_length:
            text_bd, words_bsz, aux["text"] = self._of_texts(batch, given)
            said_bs = batch["tokens"] != PAD
            told = {"words_bsz": words_bsz, "said_bs": said_bs}
            condition_bd, silent_b = condition_bd + text_bd, silent_b & ~said_bs.any(axis=1)
        x_bpf = patchify(batch["x_t"], cfg.patch_size)
        x_bpd = self._project(x_bpf.reshape(len(x_bpf), cfg.num_patches, -1))
        vectors_pd = self._place_vectors()
        x_bpd = x_bpd if vectors_pd is None else x_bpd + vectors_pd[None]
        ctx = self._context(batch["weights"], silent_b, **given)
        ctx = ctx.replace(condition_bd=condition_bd, noise_bd=noise_bd, **told)
        x_bpd, _, aux["image"] = Stack(cfg, name="stack")(constrain_tokens(x_bpd), {}, ctx)
        prediction = self._predict(x_bpd, condition_bd)
        return DiTOutput(prediction, aux if cfg.text_length else aux["image"])

    def _noisy(self, batch: dict) -> dict:
        """The batch with all that is read; when parameters are made pictures may be missing."""
        cfg = self.config
        size = (cfg.image_size, cfg.image_size, cfg.in_channels)
        rows = len(jax.tree.leaves(batch)[0])
        absent = {"weights": jnp.ones(rows)}
        if self.is_initializing():
            absent |= {"x_t": jnp.zeros((rows, *size)), "times": jnp.zeros(rows)}
        batch = jax.tree.map(jnp.asarray, absent | batch)
        if batch["x_t"].shape[1:] != size:
            raise UserError(
                f"model.image_size={cfg.image_size}, model.in_channels={cfg.in_channels}: what is "
                f"to be denoised is {list(batch['x_t'].shape[1:])}; make them equal"
            )
        return batch

    def _of_labels(self, labels_b: jax.Array) -> tuple[jax.Array, jax.Array]:
        """([b, d], which say nothing [b]); that is the last row of the table."""
        classes = self.config.num_classes
        table_vd = self._table("label_vd", classes + 1)
        none_b = (labels_b < 0) | (labels_b == classes)
        return table_vd[jnp.where(none_b, classes, labels_b)], none_b

    def _of_texts(self, batch: dict, given: dict) -> tuple[jax.Array, jax.Array, dict]:
        """([b, d], [b, s, z], aux): the mean of a text's tokens, as wide as patches; the tokens."""
        cfg, wide = self.config, param_dtype(self.config)
        text_bz, words_bsz, aux = TextTower(cfg.text_tower, name="text")(batch, **given)
        drawn = partitioned(fan_in_normal((0,)), axes.EMBED, None)
        weight_zd = self.param("text_df", drawn, (text_bz.shape[-1], cfg.d_model), wide)
        text_bd = jnp.einsum("bz,zd->bd", text_bz.astype(wide), weight_zd)
        none_b = (batch["tokens"] == PAD).all(axis=1)
        text_bd = jnp.where(none_b[:, None], self._table("no_text_td", 1), text_bd)
        return text_bd, words_bsz, aux

    def _context(self, weights_b: jax.Array, silent_b: jax.Array, **given) -> Context:
        """All patches of a picture see each other; a patch is known by its place."""
        cfg, shape = self.config, (len(weights_b), self.config.num_patches)
        number_p = jnp.arange(cfg.num_patches, dtype=jnp.int32)
        silent_bp = jnp.broadcast_to(silent_b[:, None], shape).astype(jnp.int32)
        draws = given["train"] and self.has_rng("dropout")
        ctx = seeing_all(
            cfg,
            jnp.broadcast_to(number_p[None], shape),
            silent_bp * (len(cfg.modalities) > 1),
            jnp.ones(shape, jnp.int32),
            weights_b,
            self.make_rng("dropout") if draws else None,
            **given,
        )
        return ctx.replace(positions_bt=jnp.broadcast_to(self._places()[None], (*shape, 2)))

    def _predict(self, x_bpd: jax.Array, condition_bd: jax.Array) -> jax.Array:
        """[b, h, w, out_channels]; a linear map that begins at zero."""
        cfg, dtype, wide = self.config, compute_dtype(self.config), param_dtype(self.config)
        modulation = Modulation(cfg, 2, name="final_modulation")
        shift, scale = modulation(condition_bd, dtype)
        numbers, zeros = cfg.patch_size**2 * cfg.out_channels, nn.initializers.zeros
        out_df = self.param(
            "out_df", partitioned(zeros, axes.EMBED, None), (cfg.d_model, numbers), wide
        )
        bias_f = self.param("out_bias_f", partitioned(zeros, None), (numbers,), wide)
        x_bpd = modulate(cfg, x_bpd, shift, scale)
        out_bpf = jnp.einsum(
            "bpd,df->bpf", x_bpd, out_df.astype(dtype), preferred_element_type=wide
        )
        out_bpf = out_bpf + bias_f[None, None]
        return unpatchify(out_bpf.reshape(len(out_bpf), *cfg.grid, numbers), cfg.patch_size)


@MODELS.register("dit")
def build_dit(config: DiTConfig) -> DiT:
    check_blocks(config)
    if config.text_length:
        check_blocks(config.text_tower)
    require(not config.by_modality, "model.untie", "a picture has one modality; leave all False")
    return DiT(config)
