"""The likelihood evaluator against values computed by hand, and the eval command."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.data.text_tokenizer import load_text_tokenizer
from moejax.data.vocabulary import BOI, NUM_SPECIAL, Vocabulary
from moejax.train.evaluate import evaluate, format_table
from moejax.train.likelihood import count_text_bytes, kind_of_token, metric_names, unigram_nats
from moejax.train.setup import prepare

from .conftest import VOCABULARY, make_config


def test_unigram_baseline_on_hand_computed_counts():
    """Add-one within each kind: text has 2 types, image 3, structure 16."""
    vocabulary = Vocabulary(text_size=2, image_codes=3, codes_per_image=1)
    kinds = kind_of_token(vocabulary)
    assert kinds.tolist() == [0] * 16 + [1] * 2 + [2] * 3
    counts = np.zeros(vocabulary.size, np.int64)
    counts[16:] = [5, 0, 1, 0, 6]
    counts[BOI] = 4
    nats = unigram_nats(counts, kinds)
    np.testing.assert_allclose(np.exp(-nats[16:]), [6 / 7, 1 / 7, 2 / 10, 1 / 10, 7 / 10])
    assert math.exp(-nats[BOI]) == pytest.approx(5 / (4 + 16))


def test_bytes_are_those_of_the_captions():
    """Two captions in one row, one spelt with characters of several bytes."""
    tokenizer = load_text_tokenizer("bytes")
    vocabulary = Vocabulary(tokenizer.size, 10, 2)
    captions = ["née", "ab"]
    targets, segments = [], []
    for segment, caption in enumerate(captions, 1):
        ids = [*vocabulary.text_ids(tokenizer.encode(caption)), BOI, vocabulary.image_offset]
        targets += ids
        segments += [segment] * len(ids)
    batch = {
        "targets": np.array([targets]),
        "segments": np.array([segments]),
        "weights": np.ones((1, len(targets))),
    }
    kinds = kind_of_token(vocabulary)
    assert count_text_bytes(batch, vocabulary, kinds, tokenizer) == 4 + 2
    batch["weights"][0, 0] = 0
    assert count_text_bytes(batch, vocabulary, kinds, tokenizer) == 3 + 2


class FixedModel:
    """The same logits for every token: the loss of each target is known."""

    def __init__(self, logits_v):
        self.logits_v = jnp.asarray(logits_v)

    def apply(self, variables, batch, *, train):
        assert not train
        logits = self.logits_v[None, None] + jnp.zeros((*batch["tokens"].shape, 1))
        return dataclasses.make_dataclass("Output", ["logits"])(logits)


def test_report_of_a_model_whose_losses_are_known(fake_data):
    """Likeliest token: image code 3. All else is equal."""
    setup = prepare(make_config())
    logits = np.zeros(VOCABULARY.size)
    logits[VOCABULARY.image_offset + 3] = 2.0
    context = setup.eval_context({}, setup.eval_pipeline, setup.pipeline)
    context = dataclasses.replace(context, model=FixedModel(logits))
    values = evaluate(context)
    assert set(values) <= set(metric_names(context.config))

    (batch,) = context.pipeline.eval_batches(1)
    log_z = math.log(VOCABULARY.size - 1 + math.exp(2))
    targets = batch["targets"][batch["weights"] > 0]
    codes = targets[targets >= VOCABULARY.image_offset] - VOCABULARY.image_offset
    text = targets[(targets >= NUM_SPECIAL) & (targets < VOCABULARY.image_offset)]
    hits = np.mean(codes == 3)
    assert values["image/accuracy"] == pytest.approx(hits)
    assert values["image/loss"] == pytest.approx(log_z - 2 * hits, rel=1e-5)
    assert values["image/bits_per_code"] == pytest.approx(values["image/loss"] / math.log(2))
    assert values["text/loss"] == pytest.approx(log_z, rel=1e-5)
    # One byte per text token here.
    assert values["text/bits_per_byte"] == pytest.approx(log_z / math.log(2), rel=1e-5)
    counts = context.train_pipeline.token_counts()
    text_counts = counts[NUM_SPECIAL : VOCABULARY.image_offset] + 1
    expected = np.mean(-np.log(text_counts[text - NUM_SPECIAL] / text_counts.sum()))
    assert values["text/unigram_loss"] == pytest.approx(expected)
    assert "structure/loss" not in values, "no special token is a target in these batches"


def test_evaluation_compiles_once_for_all_parameters(fake_data):
    setup = prepare(make_config())
    params = setup.recipe.create().params
    context = setup.eval_context(params, setup.eval_pipeline, setup.pipeline)
    assert evaluate(context) == evaluate(context.with_params(setup.recipe.create().params))
    assert context.programs["likelihood"]._cache_size() == 1


def test_table_sets_the_baseline_beside_the_value():
    table = format_table({"loss": 2.0, "text/loss": 1.5, "text/unigram_loss": 3.25})
    assert [line.split() for line in table.splitlines()] == [
        ["model", "unigram", "baseline"],
        ["loss", "2.0000"],
        ["text", "loss", "1.5000", "3.2500"],
    ]
    table = format_table({"psnr": 25.0, "kmeans_psnr": 21.0})
    assert table.split() == ["model", "k-means", "psnr", "25.0000", "21.0000"]
    assert format_table({"score": 1.0}).split() == ["model", "score", "1.0000"]
