"""ProMoE: raw cosines as weights, tokens without a condition apart, the contrastive loss."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import ROUTER_LOSSES, ROUTERS, SCORES, RoutingPlan, without_score
from moejax.routing.contrastive import contrast

E, D, N = 6, 5, 12
top_k = ROUTERS.get("top_k").function
expert_choice = ROUTERS.get("expert_choice").function
cosine = SCORES.get("cosine")
contrastive = ROUTER_LOSSES.get("contrastive")


def unit(values):
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def loss(inputs, plan, **options):
    return contrastive.value(contrastive.statistics(inputs, plan, **options), **options)


@pytest.fixture
def scored(make_inputs):
    """Inputs whose logits are the cosines of their tokens and prototypes."""
    inputs = make_inputs()
    prototypes = inputs.score_params["prototype_mde"][0].T
    return dataclasses.replace(inputs, logits=np.float32(unit(inputs.tokens) @ unit(prototypes).T))


def test_weights_are_the_raw_cosines(run, scored):
    """Negative ones too; as in the code they are not divided by anything."""
    plan = run(top_k, scored, top_k=E, normalise="identity")
    order = np.argsort(-scored.logits[0], axis=-1)
    np.testing.assert_array_equal(plan.expert_ids[0], order)
    expected = np.take_along_axis(scored.logits[0], order, axis=-1)
    np.testing.assert_array_equal(plan.weights[0], expected)
    assert (plan.weights[0] < 0).any()
    np.testing.assert_allclose(plan.probs.sum(axis=-1), scored.valid, atol=1e-6)


def test_experts_choose_by_negative_cosines_too(run, scored):
    """Each takes its best two of twelve, one of nine, also where all are below 0."""
    low = dataclasses.replace(scored, logits=scored.logits - 2)
    plan = run(expert_choice, low, normalise="identity", rounding="down")
    taken = plan.expert_ids < E
    for group, number, count in ((0, 12, 2), (1, 9, 1)):
        for expert in range(E):
            best = np.argsort(-low.logits[group, :number, expert], kind="stable")[:count]
            wanted = np.isin(np.arange(N), best)
            np.testing.assert_array_equal(taken[group, :, expert], wanted)
    np.testing.assert_array_equal(plan.weights[taken], low.logits[taken])


def test_prototypes_are_drawn_narrow_and_the_length_is_of_no_account():
    (shape, init) = cosine.shapes(512, E, init_std=0.02)["prototype_mde"]
    assert init(jax.random.key(0), shape, jnp.float32).std() == pytest.approx(0.02, rel=0.05)
    (shape, init) = cosine.shapes(512, E)["prototype_mde"]
    assert init(jax.random.key(0), shape, jnp.float32).std() == pytest.approx(512**-0.5, rel=0.05)


ROUTES = {
    "token choice": (top_k, {"top_k": 2}),
    "expert choice": (expert_choice, {"capacity_factor": 1.0, "rounding": "down"}),
}


@pytest.mark.parametrize("kind", ROUTES)
@pytest.mark.parametrize("normalise", ["identity", "softmax", "sigmoid"])
def test_tokens_without_a_condition_go_to_their_expert_with_weight_1(run, scored, kind, normalise):
    """And no gradient of theirs reaches a prototype, nor one of a prototype them."""
    router, options = ROUTES[kind]
    modality = np.zeros((2, N), np.int32)
    modality[1] = 1
    table = np.asarray([[1] * E + [0], [0] * E + [1]], bool)
    rng = np.random.default_rng(3)
    readout = rng.normal(size=(2, N, E + 1))
    inputs = dataclasses.replace(scored, modality=modality, allowed=table[modality], num_ffn=E + 1)

    def route(params, tokens):
        logits = cosine.apply(params, tokens, jnp.asarray(modality))
        logits = jnp.pad(logits, ((0, 0), (0, 0), (0, 1)))
        own = dataclasses.replace(inputs, logits=logits, score_params=params, tokens=tokens)
        plan = without_score(router(own, normalise=normalise, **options), E)
        chosen = jax.nn.one_hot(plan.expert_ids, E + 1)
        weights = jnp.einsum("snk,snke->sne", plan.weights, chosen)
        return (weights * readout)[1].sum() + loss(own, plan, per="group"), (plan, weights)

    # The gradient is that of the unconditional row alone; so is the loss, without any choice.
    first = np.asarray([True, False])
    inputs = dataclasses.replace(inputs, valid=inputs.valid & ~first[:, None])
    gradient, (plan, weights) = run(
        jax.grad(route, (0, 1), has_aux=True), inputs.score_params, inputs.tokens
    )
    valid = inputs.valid[1]
    np.testing.assert_array_equal(weights[1], valid[:, None] * np.eye(E + 1)[E])
    np.testing.assert_array_equal(plan.weights[1].max(axis=-1), valid)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), gradient)


def test_conditional_tokens_never_reach_the_expert_of_the_others(run, scored):
    table = np.asarray([[1] * (E - 1) + [0], [0] * (E - 1) + [1]], bool)
    inputs = dataclasses.replace(scored, allowed=table[scored.modality])
    for router, options in ROUTES.values():
        plan = run(router, inputs, normalise="identity", **options)
        free = inputs.modality == 0
        assert (plan.expert_ids[free] != E - 1).all()
        assert not np.isin(plan.expert_ids[~free], range(E - 1)).any()


def by_hand(tokens, prototypes, chosen, temperature):
    """The loss of tokens [n, d], of which chosen [n, e] says who chose which prototype."""
    used = [e for e in range(len(prototypes)) if chosen[:, e].any()]
    if len(used) < 2:
        return 0.0
    means = np.stack([tokens[chosen[:, e]].mean(axis=0) for e in used])
    logits = unit(prototypes[used]) @ unit(means).T / temperature
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -np.diagonal(logs).mean()


@pytest.mark.parametrize("per", ["batch", "group"])
def test_loss_by_hand(run, scored, per):
    """Any of a token's choices counts; padding and prototypes without tokens do not."""
    scored.logits[..., 2] = -5
    plan = run(top_k, scored, normalise="identity")
    prototypes = np.float64(scored.score_params["prototype_mde"][0].T)
    chosen = (plan.expert_ids[..., None] == np.arange(E)).any(axis=2)
    assert not chosen[..., 2].any() and chosen.sum(axis=-1).max() == 2
    rows = [(np.float64(t), c) for t, c in zip(scored.tokens, chosen, strict=True)]
    if per == "batch":
        rows = [tuple(np.concatenate(part) for part in zip(*rows, strict=True))]
    for temperature in (0.07, 1.0):
        expected = np.mean([by_hand(tokens, prototypes, c, temperature) for tokens, c in rows])
        got = run(loss, scored, plan, per=per, temperature=temperature)
        assert got == pytest.approx(expected, rel=1e-3)
    assert got > 0.1
    assert contrastive.defaults()["temperature"] == 0.07


def test_its_values_at_the_ends(run):
    def at(prototypes, means, counts, temperature=0.07):
        prototypes, means, counts = map(np.float32, (prototypes, means, counts))
        sums = means * counts[:, None]
        return float(run(contrast, prototypes, sums, counts, temperature=temperature))

    axes, ones = np.eye(4), np.ones((4, 4))
    # Own means at right angles: 0, the nearer the lower the temperature.
    assert at(0.3 * axes, 7 * axes, [3, 1, 2, 5]) < 1e-5
    assert at(axes, axes, [1] * 4, 1.0) == pytest.approx(math.log(1 + 3 / math.e), rel=1e-4)
    # All means alike: the number of prototypes that have tokens.
    assert at(axes, ones, [3, 1, 2, 5]) == pytest.approx(math.log(4), rel=1e-4)
    assert at(axes, ones, [3, 0, 2, 5]) == pytest.approx(math.log(3), rel=1e-4)
    # Fewer than two: nothing to tell apart.
    assert at(axes, ones, [0, 0, 2, 0]) == 0 and at(axes, ones, [0] * 4) == 0


def test_its_gradient_reaches_prototypes_and_tokens(run, scored):
    """Those that are used: it turns each prototype to its tokens, and the tokens to it."""
    scored.logits[..., 2] = -5
    plan = run(top_k, scored, top_k=1, normalise="identity")
    used = np.unique(plan.expert_ids[scored.valid])
    assert 1 < len(used) < E
    plan = jax.tree.map(jnp.asarray, plan)

    def of(params, tokens):
        own = dataclasses.replace(scored, score_params=params, tokens=tokens)
        return loss(own, plan, temperature=1.0)

    params, tokens = run(jax.grad(of, (0, 1)), scored.score_params, scored.tokens)
    moved = params["prototype_mde"][0].T
    assert np.isfinite(moved).all() and np.isfinite(tokens).all()
    assert (np.abs(moved[used]).max(axis=-1) > 1e-3).all()
    np.testing.assert_array_equal(moved[[e for e in range(E) if e not in used]], 0)
    assert (np.abs(tokens[scored.valid]).max(axis=-1) > 1e-4).all()
    np.testing.assert_array_equal(tokens[~scored.valid], 0)
    before = run(of, scored.score_params, scored.tokens)
    step = lambda leaf, slope: np.float32(leaf - 0.05 * slope)
    by_prototypes = run(of, jax.tree.map(step, scored.score_params, params), scored.tokens)
    by_tokens = run(of, scored.score_params, step(scored.tokens, tokens))
    assert by_prototypes < before and by_tokens < before


def test_its_gradient_is_the_same_in_microbatches(run, scored):
    """Each half has one expert that the other has not."""
    ids = np.int32([[0, 1, 2] * 4, [1, 2, 3] * 4])[..., None]
    ids = np.where(scored.valid[..., None], ids, E)
    plan = RoutingPlan(ids, np.ones(ids.shape, np.float32), np.zeros((2, N, E), np.float32))
    plan = jax.tree.map(jnp.asarray, plan)
    half = lambda tree, i: jax.tree.map(lambda x: x[i : i + 1] if len(x) == 2 else x, tree)

    def whole(params, tokens):
        own = dataclasses.replace(scored, score_params=params, tokens=tokens)
        return loss(own, plan)

    def halves(params, tokens):
        own = dataclasses.replace(scored, tokens=tokens)
        sums = []
        for i in (0, 1):
            part = dataclasses.replace(half(own, i), score_params=params)
            sums.append(contrastive.statistics(part, half(plan, i)))
        return contrastive.value(jax.tree.map(jnp.add, *sums))

    a, b = (
        run(jax.value_and_grad(f, (0, 1)), scored.score_params, scored.tokens)
        for f in (whole, halves)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


def test_it_says_what_it_needs(run, scored):
    plan = run(top_k, scored, normalise="identity")
    bare = dataclasses.replace(scored, score_params={})
    with pytest.raises(ValueError, match="prototypes of the score"):
        contrastive.statistics(bare, plan)
