"""The routers of ``vision_routers`` cost the same, and are six."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.core import meta

from moejax.analysis.flops import counted_flops, token_flops
from moejax.config import load_config
from moejax.models.vit import build_vit

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
    config = load_config(f"vision_routers:{name}", {} if name == "dense" else TINY).model
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, **moe))


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


def test_each_is_another_router():
    """The same parameters and pictures, another output; and experts do take part."""
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    batch = {"images": images}
    outputs = {}
    for name in NAMES:
        model = build_vit(tiny(name))
        shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))["params"]
        draw = np.random.default_rng(1)
        params = {}
        # By name, so that what two models have in common is the same.
        leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
        for path, leaf in leaves:
            draw = np.random.default_rng(list(jax.tree_util.keystr(path).encode()))
            params[path] = draw.normal(scale=0.5, size=leaf.shape).astype(leaf.dtype)
        params = jax.tree.unflatten(tree, [params[path] for path, _ in leaves])
        apply = jax.jit(lambda params, model=model: model.apply({"params": params}, batch).pooled)
        outputs[name] = np.asarray(apply(params))
        assert np.isfinite(outputs[name]).all()
        without = jax.tree_util.tree_map_with_path(
            lambda path, leaf: 0 * leaf if "experts" in jax.tree_util.keystr(path) else leaf,
            params,
        )
        assert np.abs(np.asarray(apply(without)) - outputs[name]).max() > 1e-3
    for a in NAMES:
        for b in NAMES:
            assert a == b or np.abs(outputs[a] - outputs[b]).max() > 1e-4, (a, b)
