"""The vision transformer: who sees whom, every router and head, the limit in which it is dense."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from moejax.config.decoder import DecoderConfig
from moejax.config.moe import MoEConfig, RouterConfig, RouterLossConfig, ScoreConfig
from moejax.config.options import Options
from moejax.config.trunk import UntieConfig
from moejax.config.vision import HEADS, POSITIONS, ViTConfig
from moejax.errors import UserError
from moejax.models.decoder import build_decoder
from moejax.models.vit import build_vit
from moejax.ops.patchify import patchify, unpatchify
from moejax.routing import ROUTERS

from .small_vit import CLASSES, EXPERTS, PATCH, SIDE, make_config

pytestmark = pytest.mark.usefixtures("quick_compiles")


@functools.cache
def made(config: ViTConfig):
    """(model, random parameters, jitted function of parameters and a batch)."""
    model = build_vit(config)
    batch = {"images": jnp.zeros((2, SIDE, SIDE, 3), jnp.uint8)}
    boxed = jax.eval_shape(model.init, jax.random.key(0), batch)
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype)
    params = jax.tree.map(draw, meta.unbox(boxed)["params"])
    return model, params, jax.jit(lambda params, batch: model.apply({"params": params}, batch))


def run(config: ViTConfig, images, params=None, **batch):
    """The outputs, as numpy."""
    _, own, apply = made(config)
    return jax.device_get(apply(own if params is None else params, {"images": images, **batch}))


def pictures(rows: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, SIDE, SIDE, 3), np.uint8)


def with_router(name: str, **fields) -> MoEConfig:
    score = ScoreConfig("cosine" if name == "soft" else "linear")
    return dataclasses.replace(EXPERTS, router=RouterConfig(name), score=score, **fields)


def test_all_patches_see_each_other():
    """The features of every patch change with every patch, the first one's with the last."""
    model, params, _ = made(make_config())

    @jax.jit
    def influence(images):
        def features(pixels):
            # In steps of a whole number: the pictures are uint8 only on their way in.
            return model.apply({"params": params}, {"images": pixels}).patches

        tangents = jax.jacfwd(features)(images)
        return jnp.square(tangents).sum(axis=(0, 2, 3, 6))

    images = pictures(1).astype(np.float32)
    of_pixels = influence(images)
    of_patches = patchify(np.asarray(of_pixels)[..., None], PATCH).sum(axis=-1)
    grid = SIDE // PATCH
    assert of_patches.shape == (grid * grid, grid, grid)
    assert (of_patches > 0).all()


@pytest.mark.parametrize("positions", POSITIONS)
def test_places_are_all_that_tells_patches_apart(positions):
    """Patches that are dealt out anew with their places are dealt out anew in the output."""
    config = make_config(positions=positions, head="class_token", registers=2)
    order = np.random.default_rng(1).permutation(16)
    dealt = patchify(pictures(), PATCH).reshape(2, 16, 1, -1)[:, order]
    images = np.asarray(unpatchify(dealt.reshape(2, 4, 4, -1), PATCH))
    _, params, _ = made(config)
    plain = run(config, pictures())
    moved_alone = run(config, images, params)
    assert np.abs(moved_alone.patches - plain.patches[:, order]).max() > 1e-3
    assert np.abs(moved_alone.logits - plain.logits).max() > 1e-3

    with_places = run_with_places(config, images, params, order)
    np.testing.assert_allclose(with_places.patches, plain.patches[:, order], atol=1e-4)
    np.testing.assert_allclose(with_places.logits, plain.logits, atol=1e-4)


def run_with_places(config, images, params, order):
    """The model whose grid has the places in another order."""
    grid = functools.partial(shuffled_grid, order=tuple(order))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moejax.models.patches.grid_positions", grid)
        if config.positions == "learned":
            params = {**params, "position_pd": params["position_pd"][order]}
        apply = jax.jit(lambda params, batch: build_vit(config).apply({"params": params}, batch))
        return jax.device_get(apply(params, {"images": images}))


def shuffled_grid(rows, columns, order):
    return np.indices((rows, columns), np.int32).reshape(2, -1).T[np.asarray(order)]


@pytest.mark.parametrize("head", HEADS)
def test_heads(head):
    """Registers and class token are no patches; without classes there are features alone."""
    config = make_config(head=head, registers=3)
    outputs = run(config, pictures(3))
    assert outputs.logits.shape == (3, CLASSES) and outputs.pooled.shape == (3, 16)
    assert outputs.patches.shape == (3, 16, 16)
    if head == "mean":
        np.testing.assert_allclose(outputs.pooled, outputs.patches.mean(axis=1), atol=1e-5)
    # Each picture by itself.
    alone = run(config, pictures(3)[1:2])
    np.testing.assert_allclose(alone.logits[0], outputs.logits[1], atol=1e-4)

    tower = make_config(head=head, registers=3, num_classes=0)
    _, params, _ = made(config)
    params = {name: value for name, value in params.items() if not name.startswith("head_")}
    assert set(made(tower)[1]) == set(params)
    features = run(tower, pictures(3), params)
    assert features.logits is None
    np.testing.assert_allclose(features.pooled, outputs.pooled, atol=1e-5)


def test_map_head_is_attention_of_one_query():
    config = make_config(head="map", positions="rope")
    outputs = run(config, pictures())
    head = jax.device_get(made(config)[1]["map_head"])
    x = outputs.patches
    q = np.einsum("d,dnh->nh", head["probe_td"][0], head["query_dnh"])
    k, v = np.split(np.einsum("bsd,dgh->bsgh", x, head["key_value_dgh"]), 2, axis=2)
    weights = jax.nn.softmax(np.einsum("nh,bsnh->bns", q, k) / np.sqrt(8), axis=-1)
    y = np.einsum("bns,bsnh,nhd->bd", weights, v, head["out_nhd"])
    normed = y / np.sqrt((y**2).mean(axis=-1, keepdims=True) + 1e-5)
    normed = normed * head["ffn_norm"]["scale_md"][0]
    gate, up = np.split(normed @ head["ffn"]["wi_mdf"][0], 2, axis=-1)
    expected = y + (jax.nn.silu(gate) * up) @ head["ffn"]["wo_mfd"][0]
    np.testing.assert_allclose(outputs.pooled, expected, rtol=1e-3, atol=1e-4)


EVERY_ROUTER = [(name, {}) for name in ROUTERS]
EVERY_ROUTER += [("expert_choice", {"plan": plan}) for plan in ("sinkhorn", "sparse")]


@pytest.mark.parametrize("name, options", EVERY_ROUTER)
def test_every_router_at_batch_size_one(name, options):
    """Outputs and gradients are finite, and the experts have a part in them."""
    moe = with_router(name)
    moe = dataclasses.replace(moe, router=RouterConfig(name, Options(options)))
    config = make_config(block_pattern=("moe",), num_layers=1, moe=moe)
    model, params, _ = made(config)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params, batch):
        logits = model.apply({"params": params}, batch).logits
        return (logits**2).sum(), logits

    by_leaf, logits = jax.device_get(gradient(params, {"images": pictures(1)}))
    assert logits.shape == (1, CLASSES)
    assert np.isfinite(logits).all() and np.abs(logits).max() > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(by_leaf))
    experts = by_leaf["stack"]["segment_0"]["block_0"]["moe"]["experts"]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(experts))


@pytest.mark.parametrize(
    "fields", [{"capacity": "order"}, {"losses": (RouterLossConfig("switch"),)}]
)
def test_soft_routing_has_nothing_to_drop_or_to_balance(fields):
    moe = dataclasses.replace(with_router("soft"), **fields)
    (name,) = fields
    with pytest.raises(UserError, match=f"model.moe.{name}: router 'soft' mixes tokens"):
        build_vit(make_config(block_pattern=("moe",), moe=moe))


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_one_expert_of_weight_one_is_dense(activation):
    fields = {"num_experts": 1, "top_k": 1, "activation": activation}
    sparse = make_config(
        block_pattern=("moe",), moe=dataclasses.replace(EXPERTS, **fields), norm="layer"
    )
    dense = make_config(ffn_activation=activation, norm="layer")
    _, params, _ = made(dense)
    block = params["stack"]["segment_0"]["block_0"]
    ffn = block["ffn"]
    moe = made(sparse)[1]["stack"]["segment_0"]["block_0"]["moe"]
    moe = {**moe, "experts": {"wi_edf": ffn["wi_mdf"], "wo_efd": ffn["wo_mfd"]}}
    block = {name: value for name, value in block.items() if name != "ffn"} | {"moe": moe}
    as_experts = {**params, "stack": {"segment_0": {"block_0": block}}}
    expected = run(dense, pictures())
    got = run(sparse, pictures(), as_experts)
    np.testing.assert_allclose(got.logits, expected.logits, atol=1e-4)
    # Two activations are two models.
    other = "gelu" if activation == "swiglu" else "swiglu"
    shapes = lambda config: jax.tree.map(jnp.shape, made(config)[1]["stack"])
    assert shapes(dense) != shapes(dataclasses.replace(dense, ffn_activation=other))


def test_soft_routing_depends_on_the_whole_picture_and_on_no_other():
    config = make_config(
        block_pattern=("moe",), moe=dataclasses.replace(with_router("soft"), routing_group=1)
    )
    both = run(config, pictures())
    changed = pictures()
    changed[1] = 255 - changed[1]
    got = run(config, changed)
    np.testing.assert_allclose(got.pooled[0], both.pooled[0], atol=1e-5)
    assert np.abs(got.pooled[1] - both.pooled[1]).max() > 0.01


def test_rows_that_fill_up_a_batch_take_no_part():
    """Experts that choose among all tokens of the batch do not see them."""
    moe = with_router("expert_choice")
    config = make_config(block_pattern=("moe",), moe=moe)
    images = pictures(4)
    expected = run(config, images[:2]).logits
    weights = np.asarray([1, 1, 0, 0], np.float32)
    np.testing.assert_allclose(run(config, images, weights=weights).logits[:2], expected, atol=1e-4)
    without = run(config, images, weights=np.ones(4, np.float32)).logits[:2]
    assert np.abs(without - expected).max() > 1e-3


def test_a_block_of_few_tokens_sees_them_in_both_directions():
    """The mask is made anew for the tokens that run it."""
    config = make_config(block_pattern=("mod:0.5:dense",), positions="rope")
    config = dataclasses.replace(
        config, depth=dataclasses.replace(config.depth, causal_rule="none", gate="none")
    )
    images = pictures(1)
    before = run(config, images).patches[0]
    changed = images.copy()
    changed[:, -PATCH:, -PATCH:] = 255 - changed[:, -PATCH:, -PATCH:]
    assert np.abs(run(config, changed).patches[0, :-1] - before[:-1]).max() > 1e-3


def test_mistakes():
    with pytest.raises(UserError, match="model.patch_size: 5 does not divide"):
        make_config(patch_size=5)
    with pytest.raises(UserError, match="model.head: "):
        make_config(head="pooled")
    with pytest.raises(UserError, match="model.head_size: RoPE over 2 axes"):
        make_config(positions="rope", head_size=6)
    with pytest.raises(UserError, match="model.untie: "):
        build_vit(make_config(untie=UntieConfig(qkv=True)))
    with pytest.raises(UserError, match="model.ffn_activation: "):
        make_config(ffn_activation="gelu", untie=UntieConfig(ffn=True))
    with pytest.raises(UserError, match="model.image_size=16: the pictures are of 8 pixels"):
        run(make_config(), np.zeros((1, 8, 8, 3), np.uint8))
    # What no decoder can have.
    moe = with_router("soft")
    with pytest.raises(UserError, match="model.moe.router.name: .* no decoder"):
        build_decoder(DecoderConfig(block_pattern=("moe",), moe=moe))
