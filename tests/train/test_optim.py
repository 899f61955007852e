"""Schedules at points computed by hand, and which parameters are decayed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import axes
from moejax.config.schema import OptimConfig
from moejax.errors import UserError
from moejax.train.optim import decay_mask, make_optimizer, make_schedule

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
