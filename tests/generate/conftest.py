"""A tiny decoder with random weights, its vocabulary and prompts with images inside."""

import functools

import jax
import numpy as np
import pytest
from flax.core import meta

from moejax.config.moe import MoEConfig, ScoreConfig
from moejax.config.schema import DecoderConfig, UntieConfig
from moejax.data.vocabulary import BOI, BOS, EOI, EOS, Vocabulary
from moejax.models.decoder import build_decoder

VOCABULARY = Vocabulary(text_size=20, image_codes=12, codes_per_image=4)
UNTIED = UntieConfig(qkv=True, out=True, ffn=True, norms=True, final_norm=True)
KINDS = {
    "dense": {},
    "mot": {"untie": UNTIED},
    # Also with logits that go from layer to layer, two caches in a layer, and a capacity that
    # drops most of the choices in training.
    "moe": {
        "block_pattern": ("moe", "shortcut_moe"),
        "moe": MoEConfig(
            num_experts=4,
            hidden=16,
            score=ScoreConfig(gating_residual=True),
            capacity="order",
            capacity_factor=0.3,
        ),
    },
}


def batch_of(rows) -> dict:
    """A decoder batch of token sequences, one segment per row, padded on the right."""
    width = max(map(len, rows))
    tokens = np.zeros((len(rows), width), np.int32)
    segments = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        segments[i, : len(row)] = 1
    return {
        "tokens": tokens,
        "modality": (tokens >= VOCABULARY.image_offset).astype(np.int32),
        "segments": segments,
        "positions": np.tile(np.arange(width, dtype=np.int32), (len(rows), 1)),
    }


class Tiny:
    """A model, its parameters, and its forward without a cache."""

    vocabulary = VOCABULARY

    def __init__(self, kind: str):
        config = DecoderConfig(
            vocab_size=VOCABULARY.size,
            num_layers=2,
            d_model=32,
            num_heads=4,
            num_kv_heads=2,
            ffn_hidden=(48,),
            **KINDS[kind],
        )
        self.model = build_decoder(config)
        init = jax.jit(functools.partial(self.model.init, train=False))
        self.params = meta.unbox(init(jax.random.key(0), batch_of([[BOS]])))["params"]
        # Strong logits: a random model is otherwise almost uniform, and greedy ties are near.
        self.params["head_dv"] = self.params["head_dv"] * 4.0
        self._forward = jax.jit(
            lambda params, batch: self.model.apply({"params": params}, batch, train=False).logits
        )

    def logits(self, rows, width: int = 48):
        """[b, width, v] of whole sequences; one width, so that one program serves all."""
        padded = [*rows, [BOS] * width]
        return np.asarray(self._forward(self.params, batch_of(padded)))[: len(rows)]


@functools.cache
def _tiny(kind: str) -> Tiny:
    return Tiny(kind)


@pytest.fixture(params=sorted(KINDS))
def tiny(request) -> Tiny:
    """Each kind of decoder in turn."""
    return _tiny(request.param)


@pytest.fixture
def dense() -> Tiny:
    return _tiny("dense")


@pytest.fixture
def mot() -> Tiny:
    return _tiny("mot")


@pytest.fixture
def image():
    """``image(seed)``: BOI, random codes, EOI."""

    def make(seed: int) -> list[int]:
        codes = np.random.default_rng(seed).integers(0, VOCABULARY.image_codes, 4)
        return [BOI, *VOCABULARY.image_ids(codes).tolist(), EOI]

    return make


@pytest.fixture
def text():
    """``text(seed, length)``: random text tokens."""

    def make(seed: int, length: int) -> list[int]:
        ids = np.random.default_rng(seed).integers(0, VOCABULARY.text_size, length)
        return VOCABULARY.text_ids(ids).tolist()

    return make


@pytest.fixture
def rows(image, text) -> list[list[int]]:
    """Whole sequences of unequal length, with none, one and two images inside."""
    return [
        [BOS, *text(0, 3), *image(1), *text(2, 2), *image(3), EOS],
        [BOS, *image(4), *text(5, 5), EOS],
        [BOS, *text(6, 4)],
    ]
