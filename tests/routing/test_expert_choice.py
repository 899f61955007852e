"""Expert choice: quotas, who is taken, modalities kept apart, causal rules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import ROUTERS, last_taken, move_threshold

E = 6
# Three experts of text, three of pictures.
TABLE = np.asarray([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]], bool)
expert_choice = ROUTERS.get("expert_choice").function


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def taken(plan):
    """[s, n, e] bool."""
    return plan.expert_ids < E


def moma(make_inputs, **fields):
    # Six text tokens and six of pictures, of which three are padding in the second group.
    modality = np.tile(np.int32([0, 1]), (2, 6))
    return make_inputs(modality=modality, allowed=TABLE[modality], **fields)


def test_each_expert_takes_its_best_tokens_by_hand(run, make_inputs):
    logits = np.float32([[[2, 0], [1, 3], [-1, 1], [0, 2]]])
    plan = run(expert_choice, make_inputs(s=1, n=4, e=2, padding=0, logits=logits))
    np.testing.assert_array_equal(plan.expert_ids[0], [[0, 2], [0, 1], [2, 2], [2, 1]])
    np.testing.assert_allclose(
        plan.weights[0],
        [[sigmoid(2.0), 0], [sigmoid(1.0), sigmoid(3.0)], [0, 0], [0, sigmoid(2.0)]],
        rtol=1e-6,
    )
    assert plan.max_choices == 6


@pytest.mark.parametrize("factor, per_expert", [(1.0, (2, 2)), (2.0, (4, 3)), (1.5, (3, 3))])
def test_counts_are_the_capacity(run, make_inputs, factor, per_expert):
    """12 and 9 tokens over 6 experts, rounded up."""
    counts = taken(run(expert_choice, make_inputs(), capacity_factor=factor)).sum(axis=1)
    np.testing.assert_array_equal(counts, np.repeat(np.asarray(per_expert)[:, None], E, axis=1))
    down = run(expert_choice, make_inputs(), capacity_factor=factor, rounding="down")
    np.testing.assert_array_equal(
        taken(down).sum(axis=1)[:, 0], [int(factor * 2), int(factor * 1.5)]
    )


def test_of_equal_scores_the_earlier_token_is_taken(run, make_inputs):
    plan = run(expert_choice, make_inputs(logits=np.zeros((2, 12, E), np.float32)))
    np.testing.assert_array_equal(taken(plan)[0].sum(axis=1), [E, E] + [0] * 10)


def test_modalities_conserve_their_tokens(run, make_inputs):
    """MoMa with capacity 1 / E_m: the choices are as many as the tokens of the modality."""
    inputs = moma(make_inputs)
    counts = taken(run(expert_choice, inputs)).sum(axis=1)
    np.testing.assert_array_equal(counts[0], [2] * 6)
    # The second group's padding: its last three tokens are picture, text, picture.
    np.testing.assert_array_equal(counts[1], [2] * 3 + [2] * 3)
    down = taken(run(expert_choice, inputs, rounding="down")).sum(axis=1)
    np.testing.assert_array_equal(down[1], [1] * 3 + [1] * 3)


def test_text_knows_nothing_of_image_logits(run, make_inputs):
    """Not by its choice, and by a gradient of exactly zero."""
    inputs = moma(make_inputs, padding=0)
    is_text = (inputs.modality == 0)[..., None]
    noise = make_inputs(7).logits
    other = dataclasses.replace(inputs, logits=np.where(is_text, inputs.logits, noise))
    a, b = run(expert_choice, inputs), run(expert_choice, other)
    text = is_text[..., 0]
    np.testing.assert_array_equal(a.expert_ids[text], b.expert_ids[text])
    np.testing.assert_array_equal(a.weights[text], b.weights[text])

    def of_text(logits):
        plan = expert_choice(dataclasses.replace(inputs, logits=logits), normalise="softmax")
        return jnp.where(is_text, plan.weights, 0).sum()

    gradient = run(jax.grad(of_text), inputs.logits)
    assert (gradient[~text] == 0).all() and (gradient[..., 3:] == 0).all()
    assert np.abs(gradient[text]).max() > 0.01


def test_per_modality_shares_out_common_experts(run, make_inputs):
    inputs = make_inputs(padding=0)
    inputs.modality[:] = [0] * 9 + [1] * 3
    # Pictures outshine text everywhere: without shares they would take all.
    inputs.logits[:, :9] -= 20
    together = taken(run(expert_choice, inputs, capacity_factor=1.0))
    np.testing.assert_array_equal(together[0, :9].sum(), 0)
    apart = taken(run(expert_choice, inputs, capacity_factor=2.0, per_modality=True))
    np.testing.assert_array_equal(apart[0, :9].sum(axis=0), [3] * E)
    np.testing.assert_array_equal(apart[0, 9:].sum(axis=0), [1] * E)
    with pytest.raises(ValueError, match="num_modalities"):
        run(expert_choice, dataclasses.replace(inputs, num_modalities=0), per_modality=True)


def test_bound_of_choices_holds(run, make_inputs):
    for factor in (0.4, 2.7):
        for rounding in ("up", "down"):
            plan = run(
                expert_choice,
                moma(make_inputs),
                capacity_factor=factor,
                rounding=rounding,
                per_modality=True,
            )
            assert taken(plan).sum(axis=(1, 2)).max() <= plan.max_choices <= 12 * E


def test_the_choice_of_a_batch_depends_on_it_and_the_causal_rules_do_not(run, make_inputs):
    """One group of all rows, against the same rows in another batch."""
    rows = make_inputs(s=2, padding=0, score_params=None)
    batch = lambda x: x.reshape(1, 24, *x.shape[2:])
    here = jax.tree.map(lambda x: batch(x.copy()), rows)
    rows.logits[1] += 3
    there = jax.tree.map(lambda x: batch(x.copy()), rows)
    first_row = lambda plan: plan.weights[0, :12]
    assert (first_row(run(expert_choice, here)) != first_row(run(expert_choice, there))).any()
    for rule in ("aux_router", "threshold"):
        here, there = (dataclasses.replace(i, train=False) for i in (here, there))
        a, b = (run(expert_choice, i, causal_rule=rule) for i in (here, there))
        np.testing.assert_array_equal(first_row(a), first_row(b))
    a, b = (run(expert_choice, i, causal_rule="none") for i in (here, there))
    assert (first_row(a) != first_row(b)).any()


def test_aux_router_chooses_and_the_main_scores_weigh(run, make_inputs):
    inputs = make_inputs(train=False)
    plan = run(expert_choice, inputs, causal_rule="aux_router")
    wanted = (inputs.causal_logits > 0) & inputs.valid[..., None]
    np.testing.assert_array_equal(taken(plan), wanted)
    np.testing.assert_allclose(plan.weights, np.where(wanted, sigmoid(inputs.logits), 0), rtol=1e-6)
    assert plan.max_choices is None
    with pytest.raises(ValueError, match="causal_logits"):
        run(expert_choice, make_inputs(causal_logits=None, train=False), causal_rule="aux_router")


def test_aux_router_has_a_threshold_for_each_expert(run, make_inputs):
    """And may say only how many tokens an expert takes: those of its highest scores."""
    threshold = np.linspace(0.1, 0.9, E, dtype=np.float32)
    inputs = make_inputs(train=False, causal_threshold=threshold)
    wanted = (sigmoid(inputs.causal_logits) > threshold) & inputs.valid[..., None]
    plan = run(expert_choice, inputs, causal_rule="aux_router")
    np.testing.assert_array_equal(taken(plan), wanted)
    counted = run(expert_choice, inputs, causal_rule="aux_count")
    counts = wanted.sum(axis=1)
    assert len(np.unique(counts)) > 3
    rank = np.argsort(np.argsort(np.where(inputs.valid[..., None], -inputs.logits, 9), 1), 1)
    np.testing.assert_array_equal(taken(counted), rank < counts[:, None])


def test_threshold_is_that_of_the_last_token_taken(run, make_inputs):
    """Two of twelve tokens and two of nine: the second largest probability of each column."""
    inputs = make_inputs()
    plan = run(expert_choice, inputs)
    sums = run(last_taken, inputs, plan)
    probs = np.sort(np.where(inputs.valid[..., None], sigmoid(inputs.causal_logits), 0), axis=1)
    np.testing.assert_allclose(sums["last_e"], probs[:, -2].sum(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(sums["groups_e"], 2)
    before = np.linspace(0, 1, E, dtype=np.float32)
    after = run(move_threshold, before, sums, decay=0.95)
    np.testing.assert_allclose(after, 0.95 * before + 0.05 * probs[:, -2].mean(axis=0), rtol=1e-5)
    # An expert that nobody could choose keeps its threshold.
    allowed = np.broadcast_to(np.arange(E) != 3, (2, 12, E))
    closed = dataclasses.replace(inputs, allowed=allowed)
    sums = run(last_taken, closed, run(expert_choice, closed))
    assert sums["groups_e"][3] == 0 and np.isfinite(sums["last_e"]).all()
    after = run(move_threshold, before, sums, decay=0.95)
    np.testing.assert_array_equal((after == before)[[0, 3, 5]], [False, True, False])


def test_threshold_rule(run, make_inputs):
    inputs = make_inputs(train=False)
    plan = run(expert_choice, inputs, causal_rule="threshold", threshold=0.7)
    wanted = (sigmoid(inputs.logits) > 0.7) & inputs.valid[..., None]
    np.testing.assert_array_equal(taken(plan), wanted)


def test_gumbel_sigmoid_moves_the_choice_in_training_only(run, make_inputs):
    inputs = make_inputs(rng=jax.random.key(5))
    noisy, clean = run(expert_choice, inputs, noise="logistic"), run(expert_choice, inputs)
    assert (taken(noisy) != taken(clean)).any()
    np.testing.assert_array_equal(taken(noisy).sum(axis=1), taken(clean).sum(axis=1))
    np.testing.assert_array_equal(noisy.probs, clean.probs)
