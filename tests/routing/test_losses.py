"""Losses: uniform and collapsed values, minima, gradients, padding, sums over microbatches."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.routing import ROUTER_LOSSES, ROUTERS, RoutingPlan, limit_capacity
from moejax.routing.perturb import perturb

E, K = 6, 2
top_k = ROUTERS.get("top_k").function


def loss(inputs, plan, *, name, **options):
    entry = ROUTER_LOSSES.get(name)
    return entry.value(entry.statistics(inputs, plan, **options), **options)


@pytest.fixture
def value(run):
    """``value(name, inputs, plan, **options)`` of a loss."""
    return lambda name, inputs, plan, **options: float(
        run(loss, inputs, plan, name=name, **options)
    )


def cyclic(inputs):
    """Token i chooses experts i and i + 1: all used alike."""
    first = np.arange(12)[None, :, None] + np.arange(K)
    ids = np.where(inputs.valid[..., None], first % E, E)
    return np.broadcast_to(ids, (2, 12, K)).astype(np.int32)


def plan_of(ids, probs):
    ids, probs = np.asarray(ids, np.int32), np.asarray(probs, np.float32)
    wins = {"wins_se": probs.sum(axis=1)}
    return RoutingPlan(ids, np.ones(ids.shape, np.float32), probs, statistics=wins)


def uniform_plan(inputs):
    """Uniform probabilities, choices balanced in groups and in halves of six tokens."""
    return plan_of(cyclic(inputs), np.full((2, 12, E), 1 / E) * inputs.valid[..., None])


def collapsed_plan(inputs):
    """Everything on expert 0; there is a second choice that nobody makes."""
    ids = np.full((2, 12, K), E)
    ids[..., 0] = np.where(inputs.valid, 0, E)
    return plan_of(ids, np.eye(E + 1)[ids[..., 0]][..., :E])


def even(make_inputs, **fields):
    """Both modalities in each group, no padding, logits of zero."""
    inputs = make_inputs(padding=0, logits=np.zeros((2, 12, E), np.float32))
    modality = np.tile(np.int32([0, 1]), (2, 6))
    inputs = dataclasses.replace(inputs, modality=modality, sequences=2, num_ffn=4)
    return dataclasses.replace(inputs, **fields)


# name -> (options, at uniform, all on one expert)
VALUES = {
    "switch": ({}, 1, E),
    "switch_group": ({"per": "group"}, 1, E),
    "deepseek_expert": ({}, 1, E),
    "deepseek_device": ({"devices": 2}, 1, 3),
    # It counts the K largest probabilities, whatever was chosen.
    "deepseek_sequence": ({}, 1, E / K),
    "gshard": ({}, 1, E),
    "gshard_all": ({"counted": "all"}, K, E),
    "gshard_batch": ({"per": "batch"}, 1, E),
    # Plans here have weights of 1: K / E for each expert, or 1 for one.
    "gshard_weighted": ({"counted": "all", "weighted": True}, K * K, E),
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
def test_value_at_uniform_and_when_collapsed(value, make_inputs, case):
    options, uniform, collapsed = VALUES[case]
    name, inputs = registered(case), even(make_inputs)
    at = lambda plan: value(name, inputs, plan, **options)
    assert at(uniform_plan(inputs)) == pytest.approx(uniform, abs=1e-5)
    assert at(collapsed_plan(inputs)) == pytest.approx(collapsed, abs=1e-5)


def test_every_loss_is_tested_for_its_values():
    by_hand = {"z", "causal_router", "contrastive"}
    assert {registered(case) for case in VALUES} | by_hand == set(ROUTER_LOSSES)


def test_z_by_hand(value, run, make_inputs):
    inputs = even(make_inputs)
    plan = uniform_plan(inputs)
    assert value("z", inputs, plan) == pytest.approx(math.log(E) ** 2, rel=1e-5)
    moved = dataclasses.replace(inputs, logits=inputs.logits - np.float32(math.log(E)))
    assert value("z", moved, plan) == pytest.approx(0, abs=1e-6)
    few = dataclasses.replace(inputs, allowed=np.broadcast_to(np.arange(E) < 2, (2, 12, E)))
    assert value("z", few, plan) == pytest.approx(math.log(2) ** 2, rel=1e-5)
    # Larger logits are made smaller, in tokens that choose and in no others.
    padded = make_inputs()
    of_logits = lambda x: loss(dataclasses.replace(padded, logits=x), plan, name="z")
    gradient = run(jax.grad(of_logits), padded.logits + 3)
    assert (gradient[padded.valid] > 0).all() and (gradient[~padded.valid] == 0).all()


def test_causal_router_by_hand(value, make_inputs):
    plan = uniform_plan(make_inputs(padding=0))
    chosen = (plan.expert_ids[..., None] == np.arange(E)).any(axis=2)
    with_logits = lambda logits: even(make_inputs, causal_logits=np.float32(logits))
    at = lambda logits: value("causal_router", with_logits(logits), plan)
    assert at(np.zeros((2, 12, E))) == pytest.approx(math.log(2), rel=1e-5)
    assert at(np.where(chosen, 20, -20)) < 1e-6
    assert at(np.where(chosen, -20, 20)) == pytest.approx(20, rel=1e-5)
    for other in ({"train": False}, {"causal_logits": None}):
        assert value("causal_router", even(make_inputs, **other), plan) == 0


def test_causal_router_does_not_reach_the_main_router(run, make_inputs):
    inputs = make_inputs()
    expert_choice = ROUTERS.get("expert_choice").function

    def of(logits, causal_logits):
        moved = dataclasses.replace(inputs, logits=logits, causal_logits=causal_logits)
        plan = expert_choice(moved)
        return loss(moved, plan, name="causal_router"), plan.expert_ids < E

    both = jax.grad(of, (0, 1), has_aux=True)
    (main, causal), taken = run(both, inputs.logits, inputs.causal_logits)
    np.testing.assert_array_equal(main, 0)
    assert (causal[taken] < 0).all()
    assert (causal[inputs.valid][~taken[inputs.valid]] > 0).all()


BALANCING = ("switch", "gshard", "deepseek_sequence", "importance", "load")


@pytest.mark.parametrize("name", BALANCING)
def test_balance_pushes_the_crowded_expert_down(run, make_inputs, name):
    inputs = make_inputs(rng=jax.random.key(0))
    inputs.logits[..., 2] += 1.5
    inputs = jax.tree.map(jnp.asarray, inputs)

    def of(logits):
        moved = dataclasses.replace(inputs, logits=logits)
        return loss(moved, top_k(moved, noise="gaussian", noise_scale=6.0), name=name)

    gradient = run(jax.grad(of), inputs.logits)
    assert np.isfinite(gradient).all()
    by_expert = gradient.sum(axis=(0, 1))
    assert by_expert[2] > 0 and by_expert.argmax() == 2
    assert (gradient[~inputs.valid] == 0).all()


def test_load_by_hand(value, run, make_inputs):
    """``1 - Phi((threshold - logit) / sigma)`` with the threshold of the noisy logits."""
    inputs = make_inputs(rng=jax.random.key(0))
    noisy = np.sort(run(perturb, inputs, kind="gaussian", scale=3.0), axis=-1)
    sigma = 3.0 / E
    z = (noisy[..., -K, None] - inputs.logits) / sigma
    p_win = np.vectorize(lambda v: 0.5 * math.erfc(v / math.sqrt(2)))(z)
    use = (p_win * inputs.valid[..., None]).sum(axis=1)
    expected = (use.var(axis=-1) / use.mean(axis=-1) ** 2).mean()
    plan = run(top_k, inputs, noise="gaussian", noise_scale=3.0)
    assert value("load", inputs, plan) == pytest.approx(expected, rel=1e-4)
    assert value("load", inputs, run(top_k, inputs)) == 0
    # Experts that have no rival win all tokens that may choose them.
    few = dataclasses.replace(inputs, allowed=np.broadcast_to(np.arange(E) < K, (2, 12, E)))
    plan = run(top_k, few, noise="gaussian", noise_scale=3.0)
    wins = np.outer([12, 9], np.arange(E) < K)
    np.testing.assert_array_equal(plan.statistics["wins_se"], wins)


def test_deepseek_sequence_counts_without_the_bias(value, run, make_inputs):
    plain = make_inputs(padding=0, sequences=2)
    biased = dataclasses.replace(plain, select_bias=np.float32([0, 0, 0, 0, 0, 9]))
    a, b = (run(top_k, i, normalise="sigmoid", renormalise=True) for i in (plain, biased))
    assert (a.expert_ids != b.expert_ids).any()
    assert value("deepseek_sequence", plain, a) == value("deepseek_sequence", plain, b)
    assert value("switch", plain, a) != value("switch", plain, b)
    # By hand: four sequences of six tokens.
    expected = 0.0
    for sequence in a.probs.reshape(4, 6, E):
        counts = np.zeros(E)
        for token in sequence:
            counts[np.argsort(-token)[:K]] += 1
        expected += E * (counts / (6 * K) * sequence.mean(axis=0)).sum() / 4
    assert value("deepseek_sequence", plain, a) == pytest.approx(expected, rel=1e-5)


def test_experts_without_weights_may_be_used_more(value, make_inputs):
    """The loss falls when a choice moves from an expert with weights to one without."""
    inputs = even(make_inputs)
    plan = uniform_plan(inputs)
    moved = plan_of(np.where(plan.expert_ids == 0, 4, plan.expert_ids), plan.probs)
    at = lambda plan, tau: value("heterogeneous", inputs, plan, tau=tau)
    assert at(moved, 0.75) < at(plan, 0.75)
    assert at(moved, 1.0) == pytest.approx(at(plan, 1.0), rel=1e-5)


def test_devices_are_groups_of_neighbours(value, make_inputs):
    """Uneven inside of devices, even between them: no loss above 1."""
    inputs = even(make_inputs, num_ffn=E)
    probs = np.broadcast_to([0.5, 0, 0, 0, 0.5, 0], (2, 12, E))
    plan = plan_of(np.broadcast_to([0, 4], (2, 12, 2)), probs)
    at = lambda devices: value("deepseek_device", inputs, plan, devices=devices)
    assert at(2) == pytest.approx(1, rel=1e-5)
    assert value("deepseek_expert", inputs, plan) == pytest.approx(3, rel=1e-5)
    assert at(6) == pytest.approx(3, rel=1e-5)


def test_information_is_greatest_for_sure_and_balanced_routing(value, make_inputs):
    inputs = even(make_inputs)
    ids = cyclic(inputs)
    plan = plan_of(ids, np.eye(E)[ids[..., 0]])
    assert value("mutual_information", inputs, plan) == pytest.approx(-math.log(E), rel=1e-5)
    # Even tokens are of one modality and use even experts: M = 2 modalities, nothing shared.
    assert value("modality_information", inputs, plan) == pytest.approx(-math.log(2), rel=1e-5)
    # Each modality counts the same, however few its tokens.
    inputs.modality[:] = [1] * 3 + [0] * 9
    ids = np.repeat(inputs.modality[..., None], K, axis=-1)
    plan = plan_of(ids, np.eye(E)[ids[..., 0]])
    assert value("modality_information", inputs, plan) == pytest.approx(-math.log(2), rel=1e-5)


def test_entropies_keep_to_their_modality(run, make_inputs):
    inputs = make_inputs()
    text = (inputs.modality == 0) & inputs.valid

    def of(logits, **options):
        moved = dataclasses.replace(inputs, logits=logits)
        return loss(moved, top_k(moved), modality=0, **options)

    for options in ({"name": "entropy_local"}, {"name": "entropy_global", "min_experts": 20.0}):
        gradient = run(jax.grad(of), inputs.logits, **options)
        assert (gradient[~text] == 0).all()
        assert np.abs(gradient[text]).max() > 1e-3


def test_global_entropy_is_at_rest_above_its_threshold(value, run, make_inputs):
    inputs = make_inputs()
    plan = run(top_k, inputs)
    mean = plan.probs[(inputs.modality == 0) & inputs.valid].mean(axis=0)
    used = math.exp(-(mean * np.log(mean)).sum())
    at = lambda least: value("entropy_global", inputs, plan, modality=0, min_experts=least)
    assert at(used * 0.98) == 0
    assert at(used * 1.02) == pytest.approx(math.log(1.02), rel=1e-3)


def test_global_entropy_has_a_threshold_for_each_modality(value, run, make_inputs):
    inputs = make_inputs()
    plan = run(top_k, inputs)
    each = lambda *least: value("entropy_global", inputs, plan, min_experts_each=least)
    one = lambda modality: value(
        "entropy_global", inputs, plan, modality=modality, min_experts=20.0
    )
    assert each(20.0, 0.0) == pytest.approx(one(0)) and each(0.0, 20.0) == pytest.approx(one(1))
    assert each(20.0, 20.0) == pytest.approx(one(0) + one(1))
    assert one(0) > 0.1 and one(1) > 0.1 and abs(one(0) - one(1)) > 1e-3
    with pytest.raises(UserError, match="entropy_global.min_experts_each"):
        each(20.0)


def test_a_modality_is_balanced_among_its_own(value, make_inputs):
    table = np.asarray([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]], bool)
    inputs = even(make_inputs)
    may = table[inputs.modality]
    inputs = dataclasses.replace(inputs, allowed=may)
    # All choose each allowed expert as often: two for text, and two of four in turn.
    ids = np.broadcast_to([[0, 1], [2, 3], [0, 1], [4, 5]] * 3, (2, 12, 2))
    plan = plan_of(ids, may / may.sum(axis=-1, keepdims=True))
    assert value("switch_per_modality", inputs, plan) == pytest.approx(2, rel=1e-5)
    assert value("switch", inputs, plan) > 1.05


def all_sums(inputs, plan):
    return {name: ROUTER_LOSSES.get(name).statistics(inputs, plan) for name in ROUTER_LOSSES}


def all_values(sums):
    return {name: ROUTER_LOSSES.get(name).value(sums[name]) for name in ROUTER_LOSSES}


def test_microbatches_add_up(run, make_inputs):
    """The sums of two halves are those of the whole, at the granularity of each loss."""
    inputs = make_inputs(rng=jax.random.key(0))
    plan = run(top_k, inputs, noise="gaussian")
    half = lambda tree, i: jax.tree.map(
        lambda x: x[i : i + 1] if np.ndim(x) >= 2 and len(x) == 2 else x, tree
    )
    parts = [run(all_sums, half(inputs, i), half(plan, i)) for i in (0, 1)]
    whole = run(all_sums, inputs, plan)
    total = jax.tree.map(np.add, *parts)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, total, whole)
    jax.tree.map(close, run(all_values, total), run(all_values, whole))
    # Nothing at all: a value of zero and no NaN.
    nothing = run(all_values, jax.tree.map(np.zeros_like, whole))
    assert all(value == 0 for value in nothing.values())


def test_losses_are_about_choices_before_the_capacity(run, make_inputs):
    inputs = make_inputs()
    inputs.logits[..., 0] += 4
    plan = run(top_k, inputs)
    limited = run(limit_capacity, plan, inputs, capacity=2, policy="order")
    assert (limited.expert_ids != plan.expert_ids).any()
    sums = (run(all_sums, inputs, p) for p in (plan, limited))
    jax.tree.map(np.testing.assert_array_equal, *sums)


def test_options_are_those_of_both_functions():
    assert ROUTER_LOSSES.get("entropy_global").defaults() == {
        "min_experts": 0.0,
        "min_experts_each": (),
        "modality": -1,
    }
    assert ROUTER_LOSSES.get("switch").defaults() == {"per": "batch"}
