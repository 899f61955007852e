"""The routers of ``vision_routers`` cost the same, and are six."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from moejax.analysis.flops import counted_flops, flops_per_token, token_flops
from moejax.config import load_config
from moejax.models.vit import build_vit
from moejax.objectives.classification import classification

pytestmark = pytest.mark.usefixtures("quick_compiles")
NAMES = (
    "softmax_token",
    "sinkhorn_token",
    "softmax_expert",
    "sinkhorn_expert",
    "sparse_expert",
    "soft",
)
TINY = {
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.num_layers": 2,
    "model.ffn_hidden": (12,),
    "model.image_size": 16,
    "model.moe.num_experts": 4,
    "model.kernel_backend": "reference",
    "data.image_size": 16,
}


def tiny(name: str, **moe):
    """The model's config, small."""
    overrides = {k: v for k, v in TINY.items() if name != "dense" or "moe" not in k}
    config = load_config(f"vision_routers:{name}", overrides).model
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, **moe))


def drawn(config) -> tuple:
    """(model, parameters): what two models have in common is the same."""
    model = build_vit(config)
    batch = {"images": jnp.zeros((1, 16, 16, 3), jnp.uint8)}
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))["params"]

    def draw(path, leaf):
        seed = list(jax.tree_util.keystr(path).encode())
        return np.random.default_rng(seed).normal(scale=0.5, size=leaf.shape).astype(leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


def features(model, params) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    apply = jax.jit(lambda params: model.apply({"params": params}, {"images": images}).pooled)
    return np.asarray(apply(params))


def test_all_cost_what_the_dense_model_does():
    """By the formula and as counted from the program, within 1%."""
    dense = load_config("vision_routers:dense")
    for name in NAMES:
        config = load_config(f"vision_routers:{name}")
        assert config.model.moe.hidden in (0, *dense.model.ffn_hidden)
        for flops in (token_flops, lambda config: counted_flops(config).forward):
            ours, theirs = flops(config), flops(dense)
            total = lambda found: getattr(found, "nominal", None) or found.forward
            assert total(ours) == pytest.approx(total(theirs), rel=0.01), name
        # Nothing else is different.
        for group in ("data", "objective", "optim", "mesh", "train", "eval"):
            assert getattr(config, group) == getattr(dense, group)


def test_all_cost_the_same_beside_texts():
    dense = load_config("vision_routers:dense_clip")
    for name in NAMES:
        config = load_config(f"vision_routers:{name}_clip")
        assert flops_per_token(config) == pytest.approx(flops_per_token(dense), rel=0.01), name
        assert config.data == dense.data and config.objective == dense.objective
        # Of more patches soft routing has more slots.
        if name != "soft":
            assert config.model.moe == load_config(f"vision_routers:{name}").model.moe


def test_each_is_another_router():
    """The same parameters and pictures, another output; and experts do take part."""
    outputs = {}
    for name in NAMES:
        model, params = drawn(tiny(name))
        outputs[name] = features(model, params)
        assert np.isfinite(outputs[name]).all()
        without = jax.tree_util.tree_map_with_path(
            lambda path, leaf: 0 * leaf if "experts" in jax.tree_util.keystr(path) else leaf,
            params,
        )
        assert np.abs(features(model, without) - outputs[name]).max() > 1e-3
    for a, b in itertools.combinations(NAMES, 2):
        assert np.abs(outputs[a] - outputs[b]).max() > 1e-4, (a, b)


SPARSE = ("vmoe", "soft_moe", "ewa", "pmoe", "mofme")


@pytest.mark.parametrize("spec", [*SPARSE, *(f"vision_routers:{name}" for name in NAMES)])
def test_one_picture_at_a_time_trains(spec):
    """With the capacity, the noise, the groups and the losses of the config."""
    config = load_config(spec, {**TINY, "model.num_layers": 4, "data.batch_size": 1})
    model, params = drawn(config.model)
    objective = classification(config.objective, config.model)
    images = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    batch = {"images": images, "labels": np.asarray([3]), "weights": np.ones(1, np.float32)}

    @jax.jit
    @jax.value_and_grad
    def value_and_gradient(params):
        rngs = {"dropout": jax.random.key(0)}
        outputs = model.apply({"params": params}, batch, train=True, step=0, rngs=rngs)
        return objective(outputs, batch).total()

    loss, gradient = value_and_gradient(params)
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    experts = [
        np.abs(leaf).max()
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
        if "experts" in jax.tree_util.keystr(path)
    ]
    assert experts and all(size > 0 for size in experts)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "soft"])
def test_one_expert_is_the_dense_layer(name):
    """Every token has it, with weight 1."""
    model, params = drawn(tiny(name, num_experts=1))
    dense, own = drawn(tiny("dense"))
    blocks = own["stack"]["segment_0"]
    ffn = params["stack"]["segment_0"]["block_1"]["moe"]["experts"]
    ffn = {"wi_mdf": ffn["wi_edf"], "wo_mfd": ffn["wo_efd"]}
    # Two dense blocks are one segment of two layers; block 1 has the expert's weights.
    assert set(blocks) == {"block_0"}
    stack = jax.tree.map(np.array, params["stack"]["segment_0"])
    second = {key: value for key, value in stack["block_1"].items() if key != "moe"} | {"ffn": ffn}
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), stack["block_0"], second)
    own = {**params, "stack": {"segment_0": {"block_0": joined}}}
    np.testing.assert_allclose(features(model, params), features(dense, own), atol=1e-4)
