"""A tiny decoder and batches of interleaved text and images for it."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax.core import meta

from moejax.config.schema import DecoderConfig, UntieConfig
from moejax.models.decoder import build_decoder

UNTIED = UntieConfig(qkv=True, out=True, ffn=True, norms=True, final_norm=True)


def make_config(**changes) -> DecoderConfig:
    config = DecoderConfig(
        vocab_size=80, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, ffn_hidden=(48,)
    )
    return dataclasses.replace(config, **changes)


def make_batch(seed: int = 0, rows: int = 2, length: int = 24, modalities: int = 2) -> dict:
    """Two packed segments a row (and a padded tail) with runs of each modality."""
    rng = np.random.default_rng(seed)
    modality = np.repeat(rng.integers(0, modalities, (rows, length // 4)), 4, axis=1)
    segments = np.ones((rows, length), np.int32)
    segments[:, length // 2 :] = 2
    segments[:, length - 2 :] = 0
    positions = np.tile(np.arange(length // 2), (rows, 2))
    return {
        "tokens": rng.integers(16, 80, (rows, length)).astype(np.int32),
        "modality": modality.astype(np.int32),
        "segments": segments,
        "positions": positions.astype(np.int32),
        "targets": rng.integers(0, 80, (rows, length)).astype(np.int32),
        "weights": (segments > 0).astype(np.float32),
    }


class Tiny:
    """Compiled functions of one config, shared by the tests."""

    def __init__(self, config: DecoderConfig):
        self.config = config
        self.model = build_decoder(config)
        init = jax.jit(self.model.init)
        self.params = meta.unbox(init(jax.random.key(0), make_batch()))["params"]
        self.logits = jax.jit(lambda p, b: self.model.apply({"params": p}, b).logits)
        self.gradients = jax.jit(
            jax.grad(lambda p, b, cot: (self.model.apply({"params": p}, b).logits * cot).sum())
        )


@functools.cache
def _tiny(config: DecoderConfig) -> Tiny:
    return Tiny(config)


@pytest.fixture
def tiny():
    """``tiny(untie=..., ...)`` -> Tiny, compiled once for each config."""
    return lambda **changes: _tiny(make_config(**changes))


@pytest.fixture
def batch():
    return make_batch()


@pytest.fixture
def float64():
    """Double precision, so that only a real difference shows."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def untied():
    return UNTIED


@pytest.fixture
def tiny_config():
    return make_config


@pytest.fixture
def tiny_batch():
    return make_batch
