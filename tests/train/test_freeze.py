"""What ``optim.freeze`` names never changes by a bit, costs nothing, and is not counted."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax import axes
from moejax.analysis.jaxpr_flops import count_flops
from moejax.errors import UserError
from moejax.train.evaluate import put_batch
from moejax.train.freeze import combine, count_frozen, freeze_masks, trainable
from moejax.train.loop import header
from moejax.train.setup import prepare
from moejax.train.step import make_loss

from .conftest import make_config

TOWERS = ("text", "image", "speech")


def box(shape, *names):
    return nn.LogicallyPartitioned(jnp.zeros(shape), names)


PARAMS = {
    "embedding_vd": box((9, 4), axes.VOCABULARY, axes.EMBED),
    "stack": {
        "wi_mdf": box((2, 3, 4, 5), axes.LAYERS, axes.MODALITY, axes.EMBED, axes.MLP),
        "shared_mdf": box((2, 1, 4, 5), axes.LAYERS, axes.MODALITY, axes.EMBED, axes.MLP),
        # A tower of a width of its own.
        "wo_mfd_image": box((2, 1, 7, 4), axes.LAYERS, axes.MODALITY, axes.MLP, axes.EMBED),
    },
    "bias": jnp.zeros((3,)),
}


def masks_of(*rules):
    return freeze_masks(PARAMS, rules, TOWERS)


def test_rules_freeze_whole_parameters_or_rows():
    assert masks_of() == jax.tree.map(lambda _: False, nn.unbox(PARAMS))
    masks = masks_of("^embed", "stack/wi.*@text", "bias")
    np.testing.assert_array_equal(
        masks["stack"].pop("wi_mdf"), np.array([True, False, False]).reshape(1, 3, 1, 1)
    )
    others = {"shared_mdf": False, "wo_mfd_image": False}
    assert masks == {"embedding_vd": True, "stack": others, "bias": True}
    masks = masks_of("@image")
    assert masks["stack"]["wo_mfd_image"] is True and masks["stack"]["shared_mdf"] is False
    assert masks["stack"]["wi_mdf"][0, :, 0, 0].tolist() == [False, True, False]
    assert count_frozen(masks, PARAMS) == 2 * 4 * 5 + 2 * 7 * 4
    # All rows together are the whole.
    assert masks_of("wi@text", "wi@image", "wi@speech")["stack"]["wi_mdf"] is True
    assert count_frozen(masks_of("stack", "stack@text"), PARAMS) == 120 + 40 + 56


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("embeding_vd", "'embeding_vd' is found in no parameter; did you mean 'embedding_vd'"),
        ("wi_mfd", "is found in no parameter; did you mean 'wi_mdf'"),
        ("a,b", r"found in no parameter; write several as \"\('a', 'b'\)\"; the parameters are b"),
        ("stack@txt", "'stack@txt' names no modality of the model; did you mean 'text'"),
        ("shared@text", "freezes nothing: no parameter .* a tower for text alone .*without @text"),
        ("_image@text", "freezes nothing"),
        ("", "an empty rule"),
        (".*", "leaves no parameter to train"),
    ],
)
def test_rules_that_freeze_nothing_or_all_are_refused(rule, message):
    with pytest.raises(UserError, match=f"optim.freeze: .*{message}") as error:
        make_config(optim__freeze=(rule,))
        masks_of(rule)
    assert "\n" not in str(error.value)


def test_a_pattern_that_is_none_is_refused_with_its_field():
    for field, value in (("freeze", ("a(@text",)), ("no_decay", ("a(",))):
        with pytest.raises(UserError, match=rf"optim.{field}: 'a\(' is no regular expression: mis"):
            make_config(**{f"optim__{field}": value})


def test_combine_takes_frozen_values_over_bit_by_bit():
    masks = masks_of("embedding_vd", "wi@text")
    old = jax.tree.map(lambda x: -x, nn.unbox(PARAMS))
    new = jax.tree.map(jnp.ones_like, trainable(masks, old))
    assert new["embedding_vd"] == optax.MaskedNode()
    both = combine(masks, old, new)
    # -0.0 is not 0.0.
    wi_mdf = both["stack"]["wi_mdf"]
    assert np.signbit(both["embedding_vd"]).all() and np.signbit(wi_mdf[:, 0]).all()
    assert (wi_mdf[:, 1:] == 1).all() and (both["bias"] == 1).all()


FROZEN = ("embedding_vd", "gain_md@text")


def run_steps(setup, number):
    """The states before and after ``number`` steps, and the metrics of the first."""
    step = setup.train_step()
    state = setup.recipe.create()
    # A minus zero among the frozen rows: its sign must survive every sum.
    gain = jnp.asarray(state.params["gain_md"]).at[0, 0].set(-0.0)
    gain = jax.device_put(gain, setup.recipe.shardings.params["gain_md"])
    # An average apart from its parameter: a step towards it would show, however it is rounded.
    ema = {}
    if state.ema:
        away = state.ema["embedding_vd"] + 1
        ema = {**state.ema, "gain_md": jnp.array(gain), "embedding_vd": away}
    state = state.replace(params={**state.params, "gain_md": gain}, ema=ema)
    before, first = jax.device_get(state), None
    with jax.set_mesh(setup.mesh):
        for n in range(number):
            state, metrics = step(state, put_batch(setup.pipeline.batch(n), setup.mesh))
            first = first or jax.device_get(metrics)
    return before, jax.device_get(state), first


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_frozen_values_keep_their_bytes(fake_data, optimizer):
    """Under weight decay of everything, a moving average, accumulation, and a skipped step."""
    fake_data.broken = frozenset({1})
    config = make_config(
        optim__name=optimizer,
        optim__freeze=FROZEN,
        optim__weight_decay=0.5,
        optim__no_decay=(),
        optim__ema_decay=0.5,
        optim__accumulation_steps=2,
        data__batch_size=16,
    )
    setup = prepare(config)
    before, after, _ = run_steps(setup, 4)
    assert int(after.skipped) == 1
    for tree in ("params", "ema"):
        old, new = getattr(before, tree), getattr(after, tree)
        assert old["embedding_vd"].tobytes() == new["embedding_vd"].tobytes()
        assert old["gain_md"][0].tobytes() == new["gain_md"][0].tobytes()
        assert np.signbit(new["gain_md"][0, 0])
        assert (old["gain_md"][1] != new["gain_md"][1]).all()
        assert not np.array_equal(old["head_dv"], new["head_dv"])
    # Embedding and head are of one size: only the head has moments.
    size = before.params["head_dv"].size
    assert size == before.params["embedding_vd"].size
    moments = [leaf.size for leaf in jax.tree.leaves(setup.recipe.abstract.opt_state)]
    assert moments.count(size) == {"adamw": 2, "adafactor": 1}[optimizer]
    frozen = before.params["embedding_vd"].size + before.params["gain_md"][0].size
    assert f" active for a token, {frozen / 1000:.2f}k frozen, in float32" in header(setup)


def test_gradient_norm_and_clipping_leave_out_what_is_frozen(fake_data):
    """The step is the one of an unfrozen run, clipped by the norm of the trained part alone."""
    options = {
        "optim__clip_norm": 1e-2,
        "optim__learning_rate": 10.0,
        "optim__name": "sgd",
        "optim__b1": 0.0,
        "model__dropout": 0.0,
    }
    free = prepare(make_config(**options), jax.devices()[:1])
    loss = make_loss(free.model, free.objective, 1, free.mesh)
    with jax.set_mesh(free.mesh):
        batch = put_batch(free.pipeline.batch(0), free.mesh)
        params = free.recipe.create().params
        params = {**params, "gain_md": params["gain_md"].at[0, 0].set(-0.0)}
        grads, _ = jax.grad(loss, has_aux=True)(params, batch, jax.random.key(0), 0)
    grads = jax.device_get({"head_dv": grads["head_dv"], "gain_md": grads["gain_md"][1]})
    norm = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in grads.values()))
    config = make_config(optim__freeze=FROZEN, optim__weight_decay=0.0, **options)
    before, after, metrics = run_steps(prepare(config, jax.devices()[:1]), 1)
    assert float(metrics.grad_norm) == pytest.approx(norm, rel=1e-5)
    rate = float(free.recipe.optimizer.schedule(0))
    moved = after.params["head_dv"] - before.params["head_dv"]
    expected = -rate * 1e-2 / norm * grads["head_dv"]
    np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-6)
    assert np.abs(expected).max() > 1e-3


def test_gradients_of_frozen_parameters_are_not_computed(fake_data):
    """The head is a third of the matmuls: forward, input gradient, weight gradient."""

    def flops(*rules):
        setup = prepare(make_config(optim__freeze=rules), jax.devices()[:1])
        step = setup.train_step()
        with jax.set_mesh(setup.mesh):
            return count_flops(step, setup.recipe.abstract, setup.batch).nominal

    assert flops("head_dv") == pytest.approx(2 / 3 * flops())


def test_inspect_counts_what_is_frozen(fake_data):
    from moejax.analysis.params import param_table
    from moejax.models import build_model

    config = make_config(optim__freeze=FROZEN)
    table = param_table(build_model(config), config)
    assert table.frozen == 284 * 16 + 16
    whole = param_table(build_model(config), dataclasses.replace(config, optim=make_config().optim))
    assert whole.frozen == 0
    # Two moments less of the embedding, in float32.
    saved = whole.state_bytes_per_device - table.state_bytes_per_device
    assert saved == 2 * 4 * 284 * 16
