"""The contrastive objective: who belongs together, who counts, and the rows of eight devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import load_config
from moejax.config.contrastive import ContrastiveConfig, TwoTowersConfig
from moejax.errors import UserError
from moejax.models.two_towers import PairOutput
from moejax.objectives.contrastive import contrastive
from moejax.parallel.mesh import batch_sharding, make_mesh

ROWS, WIDTH = 16, 6


def outputs(seed=0) -> PairOutput:
    rng = np.random.default_rng(seed)
    image, text = (jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32) for _ in range(2))
    return PairOutput(image, text, jnp.float32(2), jnp.float32(-1), {})


def batch(**fields) -> dict:
    rows = np.arange(ROWS, dtype=np.int32)
    weights = (rows < ROWS - 3).astype(np.float32)
    # A family holds two concepts, a concept two records.
    return {"weights": weights, "family": rows // 4, "concept": rows // 2, **fields}


def loss_of(outputs, batch, **fields):
    return contrastive(ContrastiveConfig(**fields), TwoTowersConfig())(outputs, batch)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("chunk", [0, 3])
def test_eight_devices_are_one(kind, chunk):
    """In value and gradient, and no device forms the logits of others' rows."""

    def total(outputs, batch):
        sums = loss_of(outputs, batch, loss=kind, chunk=chunk)
        return sums.total(), sums

    run = jax.jit(jax.value_and_grad(total, has_aux=True, allow_int=True))
    given = outputs()
    expected = run(given, batch())
    config = load_config("clip", {"mesh.data": 8})
    mesh = make_mesh(config.mesh, jax.devices())
    rows = batch_sharding(mesh)
    with jax.set_mesh(mesh):
        image, text = jax.device_put((given.image, given.text), rows)
        placed = given.replace(image=image, text=text)
        on_mesh = jax.device_put(batch(), rows)
        got = run(placed, on_mesh)
        program = run.lower(placed, on_mesh).compile().as_text()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)
    assert f"f32[{ROWS},{ROWS}]" not in program
    assert f"f32[{ROWS // 8},{ROWS}]" in program


def test_terms_by_hand():
    """Equal embeddings: the logarithm of 13 rows, whatever belongs together."""
    same = outputs().replace(image=jnp.ones((ROWS, 1)), text=jnp.ones((ROWS, 1)))
    for positives in ("pair", "concept", "family"):
        sums = loss_of(same, batch(), positives=positives)
        assert float(sums.total()) == pytest.approx(math.log(13), rel=1e-5)
        assert float(sums.mean("scale")) == 2
        assert float(sums.weights["contrastive"]) == 13
    # All texts are alike, so that the first is the likeliest of each.
    correct = lambda positives: float(
        loss_of(same, batch(), positives=positives).mean("contrastive_correct")
    )
    np.testing.assert_allclose(
        [correct("pair"), correct("concept"), correct("family")], np.asarray([1, 2, 4]) / 13
    )


def test_what_belongs_together():
    """Texts that are the concept's: they cost least where all of the concept are positives."""
    by_concept = jax.nn.one_hot(jnp.arange(ROWS) // 2, ROWS)
    perfect = outputs().replace(image=by_concept, text=by_concept, scale=jnp.float32(60))
    full = batch(weights=np.ones(ROWS, np.float32))
    cost = lambda loss, positives: float(
        loss_of(perfect, full, loss=loss, positives=positives).total()
    )
    assert cost("clip", "concept") == pytest.approx(math.log(2), rel=1e-5)
    assert cost("clip", "pair") == pytest.approx(math.log(2), rel=1e-5)
    # Two of the four are 60 nats away.
    assert cost("clip", "family") == pytest.approx(math.log(2) + 30, rel=1e-5)
    biased = perfect.replace(bias=jnp.float32(-30))
    perfect = biased
    assert cost("siglip", "concept") == pytest.approx(0, abs=1e-4)
    # The other record of the concept is a negative that has 30 nats.
    assert cost("siglip", "pair") == pytest.approx(30, rel=1e-4)


def test_mistakes():
    with pytest.raises(UserError, match="optim.accumulation_steps: must be 1"):
        load_config("clip", {"optim.accumulation_steps": 2})
    with pytest.raises(UserError, match="objective.positives: "):
        ContrastiveConfig(positives="record")
    with pytest.raises(UserError, match="data.format: 'pairs' does not fit model 'vit'"):
        load_config("vit", {"data.format": "pairs"})
    with pytest.raises(UserError, match="data.format: 'images' does not fit model 'limoe'"):
        load_config("limoe", {"data.format": "images"})
