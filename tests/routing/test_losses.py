"""Losses: uniform and collapsed values, minima, gradients, padding, sums over microbatches."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import ROUTER_LOSSES, ROUTERS, RoutingPlan, allowed_experts, limit_capacity
from moejax.routing.normalise import softmax

E, K = 6, 2
top_k = ROUTERS.get("top_k").function


def loss(name, inputs, plan, **options):
    entry = ROUTER_LOSSES.get(name)
    return entry.value(entry.statistics(inputs, plan, **options), **options)


def cyclic(inputs):
    """Token i chooses experts i and i + 1: all used alike."""
    first = np.arange(12)[None, :, None] + np.arange(K)[None, None]
    ids = np.where(np.asarray(inputs.valid)[..., None], first % E, E)
    return jnp.asarray(np.broadcast_to(ids, (2, 12, K)), jnp.int32)


def uniform_plan(inputs):
    """Uniform probabilities, choices balanced in groups and in halves of six tokens."""
    probs = jnp.where(inputs.valid[..., None], jnp.full((2, 12, E), 1 / E), 0)
    return RoutingPlan(cyclic(inputs), jnp.ones((2, 12, K)), probs, statistics=wins(probs))


def collapsed_plan(inputs):
    """Everything on expert 0."""
    ids = jnp.where(inputs.valid[..., None], 0, E)
    probs = jax.nn.one_hot(ids[..., 0], E)
    return RoutingPlan(ids, jnp.ones((2, 12, 1)), probs, statistics=wins(probs))


def wins(probs):
    return {"wins_se": probs.sum(axis=1)}


def even(make_inputs, **fields):
    """Both modalities in each group, no padding, logits of zero."""
    inputs = make_inputs(padding=0, logits=jnp.zeros((2, 12, E)))
    modality = jnp.tile(jnp.asarray([0, 1], jnp.int32), (2, 6))
    inputs = dataclasses.replace(inputs, modality=modality, sequences=2, num_ffn=4)
    return dataclasses.replace(inputs, **fields)


# name -> (options, at uniform, all on one expert)
VALUES = {
    "switch": ({}, 1, E),
    "switch_group": ({"per": "group"}, 1, E),
    "deepseek_expert": ({}, 1, E),
    "deepseek_device": ({"devices": 2}, 1, 3),
    "deepseek_sequence": ({}, 1, E),
    "gshard": ({}, 1, E),
    "gshard_all": ({"counted": "all"}, K, E),
    "gshard_batch": ({"per": "batch"}, 1, E),
    "heterogeneous": ({"tau": 0.75}, K * (4 + 0.75 * 2) / E**2, 1),
    "switch_per_modality": ({}, 2, 2 * E),
    "importance": ({}, 0, E - 1),
    "importance_batch": ({"per": "batch"}, 0, E - 1),
    "load": ({}, 0, E - 1),
    "mutual_information": ({}, 0, 0),
    "modality_information": ({}, 0, 0),
    "entropy_local": ({}, 2 * math.log(E), 0),
    "entropy_local_one": ({"modality": 1}, math.log(E), 0),
    "entropy_global": ({}, -2 * math.log(E), 0),
    "entropy_global_tau": ({"min_experts": 4.0, "modality": 0}, 0, math.log(4)),
}


def registered(case):
    return case if case in ROUTER_LOSSES else case.rpartition("_")[0]


@pytest.mark.parametrize("case", VALUES)
def test_value_at_uniform_and_when_collapsed(make_inputs, case):
    options, uniform, collapsed = VALUES[case]
    name, inputs = registered(case), even(make_inputs)
    assert float(loss(name, inputs, uniform_plan(inputs), **options)) == pytest.approx(
        uniform, abs=1e-5
    )
    assert float(loss(name, inputs, collapsed_plan(inputs), **options)) == pytest.approx(
        collapsed, abs=1e-5
    )


def test_every_loss_is_tested_for_its_values():
    assert {registered(case) for case in VALUES} | {"z", "causal_router"} == set(ROUTER_LOSSES)


def test_z_by_hand(make_inputs):
    inputs = even(make_inputs)
    plan = uniform_plan(inputs)
    assert float(loss("z", inputs, plan)) == pytest.approx(math.log(E) ** 2, rel=1e-5)
    moved = dataclasses.replace(inputs, logits=inputs.logits - math.log(E))
    assert float(loss("z", moved, plan)) == pytest.approx(0, abs=1e-6)
    allowed = jnp.zeros((2, 12, E), bool).at[..., :2].set(True)
    few = dataclasses.replace(inputs, allowed=allowed)
    assert float(loss("z", few, plan)) == pytest.approx(math.log(2) ** 2, rel=1e-5)
    # Larger logits are made smaller, in tokens that choose and in no others.
    padded = make_inputs(logits=make_inputs().logits + 3)
    gradient = jax.grad(lambda x: loss("z", dataclasses.replace(padded, logits=x), plan))(
        padded.logits
    )
    assert (gradient[np.asarray(padded.valid)] > 0).all()
    assert (gradient[~np.asarray(padded.valid)] == 0).all()


def test_causal_router_by_hand(make_inputs):
    inputs = even(make_inputs, causal_logits=jnp.zeros((2, 12, E)))
    plan = uniform_plan(inputs)
    assert float(loss("causal_router", inputs, plan)) == pytest.approx(math.log(2), rel=1e-5)
    right = jnp.where(
        (plan.expert_ids[..., None] == jnp.arange(E)[None, None, None]).any(2), 20.0, -20.0
    )
    sure = dataclasses.replace(inputs, causal_logits=right)
    assert float(loss("causal_router", sure, plan)) < 1e-6
    wrong = dataclasses.replace(inputs, causal_logits=-right)
    assert float(loss("causal_router", wrong, plan)) == pytest.approx(20, rel=1e-5)
    for other in ({"train": False}, {"causal_logits": None}):
        assert float(loss("causal_router", dataclasses.replace(inputs, **other), plan)) == 0


def test_causal_router_does_not_reach_the_main_router(make_inputs):
    inputs = make_inputs()
    expert_choice = ROUTERS.get("expert_choice").function

    def of(logits, causal_logits):
        moved = dataclasses.replace(inputs, logits=logits, causal_logits=causal_logits)
        return loss("causal_router", moved, expert_choice(moved))

    main, causal = jax.grad(of, (0, 1))(inputs.logits, inputs.causal_logits)
    np.testing.assert_array_equal(main, 0)
    taken = np.asarray(expert_choice(inputs).expert_ids) < E
    valid = np.asarray(inputs.valid)
    assert (np.asarray(causal)[taken] < 0).all()
    assert (np.asarray(causal)[valid][~taken[valid]] > 0).all()


BALANCING = ("switch", "gshard", "deepseek_expert", "deepseek_sequence", "importance", "load")


@pytest.mark.parametrize("name", BALANCING)
def test_balance_pushes_the_crowded_expert_down(make_inputs, name):
    inputs = make_inputs(logits=make_inputs().logits.at[..., 2].add(1.5), rng=jax.random.key(0))

    def of(logits):
        moved = dataclasses.replace(inputs, logits=logits)
        return loss(name, moved, top_k(moved, noise="gaussian", noise_scale=6.0))

    gradient = np.asarray(jax.grad(of)(inputs.logits))
    assert np.isfinite(gradient).all()
    by_expert = gradient.sum(axis=(0, 1))
    assert by_expert[2] > 0 and by_expert.argmax() == 2
    assert (gradient[~np.asarray(inputs.valid)] == 0).all()


def test_load_by_hand(make_inputs):
    """``1 - Phi((threshold - logit) / sigma)`` with the threshold of the noisy logits."""
    from moejax.routing.perturb import perturb

    inputs = make_inputs(rng=jax.random.key(0))
    noisy = np.sort(np.asarray(perturb(inputs, "gaussian", 3.0)), axis=-1)
    sigma = 3.0 / E
    z = (noisy[..., -K, None] - np.asarray(inputs.logits)) / sigma
    p_win = np.vectorize(lambda v: 0.5 * math.erfc(v / math.sqrt(2)))(z)
    use = (p_win * np.asarray(inputs.valid)[..., None]).sum(axis=1)
    expected = (use.var(axis=-1) / use.mean(axis=-1) ** 2).mean()
    plan = top_k(inputs, noise="gaussian", noise_scale=3.0)
    assert float(loss("load", inputs, plan)) == pytest.approx(expected, rel=1e-4)
    assert float(loss("load", inputs, top_k(inputs))) == 0


def test_deepseek_sequence_counts_without_the_bias(make_inputs):
    plain = make_inputs(padding=0, sequences=2)
    biased = dataclasses.replace(plain, select_bias=jnp.zeros(E).at[5].set(9.0))
    plans = [top_k(i, normalise="sigmoid", renormalise=True) for i in (plain, biased)]
    assert (plans[0].expert_ids != plans[1].expert_ids).any()
    values = [loss("deepseek_sequence", i, p) for i, p in zip((plain, biased), plans, strict=True)]
    assert values[0] == values[1]
    # By hand: four sequences of six tokens.
    probs = np.asarray(plans[0].probs).reshape(4, 6, E)
    expected = 0.0
    for sequence in probs:
        counts = np.zeros(E)
        for token in sequence:
            counts[np.argsort(-token)[:K]] += 1
        expected += E * (counts / (6 * K) * sequence.mean(axis=0)).sum() / 4
    assert float(values[0]) == pytest.approx(expected, rel=1e-5)
    assert loss("switch", *(biased, plans[1])) != loss("switch", *(plain, plans[0]))


def test_experts_without_weights_may_be_used_more(make_inputs):
    """The heterogeneous loss falls when a choice moves from an expert with weights to one without."""
    inputs = even(make_inputs)
    plan = uniform_plan(inputs)
    moved = plan.replace(expert_ids=jnp.where(plan.expert_ids == 0, 4, plan.expert_ids))
    assert loss("heterogeneous", inputs, moved) < loss("heterogeneous", inputs, plan)
    same = {"tau": 1.0}
    assert float(loss("heterogeneous", inputs, moved, **same)) == pytest.approx(
        float(loss("heterogeneous", inputs, plan, **same)), rel=1e-5
    )


def test_devices_are_groups_of_neighbours(make_inputs):
    """Uneven inside of devices, even between them: no loss above 1."""
    inputs = even(make_inputs, num_ffn=E)
    probs = jnp.broadcast_to(jnp.asarray([0.5, 0, 0, 0.5, 0, 0]), (2, 12, E))
    ids = jnp.broadcast_to(jnp.asarray([0, 3], jnp.int32), (2, 12, 2))
    plan = RoutingPlan(ids, jnp.ones((2, 12, 2)), probs)
    assert float(loss("deepseek_device", inputs, plan, devices=2)) == pytest.approx(1, rel=1e-5)
    assert float(loss("deepseek_expert", inputs, plan)) == pytest.approx(3, rel=1e-5)
    assert float(loss("deepseek_device", inputs, plan, devices=6)) == pytest.approx(3, rel=1e-5)


def test_information_is_greatest_for_sure_and_balanced_routing(make_inputs):
    inputs = even(make_inputs)
    ids = cyclic(inputs)[..., :1]
    plan = RoutingPlan(ids, jnp.ones((2, 12, 1)), jax.nn.one_hot(ids[..., 0], E))
    assert float(loss("mutual_information", inputs, plan)) == pytest.approx(-math.log(E), rel=1e-5)
    # Even tokens are of one modality and use even experts: M = 2 modalities, nothing shared.
    assert float(loss("modality_information", inputs, plan)) == pytest.approx(
        -math.log(2), rel=1e-5
    )


def test_entropies_keep_to_their_modality(make_inputs):
    inputs = make_inputs()
    text = np.asarray((inputs.modality == 0) & inputs.valid)
    for name, options in (("entropy_local", {}), ("entropy_global", {"min_experts": 20.0})):
        gradient = jax.grad(
            lambda x, name=name, options=options: loss(
                name,
                inputs,
                top_k(dataclasses.replace(inputs, logits=x)),
                modality=0,
                **options,
            )
        )(inputs.logits)
        assert (np.asarray(gradient)[~text] == 0).all()
        assert np.abs(np.asarray(gradient)[text]).max() > 1e-3


def test_global_entropy_is_at_rest_above_its_threshold(make_inputs):
    inputs = make_inputs()
    mean = np.asarray(softmax(inputs.logits, inputs.may_choose()))
    mean = mean[np.asarray((inputs.modality == 0) & inputs.valid)].mean(axis=0)
    used = math.exp(-(mean * np.log(mean)).sum())
    plan = top_k(inputs)
    for factor, positive in ((0.98, False), (1.02, True)):
        options = {"modality": 0, "min_experts": used * factor}
        value = float(loss("entropy_global", inputs, plan, **options))
        assert (value > 0) is positive
    assert value == pytest.approx(math.log(1.02), rel=1e-3)


def test_a_modality_is_balanced_among_its_own(make_inputs):
    table = jnp.asarray([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]], bool)
    inputs = even(make_inputs)
    inputs = dataclasses.replace(inputs, allowed=allowed_experts(table, inputs.modality))
    may = inputs.may_choose().astype(jnp.float32)
    # All choose each allowed expert as often: two for text, and two of four in turn.
    pairs = np.asarray([[0, 1], [2, 3], [0, 1], [4, 5]] * 3)
    ids = jnp.asarray(np.broadcast_to(pairs, (2, 12, 2)), jnp.int32)
    plan = RoutingPlan(ids, jnp.ones((2, 12, 2)), may / may.sum(axis=-1, keepdims=True))
    assert float(loss("switch_per_modality", inputs, plan)) == pytest.approx(2, rel=1e-5)
    assert float(loss("switch", inputs, plan)) > 1.05


@pytest.mark.parametrize("name", list(ROUTER_LOSSES))
def test_microbatches_add_up(make_inputs, name):
    """The sums of two halves are those of the whole, at the granularity of each loss."""
    inputs = make_inputs(rng=jax.random.key(0))
    entry = ROUTER_LOSSES.get(name)
    plan = top_k(inputs, noise="gaussian")
    half = lambda tree, i: jax.tree.map(
        lambda x: x[i : i + 1] if getattr(x, "ndim", 0) >= 2 else x, tree
    )
    parts = [entry.statistics(half(inputs, i), half(plan, i)) for i in (0, 1)]
    whole = entry.statistics(inputs, plan)
    total = jax.tree.map(jnp.add, *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), total, whole)
    np.testing.assert_allclose(entry.value(total), entry.value(whole), rtol=1e-5, atol=1e-6)
    # Nothing at all: a value of zero and no NaN.
    nothing = jax.tree.map(jnp.zeros_like, whole)
    assert float(entry.value(nothing)) == 0


def test_losses_are_about_choices_before_the_capacity(make_inputs):
    inputs = make_inputs(logits=make_inputs().logits.at[..., 0].add(4.0))
    plan = top_k(inputs)
    limited = limit_capacity(plan, inputs, 2, "order")
    for name in ("switch", "gshard", "heterogeneous", "switch_per_modality", "deepseek_device"):
        assert loss(name, inputs, plan) == loss(name, inputs, limited)


def test_options_are_those_of_both_functions():
    assert ROUTER_LOSSES.get("entropy_global").defaults() == {"min_experts": 0.0, "modality": -1}
    assert ROUTER_LOSSES.get("switch").defaults() == {"per": "batch"}
