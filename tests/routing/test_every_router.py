"""What holds for every registered router; a new one is tested here by being registered."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import (
    ROUTER_LOSSES,
    ROUTERS,
    RoutingPlan,
    SoftPlan,
    check_router,
    limit_capacity,
    router,
    routing_statistics,
)

E = 6
# Deals tokens out by lot, or by their place where there is no key.
BY_PLACE = {"random_partition"}
TABLE = np.asarray([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]], bool)


@pytest.fixture(params=list(ROUTERS))
def name(request):
    return request.param


@pytest.fixture
def route(run):
    return lambda name, inputs, **options: run(ROUTERS.get(name).function, inputs, **options)


def is_sparse(name):
    return name != "soft"


def uses_logits(name, route, make_inputs):
    """Whether the plan depends on them."""
    inputs = make_inputs()
    other = dataclasses.replace(inputs, logits=make_inputs(1).logits)
    a, b = (jax.tree.leaves(route(name, i)) for i in (inputs, other))
    return any((x != y).any() for x, y in zip(a, b, strict=True))


def variants(make_inputs):
    """Inputs with and without noise, a table of allowed experts, a bias, evaluation."""
    inputs = make_inputs()
    yield inputs
    yield dataclasses.replace(inputs, rng=jax.random.key(3))
    yield dataclasses.replace(
        inputs,
        allowed=TABLE[inputs.modality],
        select_bias=np.linspace(-0.5, 0.5, E, dtype=np.float32),
    )
    yield dataclasses.replace(inputs, train=False)


def by_token(tree, index):
    """``x[:, index]`` of everything that has tokens."""
    return jax.tree.map(lambda x: x[:, index] if np.shape(x)[:2] == (2, 12) else x, tree)


def by_expert(plan):
    """[s, n, e] weights (and for soft routing dispatch weights beside them)."""
    if isinstance(plan, SoftPlan):
        return np.concatenate([plan.dispatch, plan.combine], axis=-1)
    one_hot = plan.expert_ids[..., None] == np.arange(E)
    return (one_hot * plan.weights[..., None]).sum(axis=2)


def test_plan_is_well_formed(name, route, make_inputs):
    for inputs in variants(make_inputs):
        plan = route(name, inputs)
        may = np.asarray(inputs.may_choose())
        if not is_sparse(name):
            assert isinstance(plan, SoftPlan)
            continue
        ids, weights, probs = plan.expert_ids, plan.weights, plan.probs
        s, n, k = ids.shape
        assert probs.shape == (s, n, E) and weights.shape == (s, n, k)
        assert ids.dtype == np.int32 and weights.dtype == np.float32 == probs.dtype
        assert ((ids >= 0) & (ids <= E)).all()
        assert ((weights == 0) | (ids < E)).all() and (weights >= 0).all()
        for a in range(s):
            for b in range(n):
                chosen = ids[a, b][ids[a, b] < E]
                assert len(set(chosen)) == len(chosen), "an expert twice"
                assert may[a, b][chosen].all(), "an expert that is not allowed"
        # A distribution over what may be chosen, nothing for padding.
        np.testing.assert_allclose(probs.sum(axis=-1), may.any(axis=-1), atol=1e-6)
        assert (probs[~may] == 0).all()
        if plan.max_choices is not None:
            assert (ids < E).sum(axis=(1, 2)).max() <= plan.max_choices


def all_sums(inputs, plan):
    losses = [ROUTER_LOSSES.get(loss).statistics(inputs, plan) for loss in ROUTER_LOSSES]
    return [routing_statistics(inputs, plan, 2), *losses]


def test_padding_takes_no_part(name, route, run, make_inputs):
    """Whatever it holds: the others route alike, it routes nowhere, and counts in no sum."""
    for inputs in variants(make_inputs):
        if inputs.rng is not None:
            continue
        pad = ~inputs.valid[..., None]
        other = dataclasses.replace(
            inputs,
            logits=np.where(pad, np.float32(50), inputs.logits),
            causal_logits=np.where(pad, np.float32(50), inputs.causal_logits),
            tokens=np.where(pad, np.float32(50), inputs.tokens),
            modality=np.where(inputs.valid, inputs.modality, 1 - inputs.modality),
            token_ids=np.where(inputs.valid, inputs.token_ids, 7),
        )
        plans = route(name, inputs), route(name, other)
        jax.tree.map(np.testing.assert_array_equal, *plans)
        if is_sparse(name):
            assert (plans[1].expert_ids[~inputs.valid] == E).all()
            if inputs.allowed is None and inputs.train:
                sums = [run(all_sums, *pair) for pair in zip((inputs, other), plans, strict=True)]
                jax.tree.map(np.testing.assert_array_equal, *sums)
        else:
            assert (plans[1].combine[~inputs.valid] == 0).all()
            assert (plans[1].dispatch[~inputs.valid] == 0).all()


def test_padding_may_as_well_not_be_there(name, route, make_inputs):
    inputs = make_inputs()
    inputs.valid[:, 9:] = False
    plan = by_token(route(name, inputs), slice(9))
    expected = route(name, by_token(inputs, slice(9)))
    for got, want in zip(*map(jax.tree.leaves, (plan, expected)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_groups_do_not_see_each_other(name, route, make_inputs):
    inputs, other = make_inputs(), make_inputs()
    other.logits[0] = make_inputs(1).logits[0]
    second = lambda plan: jax.tree.map(lambda x: x[1], plan)
    jax.tree.map(
        np.testing.assert_array_equal, second(route(name, inputs)), second(route(name, other))
    )


def test_permuting_experts_permutes_the_choice(name, route, make_inputs):
    """Weights by expert follow the columns of the logits."""
    inputs = make_inputs()
    if not uses_logits(name, route, make_inputs):
        pytest.skip("no logits in it")
    order = np.asarray([3, 0, 5, 1, 4, 2])
    moved = dataclasses.replace(inputs, logits=inputs.logits[..., order])
    got, want = by_expert(route(name, moved)), by_expert(route(name, inputs))
    np.testing.assert_allclose(got, want[:, :, order], atol=1e-6)


def test_permuting_tokens_permutes_the_plan(name, route, make_inputs):
    inputs = make_inputs(padding=0)
    if name in BY_PLACE:
        pytest.skip("by place")
    order = np.random.default_rng(0).permutation(12)
    got = by_expert(route(name, by_token(inputs, order)))
    np.testing.assert_allclose(got, by_expert(route(name, inputs))[:, order], atol=1e-6)


def test_equal_experts_are_one_expert(name, route, make_inputs):
    """Where weights sum to 1, y = sum_k w_k f(x) = f(x)."""
    options = {"renormalise": True} if "renormalise" in ROUTERS.get(name).defaults() else {}
    inputs = make_inputs()
    if name == "expert_choice":
        pytest.skip("weights of a token have no fixed sum")
    plan = route(name, inputs, **options)
    total = by_expert(plan) if is_sparse(name) else plan.combine.sum(axis=-1)
    chosen = total.sum(axis=-1) > 0
    np.testing.assert_allclose(total.sum(axis=-1)[chosen], 1, rtol=1e-6)
    assert (chosen == inputs.valid).mean() > 0.9


def test_gradient_reaches_logits_and_no_bias(name, route, run, make_inputs):
    bias = np.linspace(-0.1, 0.1, E, dtype=np.float32)
    inputs = make_inputs(select_bias=bias)
    if not uses_logits(name, route, make_inputs):
        pytest.skip("no logits in it")
    readout = np.random.default_rng(9).normal(size=(2, 12, E))

    def output(logits, bias):
        moved = dataclasses.replace(inputs, logits=logits, select_bias=bias)
        plan = ROUTERS.get(name).function(moved)
        if isinstance(plan, SoftPlan):
            return (plan.combine[..., 0] * readout).sum()
        one_hot = jax.nn.one_hot(plan.expert_ids, E)
        return (jnp.einsum("snk,snke->sne", plan.weights, one_hot) * readout).sum()

    of_logits, of_bias = run(jax.grad(output, (0, 1)), inputs.logits, bias)
    assert np.isfinite(of_logits).all() and np.abs(of_logits[0]).max() > 1e-3
    np.testing.assert_array_equal(of_logits[~inputs.valid], 0)
    np.testing.assert_array_equal(of_bias, 0)


def test_causal_routers_look_at_one_token(name, route, make_inputs):
    """The others do compare tokens, but under a causal rule without training."""
    facts = ROUTERS.get(name)
    rest = np.ones((2, 12), bool)
    rest[0, 5] = False

    def same(train, **options):
        first, second = make_inputs(train=train), make_inputs(train=train)
        second.logits[0, 5] = [9, 8, 7, 6, 5, 4]
        a, b = (by_expert(route(name, i, **options)) for i in (first, second))
        return bool((a[rest] == b[rest]).all())

    assert same(True) is facts.causal
    if facts.causal:
        assert same(False)
    for rule in facts.causal_rules:
        assert same(True, causal_rule=rule) is False
        assert same(False, causal_rule=rule) is (rule not in ("none", "aux_count"))


def test_evaluation_draws_nothing(name, route, make_inputs):
    noisy = {"noise": "logistic"} if "noise" in ROUTERS.get(name).defaults() else {}
    inputs = make_inputs(train=False)
    with_key = dataclasses.replace(inputs, rng=jax.random.key(1))
    if name not in BY_PLACE:
        jax.tree.map(
            np.testing.assert_array_equal,
            route(name, with_key, **noisy),
            route(name, inputs),
        )
    if noisy:
        moved = route(name, make_inputs(rng=jax.random.key(1)), **noisy)
        assert (by_expert(moved) != by_expert(route(name, make_inputs()))).any()


@pytest.mark.parametrize("policy", ["order", "recycle"])
def test_capacity_conserves(name, policy, route, run, make_inputs):
    """Choices are kept or dropped, nobody has more than its places, enough places drop none."""
    if not is_sparse(name):
        pytest.skip("soft routing drops nothing")
    inputs = make_inputs()
    # Plans of equal shape share one program.
    plan = dataclasses.replace(route(name, inputs), max_choices=None)
    limited = run(limit_capacity, plan, inputs, capacity=2, policy=policy)
    before, after = plan.expert_ids, limited.expert_ids
    per_expert = (after[..., None] == np.arange(E)).sum(axis=(1, 2))
    assert per_expert.max() <= 2
    wanted = (before[..., None] == np.arange(E)).sum(axis=(1, 2))
    if policy != "recycle":
        np.testing.assert_array_equal(per_expert, np.minimum(wanted, 2))
    assert ((limited.weights > 0) <= (after < E)).all()
    np.testing.assert_array_equal(limited.chosen_ids, before)
    roomy = run(limit_capacity, plan, inputs, capacity=24, policy=policy)
    np.testing.assert_array_equal(roomy.expert_ids, plan.expert_ids)
    np.testing.assert_array_equal(roomy.weights, plan.weights)


def test_defaults_pass_their_own_check(name):
    for rule in ROUTERS.get(name).causal_rules or ("",):
        options = {"causal_rule": rule} if rule else {}
        check_router(name, options, E, causal_model=bool(rule))


def test_a_new_router_is_one_short_function(route, run, make_inputs):
    """Fifteen lines, registration and all: a token goes to the expert of its largest |logit|."""

    @router("loudest_of_test")
    def loudest(inputs, *, power: float = 1.0):
        size = jnp.where(inputs.may_choose(), jnp.abs(inputs.logits) ** power, 0)
        probs = size / jnp.maximum(size.sum(axis=-1, keepdims=True), 1e-9)
        best = jnp.where(inputs.valid, probs.argmax(axis=-1), inputs.num_experts)[..., None]
        return RoutingPlan(best, probs.max(axis=-1, keepdims=True), probs)

    try:
        check_router("loudest_of_test", {"power": 2}, E, causal_model=True)
        test_plan_is_well_formed("loudest_of_test", route, make_inputs)
        test_padding_takes_no_part("loudest_of_test", route, run, make_inputs)
        test_permuting_experts_permutes_the_choice("loudest_of_test", route, make_inputs)
        test_gradient_reaches_logits_and_no_bias("loudest_of_test", route, run, make_inputs)
    finally:
        ROUTERS._entries.pop("loudest_of_test")
