"""The next-token objective against sums written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.schema import DecoderConfig, NextTokenConfig
from moejax.models.decoder import DecoderOutput
from moejax.objectives.next_token import next_token

VOCABULARY = 20
TARGETS = np.array([[3, 17, 18, 4], [16, 19, 2, 0]], np.int32)
MODALITY = np.array([[0, 0, 1, 1], [0, 0, 1, 0]], np.int32)
WEIGHTS = np.array([[1, 1, 1, 0], [1, 1, 1, 0]], np.float32)


@pytest.fixture
def logits():
    return jax.random.normal(jax.random.key(0), (2, 4, VOCABULARY)) * 2


def sums_of(logits, z_loss=0.1, **changes):
    objective = next_token(NextTokenConfig(z_loss=z_loss), DecoderConfig())
    batch = {"targets": TARGETS, "modality": MODALITY, "weights": WEIGHTS}
    batch = {name: jnp.asarray(changes.get(name, value)) for name, value in batch.items()}
    return objective(DecoderOutput(logits, {}, {}), batch)


def test_terms_are_split_by_the_targets_modality(logits):
    probability = np.exp(np.float64(logits))
    log_z = np.log(probability.sum(axis=-1))
    nll = log_z - np.take_along_axis(np.float64(logits), TARGETS[..., None], axis=-1)[..., 0]
    found = sums_of(logits)
    # The target's modality is that of the next position; ids below 16 are structure.
    expected = {
        "token": [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)],
        "structure": [(0, 0), (1, 2)],
        "text": [(1, 0)],
        "image": [(0, 1), (0, 2), (1, 1)],
    }
    for name, places in expected.items():
        np.testing.assert_allclose(found.sums[name], sum(nll[p] for p in places), rtol=1e-5)
        assert found.weights[name] == len(places)
    z = (log_z**2 * WEIGHTS).sum() / 6
    token = sum(nll[p] for p in expected["token"]) / 6
    np.testing.assert_allclose(found.total(), token + 0.1 * z, rtol=1e-5)


def test_correct_counts_the_highest_logit(logits):
    right = jnp.zeros_like(logits).at[0, 1, 17].set(5.0)
    found = sums_of(right)
    assert found.sums["image_correct"] == 1 and found.weights["image_correct"] == 3


def test_sums_of_microbatches_add_up(logits):
    first = WEIGHTS * np.array([[1], [0]], np.float32)
    parts = sums_of(logits, weights=first) + sums_of(logits, weights=WEIGHTS - first)
    whole = sums_of(logits)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), parts, whole)
    assert parts.total() == pytest.approx(float(whole.total()), rel=1e-6)


def test_weightless_targets_do_not_matter(logits):
    changed = logits.at[:, 3].set(100.0)
    jax.tree.map(np.testing.assert_array_equal, sums_of(changed), sums_of(logits))


def test_a_batch_without_images_has_a_finite_loss(logits):
    found = sums_of(logits, modality=np.zeros_like(MODALITY))
    assert found.weights["image"] == 0 and found.mean("image") == 0
    assert np.isfinite(found.total())
