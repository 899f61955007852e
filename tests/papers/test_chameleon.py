"""What makes the ``chameleon`` config the dense baseline."""

import jax
import numpy as np

from moejax.api import build
from moejax.config import load_config


def test_all_weights_are_shared(tiny, drawn, tiny_batch):
    """Which modality a token is of does not reach the logits; with one untied part it does."""
    text = tiny_batch(0)
    mixed = tiny_batch(np.random.default_rng(1).integers(0, 2, (2, 12)))

    def difference(**overrides) -> float:
        config = load_config("chameleon", {**tiny, **overrides})
        model = build(config)[0]
        params = drawn(model, config)
        apply = jax.jit(lambda batch: model.apply({"params": params}, batch).logits)
        return np.abs(apply(text) - apply(mixed)).max()

    assert difference() == 0
    assert difference(**{"model.untie.ffn": True}) > 0.1
