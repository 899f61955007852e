"""What makes the ``mot`` config a Mixture-of-Transformers."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from moejax import axes
from moejax.analysis.params import boxed_params
from moejax.api import build
from moejax.config import load_config

UNTIED = ("qkv", "out", "ffn", "norms", "final_norm")


def test_modalities_have_own_weights(tiny, drawn, tiny_batch):
    config = load_config("mot", tiny)
    model = build(config)[0]
    text, mixed = np.zeros((2, 12)), np.zeros((2, 12))
    mixed[:, 6:] = 1
    boxed = boxed_params(model, config)
    params = drawn(model, config)

    def score(params):
        return jnp.sin(model.apply({"params": params}, tiny_batch(text)).logits).sum()

    grads = jax.tree.leaves(jax.jit(jax.grad(score))(params))
    is_box = lambda leaf: isinstance(leaf, meta.AxisMetadata)
    names = [leaf.names for leaf in jax.tree.leaves(boxed, is_leaf=is_box)]
    untied = 0
    for name, grad in zip(names, grads, strict=True):
        if axes.MODALITY not in name:
            continue
        towers = jnp.moveaxis(grad, name.index(axes.MODALITY), 0)
        assert towers.shape[0] == 2, f"{name} is shared"
        # Text alone: the image tower's gradient is not small but exactly zero.
        assert jnp.all(towers[1] == 0)
        assert jnp.any(towers[0] != 0)
        untied += 1
    # QKV, output, feed-forward in and out, two block norms, two QK-norms, final norm.
    assert untied == 9

    apply = jax.jit(lambda batch: model.apply({"params": params}, batch).logits)
    before, after = apply(tiny_batch(text)), apply(tiny_batch(mixed))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert np.abs(before[:, 6:] - after[:, 6:]).max() > 0.1


def test_each_flag_unties_its_own_parameters(tiny):
    shared = {f"model.untie.{name}": False for name in UNTIED}
    owned = {}
    for name in UNTIED:
        config = load_config("mot", {**tiny, **shared, f"model.untie.{name}": True})
        model = build(config)[0]
        total = sum(leaf.size for leaf in jax.tree.leaves(boxed_params(model, config)))
        owned[name] = total - _dense_total({**tiny, **shared})
    # Two layers; d 16, two heads of 8, f 32: one more tower of each.
    assert owned == {
        "qkv": 2 * 16 * 48,
        "out": 2 * 16 * 16,
        "ffn": 2 * 3 * 16 * 32,
        "norms": 2 * (2 * 16 + 2 * 8),
        "final_norm": 16,
    }


def _dense_total(overrides: dict) -> int:
    config = load_config("mot", overrides)
    return sum(leaf.size for leaf in jax.tree.leaves(boxed_params(build(config)[0], config)))
