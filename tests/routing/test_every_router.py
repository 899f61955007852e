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
    allowed_experts,
    check_router,
    limit_capacity,
    routing_statistics,
)

E = 6
# Deals tokens out by lot, or by their place where there is no key.
BY_PLACE = {"random_partition"}


@pytest.fixture(params=list(ROUTERS))
def name(request):
    return request.param


def route(name, inputs, **options):
    return ROUTERS.get(name).function(inputs, **options)


def is_sparse(name):
    return name != "soft"


def uses_logits(name, make_inputs):
    """Whether the plan depends on them."""
    inputs = make_inputs()
    other = dataclasses.replace(inputs, logits=make_inputs(1).logits)
    a, b = (jax.tree.leaves(route(name, i)) for i in (inputs, other))
    return any(bool((x != y).any()) for x, y in zip(a, b, strict=True))


def variants(make_inputs):
    """Inputs with and without noise, tables of allowed experts, a bias."""
    inputs = make_inputs()
    table = jnp.asarray([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]], bool)
    yield inputs
    yield dataclasses.replace(inputs, rng=jax.random.key(3))
    yield dataclasses.replace(
        inputs,
        allowed=allowed_experts(table, inputs.modality),
        select_bias=jnp.linspace(-0.5, 0.5, E),
    )
    yield dataclasses.replace(inputs, train=False)


def test_plan_is_well_formed(name, make_inputs):
    for inputs in variants(make_inputs):
        plan = route(name, inputs)
        may = np.asarray(inputs.may_choose())
        if not is_sparse(name):
            assert isinstance(plan, SoftPlan)
            continue
        ids, weights, probs = map(np.asarray, (plan.expert_ids, plan.weights, plan.probs))
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


def test_padding_takes_no_part(name, make_inputs):
    """Whatever its logits: the others route alike, and it routes nowhere."""
    for inputs in variants(make_inputs):
        if inputs.rng is not None:
            continue
        pad = ~inputs.valid[..., None]
        other = dataclasses.replace(
            inputs,
            logits=jnp.where(pad, 50.0, inputs.logits),
            causal_logits=jnp.where(pad, 50.0, inputs.causal_logits),
            modality=jnp.where(inputs.valid, inputs.modality, 1 - inputs.modality),
            token_ids=jnp.where(inputs.valid, inputs.token_ids, 7),
        )
        plans = route(name, inputs), route(name, other)
        if is_sparse(name):
            assert (np.asarray(plans[1].expert_ids)[~np.asarray(inputs.valid)] == E).all()
            sums = [
                [routing_statistics(i, p, 2)]
                + [ROUTER_LOSSES.get(loss).statistics(i, p) for loss in ROUTER_LOSSES]
                for i, p in zip((inputs, other), plans, strict=True)
            ]
            jax.tree.map(np.testing.assert_array_equal, *sums)
        else:
            assert (np.asarray(plans[1].combine)[~np.asarray(inputs.valid)] == 0).all()
            assert (np.asarray(plans[1].dispatch)[~np.asarray(inputs.valid)] == 0).all()
        jax.tree.map(np.testing.assert_array_equal, *plans)


def test_padding_may_as_well_not_be_there(name, make_inputs):
    inputs = make_inputs()
    inputs = dataclasses.replace(inputs, valid=inputs.valid.at[:, 9:].set(False))
    kept = lambda x: x[:, :9] if getattr(x, "ndim", 0) >= 2 else x
    short = jax.tree.map(kept, inputs)
    plan, expected = jax.tree.map(kept, route(name, inputs)), route(name, short)
    for got, want in zip(*map(jax.tree.leaves, (plan, expected)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_groups_do_not_see_each_other(name, make_inputs):
    inputs = make_inputs()
    other = dataclasses.replace(inputs, logits=inputs.logits.at[0].set(make_inputs(1).logits[0]))
    second = lambda plan: jax.tree.map(lambda x: x[1], plan)
    jax.tree.map(
        np.testing.assert_array_equal, second(route(name, inputs)), second(route(name, other))
    )


def test_permuting_experts_permutes_the_choice(name, make_inputs):
    """Weights by expert follow the columns of the logits."""
    inputs = make_inputs()
    if not uses_logits(name, make_inputs):
        pytest.skip("no logits in it")
    order = np.asarray([3, 0, 5, 1, 4, 2])
    moved = dataclasses.replace(
        inputs,
        logits=inputs.logits[..., order],
        causal_logits=inputs.causal_logits[..., order],
    )
    got, want = by_expert(route(name, moved)), by_expert(route(name, inputs))
    np.testing.assert_allclose(got, want[:, :, order], atol=1e-6)


def test_permuting_tokens_permutes_the_plan(name, make_inputs):
    inputs = make_inputs(padding=0)
    if name in BY_PLACE:
        pytest.skip("by place")
    order = np.random.default_rng(0).permutation(12)
    moved = jax.tree.map(lambda x: x[:, order] if getattr(x, "ndim", 0) >= 2 else x, inputs)
    got, want = by_expert(route(name, moved)), by_expert(route(name, inputs))
    np.testing.assert_allclose(got, want[:, order], atol=1e-6)


def by_expert(plan):
    """[s, n, e] weights (and for soft routing dispatch weights as well)."""
    if isinstance(plan, SoftPlan):
        return np.concatenate([plan.dispatch, plan.combine], axis=-1)
    one_hot = np.asarray(plan.expert_ids)[..., None] == np.arange(E)
    return (one_hot * np.asarray(plan.weights)[..., None]).sum(axis=2)


def test_equal_experts_are_one_expert(name, make_inputs):
    """Where weights sum to 1, y = sum_k w_k f(x) = f(x)."""
    options = {"renormalise": True} if "renormalise" in ROUTERS.get(name).defaults() else {}
    inputs = make_inputs()
    if name == "expert_choice":
        pytest.skip("weights of a token have no fixed sum")
    total = by_expert(route(name, inputs, **options))
    if not is_sparse(name):
        total = np.asarray(route(name, inputs).combine).sum(axis=-1)
    chosen = total.sum(axis=-1) > 0
    np.testing.assert_allclose(total.sum(axis=-1)[chosen], 1, rtol=1e-6)
    assert (chosen == np.asarray(inputs.valid)).mean() > 0.9


def test_gradient_reaches_logits_and_no_bias(name, make_inputs):
    inputs = make_inputs(select_bias=jnp.linspace(-0.1, 0.1, E))
    if not uses_logits(name, make_inputs):
        pytest.skip("no logits in it")
    readout = jax.random.normal(jax.random.key(9), (2, 12, E))

    def output(logits, bias):
        plan = route(name, dataclasses.replace(inputs, logits=logits, select_bias=bias))
        if isinstance(plan, SoftPlan):
            return (plan.combine[..., 0] * readout).sum()
        one_hot = jax.nn.one_hot(plan.expert_ids, E)
        return (jnp.einsum("snk,snke->sne", plan.weights, one_hot) * readout).sum()

    of_logits, of_bias = jax.grad(output, (0, 1))(inputs.logits, inputs.select_bias)
    assert np.isfinite(of_logits).all() and np.abs(of_logits[0]).max() > 1e-3
    np.testing.assert_array_equal(of_logits[~inputs.valid], 0)
    np.testing.assert_array_equal(of_bias, 0)


def test_causal_routers_look_at_one_token(name, make_inputs):
    """The others do compare tokens, but under a causal rule without training."""
    router = ROUTERS.get(name)
    inputs = make_inputs()
    changed = inputs.logits.at[0, 5].set(jnp.asarray([9.0, 8, 7, 6, 5, 4]))
    rest = np.ones((2, 12), bool)
    rest[0, 5] = False

    def same(train, **options):
        first = dataclasses.replace(inputs, train=train)
        second = dataclasses.replace(first, logits=changed)
        a, b = (by_expert(route(name, i, **options)) for i in (first, second))
        return bool((a[rest] == b[rest]).all())

    assert same(True) is router.causal
    for rule in router.causal_rules:
        assert same(True, causal_rule=rule) is False
        assert same(False, causal_rule=rule) is (rule != "none")
    if router.causal:
        assert same(False)


def test_evaluation_draws_nothing(name, make_inputs):
    options = {}
    defaults = ROUTERS.get(name).defaults()
    if "noise" in defaults:
        options["noise"] = "logistic"
    inputs = make_inputs(train=False)
    for key in (1, 2):
        with_key = dataclasses.replace(inputs, rng=jax.random.key(key))
        if name in BY_PLACE:
            continue
        jax.tree.map(
            np.testing.assert_array_equal,
            route(name, with_key, **options),
            route(name, inputs),
        )
    if options:
        training = dataclasses.replace(inputs, train=True)
        noisy = dataclasses.replace(training, rng=jax.random.key(1))
        assert (by_expert(route(name, noisy, **options)) != by_expert(route(name, training))).any()


@pytest.mark.parametrize("policy", ["order", "priority", "weight", "recycle"])
def test_capacity_conserves(name, policy, make_inputs):
    """Choices are kept or dropped, nobody has more than its places, enough places drop none."""
    if not is_sparse(name):
        pytest.skip("soft routing drops nothing")
    inputs = make_inputs()
    plan = route(name, inputs)
    limited = limit_capacity(plan, inputs, 2, policy)
    before, after = (np.asarray(ids) for ids in (plan.expert_ids, limited.expert_ids))
    per_expert = (after[..., None] == np.arange(E)).sum(axis=(1, 2))
    assert per_expert.max() <= 2
    wanted = (before[..., None] == np.arange(E)).sum(axis=(1, 2))
    if policy != "recycle":
        np.testing.assert_array_equal(per_expert, np.minimum(wanted, 2))
    assert ((np.asarray(limited.weights) > 0) <= (after < E)).all()
    np.testing.assert_array_equal(limited.chosen(), before)
    roomy = limit_capacity(plan, inputs, 24, policy)
    np.testing.assert_array_equal(roomy.expert_ids, plan.expert_ids)
    np.testing.assert_array_equal(roomy.weights, plan.weights)


def test_runs_under_jit_and_vmap(name, make_inputs):
    inputs = make_inputs()
    plain = route(name, inputs)
    compiled = jax.jit(lambda i: route(name, i))(inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, compiled)


def test_defaults_pass_their_own_check(name):
    router = ROUTERS.get(name)
    for rule in router.causal_rules or ("",):
        options = {"causal_rule": rule} if rule else {}
        check_router(name, options, E, causal_model=bool(rule))


def test_a_new_router_is_one_short_function(make_inputs):
    """Fifteen lines, registration and all: a token goes to the expert of its largest |logit|."""
    from moejax.routing import router

    @router("loudest_of_test")
    def loudest(inputs, *, power: float = 1.0):
        size = jnp.where(inputs.may_choose(), jnp.abs(inputs.logits) ** power, 0)
        probs = size / jnp.maximum(size.sum(axis=-1, keepdims=True), 1e-9)
        best = jnp.where(inputs.valid, probs.argmax(axis=-1), inputs.num_experts)[..., None]
        return RoutingPlan(best, probs.max(axis=-1, keepdims=True), probs)

    try:
        check_router("loudest_of_test", {"power": 2}, E, causal_model=True)
        for test in (test_plan_is_well_formed, test_padding_takes_no_part):
            test("loudest_of_test", make_inputs)
        test_permuting_experts_permutes_the_choice("loudest_of_test", make_inputs)
    finally:
        ROUTERS._entries.pop("loudest_of_test")
