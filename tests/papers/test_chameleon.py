"""What makes the ``chameleon`` config the dense baseline."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.analysis.params import abstract_params
from moejax.api import build
from moejax.config import load_config

TINY = {
    "model.d_model": 16,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.ffn_hidden": (32,),
    "model.vocab_size": 40,
    "model.kernel_backend": "reference",
}


def test_all_weights_are_shared():
    """Which modality a token is of does not reach the logits; with one untied part it does."""
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(16, 40, (2, 12)).astype(np.int32),
        "segments": np.ones((2, 12), np.int32),
        "positions": np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12)),
    }
    text = {**batch, "modality": np.zeros((2, 12), np.int32)}
    mixed = {**batch, "modality": rng.integers(0, 2, (2, 12)).astype(np.int32)}

    def difference(**overrides) -> float:
        config = load_config("chameleon", {**TINY, **overrides})
        model = build(config)[0]
        params = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype),
            abstract_params(model, config),
        )
        apply = jax.jit(lambda batch: model.apply({"params": params}, batch).logits)
        return np.abs(apply(text) - apply(mixed)).max()

    assert difference() == 0
    assert difference(**{"model.untie.ffn": True}) > 0.1
