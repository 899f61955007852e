"""A vision transformer and a tower of texts that meet in one space (CLIP, arXiv 2103.00020).

Departures: texts see both directions and are pooled as pictures are (``model.head``), where CLIP's
are causal and stand for themselves by their last token; no biases but those of patches.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from moejax import axes
from moejax.config.contrastive import PairConfig, TwoTowersConfig
from moejax.models.registry import MODELS
from moejax.models.text_tower import TextTower
from moejax.models.vit import ViT
from moejax.nn.block import check_blocks
from moejax.nn.layers import fan_in_normal, param_dtype, partitioned
from moejax.ops.contrastive import capped_exp, to_unit


@struct.dataclass
class PairOutput:
    """Pictures and texts in one space.

    Attributes:
      image: [b, z] f32 or wider, of length one.
      text: [b, z], of length one.
      scale: [] of their products, positive.
      bias: [] added to them.
      aux: statistics of the blocks.
    """

    image: jax.Array
    text: jax.Array
    scale: jax.Array
    bias: jax.Array
    aux: dict


class TwoTowers(nn.Module):
    """See the module docstring."""

    config: TwoTowersConfig

    @nn.compact
    def __call__(
        self,
        batch: dict[str, jax.Array],
        *,
        train: bool = False,
        step: jax.Array | None = None,
        record: bool = False,
    ) -> PairOutput:
        """The pictures and the texts of a batch, each by itself.

        Args:
          batch: ``images`` [b, h, w, 3] uint8, ``tokens`` [b, t] i32, ``weights`` [b] f32, 0 for
            rows that only fill up a batch.
          train: apply dropout and the noise of routers (with the rng stream "dropout").
          step: of the training run, [] i32.
          record: give each token's experts, weights and logits in ``aux``.
        """
        given = {"train": train, "step": step, "record": record}
        picture = ViT(self.config, name="image")(batch, **given)
        text_bd, _, text_aux = TextTower(self.config.text_tower, name="text")(batch, **given)
        aux = {"image": picture.aux, "text": text_aux}
        return PairHead(self.config, name="head")(picture.pooled, text_bd, aux)


class PairHead(nn.Module):
    """Features of pictures and of texts into one space; scale and bias of their products."""

    config: PairConfig

    @nn.compact
    def __call__(self, image_bd: jax.Array, text_bd: jax.Array, aux: dict) -> PairOutput:
        cfg, wide = self.config, param_dtype(self.config)

        def embed(name: str, x_bd: jax.Array) -> jax.Array:
            init = partitioned(fan_in_normal((0,)), axes.EMBED, None)
            weight_dz = self.param(f"{name}_dz", init, (x_bd.shape[-1], cfg.embed_dim), wide)
            weight_dz = weight_dz.astype(x_bd.dtype)
            return to_unit(jnp.einsum("bd,dz->bz", x_bd, weight_dz, preferred_element_type=wide))

        begin = nn.initializers.constant(math.log(cfg.initial_scale))
        log_scale = self.param("log_scale", begin, (), wide)
        bias = jnp.zeros((), wide)
        if cfg.learn_bias:
            bias = self.param("bias", nn.initializers.constant(cfg.initial_bias), (), wide)
        return PairOutput(
            embed("image", image_bd),
            embed("text", text_bd),
            capped_exp(log_scale, cfg.max_scale or math.inf),
            bias,
            aux,
        )


@MODELS.register("two_towers")
def build_two_towers(config: TwoTowersConfig) -> TwoTowers:
    check_blocks(config)
    check_blocks(config.text_tower)
    return TwoTowers(config)
