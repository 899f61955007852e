"""The layer of experts inside a decoder: reductions, isolation, padding, carried logits, pools."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from moejax.config.moe import BalanceConfig, MoEConfig, RouterConfig, RouterLossConfig, ScoreConfig
from moejax.config.options import Options
from moejax.config.schema import Config, DecoderConfig, NextTokenConfig
from moejax.errors import UserError
from moejax.models.decoder import build_decoder
from moejax.objectives.base import Objective
from moejax.objectives.next_token import next_token
from moejax.objectives.routing import with_routing

D, F, ROWS, LENGTH = 16, 24, 2, 12


def moe_config(**changes) -> MoEConfig:
    return dataclasses.replace(MoEConfig(num_experts=4, hidden=F), **changes)


def router(name: str = "top_k", **options) -> RouterConfig:
    return RouterConfig(name, Options(options))


def decoder(moe: MoEConfig, **changes) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=40,
        num_layers=2,
        d_model=D,
        num_heads=2,
        ffn_hidden=(F,),
        block_pattern=changes.pop("block_pattern", ("moe",)),
        norm_placement="pre",
        moe=moe,
        **changes,
    )


def make_batch(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    segments = np.ones((ROWS, LENGTH), np.int32)
    segments[:, -2:] = 0
    return {
        "tokens": rng.integers(16, 40, (ROWS, LENGTH)).astype(np.int32),
        "modality": rng.integers(0, 2, (ROWS, LENGTH)).astype(np.int32),
        "segments": segments,
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "targets": rng.integers(16, 40, (ROWS, LENGTH)).astype(np.int32),
        "weights": (segments > 0).astype(np.float32),
    }


class Model:
    """Compiled functions of one config."""

    def __init__(self, config: DecoderConfig):
        self.config, self.model = config, build_decoder(config)
        boxed = jax.eval_shape(self.model.init, jax.random.key(0), make_batch())["params"]
        rng = np.random.default_rng(1)
        self.params = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), meta.unbox(boxed)
        )
        self.apply = jax.jit(
            lambda p, b, **options: self.model.apply({"params": p}, b, **options),
            static_argnames=("train", "record"),
        )

    def logits(self, params=None, batch=None, **options):
        params = self.params if params is None else params
        return np.asarray(self.apply(params, batch or make_batch(), **options).logits)


@functools.cache
def model(config: DecoderConfig) -> Model:
    return Model(config)


def moe_params(params) -> dict:
    return params["stack"]["segment_0"]["block_0"]["moe"]


def with_moe_params(params, changed: dict) -> dict:
    def replace(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for key, function in changed.items():
            if name.endswith(key):
                return function(leaf)
        return leaf

    return jax.tree_util.tree_map_with_path(replace, params)


REAL = slice(0, LENGTH - 2)


def test_equal_experts_with_weights_of_sum_1_are_one_expert():
    """Whatever the router chooses; the dense block with that expert's weights is the oracle."""
    sparse = model(decoder(moe_config(router=router(renormalise=True))))
    first = lambda leaf: jnp.broadcast_to(leaf[:, :1], leaf.shape)
    params = with_moe_params(sparse.params, {"wi_edf": first, "wo_efd": first})
    dense = model(decoder(MoEConfig(), block_pattern=("untied",)))
    block = params["stack"]["segment_0"]["block_0"]
    experts = block["moe"]["experts"]
    ffn = {"wi_mdf": experts["wi_edf"][:, :1], "wo_mfd": experts["wo_efd"][:, :1]}
    kept = {name: value for name, value in block.items() if name != "moe"}
    stack = {"segment_0": {"block_0": {**kept, "ffn": ffn}}}
    expected = dense.logits({**params, "stack": stack})
    np.testing.assert_allclose(sparse.logits(params)[:, REAL], expected[:, REAL], atol=1e-5)


@pytest.mark.parametrize("dispatch", ["dense", "capacity"])
def test_dispatches_agree_inside_the_model(dispatch):
    moe = moe_config(capacity="priority", capacity_factor=1.0)
    expected = model(decoder(moe))
    other = model(decoder(dataclasses.replace(moe, dispatch=dispatch)))
    for train in (True, False):
        got, wanted = (m.logits(expected.params, train=train) for m in (other, expected))
        np.testing.assert_allclose(got, wanted, atol=1e-5, err_msg=dispatch)


def test_outside_of_training_nobody_is_dropped():
    """Unless asked for: who is dropped depends on tokens that come later."""
    open_, narrow = moe_config(), moe_config(capacity="order", capacity_factor=0.5)
    free, tight = model(decoder(open_)), model(decoder(narrow))
    asked = model(decoder(dataclasses.replace(narrow, eval_capacity_factor=0.5)))
    np.testing.assert_array_equal(tight.logits(free.params), free.logits())
    dropped = tight.logits(free.params, train=True)
    assert np.abs(dropped - free.logits())[:, REAL].max() > 1e-3
    np.testing.assert_allclose(asked.logits(free.params), dropped, atol=1e-6)


def test_rows_that_fill_up_a_batch_take_no_places():
    """Expert choice over the whole batch, in which the second row counts for nothing."""
    chosen = router("expert_choice", causal_rule="none")
    run = model(decoder(moe_config(router=chosen, routing_group=0)))
    batch = make_batch()
    batch["weights"] = batch["weights"] * np.array([[1.0], [0.0]], np.float32)
    other = {**batch, "tokens": np.where([[True], [False]], batch["tokens"], 17)}
    a, b = (run.logits(batch=one) for one in (batch, other))
    np.testing.assert_array_equal(a[0], b[0])


def test_attributes_score_sees_the_modality_alone():
    run = model(decoder(moe_config(score=ScoreConfig("attributes"))))
    batch = make_batch()
    aux = run.apply(run.params, batch, record=True).aux
    ids = np.asarray(aux["segment_0"]["block_0"]["moe"]["router"]["expert_ids"])[0]
    real = batch["segments"] > 0
    for modality in (0, 1):
        assert len({tuple(row) for row in ids[real & (batch["modality"] == modality)]}) == 1


def test_scan_equals_unrolled_and_remat():
    moe = moe_config(score=ScoreConfig(gating_residual=True), shared_hidden=8)
    expected = model(decoder(moe))
    for changes in ({"unroll": True}, {"remat": "full"}):
        other = model(decoder(moe, **changes))
        np.testing.assert_allclose(other.logits(expected.params), expected.logits(), atol=1e-5)


def test_gating_residual_carries_the_logits_of_the_layer_before():
    residual = model(decoder(moe_config(score=ScoreConfig(gating_residual=True))))
    plain = model(decoder(moe_config()))
    silent = with_moe_params(residual.params, {"residual_router_ee": jnp.zeros_like})
    without = jax.tree_util.tree_map_with_path(lambda path, _: _at(silent, path), plain.params)
    np.testing.assert_array_equal(residual.logits(silent), plain.logits(without))
    assert np.abs(residual.logits() - plain.logits(without)).max() > 1e-3

    def first_layer_router(params):
        return (residual.model.apply({"params": params}, make_batch()).logits ** 2).sum()

    gradient = jax.jit(jax.grad(first_layer_router))(residual.params)
    matrix = moe_params(gradient)["router"]["residual_router_ee"]
    # Layer 0 has nothing before it; layer 1 sees layer 0's logits.
    assert np.all(matrix[0] == 0) and np.any(matrix[1] != 0)


def _at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


def test_allowed_experts_isolate_modalities():
    """Tokens of modality 0 never use experts 2 and 3: no choice, and exactly no gradient."""
    config = decoder(moe_config(allowed=((0, 1), (2, 3))), num_kv_heads=2)
    run = model(config)
    record = run.apply(run.params, make_batch(), record=True).aux
    ids = np.asarray(record["segment_0"]["block_0"]["moe"]["router"]["expert_ids"])
    batch = make_batch()
    real = batch["segments"] > 0
    text = real & (batch["modality"] == 0)
    assert np.all(ids[:, text] < 2) and np.all(ids[:, real & ~text] >= 2)
    assert np.all(ids[:, ~real] == 4), "padding is sent nowhere"
    only_text = {**batch, "modality": np.zeros_like(batch["modality"])}
    loss = lambda p: (run.model.apply({"params": p}, only_text).logits ** 2).sum()
    experts = moe_params(jax.jit(jax.grad(loss))(run.params))["experts"]
    for name, leaf in experts.items():
        assert np.all(leaf[:, 2:] == 0) and np.any(leaf[:, :2] != 0), name


def test_padding_changes_nothing():
    run = model(decoder(moe_config(router=router(), losses=(RouterLossConfig("switch"),))))
    batch = make_batch()
    other = {**batch, "tokens": np.where(batch["segments"] > 0, batch["tokens"], 17)}
    a, b = (run.apply(run.params, one, train=True) for one in (batch, other))
    np.testing.assert_array_equal(a.logits[:, REAL], b.logits[:, REAL])
    jax.tree.map(np.testing.assert_array_equal, a.aux, b.aux)


def test_one_iteration_is_the_layer_and_the_second_sees_the_first():
    once, twice = (model(decoder(moe_config(iterations=n, top_k=1))) for n in (1, 2))
    silent = with_moe_params(twice.params, {"router_1/router_de": lambda leaf: leaf})
    shared = jax.tree_util.tree_map_with_path(lambda p, _: _at(silent, p), once.params)
    assert np.abs(once.logits(shared) - twice.logits(silent)).max() > 1e-3
    extra = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(twice.params)
    } - {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(once.params)
    }
    assert {name.split("/")[-2] for name in extra} == {"router_1"}, extra


def test_layers_of_a_pool_share_experts_and_choose_from_all():
    run = model(decoder(moe_config(pool_layers=2), block_pattern=("moe", "moe")))
    period = run.params["stack"]["segment_0"]
    assert period["pool"]["wi_edf"].shape == (1, 8, D, 2 * F)
    assert period["block_1"]["moe"]["router"]["router_mde"].shape == (1, 1, D, 8)
    assert "experts" not in period["block_0"]["moe"]
    aux = run.apply(run.params, make_batch(), record=True).aux["segment_0"]
    for block in ("block_0", "block_1"):
        ids = np.asarray(aux[block]["moe"]["router"]["expert_ids"])
        chosen = set(ids[ids < 8].tolist())
        assert chosen & {0, 1, 2, 3} and chosen & {4, 5, 6, 7}, (block, chosen)


def test_layers_may_differ_in_their_experts():
    run = model(decoder(moe_config(), block_pattern=("moe:2", "moe:6")))
    period = run.params["stack"]["segment_0"]
    sizes = [period[f"block_{i}"]["moe"]["experts"]["wi_edf"].shape[1] for i in (0, 1)]
    assert sizes == [2, 6]
    assert np.isfinite(run.logits()).all()


def test_shortcut_block_without_experts_is_two_layers():
    moe = moe_config(top_k=1)
    short = model(decoder(moe, block_pattern=("shortcut_moe",)))
    params = with_moe_params(short.params, {"wo_efd": jnp.zeros_like})
    dense = model(decoder(MoEConfig(), block_pattern=("untied",), **{"num_kv_heads": 2}))
    dense = model(dataclasses.replace(dense.config, num_layers=4))
    block = params["stack"]["segment_0"]["block_0"]
    halves = [
        {
            name.removeprefix(f"{half}_"): block[name]
            for name in block
            if name.startswith(f"{half}_")
        }
        for half in ("first", "second")
    ]
    # Layers 0, 1 of the stack hold first and second halves in turn.
    woven = jax.tree.map(lambda a, b: jnp.stack([a, b], 1).reshape(-1, *a.shape[1:]), *halves)
    expected = dense.logits({**params, "stack": {"segment_0": {"block_0": woven}}})
    np.testing.assert_allclose(short.logits(params), expected, atol=1e-5)
    assert np.abs(short.logits() - expected).max() > 1e-3


def objective_of(config: DecoderConfig):
    return with_routing(Objective(next_token(NextTokenConfig(), config)), config)


def test_losses_of_two_microbatches_are_those_of_the_batch():
    losses = tuple(RouterLossConfig(name, 0.1) for name in ("switch", "z", "importance"))
    config = decoder(moe_config(losses=losses))
    run, objective = model(config), objective_of(config)
    one, two = make_batch(0), make_batch(1)
    both = {name: np.concatenate([one[name], two[name]]) for name in one}
    on_device = [jax.tree.map(jnp.asarray, b) for b in (one, two, both)]
    sums = [objective(run.apply(run.params, b, train=True), b) for b in on_device]
    total = sums[0] + sums[1]
    np.testing.assert_allclose(total.total(), sums[2].total(), rtol=1e-5)
    for name, value in total.derived_values().items():
        np.testing.assert_allclose(value, sums[2].derived_values()[name], rtol=1e-4, atol=1e-6)
    # Once for each of the two layers.
    without = dataclasses.replace(config, moe=dataclasses.replace(config.moe, losses=()))
    both = on_device[2]
    plain = objective_of(without)(model(without).apply(run.params, both, train=True), both)
    means = sums[2].derived_values()
    expected = sum(2 * 0.1 * means[f"router/{loss.name}"] for loss in losses)
    np.testing.assert_allclose(sums[2].total() - plain.total(), expected, rtol=1e-3)


APART = {"unscored_experts": 1, "allowed": ((0, 1, 2), (3,))}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"top_k": 5}, "model.moe.top_k"),
        ({"num_experts": 0}, "model.moe.num_experts"),
        ({"capacity": "order", "capacity_factor": 0.0}, "model.moe.capacity_factor"),
        ({"allowed": ((0, 1), ())}, "model.moe.allowed: no expert is allowed for 'image'"),
        ({"allowed": ((0, 1), (7,))}, "model.moe.allowed: 'image': no expert"),
        ({"router": router("expert_choice")}, "model.moe.router.options.causal_rule"),
        ({"router": router("soft")}, "model.moe.router.name"),
        ({"router": router("topk")}, "model.moe.router.name: no router 'topk'; did you mean"),
        ({"router": router(renormalize=True)}, "model.moe.router.options.renormalize"),
        ({"losses": (RouterLossConfig("swich"),)}, "model.moe.losses[0]"),
        ({"losses": (RouterLossConfig("load"),)}, "model.moe.losses: 'load' is about noise"),
        ({"losses": (RouterLossConfig("causal_router"),)}, "model.moe.causal_router"),
        ({"router": router("hash"), "balance": BalanceConfig("sign")}, "model.moe.balance.name"),
        ({"shared_competing": 2}, "model.moe.shared_competing: needs a width"),
        (
            {"router": router("hash"), "shared_competing": 2, "shared_hidden": 8},
            "model.moe.shared_competing: router 'hash'",
        ),
        ({"unscored_experts": 1}, "model.moe.unscored_experts: needs model.moe.allowed"),
        ({"unscored_experts": 4}, "model.moe.unscored_experts: leaves none of 4"),
        (
            {"unscored_experts": 1, "allowed": ((0, 1, 2), (2, 3))},
            "model.moe.unscored_experts: needs model.moe.allowed: for each modality experts below",
        ),
        (
            {**APART, "zero_experts": 1},
            "model.moe.unscored_experts: cannot be beside experts without weights",
        ),
        (
            {**APART, "router": router("expert_choice", capacity_factor=0.5, causal_rule="none")},
            "model.moe.router.options.capacity_factor: below 1 leaves out tokens",
        ),
        ({"losses": (RouterLossConfig("contrastive"),)}, "model.moe.losses: 'contrastive'"),
        ({"causal_router_decay": 0.5}, "model.moe.causal_router_decay: needs model.moe.causal"),
        (
            {"router": router("expert_choice", causal_rule="aux_count")},
            "model.moe.causal_router: causal_rule='aux_count' needs",
        ),
        ({"pool_steps": (1, 2)}, "model.moe.pool_steps: needs model.moe.pool_layers"),
        ({"score": ScoreConfig("mpl")}, "model.moe.score.name: no score 'mpl'; did you mean 'mlp'"),
        (
            {"balance": BalanceConfig("sign", options=Options(rat=1))},
            "model.moe.balance.options.rat",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_field(changes, message):
    with pytest.raises(UserError) as error:
        build_decoder(decoder(moe_config(**changes)))
    assert str(error.value).startswith(message), error.value
    assert "\n" not in str(error.value)


def test_a_routing_group_has_to_divide_the_rows_of_a_microbatch():
    with pytest.raises(UserError, match="model.moe.routing_group: 3 does not divide the 8 rows"):
        Config(model=decoder(moe_config(routing_group=3)))
    Config(model=decoder(moe_config(routing_group=16)))


def test_blocks_with_experts_need_experts():
    with pytest.raises(UserError, match="model.moe.num_experts: must be positive where blocks"):
        build_decoder(decoder(MoEConfig(), block_pattern=("moe:4",)))


def test_experts_that_no_block_asks_for_change_nothing():
    config = decoder(moe_config(), block_pattern=("untied",))
    batch = jax.tree.map(jnp.asarray, make_batch())
    sums = objective_of(config)(model(config).apply(model(config).params, batch, train=True), batch)
    assert sums.derived == () and np.isfinite(sums.total())


def test_layers_of_a_pool_are_of_one_kind():
    for changes in ({"block_pattern": ("dense", "moe")}, {"first_blocks": ("moe",)}):
        with pytest.raises(UserError, match="model.moe.pool_layers: layers that share"):
            decoder(moe_config(pool_layers=2), **{"block_pattern": ("moe", "moe"), **changes})


def test_layers_of_a_pool_are_one_period():
    with pytest.raises(UserError, match="model.moe.pool_layers: 3 layers share their experts"):
        decoder(moe_config(pool_layers=3), block_pattern=("moe", "moe"))
