"""Paper configs made tiny, with every mechanism left as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.analysis.params import abstract_params

TINY = {
    "model.d_model": 16,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.ffn_hidden": (32,),
    "model.vocab_size": 40,
    "model.kernel_backend": "reference",
    "data.sequence_length": 12,
    "data.batch_size": 2,
}


@pytest.fixture
def tiny() -> dict:
    """Overrides that make a decoder's config tiny."""
    return dict(TINY)


@pytest.fixture
def drawn():
    """``drawn(model, config, seed)``: random parameters without a compiled initialisation."""

    def draw(model, config, seed: int = 1):
        rng = np.random.default_rng(seed)
        return jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype),
            abstract_params(model, config),
        )

    return draw


@pytest.fixture
def tiny_batch():
    """``tiny_batch(modality)``: two rows of 12 tokens with the given modality ids [2, 12]."""

    def make(modality) -> dict:
        tokens = np.random.default_rng(0).integers(16, 40, (2, 12)).astype(np.int32)
        return {
            "tokens": tokens,
            "modality": np.broadcast_to(np.asarray(modality, np.int32), (2, 12)),
            "segments": np.ones((2, 12), np.int32),
            "positions": np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12)),
        }

    return make
