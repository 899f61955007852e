"""Diffusion transformers of the papers: DiT-MoE's experts, sizes, how it is upcycled."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.analysis.params import param_table
from moejax.api import build
from moejax.config import load_config
from moejax.objectives.base import LossSums, Objective
from moejax.objectives.routing import with_routing
from moejax.train.checkpoint import Checkpoints
from moejax.train.setup import prepare_model
from moejax.train.start import plan_start

pytestmark = pytest.mark.usefixtures("quick_compiles")
# Of what ``expert_layer`` gives to its experts.
WIDTH = 16
TINY = {
    "model.image_size": 8,
    "model.d_model": 16,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.ffn_hidden": (24,),
    "model.kernel_backend": "reference",
    "model.moe.hidden": 24,
    "model.moe.shared_hidden": 8,
    "data.image_size": 8,
    "data.batch_size": 4,
}


def test_experts_of_dit_moe(expert_layer, tokens, mlp):
    """Two of eight by their softmax over all, not divided by their sum, beside a shared MLP."""
    layer = expert_layer("dit_moe")
    y, aux = layer(tokens)
    params = layer.params
    probs = jax.nn.softmax(tokens @ params["router"]["router_mde"][0])
    weights, ids = jax.lax.top_k(probs, 2)
    wi_edf, wo_efd = (params["experts"][name] for name in ("wi_edf", "wo_efd"))
    each = jnp.stack([mlp(tokens, wi, wo) for wi, wo in zip(wi_edf, wo_efd, strict=True)], axis=2)
    chosen = jnp.take_along_axis(each, ids[..., None], axis=2)
    shared = mlp(tokens, params["shared_wi_edf"][0], params["shared_wo_efd"][0])
    expected = shared + (weights[..., None] * chosen).sum(axis=2)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(np.sort(aux["expert_ids"]), np.sort(ids))
    assert aux["weights"].sum(axis=-1).max() < 1
    # The widths of the authors' code.
    model = load_config("dit_moe:s_8e2a").model
    assert (model.moe.hidden, model.moe.shared_hidden) == (4 * model.d_model, 2 * model.d_model)


def test_all_experts_alike_are_one_mlp_beside_the_shared(expert_layer, tokens, mlp):
    """With every expert chosen the weights add up to 1."""
    layer = expert_layer("dit_moe", {"model.moe.top_k": 8})
    first = {name: leaf[:1] for name, leaf in layer.params["experts"].items()}
    alike = {name: jnp.repeat(leaf, 8, axis=0) for name, leaf in first.items()}
    y, aux = layer(tokens, params={**layer.params, "experts": alike})
    np.testing.assert_allclose(aux["weights"].sum(axis=-1), 1, rtol=1e-5)
    assert np.ptp(aux["weights"]) > 0.1
    routed = mlp(tokens, first["wi_edf"][0], first["wo_efd"][0])
    shared = mlp(tokens, layer.params["shared_wi_edf"][0], layer.params["shared_wo_efd"][0])
    np.testing.assert_allclose(y, routed + shared, rtol=1e-4, atol=1e-4)


DENOISERS = ("dit", "sit", "dit_moe", "promoe", "ec_dit", "diffmoe", "raphael", "mode")


@pytest.mark.parametrize("name", DENOISERS)
def test_clothes_are_not_mirrored(name):
    """What is drawn is compared with pictures as they are; emoji may be where their record says."""
    config = load_config(name)
    assert config.data.source == "fashion_mnist:default"
    assert config.objective.augment.flip == "none"
    if name in ("dit", "sit", "raphael"):
        assert load_config(f"{name}:text").objective.augment.flip == "allowed"


def test_the_loss_of_balance_is_its_coefficient_where_the_load_is_spread(expert_layer):
    """0.01 of patches that choose each pair of neighbouring experts as often; more of one pair."""
    layer = expert_layer("dit_moe")
    experts, chosen = 8, 2
    towards_eb = np.eye(experts, WIDTH, dtype=np.float32)
    pairs = towards_eb + np.roll(towards_eb, 1, axis=0)
    spread = np.tile(pairs, (3, 1)).reshape(2, 12, WIDTH)
    router = {**layer.params["router"], "router_mde": jnp.asarray(5 * towards_eb.T[None])}
    nothing = Objective(lambda outputs, batch, rng=None: LossSums({}, {}, ()))
    found = []
    for tokens in (spread, np.broadcast_to(pairs[0], spread.shape)):
        _, aux = layer(jnp.asarray(tokens), params={**layer.params, "router": router})
        one_layer = {"moe": {"router": jax.tree.map(lambda leaf: leaf[None], aux)}}
        sums = with_routing(nothing, layer.config)(types.SimpleNamespace(aux=one_layer), {})
        counts = np.bincount(np.ravel(aux["expert_ids"]), minlength=experts)
        found.append((counts.tolist(), float(sums.total())))
    assert found[0][0] == [spread.size // WIDTH * chosen // experts] * experts
    assert found[0][1] == pytest.approx(0.01, rel=1e-5)
    # All on two experts of eight: four times as much, but for what the others' scores are.
    assert sorted(found[1][0])[:-2] == [0] * 6
    assert found[1][1] == pytest.approx(0.04, rel=0.03)


def test_dit_moe_g_has_16_5b_parameters_and_3_1b_active():
    """By our count 3.18B, of which the paper prints 3.1B; and ours to the last parameter."""
    config = load_config("dit_moe:g_16e2a")
    table, model = param_table(build(config)[0], config), config.model
    assert table.total == pytest.approx(16.5e9, rel=0.005)
    assert table.active == pytest.approx(3.18e9, rel=0.001)
    d, layers, experts, chosen = model.d_model, model.num_layers, 16, 2
    # Attention 4, the shared MLP 6, modulation 6, an expert 12 of them.
    blocks = lambda run: layers * d * (d * (12 * run + 16) + experts + 6)
    numbers = model.patch_size**2 * model.in_channels
    patches, noise, labels = (numbers + 1) * d, (256 + 1) * d + (d + 1) * d, 1001 * d
    out = 2 * (d + 1) * d + (d + 1) * numbers
    assert table.total == blocks(experts) + patches + noise + labels + out
    assert table.active == blocks(chosen) + patches + noise + labels + out


def test_dit_and_sit_differ_in_process_and_range_alone():
    for arg in ("", ":b2"):
        fields = {
            "model.learned_range": True,
            "objective.learned_range": True,
            "objective.process": "ddpm",
            "objective.schedule": "linear",
            "objective.direction": "to_noise",
        }
        sit, dit = load_config(f"sit{arg}", fields), load_config(f"dit{arg}")
        for group in ("model", "data", "objective", "optim", "mesh", "train", "eval"):
            assert getattr(sit, group) == getattr(dit, group)


def test_upcycled_experts_are_copies_of_the_first(tmp_path):
    """Twice as many; all but the routers is taken over."""
    source = prepare_model(load_config("dit_moe", TINY), jax.devices()[:1])
    state = source.recipe.create()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state, {}, source.mesh)
    checkpoints.close()
    setup = prepare_model(
        load_config("dit_moe:upcycle", {**TINY, "train.init_from": str(tmp_path)}),
        jax.devices()[:1],
    )
    start = plan_start(setup, tmp_path / "new")
    assert start is not None
    assert all(name.endswith("router_mde") for name in start.plan.skipped)
    assert not [name for name in start.plan.unused if not name.endswith("router_mde")]
    before, after = jax.device_get((state.params, start.create(setup.recipe).params))
    moe = lambda params: params["stack"]["segment_0"]["block_0"]["moe"]
    for name in ("wi_edf", "wo_efd"):
        first = moe(before)["experts"][name][:, :1]
        np.testing.assert_array_equal(moe(after)["experts"][name], np.repeat(first, 16, axis=1))
    np.testing.assert_array_equal(moe(after)["shared_wi_edf"], moe(before)["shared_wi_edf"])
