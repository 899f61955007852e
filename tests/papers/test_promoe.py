"""ProMoE: what shows nothing goes past the prototypes; the rest to the nearest of them."""

import jax
import numpy as np
import pytest

from moejax.api import build
from moejax.config import load_config

pytestmark = pytest.mark.usefixtures("quick_compiles")
# A picture that shows something, and one of which nothing is said.
SHOWN, SILENT = 0, 1
MODALITY = np.asarray([[SHOWN], [SILENT]])
UNCONDITIONAL = 12


def gelu_mlp(x, wi_df, wo_fd):
    return jax.nn.gelu(x @ wi_df) @ wo_fd


@pytest.mark.parametrize("arg", ["promoe", "promoe:ec"])
def test_null_patches_never_touch_prototypes(expert_layer, tokens, arg):
    """They get the whole of their expert and send no gradient; the others never see that expert."""
    layer = expert_layer(arg)
    params = layer.params
    assert params["router"]["prototype_mde"].shape == (1, 16, UNCONDITIONAL)
    y, aux = layer(tokens, MODALITY)
    chosen = (aux["expert_ids"][..., None] == np.arange(UNCONDITIONAL + 1)).any(axis=2)
    np.testing.assert_array_equal(chosen[SILENT].nonzero()[1], UNCONDITIONAL)
    assert chosen[SILENT].any(axis=-1).all() and not chosen[SHOWN, :, UNCONDITIONAL].any()
    np.testing.assert_array_equal(aux["weights"][SILENT].sum(axis=-1), 1)
    wi_edf, wo_efd = (params["experts"][name] for name in ("wi_edf", "wo_efd"))
    expected = gelu_mlp(tokens[SILENT], wi_edf[UNCONDITIONAL], wo_efd[UNCONDITIONAL])
    shared = gelu_mlp(tokens[SILENT], params["shared_wi_edf"][0], params["shared_wo_efd"][0])
    np.testing.assert_allclose(y[SILENT], expected + shared, rtol=1e-4, atol=1e-4)

    silent = layer.gradient(params, tokens, MODALITY, of=SILENT)
    assert not silent["router"]["prototype_mde"].any()
    assert not silent["experts"]["wi_edf"][:UNCONDITIONAL].any()
    shown = layer.gradient(params, tokens, MODALITY, of=SHOWN)
    assert shown["router"]["prototype_mde"].any()
    assert not shown["experts"]["wi_edf"][UNCONDITIONAL].any()


def test_the_weight_is_the_cosine_to_the_nearest_prototype(expert_layer, tokens):
    layer = expert_layer("promoe")
    _, aux = layer(tokens)
    unit = lambda x, axis: np.asarray(x) / np.linalg.norm(x, axis=axis, keepdims=True)
    cosines = unit(tokens, -1) @ unit(layer.params["router"]["prototype_mde"][0], 0)
    np.testing.assert_array_equal(aux["expert_ids"][..., 0], cosines.argmax(axis=-1))
    np.testing.assert_allclose(aux["weights"][..., 0], cosines.max(axis=-1), rtol=1e-3)


def test_experts_choose_a_twelfth_of_each_picture(expert_layer, tokens):
    _, aux = expert_layer("promoe:ec")(tokens)
    taken = (aux["expert_ids"][..., None] == np.arange(13)).any(axis=2)
    np.testing.assert_array_equal(taken.sum(axis=1), [[1] * 12 + [0]] * 2)


TINY = {
    "model.image_size": 8,
    "model.d_model": 16,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.ffn_hidden": (24,),
    "model.kernel_backend": "reference",
    "model.moe.hidden": 8,
    "model.moe.shared_hidden": 8,
    "data.image_size": 8,
    "data.batch_size": 4,
}


def test_guidance_routes_its_halves_apart_and_the_loss_learns_from_one(drawn):
    """A doubled batch, of which one half has lost its labels; the loss is as without that half."""
    config = load_config("promoe", TINY)
    model, objective = build(config)
    params = drawn(model, config)
    rng = np.random.default_rng(0)
    pictures = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
    twice = lambda half: np.concatenate([half, half])
    times = np.float32([0.2, 0.8])
    batch = {"x_t": twice(pictures), "times": twice(times), "labels": np.int32([3, 7, 10, 10])}
    extra = {"data": batch["x_t"], "noise": batch["x_t"], "noise_times": batch["times"]}
    batch |= {**extra, "quarter": np.zeros(4, np.int32)}

    @jax.jit
    def run(params, batch):
        outputs = model.apply({"params": params}, batch, train=True, record=True)
        return outputs.aux["segment_0"]["block_1"]["moe"]["router"]["expert_ids"]

    ids = np.asarray(run(params, batch))[0]
    assert (ids[2:] == UNCONDITIONAL).all() and (ids[:2] < UNCONDITIONAL).all()

    @jax.jit
    @jax.value_and_grad
    def contrastive(params, batch):
        sums = objective(model.apply({"params": params}, batch, train=True), batch)
        assert [one.coefficient for one in sums.derived][0] == 1.0
        return sums.derived_values()["router/contrastive"]

    value, gradient = contrastive(params, batch)
    blocks = gradient["stack"]["segment_0"]
    router = lambda blocks: blocks["block_1"]["moe"]["router"]["prototype_mde"]
    assert value > 1e-3 and np.abs(router(blocks)).max() > 1e-4
    # Through the tokens it reaches the block before too.
    assert np.abs(blocks["block_0"]["ffn"]["wo_mfd"]).max() > 1e-6
    alone, _ = contrastive(params, {**batch, "weights": np.float32([1, 1, 0, 0])})
    np.testing.assert_allclose(alone, value, rtol=1e-5)
    value, gradient = contrastive(params, {**batch, "labels": np.full(4, 10, np.int32)})
    assert value == 0 and not any(leaf.any() for leaf in jax.tree.leaves(gradient))
