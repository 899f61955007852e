"""The "retrieval" evaluator by hand, beside chance, and training that raises it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import load_config
from moejax.config.contrastive import ContrastiveConfig, TwoTowersConfig
from moejax.config.schema import Config, DataConfig, EvalConfig
from moejax.data.pair_pipeline import PairPipeline
from moejax.errors import UserError
from moejax.models.two_towers import PairOutput
from moejax.parallel.mesh import batch_sharding, make_mesh
from moejax.train import retrieval as module
from moejax.train.evaluate import EvalContext, check_evaluators, evaluate
from moejax.train.retrieval import (
    both_ways,
    draw_galleries,
    draw_style_galleries,
    metric_names,
    prompt,
    recalls,
    zero_shot,
)
from moejax.train.setup import prepare_model

pytestmark = pytest.mark.usefixtures("quick_compiles")
FAMILIES, CATEGORIES = 12, ("Red & Blue", "Green")
WORDS = ("ape", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibex", "jay", "kea", "lion")


class Pictures(list):
    """Each family has one picture in each of two styles, of one grey but for its corner."""

    name, version, categories = "made:pictures", "1", CATEGORIES

    def __init__(self, split="val"):
        self.split = split
        for family in range(FAMILIES):
            for style in ("bold", "thin"):
                image = np.full((8, 8, 3), 20 * family, np.uint8)
                image[0, 0] = 255 if style == "bold" else 0
                self.append(
                    {
                        "id": f"{family}/{style}",
                        "image": image,
                        "text": WORDS[family],
                        "family": WORDS[family],
                        "concept": str(family),
                        "style": style,
                        "label": int(family >= 8),
                    }
                )

    def text_at(self, index):
        return self[index]["text"]


def make_config() -> Config:
    return Config(
        model=TwoTowersConfig(vocab_size=272),
        data=DataConfig(
            format="pairs",
            image_size=8,
            batch_size=5,
            sequence_length=12,
            text_tokenizer="bytes",
        ),
        objective=ContrastiveConfig(),
        eval=EvalConfig(metrics=("retrieval",)),
    )


class Told:
    """A model that is told the embeddings of pictures by their grey, of texts by a first letter."""

    def __init__(self, image, text):
        self.image, self.text = np.asarray(image, np.float32), np.asarray(text, np.float32)

    def apply(self, variables, batch, *, train):
        image = variables["params"][0][batch["images"][:, 4, 4, 0] // 20]
        text = variables["params"][1][batch["tokens"][:, 1] - 16 - ord("a")]
        return PairOutput(image, text, jnp.float32(10.0), None, {})


def values(image, text):
    config = make_config()
    model = Told(image, text)
    pipeline = PairPipeline(config, Pictures())
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    params = (model.image, model.text)
    return evaluate(EvalContext(config, model, None, params, pipeline, pipeline, mesh))


def test_recalls_by_hand():
    """The right entry is the first, the third, and behind an equal one; then the second."""
    scores = np.asarray([[9, 1, 1, 1], [5, 2, 1, 3], [4, 1, 4, 0], [1, 2, 3, 2.5]])
    np.testing.assert_allclose(recalls(scores), [1 / 4, 1, 1])
    many = np.tile(np.arange(12.0), (12, 1))
    # Entry i stands behind 11 - i others.
    np.testing.assert_allclose(recalls(many), np.asarray([1, 5, 10]) / 12)


def test_both_ways_by_hand():
    """Picture 1 finds text 0 before its own; all texts find their pictures."""
    image, text = np.eye(3), np.asarray([[3.0, 2.9, 0], [1, 2, 0], [2, 0, 2.5]])
    found = both_ways(image, text, [np.arange(3)], 2.0)
    assert found["image_to_text/recall_at_1"] == pytest.approx(2 / 3)
    assert found["text_to_image/recall_at_1"] == 1
    assert found["gallery"] == 3
    # By a scale of two, picture i has the logits 2 text[:, i], text i has 2 text[i].
    of_pictures = [math.log(np.exp(2 * (text[:, i] - text[i, i])).sum()) for i in range(3)]
    assert found["image/loss"] == pytest.approx(np.mean(of_pictures))
    of_texts = [math.log(np.exp(2 * (text[i] - text[i, i])).sum()) for i in range(3)]
    assert found["text/loss"] == pytest.approx(np.mean(of_texts))
    assert found["image/chance_loss"] == found["text/chance_loss"] == pytest.approx(math.log(3))
    assert found["image_to_text/chance_recall_at_1"] == pytest.approx(1 / 3)
    assert found["image_to_text/chance_recall_at_5"] == 1
    # The mean over galleries: of two, picture 0 finds its own in both.
    several = both_ways(image, text, [np.arange(3), np.asarray([2, 0])], 2.0)
    assert several["image_to_text/recall_at_1"] == pytest.approx((2 / 3 + 1) / 2)


def test_galleries_have_one_record_of_each_family(monkeypatch):
    monkeypatch.setattr(module, "GALLERY", 5)
    family = np.repeat(np.arange(8), 3)
    galleries = draw_galleries(family)
    assert len(galleries) == module.DRAWS
    for rows in galleries:
        assert len(rows) == 5 and len(set(family[rows])) == 5
    assert {int(i) for rows in galleries for i in rows} == set(range(24))
    for one, again in zip(galleries, draw_galleries(family), strict=True):
        np.testing.assert_array_equal(one, again)


def test_galleries_of_styles():
    """Family 0 has two concepts, of which one is in both styles; family 2 is in one style."""
    family = np.asarray([0, 0, 0, 1, 1, 2])
    concept = np.asarray([0, 1, 1, 2, 2, 3])
    style = np.asarray([0, 0, 1, 1, 0, 1])
    drawn = draw_style_galleries(family, concept, style)
    assert len(drawn) == module.DRAWS
    for queries, rows in drawn:
        np.testing.assert_array_equal(concept[queries], concept[rows])
        assert sorted(concept[rows].tolist()) == [1, 2]
        assert len(set(style[queries])) == len(set(style[rows])) == 1
        assert style[queries][0] != style[rows][0]
    assert {int(style[queries][0]) for queries, _ in drawn} == {0, 1}
    assert draw_style_galleries(family, concept, 0 * style) == []


def test_zero_shot_by_hand():
    scores = np.asarray([[2, 1, 0], [2, 1, 0], [0, 1, 2], [0, 3, 1], [9, 0, 0]])
    found = zero_shot(scores, np.asarray([0, 1, 2, 1, -1]), np.asarray([1, 7, 2]))
    assert found["zero_shot/accuracy"] == 3 / 4
    assert found["zero_shot/chance_accuracy"] == pytest.approx(1 / 3)
    assert found["zero_shot/most_frequent"] == 2 / 4
    assert prompt("Food & Drink") == "food and drink"


def test_a_model_that_knows_nothing_is_at_chance():
    got = values(np.ones((FAMILIES, 2)), np.ones((26, 2)))
    assert set(got) == set(metric_names(make_config()))
    assert got["gallery"] == FAMILIES
    for task in module.TASKS:
        for k in module.RECALLS:
            chance = got[f"{task}/chance_recall_at_{k}"]
            assert chance == pytest.approx(min(1, k / FAMILIES))
            assert got[f"{task}/recall_at_{k}"] == pytest.approx(chance)
    # The first category is that of eight in twelve.
    assert got["zero_shot/accuracy"] == got["zero_shot/most_frequent"] == pytest.approx(2 / 3)


def test_a_model_that_knows_all():
    """Texts are known by their letters; r, of the name of the first category, is near 0 to 7."""
    letters = np.zeros((26, FAMILIES))
    letters[np.arange(FAMILIES), np.arange(FAMILIES)] = 1
    letters[ord("r") - ord("a"), :8] = 0.5
    # The name of the second category begins with g, as the family 6 does.
    got = values(np.eye(FAMILIES), letters)
    for task in module.TASKS:
        assert got[f"{task}/recall_at_1"] == 1
    # Families 0 to 5 and 7 find r, 6 finds g; 8 to 11 find nothing, and so the first.
    assert got["zero_shot/accuracy"] == pytest.approx(7 / 12)


def test_mistakes():
    with pytest.raises(UserError, match="eval.metrics: 'retrieval' needs pictures with texts"):
        check_evaluators(load_config("vit", {"eval.metrics": ("retrieval",)}))
    with pytest.raises(UserError, match="eval.metrics: 'accuracy' needs a model with classes"):
        check_evaluators(load_config("clip", {"eval.metrics": ("accuracy",)}))


@pytest.mark.parametrize(
    "name", ["clip", *(pytest.param(name, marks=pytest.mark.slow) for name in ("siglip", "limoe"))]
)
def test_a_few_steps_find_the_text_of_a_grey(name):
    overrides = {
        "model.image_size": 8,
        "model.vocab_size": 272,
        "model.text_length": 12,
        "model.d_model": 16,
        "model.num_heads": 2,
        "model.num_layers": 2,
        "model.ffn_hidden": (24,),
        "data.image_size": 8,
        "data.batch_size": 24,
        "data.sequence_length": 12,
        "data.text_tokenizer": "bytes",
        "objective.augment.flip": "none",
        "objective.augment.crop_padding": 0,
        "optim.learning_rate": 1e-2,
        "optim.warmup_steps": 2,
        "train.steps": 30,
    }
    config = load_config(name, overrides)
    setup = prepare_model(config, jax.devices()[:1])
    pipeline = PairPipeline(config, Pictures("train"))
    step, losses = setup.train_step(), []
    with jax.set_mesh(setup.mesh):
        state = setup.recipe.create()
        for i in range(30):
            batch = jax.device_put(pipeline.batch(i), batch_sharding(setup.mesh))
            state, metrics = step(state, batch)
            losses.append(float(metrics.losses.mean("contrastive")))
            if name == "limoe":
                routed = metrics.losses.derived_values()
                assert np.isfinite(routed["router/entropy_local"])
    assert losses[-1] < 0.8 * losses[0]
    got = evaluate(setup.eval_context(state.params, pipeline, pipeline))
    for task in module.TASKS:
        assert got[f"{task}/recall_at_1"] > 1.5 * got[f"{task}/chance_recall_at_1"]
