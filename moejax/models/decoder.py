"""The early-fusion decoder: dense and Mixture-of-Transformers are options of one config.

One sequence of text, image, ... tokens, one vocabulary, one causal self-attention
(Chameleon, arXiv 2405.09818); any of QKV, output projection, feed-forward and norms may be of
each modality's own (Mixture-of-Transformers, arXiv 2411.04996).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from moejax import axes
from moejax.config.schema import DecoderConfig
from moejax.models.registry import MODELS
from moejax.nn.block import BLOCKS
from moejax.nn.context import Context
from moejax.nn.layers import (
    Norm,
    compute_dtype,
    fan_in_normal,
    param_dtype,
    partitioned,
)
from moejax.nn.stack import Stack
from moejax.ops.attention import cached_mask, causal_mask
from moejax.ops.untied import modality_layout
from moejax.parallel.local import run_local


@struct.dataclass
class DecoderOutput:
    """``logits`` [b, t, v] in float32 or wider; ``rows``: the keys and values of these tokens.

    ``rows`` is keyed by segment of the stack, leaves [l, b, t, g, h] (None in training).
    """

    logits: jax.Array
    aux: dict
    rows: dict


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
        cached_b: jax.Array | None = None,
    ) -> DecoderOutput:
        """Logits of the next token after each token.

        Args:
          batch: ``tokens``, ``modality``, ``segments``, ``positions``, all [b, t] i32.
          train: keep no keys and values, apply dropout (with the rng stream "dropout").
          cache: keys and values of earlier tokens, as in ``rows`` with s slots for t.
          cached_b: how many slots of each row of the cache are filled, [b] i32.
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
        mask_bts = causal_mask(segments)
        layer_state = {}
        if cache is not None:
            assert cached_b is not None, "a cache comes with the number of its filled slots"
            mask_bts = cached_mask(segments, cached_b, _capacity(cache))
            layer_state = cache
        ctx = Context(
            positions_bt=batch["positions"],
            modality_bt=modality,
            mask_bts=mask_bts,
            layout=self._layout(modality),
            rng=self.make_rng("dropout") if train and cfg.dropout > 0 else None,
            train=train,
        )
        x_btd, rows, aux = Stack(cfg, name="stack")(x_btd, layer_state, ctx)
        towers = len(cfg.modalities) if cfg.untie.final_norm else 1
        norm = Norm("rms", cfg.norm_eps, towers, param_dtype(cfg), name="final_norm")
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
        logits = jnp.einsum(
            "btd,dv->btv", x_btd, head_dv.astype(dtype), preferred_element_type=param_dtype(cfg)
        )
        return DecoderOutput(logits, aux, rows)

    def _layout(self, modality):
        """One sort for the whole forward, or none if every projection is shared."""
        untie = self.config.untie
        if not (untie.qkv or untie.out or untie.ffn):
            return None
        num = len(self.config.modalities)
        return run_local(lambda modality_bt: modality_layout(modality_bt, num), (modality,))


def _capacity(cache: dict) -> int:
    return jax.tree.leaves(cache)[0].shape[2]


@MODELS.register("decoder")
def build_decoder(config: DecoderConfig) -> Decoder:
    for kind in config.block_kinds():
        BLOCKS.get(kind, field="model.block_pattern")
    return Decoder(config)
