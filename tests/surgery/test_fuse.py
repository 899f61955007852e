"""Chosen experts as one wide MLP: the layer of experts, and the model, to rounding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from moejax.config.dit import DiTConfig
from moejax.config.moe import MoEConfig, RouterConfig, ScoreConfig
from moejax.config.options import Options
from moejax.errors import UserError
from moejax.experts.activations import activate
from moejax.experts.mlp import expert_mlp
from moejax.models.dit import build_dit
from moejax.surgery.fuse import fuse_at, fuse_experts

pytestmark = pytest.mark.usefixtures("quick_compiles")
T, D, F, E, SIDE = 7, 6, 5, 4, 8


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_fused_experts_are_the_layer(activation):
    """Two experts of four, in any order; an id that is none adds nothing."""
    rng = np.random.default_rng(0)
    wide = 2 * F if activation == "swiglu" else F
    wi, wo = rng.normal(size=(E, D, wide)), rng.normal(size=(E, F, D))
    x, wi, wo = (a.astype(np.float32) for a in (rng.normal(size=(T, D)), wi, wo))
    weights = np.float32([0.7, 0.3, 0.9])
    ids = np.int32([3, 1, E])

    @jax.jit
    def both(x, wi, wo, ids, weights):
        each = lambda values: jnp.broadcast_to(values, (T, 3))
        live = expert_mlp(
            x, wi, wo, each(ids), each(weights), activation=activation, dispatch="dense"
        )
        wi_df, wo_fd = fuse_experts(wi, wo, ids, weights, activation)
        return live, activate(x @ wi_df, activation) @ wo_fd

    live, fused = both(x, wi, wo, ids, weights)
    np.testing.assert_allclose(fused, live, atol=1e-5)


# MoDE: the router sees the noise alone.
MODEL = DiTConfig(
    image_size=SIDE,
    patch_size=2,
    num_classes=5,
    num_layers=2,
    d_model=16,
    num_heads=2,
    ffn_hidden=(24,),
    block_pattern=("moe",),
    kernel_backend="reference",
    moe=MoEConfig(
        num_experts=4,
        hidden=12,
        shared_hidden=8,
        score=ScoreConfig("mlp", input="noise"),
        router=RouterConfig("top_k", Options(renormalise=True)),
    ),
)


def batch_at(*times):
    rng = np.random.default_rng(0)
    return {
        "x_t": rng.normal(size=(len(times), SIDE, SIDE, 3)).astype(np.float32),
        "times": np.float32(times),
        "labels": np.arange(len(times), dtype=np.int32),
    }


@pytest.fixture(scope="module")
def live(quick_compiles):
    """``(model, params, apply(batch))`` with random parameters."""
    model = build_dit(MODEL)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch_at(0.5))["params"]
    rng = np.random.default_rng(1)
    draw = lambda leaf: jnp.asarray(rng.normal(scale=0.4, size=leaf.shape), leaf.dtype)
    params = jax.tree.map(draw, meta.unbox(shapes))
    apply = jax.jit(lambda params, batch: model.apply({"params": params}, batch, record=True))
    return params, lambda batch: jax.device_get(apply(params, batch))


def test_cached_is_live_at_each_noise_level(live):
    """As each has experts of its own, what is cached for one level is another model at another."""
    params, apply = live
    levels, cached, ids = (0.05, 0.9), [], []
    for time in levels:
        outputs = apply(batch_at(time, time))
        config, fused = fuse_at(MODEL, params, outputs.aux)
        cached.append((fused, outputs.prediction))
        router = outputs.aux["segment_0"]["block_0"]["moe"]["router"]
        ids.append(router["expert_ids"][:, 0, 0])
    assert (ids[0] != ids[1]).any(), "the levels are to differ in their experts"
    # All levels are one config: one program, and parameters that can be stacked.
    assert config.base_kinds() == {"dense"} and config.ffn_hidden == (2 * 12 + 8,)
    dense = build_dit(config)
    run = jax.jit(lambda params, batch: dense.apply({"params": params}, batch).prediction)
    for time, (fused, expected) in zip(levels, cached, strict=True):
        got = run(fused, batch_at(time, time))
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
    wrong = run(cached[1][0], batch_at(levels[0], levels[0]))
    assert np.abs(wrong - cached[0][1]).max() > 1e-2 * np.abs(cached[0][1]).max()


def test_what_cannot_be_fused_is_refused(live):
    params, apply = live
    aux = apply(batch_at(0.05, 0.9)).aux
    with pytest.raises(UserError, match="model.moe.score.input: tokens chose differently"):
        fuse_at(MODEL, params, aux)
    changed = lambda **moe: dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, **moe))
    with pytest.raises(UserError, match="model.moe.zero_experts: only plain experts"):
        fuse_at(changed(zero_experts=1), params, aux)
    with pytest.raises(UserError, match="model.block_pattern: only blocks 'moe'"):
        fuse_at(dataclasses.replace(MODEL, block_pattern=("dense",)), params, aux)
