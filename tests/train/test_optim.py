"""Schedules at points computed by hand, which parameters are decayed, groups, optimizers."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax import axes
from moejax.config import default_config, freeze, load_config, to_dict
from moejax.config.schema import DecoderConfig, MeshConfig, OptimConfig
from moejax.config.training import GroupConfig
from moejax.errors import UserError
from moejax.train.evaluate import put_batch
from moejax.train.optim import decay_mask, make_optimizer, make_schedule
from moejax.train.setup import prepare

from .conftest import make_config


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 10 steps of warm-up, 100 in all: p = (count - 10) / 90.
        ("cosine", {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 55: 0.6, 100: 0.2, 200: 0.2}),
        ("linear", {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.6, 100: 0.2}),
        ("constant", {0: 0.1, 9: 1.0, 50: 1.0, 100: 1.0}),
        # The last 40 % decay: from step 60 on, half of it is behind at 80.
        ("wsd", {0: 0.1, 9: 1.0, 60: 1.0, 80: 0.6, 100: 0.2}),
    ],
)
def test_schedule_at_hand_computed_points(schedule, expected):
    optim = OptimConfig(
        learning_rate=2.0,
        schedule=schedule,
        warmup_steps=10,
        final_fraction=0.2,
        decay_fraction=0.4,
    )
    learning_rate = make_schedule(optim, steps=100)
    for count, fraction in expected.items():
        assert float(learning_rate(count)) == pytest.approx(2 * fraction, rel=1e-5), count


def test_schedule_without_warmup_starts_at_the_peak():
    learning_rate = make_schedule(OptimConfig(learning_rate=1.0, warmup_steps=0), steps=10)
    assert float(learning_rate(0)) == 1.0


def test_schedule_shorter_than_its_warmup_only_rises():
    learning_rate = make_schedule(OptimConfig(learning_rate=1.0, warmup_steps=20), steps=10)
    assert float(learning_rate(9)) == pytest.approx(0.5)


def test_vectors_and_named_parameters_are_not_decayed():
    def box(*names):
        return nn.LogicallyPartitioned(jnp.ones((2,) * len(names)), names)

    params = {
        "ffn": {"wi_mdf": box(axes.LAYERS, axes.MODALITY, axes.EMBED, axes.MLP)},
        # A vector for each layer and modality, whatever it is called.
        "gain_md": box(axes.LAYERS, axes.MODALITY, axes.EMBED),
        "moe": {"router_de": box(axes.EMBED, axes.MLP)},
        "attn_norm": {"weight": box(axes.EMBED, axes.MLP)},
        "plain": jnp.ones((3, 3)),
        "plain_vector": jnp.ones((3,)),
    }
    assert decay_mask(params, ("norm", "bias", "scale", "router")) == {
        "ffn": {"wi_mdf": True},
        "gain_md": False,
        "moe": {"router_de": False},
        "attn_norm": {"weight": False},
        "plain": True,
        "plain_vector": False,
    }


def test_decay_moves_only_what_the_mask_allows():
    config = make_config(optim__weight_decay=0.5, optim__clip_norm=0.0, optim__warmup_steps=0)
    params = {"wi_df": jnp.ones((2, 2)), "bias_f": jnp.ones((2,))}
    optimizer = make_optimizer(config, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.transform.update(zeros, optimizer.transform.init(params), params)
    rate = config.optim.learning_rate
    np.testing.assert_allclose(updates["wi_df"], -rate * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias_f"], 0)


def test_unknown_optimizer_is_named():
    with pytest.raises(UserError, match="optim.name: no optimizer 'adam'.*'adamw'"):
        make_optimizer(make_config(optim__name="adam"), {})


def random_tree(shapes, seed):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=shape), jnp.float32) for k, shape in shapes.items()}


def updates_of(transform, params, gradients):
    """The updates of each of several steps; the parameters move with them."""
    state, updates = nn.unbox(transform.init(params)), []
    for step_gradients in gradients:
        update, state = transform.update(step_gradients, state, nn.unbox(params))
        params = optax.apply_updates(nn.unbox(params), update)
        updates.append(jax.device_get(update))
    return updates


STACKED = {
    "embedding_vd": (axes.VOCABULARY, axes.EMBED),
    "gain_md": (axes.LAYERS, axes.MODALITY, axes.EMBED),
    "qkv_mdnh": (axes.LAYERS, axes.MODALITY, axes.EMBED, axes.HEADS, axes.HEAD_SIZE),
    "out_mnhd": (axes.LAYERS, axes.MODALITY, axes.HEADS, axes.HEAD_SIZE, axes.EMBED),
}
SIZES = {
    axes.LAYERS: 2,
    axes.MODALITY: 2,
    axes.VOCABULARY: 6,
    # Adafactor factors from 128 on.
    axes.EMBED: 128,
    axes.HEADS: 2,
    axes.HEAD_SIZE: 64,
}
# As matrices: what the axes beside layer and modality map from and to.
MATRICES = {
    "embedding_vd": (6, 128),
    "gain_md": (128,),
    "qkv_mdnh": (128, 128),
    "out_mnhd": (128, 128),
}


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_layers_and_towers_are_optimized_as_if_they_were_not_stacked(name):
    """Each matrix of the stack moves as in a tree where it lies alone; decay is on."""
    shapes = {k: tuple(SIZES[axis] for axis in names) for k, names in STACKED.items()}

    def tree(seed):
        """Towers of very different size, which one norm over the whole stack would mix up."""
        drawn = random_tree(shapes, seed)
        stacked = {k for k in drawn if k != "embedding_vd"}
        return drawn | {k: drawn[k].at[:, 1].multiply(100.0) for k in stacked}

    params, gradients = tree(0), [tree(seed) for seed in (1, 2, 3)]
    boxed = {k: nn.LogicallyPartitioned(params[k], names) for k, names in STACKED.items()}
    config = make_config(optim__name=name, optim__clip_norm=0.0, optim__weight_decay=0.3)
    transform = make_optimizer(config, boxed).transform
    stacked = updates_of(transform, boxed, gradients)
    largest = max(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(transform.init, boxed)))
    assert largest == {"adafactor": 6 * 128, "muon": 4 * 128 * 128}[name]

    def apart(tree):
        split = {}
        for k, leaf in tree.items():
            grid = leaf.reshape(-1, *MATRICES[k])
            split |= {f"{k}_{i}": grid[i] for i in range(len(grid))}
        return split

    alone = apart(params)
    schedule = make_schedule(config.optim, config.train.steps)
    matrices = {k for k in alone if k.startswith(("qkv", "out"))}
    decayed = {k: v.ndim == 2 for k, v in alone.items()}
    if name == "adafactor":
        reference = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
            optax.add_decayed_weights(0.3, decayed),
            optax.scale_by_learning_rate(schedule),
        )
    else:
        numbers = optax.contrib.MuonDimensionNumbers()
        reference = optax.partition(
            {
                "m": optax.contrib.muon(
                    schedule,
                    beta=0.9,
                    weight_decay=0.3,
                    consistent_rms=0.2,
                    muon_weight_dimension_numbers=lambda p: jax.tree.map(lambda _: numbers, p),
                ),
                "a": optax.adamw(
                    schedule,
                    0.9,
                    0.95,
                    weight_decay=0.3,
                    mask=lambda p: jax.tree.map(lambda x: x.ndim == 2, p),
                ),
            },
            {k: "m" if k in matrices else "a" for k in alone},
        )
    expected = updates_of(reference, alone, [apart(g) for g in gradients])
    for here, there in zip(stacked, expected, strict=True):
        here = apart(here)
        assert here.keys() == there.keys()
        for k, update in here.items():
            close = 1e-4 * np.abs(there[k]).max()
            np.testing.assert_allclose(update, there[k], rtol=0, atol=close, err_msg=k)


def test_muon_turns_gradients_into_nearly_orthogonal_steps_of_adamw_size():
    """Singular values between 0.5 and 1.5 of 0.2 sqrt(larger side): root mean square about 0.2."""
    params = {"w_df": jnp.zeros((8, 32))}
    config = make_config(
        optim__name="muon", optim__clip_norm=0.0, optim__weight_decay=0.0, optim__warmup_steps=0
    )
    (update,) = updates_of(
        make_optimizer(config, params).transform, params, [random_tree({"w_df": (8, 32)}, 0)]
    )
    values = np.linalg.svd(update["w_df"] / config.optim.learning_rate)[1] / (0.2 * 32**0.5)
    assert values.min() > 0.5 and values.max() < 1.5


def test_lion_and_sgd_are_those_of_optax():
    params, gradients = random_tree({"w": (3, 2), "b": (2,)}, 0), []
    for seed in (1, 2):
        gradients.append(random_tree({"w": (3, 2), "b": (2,)}, seed))
    shared = {"optim__clip_norm": 0.0, "optim__weight_decay": 0.3, "optim__no_decay": ()}
    lion = make_config(optim__name="lion", optim__b2=0.99, **shared)
    schedule = make_schedule(lion.optim, lion.train.steps)
    decayed = {"w": True, "b": False}
    reference = optax.lion(schedule, b1=0.9, b2=0.99, weight_decay=0.3, mask=decayed)
    sgd = make_config(optim__name="sgd", **shared)
    momentum = optax.chain(optax.sgd(1.0, momentum=0.9), optax.scale(-1.0))
    by_hand = optax.chain(
        momentum, optax.add_decayed_weights(0.3, decayed), optax.scale_by_learning_rate(schedule)
    )
    for config, expected in ((lion, reference), (sgd, by_hand)):
        here = updates_of(make_optimizer(config, params).transform, params, gradients)
        there = updates_of(expected, params, gradients)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), here, there)


def test_groups_have_their_own_optimizer_rate_and_decay():
    """The first group that is found counts; clipping is by the norm of all together."""
    shapes = {"stack/wi_df": (3, 3), "stack/wo_fd": (3, 3), "head_dv": (3, 2), "embedding": (2, 3)}
    params, gradients = random_tree(shapes, 0), [random_tree(shapes, 1)]
    groups = (
        GroupConfig(match="wo", scale=0.5),
        GroupConfig(match="stack", name="sgd", weight_decay=0.0),
        GroupConfig(match="^head", weight_decay=0.7),
    )
    plain = make_config(optim__clip_norm=1.0)
    config = make_config(optim__clip_norm=1.0, optim__groups=groups)
    (here,) = updates_of(make_optimizer(config, params).transform, params, gradients)
    (usual,) = updates_of(make_optimizer(plain, params).transform, params, gradients)
    rate = float(make_schedule(config.optim, config.train.steps)(0))
    norm = float(optax.tree.norm(gradients[0]))
    assert norm > 1
    np.testing.assert_allclose(here["embedding"], usual["embedding"], rtol=1e-6)
    np.testing.assert_allclose(here["stack/wo_fd"], 0.5 * usual["stack/wo_fd"], rtol=1e-5)
    expected = -rate * gradients[0]["stack/wi_df"] / norm
    np.testing.assert_allclose(here["stack/wi_df"], expected, rtol=1e-5)
    more = -rate * (0.7 - plain.optim.weight_decay) * params["head_dv"]
    np.testing.assert_allclose(here["head_dv"] - usual["head_dv"], more, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"match": "hed_dv"}, r"\[1\].match: 'hed_dv' is found .* did you mean 'head_dv'"),
        ({"match": "head"}, r"\[1\].match: 'head' only in parameters of the groups before it"),
        ({"match": "gain", "name": "sgdd"}, r"\[1\].name: no optimizer 'sgdd'.*'sgd'"),
        ({"match": "("}, r"\[1\].match: '\(' is no regular expression"),
        ({"match": "gain", "scale": 0.0}, r"\[1\].scale: must be positive"),
        ({"match": "gain", "rate": 0.1}, r"\[1\].rate: no such field"),
    ],
)
def test_groups_that_cannot_be_are_refused(group, message):
    params = {"head_dv": jnp.ones((2, 2)), "gain": jnp.ones((2, 2))}
    config = default_config()
    config.optim.groups = ({"match": "head"}, group)
    with pytest.raises(UserError, match=f"optim.groups{message}"):
        make_optimizer(freeze(config), params)


def test_groups_survive_the_command_line_and_config_json(tmp_path):
    text = "({'match': 'norm', 'scale': 0.1}, {'match': 'stack', 'name': 'muon'})"
    config = load_config("quickstart", [f"optim.groups={text}"])
    assert config.optim.groups == (
        GroupConfig(match="norm", scale=0.1),
        GroupConfig(match="stack", name="muon"),
    )
    assert freeze(to_dict(config)) == config
    pairs = "(('^stack/segment_0', 'stack/segment_1'), ('^head_dv$', ''))"
    overrides = ["train.init_from=runs/x@5", f"train.init_rename={pairs}", "optim.freeze=a/.*@text"]
    config = load_config("quickstart", [*overrides, "train.init_towers=(('image', 'text'),)"])
    assert config.train.init_rename[1] == ("^head_dv$", "")
    assert config.train.init_towers == (("image", "text"),)
    assert config.optim.freeze == ("a/.*@text",)


DECODER = DecoderConfig(vocab_size=284, num_layers=1, d_model=16, num_heads=2, ffn_hidden=(16,))


@pytest.mark.parametrize("name", [pytest.param("adafactor", marks=pytest.mark.slow), "muon"])
def test_what_sees_whole_matrices_trains_sharded_as_on_one_device(fake_data, name):
    config = dataclasses.replace(make_config(optim__name=name, data__batch_size=16), model=DECODER)
    results = []
    for mesh, devices in ((MeshConfig(data=2, fsdp=4), None), (MeshConfig(), jax.devices()[:1])):
        setup = prepare(dataclasses.replace(config, mesh=mesh), devices)
        step = setup.train_step()
        state = setup.recipe.create()
        with jax.set_mesh(setup.mesh):
            for number in range(2):
                batch = put_batch(setup.pipeline.batch(number), setup.mesh)
                state, metrics = step(state, batch)
                assert float(metrics.steps) == 1
        results.append(jax.device_get(state.params))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * np.abs(b).max())
