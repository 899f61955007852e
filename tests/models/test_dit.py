"""The diffusion transformer: the identity it begins as, what it is told, what routers see."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from moejax.config import freeze, load_config, load_config_dict
from moejax.config.contrastive import TextSizes
from moejax.config.depth import DepthConfig, RecursionConfig
from moejax.config.dit import DiTConfig, WordsConfig
from moejax.config.moe import MoEConfig, RouterConfig, ScoreConfig
from moejax.config.vision import ViTConfig
from moejax.data.vocabulary import PAD
from moejax.errors import UserError
from moejax.models.dit import build_dit
from moejax.nn.block import make_block
from moejax.objectives.base import LossSums, Objective
from moejax.objectives.routing import with_routing

pytestmark = pytest.mark.usefixtures("quick_compiles")

SIDE, PATCH, CHANNELS, CLASSES, D, TEXT = 8, 2, 3, 5, 16, 6
PATCHES = (SIDE // PATCH) ** 2
EXPERTS = MoEConfig(num_experts=4, hidden=24, shared_hidden=8, routing_group=0)


def make_config(**changes) -> DiTConfig:
    config = DiTConfig(
        image_size=SIDE,
        patch_size=PATCH,
        in_channels=CHANNELS,
        num_classes=CLASSES,
        num_layers=2,
        d_model=D,
        num_heads=2,
        ffn_hidden=(24,),
        kernel_backend="reference",
    )
    return dataclasses.replace(config, **changes)


def scored_by(which: str) -> DiTConfig:
    moe = dataclasses.replace(EXPERTS, score=ScoreConfig(input=which))
    return make_config(block_pattern=("moe",), moe=moe)


def make_batch(rows: int = 2, **changes) -> dict:
    rng = np.random.default_rng(0)
    batch = {
        "x_t": rng.normal(size=(rows, SIDE, SIDE, CHANNELS)).astype(np.float32),
        "times": np.linspace(0.1, 0.9, rows, dtype=np.float32),
        "labels": np.arange(rows, dtype=np.int32) % CLASSES,
    }
    return {**batch, **changes}


@functools.cache
def made(config: DiTConfig):
    """(model, its shapes, random parameters, jitted function of parameters and a batch)."""
    model = build_dit(config)
    # As in training: pictures that nothing has been done to yet.
    batch = {"images": jnp.zeros((2, SIDE, SIDE, 3), jnp.uint8), "labels": jnp.zeros(2, jnp.int32)}
    batch |= {"tokens": jnp.zeros((2, TEXT), jnp.int32)}
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))["params"]
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype)
    apply = jax.jit(
        lambda params, batch, record: model.apply({"params": params}, batch, record=record),
        static_argnums=2,
    )
    return model, batch, jax.tree.map(draw, shapes), apply


def run(config: DiTConfig, batch: dict | None = None, params=None, record: bool = False):
    """The outputs, as numpy."""
    _, _, own, apply = made(config)
    batch = make_batch() if batch is None else batch
    return jax.device_get(apply(own if params is None else params, batch, record))


def experts_of(config: DiTConfig, batch: dict, params=None) -> np.ndarray:
    """[b, t, k] of the first layer."""
    aux = run(config, batch, params, record=True).aux["segment_0"]["block_0"]["moe"]["router"]
    return np.sort(aux["expert_ids"][0], axis=-1)


KINDS = {
    "dense": {},
    "moe": {"moe": EXPERTS},
    "mod:0.5:dense": {"depth": DepthConfig(causal_rule="none")},
    "recursive:dense": {"recursion": RecursionConfig(steps=2)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_begin_as_the_identity(kind):
    """To the last bit; with any other gate they do not."""
    config = make_config(block_pattern=(kind,), num_layers=1, **KINDS[kind])
    model, batch, random, _ = made(config)
    params = meta.unbox(jax.jit(model.init)(jax.random.key(0), batch))["params"]
    assert not run(config, params=params).prediction.any()

    # What goes in comes out: other weights of branches change nothing, other gates do.
    params = {**params, **{name: random[name] for name in ("out_df", "final_modulation")}}
    before = run(config, params=params).prediction
    branches = add_one(params, "stack", lambda path: "modulation" not in path)
    np.testing.assert_array_equal(run(config, params=branches).prediction, before)
    gates = add_one(params, "stack", lambda path: "modulation" in path)
    assert np.abs(run(config, params=gates).prediction - before).max() > 1e-3


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_what_goes_into_a_new_block_comes_out(kind):
    config = make_config(block_pattern=(kind,), num_layers=1, **KINDS[kind])
    block = make_block(config, kind, "block")
    x_btd = jnp.asarray(np.random.default_rng(0).normal(size=(2, PATCHES, D)), jnp.float32)
    ctx = context_of(config)
    params = meta.unbox(jax.jit(block.init)(jax.random.key(0), x_btd, {}, {}, ctx))["params"]
    apply = jax.jit(lambda params: block.apply({"params": params}, x_btd, {}, {}, ctx)[0])
    np.testing.assert_array_equal(apply(params), x_btd)
    gates = add_one({"block": params}, "block", lambda path: "modulation" in path)["block"]
    assert np.abs(np.asarray(apply(gates) - x_btd)).max() > 1e-2


def add_one(params: dict, name: str, which) -> dict:
    """1 more for the parameters under a name whose paths are meant."""
    change = lambda path, leaf: leaf + which(jax.tree_util.keystr(path))
    return {**params, name: jax.tree_util.tree_map_with_path(change, params[name])}


def test_only_gates_learn_at_first():
    """Through a gate of 0 nothing reaches its branch, and something reaches the gate."""
    config = make_config()
    model, batch, random, _ = made(config)
    params = meta.unbox(jax.jit(model.init)(jax.random.key(0), batch))["params"]
    params = {**params, "out_df": random["out_df"]}

    @jax.jit
    @jax.grad
    def gradient(params):
        prediction = model.apply({"params": params}, make_batch(), train=True).prediction
        return jnp.square(prediction - 1).sum()

    block = jax.device_get(gradient(params)["stack"]["segment_0"]["block_0"])
    for name in ("weight_df", "bias_f"):
        parts = np.split(block["modulation"].pop(name), 6, axis=-1)
        largest = np.asarray([np.abs(part).max() for part in parts])
        np.testing.assert_array_equal(largest > 0, [False, False, True] * 2)
    assert not any(leaf.any() for leaf in jax.tree.leaves(block))


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_constant_condition_is_the_scale_of_a_norm(kind):
    """Shift 0, gate 1: the block of a vision transformer whose norms have the scale 1 + s."""
    config = make_config(block_pattern=(kind,), moe=EXPERTS)
    names = {field.name for field in dataclasses.fields(ViTConfig)}
    fields = {name: value for name, value in vars(config).items() if name in names}
    plain = ViTConfig(**{**fields, "name": "vit"})
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: leaf[0], made(config)[2]["stack"]["segment_0"]["block_0"])
    scales = rng.normal(size=(2, D)).astype(np.float32)
    zeros, ones = np.zeros(D, np.float32), np.ones(D, np.float32)
    # shift, scale, gate of attention, then of what follows.
    bias = np.concatenate([zeros, scales[0], ones, zeros, scales[1], ones])
    modulation = {"weight_df": jnp.zeros((D, 6 * D)), "bias_f": jnp.asarray(bias)}
    x_btd, ctx = jnp.asarray(rng.normal(size=(2, PATCHES, D)), jnp.float32), context_of(config)
    apply = lambda config, params: make_block(config, kind, "block").apply(
        {"params": params}, x_btd, {}, {}, ctx
    )[0]
    got = apply(config, {**params, "modulation": modulation})
    rest = {name: value for name, value in params.items() if name != "modulation"}
    norms = {
        f"{name}_norm": {"scale_md": jnp.asarray(1 + scale[None])}
        for name, scale in zip(("attention", "ffn"), scales, strict=True)
    }
    np.testing.assert_allclose(got, apply(plain, {**rest, **norms}), atol=2e-5)


def context_of(config: DiTConfig):
    """Of two rows, as the model makes it."""
    ctx = build_dit(config)._context(jnp.ones(2), jnp.zeros(2, bool), train=False)
    told = jnp.ones((2, D))
    return ctx.replace(condition_bd=told, noise_bd=told)


def test_what_a_picture_is_told():
    """Noise and class each change it; null is null by any name; rows do not hear of each other."""
    config = make_config()
    plain = run(config).prediction
    for name, value in {"times": [0.1, 0.3], "labels": [0, 4]}.items():
        told = run(config, make_batch(**{name: np.asarray(value, make_batch()[name].dtype)}))
        np.testing.assert_allclose(told.prediction[0], plain[0], atol=1e-5)
        assert np.abs(told.prediction[1] - plain[1]).max() > 1e-2
    null, negative = (
        run(config, make_batch(labels=np.int32([label, 0]))).prediction for label in (CLASSES, -1)
    )
    np.testing.assert_array_equal(null, negative)
    assert np.abs(null[0] - plain[0]).max() > 1e-2
    # Without classes labels are not read.
    unlabelled = make_config(num_classes=0)
    assert "label_vd" not in made(unlabelled)[2]
    batch = make_batch()
    del batch["labels"]
    assert np.isfinite(run(unlabelled, batch).prediction).all()


def test_pixels_and_channels_come_out_where_they_went_in():
    config = make_config(learned_range=True)
    numbers = PATCH * PATCH * 2 * CHANNELS
    params = {**made(config)[2], "out_df": jnp.zeros((D, numbers))}
    params["out_bias_f"] = jnp.arange(numbers, dtype=jnp.float32)
    prediction = run(config, params=params).prediction
    assert prediction.shape == (2, SIDE, SIDE, 2 * CHANNELS)
    row, column, channel = np.indices(prediction.shape[1:])
    expected = ((row % PATCH) * PATCH + column % PATCH) * 2 * CHANNELS + channel
    np.testing.assert_array_equal(prediction[1], expected)


def test_dtype_of_the_prediction():
    assert run(make_config(dtype="bfloat16")).prediction.dtype == np.float32


@pytest.mark.parametrize("positions", ["sincos", "learned", "rope"])
def test_patches_know_their_places(positions):
    config = make_config(positions=positions)
    one = np.ones((2, SIDE, SIDE, CHANNELS), np.float32)
    one[:, :PATCH] = 2.0
    prediction = run(config, make_batch(x_t=one)).prediction
    # Two patches alike, in a corner and beside it, unless places are told apart.
    alike = prediction[:, :PATCH, :PATCH] - prediction[:, :PATCH, PATCH : 2 * PATCH]
    assert np.abs(alike).max() > 1e-3


@pytest.mark.parametrize("which", ["token", "condition", "noise"])
def test_what_routers_see(which):
    """Tokens; or what their row is told, or its noise alone, so that all have equal experts."""
    config, rows = scored_by(which), 8
    times = np.linspace(0.05, 1, rows, dtype=np.float32)
    labels = np.arange(rows, dtype=np.int32) % CLASSES
    experts = experts_of(config, make_batch(rows, times=times, labels=labels))
    alike = (experts == experts[:, :1]).all(axis=(1, 2))
    assert alike.all() == (which != "token")
    assert len(np.unique(experts[:, 0], axis=0)) > 1
    noisier = experts_of(config, make_batch(rows, times=times[::-1].copy(), labels=labels))
    other = experts_of(config, make_batch(rows, times=times, labels=(labels + 1) % CLASSES))
    assert (noisier != experts).any()
    assert (other != experts).any() == (which != "noise")
    if which == "noise":
        np.testing.assert_array_equal(noisier, experts[::-1])


@pytest.mark.parametrize("which", ["token", "condition"])
def test_a_class_routes_by_what_it_says_alone(which):
    """Classes of equal rows of the table have equal experts; of other rows they do not."""
    config, rows = scored_by(which), 5
    labels = np.random.default_rng(1).permutation(CLASSES).astype(np.int32)
    plain, shuffled = make_batch(rows), make_batch(rows, labels=labels)
    own = made(config)[2]
    first = jnp.broadcast_to(own["label_vd"][:1], own["label_vd"].shape)
    found = [
        experts_of(config, batch, params)
        for params in ({**own, "label_vd": first}, {**own, "label_vd": 4 * own["label_vd"]})
        for batch in (plain, shuffled)
    ]
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[2] != found[3]).any()


def test_the_loss_of_even_routing_is_its_coefficient():
    """DiT-MoE's alpha, for each layer: probabilities are 1 / E, whatever is chosen.

    Of a load that is spread too: tests/papers/test_dit.py.
    """
    alpha = 0.01
    sizes = {"image_size": SIDE, "patch_size": PATCH, "d_model": D, "num_heads": 2, "num_layers": 2}
    changes = {f"model.{name}": value for name, value in sizes.items()}
    changes |= {"model.moe.hidden": 24, "model.moe.shared_hidden": 8, "data.image_size": SIDE}
    config = load_config("dit_moe", {**changes, "model.kernel_backend": "reference"}).model
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if "router_mde" in jax.tree_util.keystr(path) else leaf,
        made(config)[2],
    )
    nothing = Objective(lambda outputs, batch, rng=None: LossSums({}, {}, ()))
    sums = with_routing(nothing, config)(run(config, params=params), {})
    assert sums.derived_values()["router/switch"] == pytest.approx(1, rel=1e-6)
    assert sums.total() == pytest.approx(alpha * config.num_layers, rel=1e-6)
    uneven = with_routing(nothing, config)(run(config), {})
    assert uneven.total() > 1.05 * alpha * config.num_layers


def test_pictures_that_are_told_nothing_can_be_a_modality_of_their_own():
    """For routers: with experts of its own such a picture meets no others."""
    moe = dataclasses.replace(EXPERTS, top_k=1, allowed=((0, 1, 2), (3,)))
    modalities = ("image", "unconditional")
    config = make_config(block_pattern=("moe",), modalities=modalities, moe=moe)
    experts = experts_of(config, make_batch(3, labels=np.int32([1, CLASSES, -1])))
    assert (experts[0] < 3).all() and (experts[1:] == 3).all()
    with pytest.raises(UserError, match="model.modalities: name 'image' and"):
        make_config(modalities=("image", "text", "speech"))


def test_rows_that_fill_up_a_batch_take_no_part():
    moe = dataclasses.replace(EXPERTS, router=RouterConfig("expert_choice"))
    config = make_config(block_pattern=("moe",), moe=moe)
    batch = make_batch(4)
    two = {name: value[:2] for name, value in batch.items()}
    expected = run(config, two).prediction
    got = run(config, {**batch, "weights": np.float32([1, 1, 0, 0])}).prediction
    np.testing.assert_allclose(got[:2], expected, atol=1e-4)
    assert np.abs(run(config, batch).prediction[:2] - expected).max() > 1e-3


@pytest.mark.parametrize("kind", ["dense", "mod:0.5:dense", "recursive:dense"])
@pytest.mark.parametrize("attend", [False, True])
def test_texts(kind, attend):
    """What is written changes the prediction, padding does not; nothing written is a vector."""
    config = make_config(
        num_classes=0,
        text_length=TEXT,
        vocab_size=40,
        text=TextSizes(num_layers=1, d_model=8),
        block_pattern=(kind,),
        words=WordsConfig(attend=attend, num_experts=3 * attend, hidden=12 * attend),
        **KINDS[kind],
    )
    tokens = np.int32([[20, 21, 22, PAD, PAD, PAD], [PAD] * TEXT])
    plain = run(config, make_batch(tokens=tokens)).prediction
    assert np.isfinite(plain).all()
    other = tokens.copy()
    other[0, 1] = 30
    told = run(config, make_batch(tokens=other)).prediction
    assert np.abs(told[0] - plain[0]).max() > 1e-2
    np.testing.assert_allclose(told[1], plain[1], atol=1e-6)

    params = made(config)[2]
    words = {**params, "text_df": params["text_df"] + 1}
    changed = run(config, make_batch(tokens=tokens), words).prediction
    np.testing.assert_allclose(changed[1], plain[1], atol=1e-6)
    assert np.abs(changed[0] - plain[0]).max() > 1e-2
    silence = {**params, "no_text_td": params["no_text_td"] + 1}
    changed = run(config, make_batch(tokens=tokens), silence).prediction
    np.testing.assert_allclose(changed[0], plain[0], atol=1e-6)
    assert np.abs(changed[1] - plain[1]).max() > 1e-2

    model = made(config)[0]
    loss = lambda params: jnp.square(
        model.apply({"params": params}, make_batch(tokens=tokens)).prediction
    ).sum()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


def test_mistakes():
    with pytest.raises(UserError, match="model.norm_placement: is 'pre'"):
        make_config(norm_placement="post_branch")
    with pytest.raises(UserError, match="model.depth.group: is 1"):
        make_config(depth=DepthConfig(group=2))
    with pytest.raises(UserError, match="model.patch_size: 3 does not divide"):
        make_config(patch_size=3)
    with pytest.raises(UserError, match="model.text.num_heads: 2 does not divide"):
        make_config(text_length=4, text=TextSizes(d_model=9))
    with pytest.raises(UserError, match="model.block_pattern: 'shortcut_moe' has no place"):
        build_dit(make_config(block_pattern=("shortcut_moe",), moe=EXPERTS))
    with pytest.raises(UserError, match="model.moe.score.input: 'pixels' is none of token"):
        scored_by("pixels")
    moe = dataclasses.replace(EXPERTS, score=ScoreConfig("attributes", input="noise"))
    with pytest.raises(UserError, match="model.moe.score.input: is 'token' for the score"):
        build_dit(make_config(block_pattern=("moe",), moe=moe))
    with pytest.raises(UserError, match="model.image_size=8, model.in_channels=3: .*8, 8, 4"):
        run(make_config(), make_batch(x_t=np.zeros((2, 8, 8, 4), np.float32)))


@pytest.mark.parametrize(
    "name, field, value, message",
    [
        ("dit", "model.learned_range", False, "model.learned_range: is False and objective.*=True"),
        ("dit", "model.image_size", 32, "model.image_size: 32, with .* is not that of pictures"),
        ("dit", "model.in_channels", 4, "model.image_size: 28, with model.in_channels=4"),
        ("dit:text", "model.text_length", 0, "data.format: 'pairs' does not fit model 'dit'"),
        ("dit:text", "model.text_length", 12, "model.text_length: 12 is not data.sequence_length"),
        ("vit", "data.latents", True, "data.latents: model 'vit' reads pictures"),
        ("quickstart", "data.latents", True, "data.latents: is of pictures"),
    ],
)
def test_what_does_not_fit_together(name, field, value, message):
    with pytest.raises(UserError, match=message):
        load_config(name, {field: value})


def test_another_objective_does_not_fit():
    config = load_config_dict("dit")
    config.objective = load_config_dict("vit").objective
    with pytest.raises(UserError, match="objective.name: 'classification' does not fit"):
        freeze(config)
