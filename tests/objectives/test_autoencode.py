"""The autoencoder's loss: values by hand, weights, and sums that add up over microbatches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.schema import AutoencodeConfig, FSQAutoencoderConfig
from moejax.models.tokenizer import AutoencoderOutput
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
