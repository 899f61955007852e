"""What makes ``moiie`` and ``ming_flash_omni`` what they are: routers that know the modality."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from moejax.config import load_config
from moejax.nn.moe import Experts

PICTURE, TEXT = 0, 3


def test_moiie_keeps_experts_apart(expert_layer, tokens, mixed):
    """Text never runs the experts of pictures, nor the reverse; both run those between them."""
    layer = expert_layer("moiie")
    _, aux = layer(tokens, mixed)
    ids = aux["expert_ids"]
    text = mixed == 0
    assert set(np.unique(ids[text])) == {1, 2, TEXT}
    assert set(np.unique(ids[~text])) == {PICTURE, 1, 2}
    np.testing.assert_allclose(aux["weights"].sum(axis=-1), 1, rtol=1e-6)

    from_text, from_pictures = (
        layer.gradient(layer.params, tokens, mixed, of=np.nonzero(of)) for of in (text, ~text)
    )
    for name in ("wi_edf", "wo_efd"):
        a, b = from_text["experts"][name], from_pictures["experts"][name]
        assert np.all(a[PICTURE] == 0) and np.all(b[TEXT] == 0)
        assert all(np.any(g[[1, 2]] != 0) for g in (a, b))
        assert np.any(a[TEXT] != 0) and np.any(b[PICTURE] != 0)
    # Each has a router of its own.
    a, b = (gradient["router"]["router_mde"] for gradient in (from_text, from_pictures))
    assert np.all(a[1] == 0) and np.all(b[0] == 0) and np.any(a[0] != 0) and np.any(b[1] != 0)

    free = expert_layer("moiie", {"model.moe.allowed": ()})
    ids = free(tokens, mixed)[1]["expert_ids"]
    assert PICTURE in ids[text] and TEXT in ids[~text]


def test_moiie_begins_with_equal_experts(experts_tiny):
    """With weights that sum to 1 it does not matter at first which of them a token has."""
    config = load_config("moiie", experts_tiny("moiie"))
    init = jax.jit(lambda key: Experts(config.model, 4).init(key)["params"])
    experts = meta.unbox(init(jax.random.key(0)))
    for leaf in jax.tree.leaves(experts):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))


def test_ming_has_a_router_per_modality(expert_layer, tokens):
    """The same token goes elsewhere as a picture; with equal routers, or one, it does not."""
    layer = expert_layer("ming_flash_omni")

    def choice(layer, modality: int, params=None):
        return layer(tokens, modality, params=params)[1]["expert_ids"]

    as_text, as_picture = choice(layer, 0), choice(layer, 1)
    assert np.mean(as_text != as_picture) > 0.3
    # No expert is set aside.
    assert layer.config.moe.allowed == () and np.intersect1d(as_text, as_picture).size > 1
    router = layer.params["router"]
    equal = {**router, "router_mde": jnp.broadcast_to(router["router_mde"][:1], (2, 16, 8))}
    params = {**layer.params, "router": equal}
    np.testing.assert_array_equal(choice(layer, 0, params), choice(layer, 1, params))
    one = expert_layer("ming_flash_omni", {"model.moe.score.per_modality": False})
    assert one.params["router"]["router_mde"].shape == (1, 16, 8)
    np.testing.assert_array_equal(choice(one, 0), choice(one, 1))
