"""The autoencoder's loss: values by hand, weights, and sums that add up over microbatches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.schema import AutoencodeConfig, FSQAutoencoderConfig, KLAutoencoderConfig
from moejax.errors import UserError
from moejax.models.autoencoder import AutoencoderOutput
from moejax.objectives import OBJECTIVES


@pytest.fixture
def objective():
    make = OBJECTIVES.get("autoencode")
    return jax.jit(make(AutoencodeConfig(l1=0.25, l2=2.0), FSQAutoencoderConfig()))


def outputs(target, reconstruction):
    return AutoencoderOutput(target, reconstruction, jnp.zeros((len(target), 1), jnp.int32))


def test_value_by_hand(objective):
    target = jnp.zeros((2, 2, 2, 3))
    reconstruction = jnp.stack([jnp.full((2, 2, 3), 0.5), jnp.full((2, 2, 3), -1.0)])
    sums = objective(outputs(target, reconstruction), {"weights": jnp.ones(2)})
    assert float(sums.mean("l1")) == pytest.approx(0.75)
    assert float(sums.mean("l2")) == pytest.approx(0.625)
    assert float(sums.total()) == pytest.approx(0.25 * 0.75 + 2.0 * 0.625)


def test_pictures_of_weight_zero_do_not_count(objective):
    target, other = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 3)).astype(np.float32)
    weights = np.array([1, 1, 0], np.float32)

    def loss(reconstruction):
        return objective(outputs(target, reconstruction), {"weights": weights}).total()

    grads = np.asarray(jax.grad(loss)(other))
    assert np.abs(grads[2]).max() == 0
    assert np.abs(grads[:2]).min() > 0
    part = objective(outputs(target[:2], other[:2]), {"weights": weights[:2]})
    assert float(loss(other)) == pytest.approx(float(part.total()), rel=1e-6)


def test_microbatches_add_up(objective):
    target, other = np.random.default_rng(1).normal(size=(2, 4, 4, 4, 3)).astype(np.float32)
    whole = objective(outputs(target, other), {"weights": jnp.ones(4)})
    first = objective(outputs(target[:1], other[:1]), {"weights": jnp.ones(1)})
    rest = objective(outputs(target[1:], other[1:]), {"weights": jnp.ones(3)})
    np.testing.assert_allclose((first + rest).total(), whole.total(), rtol=1e-6)


def test_divergence_by_hand():
    objective = OBJECTIVES.get("autoencode")(
        AutoencodeConfig(l1=0.25, l2=2.0, kl=0.5), KLAutoencoderConfig()
    )
    target, reconstruction = jnp.zeros((3, 2, 2, 3)), jnp.full((3, 2, 2, 3), 0.5)
    out = AutoencoderOutput(target, reconstruction, kl=jnp.asarray([1.0, 3.0, 100.0]))
    sums = objective(out, {"weights": jnp.asarray([1.0, 1.0, 0.0])})
    assert float(sums.mean("kl")) == pytest.approx(2.0)
    assert float(sums.total()) == pytest.approx(0.25 * 0.5 + 2.0 * 0.25 + 0.5 * 2.0)


def test_divergence_of_codes_is_a_user_error():
    make = OBJECTIVES.get("autoencode")
    with pytest.raises(UserError, match="objective.kl: model 'fsq_autoencoder' has no posterior"):
        make(AutoencodeConfig(kl=1e-3), FSQAutoencoderConfig())
    with pytest.raises(UserError, match="objective.kl: must not be negative"):
        AutoencodeConfig(kl=-1.0)
