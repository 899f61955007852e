"""What makes the ``hunyuan_large`` config Hunyuan-Large: nobody is dropped, experts go slow."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.analysis.params import boxed_params
from moejax.api import build
from moejax.config import load_config
from moejax.train.leaves import is_box, named_leaves
from moejax.train.optim import make_optimizer


def test_dropped_tokens_are_recycled(expert_layer, tokens):
    """All want expert 0, which has places for two of a row's 12; the rest goes elsewhere."""
    layer = expert_layer("hunyuan_large")
    x = tokens.at[..., 0].set(5.0)
    router_mde = layer.params["router"]["router_mde"].at[0, 0].set(0).at[0, 0, 0].set(1.0)
    params = {**layer.params, "router": {**layer.params["router"], "router_mde": router_mde}}
    _, aux = layer(x, params=params, train=True, rng=jax.random.key(0))
    ids, weights = aux["expert_ids"][..., 0], aux["weights"][..., 0]
    probs = np.asarray(jax.nn.softmax(x @ router_mde[0]))
    assert np.mean(probs.argmax(axis=-1) == 0) > 0.9
    assert np.all(ids < 8), "a token was dropped"
    for row in ids:
        assert np.bincount(row, minlength=8).max() <= 2
    # The weight is the probability of where the token went.
    expected = np.take_along_axis(probs, ids[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(weights, expected, rtol=1e-5)

    dropping = expert_layer("hunyuan_large", {"model.moe.capacity": "order"})
    _, aux = dropping(x, params=params, train=True, rng=jax.random.key(0))
    assert np.mean(aux["expert_ids"] == 8) > 0.5


def test_experts_learn_at_their_share_of_the_rate(experts_tiny):
    """A gradient of 1 moves a shared expert by the learning rate, a routed one by 0.31 of it."""
    overrides = {**experts_tiny("hunyuan_large"), "optim.weight_decay": 0.0, "optim.clip_norm": 0.0}
    config = load_config("hunyuan_large", overrides)
    boxed = boxed_params(build(config)[0], config)
    optimizer = make_optimizer(config, boxed)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.unbox().shape), boxed, is_leaf=is_box)
    transform = optimizer.transform
    updates = jax.jit(lambda p: transform.update(p, transform.init(p), p)[0])(params)
    size = {name: float(jnp.abs(leaf).mean()) for name, leaf in named_leaves(updates).items()}
    routed = [value for name, value in size.items() if "moe/experts/" in name]
    others = [value for name, value in size.items() if "moe/experts/" not in name]
    assert len(routed) == 2 and any("shared_wi" in name for name in size)
    np.testing.assert_allclose(others, others[0], rtol=1e-4)
    np.testing.assert_allclose(routed, 0.31 * others[0], rtol=1e-4)
