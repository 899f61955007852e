"""The likelihood evaluator against values computed by hand, and the eval command."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.cli.main import main
from moejax.config.schema import EvalConfig
from moejax.data.text_tokenizer import load_text_tokenizer
from moejax.data.vocabulary import BOI, NUM_SPECIAL, Vocabulary
from moejax.errors import UserError
from moejax.train.evaluate import (
    EVALUATORS,
    EvalPlan,
    EvalResult,
    Patience,
    check_evaluators,
    eval_plans,
    evaluate,
    format_table,
    on_split,
    run_evaluators,
)
from moejax.train.likelihood import count_text_bytes, kind_of_token, metric_names, unigram_nats
from moejax.train.loop import train
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


@pytest.fixture
def registered(monkeypatch):
    """``registered(name, function)``: an evaluator that the test forgets afterwards."""
    monkeypatch.setattr(EVALUATORS, "_entries", dict(EVALUATORS._entries))
    return lambda name, function: EVALUATORS.register(name)(function)


def test_entries_name_split_and_schedule(registered):
    registered("mine", lambda context: {})
    config = EvalConfig(
        split="val", every=20, metrics=("likelihood", "likelihood@train/100", "mine/0,mine@test")
    )
    assert eval_plans(config) == (
        EvalPlan("likelihood", "val", 20),
        EvalPlan("likelihood", "train", 100, "train/"),
        EvalPlan("mine", "val", 0),
        EvalPlan("mine", "test", 20, "test/"),
    )
    due = {step: [plan.due(step) for plan in eval_plans(config)] for step in (20, 30, 100)}
    assert due == {
        20: [True, False, False, True],
        30: [False] * 4,
        100: [True, True, False, True],
    }
    assert eval_plans(EvalConfig(metrics=("",))) == ()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (("likelyhood@val",), "eval.metrics: no evaluator 'likelyhood'; did you mean 'likelihood'"),
        (("likelihood@vall",), "'likelihood@vall': no split 'vall'; did you mean 'val'"),
        (("likelihood@val/ten",), "'likelihood@val/ten': 'ten' is no number of steps"),
        (("likelihood@val/-1",), "'-1' is no number of steps"),
        (("likelihood@/5",), "'likelihood@/5' is not NAME, NAME@SPLIT or NAME@SPLIT/EVERY"),
        (("likelihood", "likelihood@val/7"), "names 'likelihood' on val twice"),
    ],
)
def test_entries_that_are_refused(entries, message):
    with pytest.raises(UserError, match=message):
        eval_plans(EvalConfig(metrics=entries))


def test_best_metric_and_patience_are_checked_before_the_run(registered):
    registered("other", lambda context: {"loss": 1.0}).metric_names = lambda config: ["loss"]
    entries = ("likelihood", "likelihood@train/0")

    def refused(message, **fields):
        with pytest.raises(UserError, match=message):
            check_evaluators(make_config(**{f"eval__{k}": v for k, v in fields.items()}))

    check_evaluators(make_config(eval__metrics=entries, eval__best_metric="train/text/loss"))
    refused(
        "measures no 'trian/text/loss'; did you mean 'train/text/loss'",
        metrics=entries,
        best_metric="trian/text/loss",
    )
    refused(
        "eval.patience: 'train/text/loss' is measured after the last step only",
        metrics=entries,
        best_metric="train/text/loss",
        patience=2,
    )
    check_evaluators(
        make_config(eval__metrics=entries, eval__best_metric="text/loss", eval__patience=2)
    )
    refused("'likelihood' and 'other' both return 'loss'", metrics=("likelihood", "other"))
    with pytest.raises(UserError, match="eval.patience: needs eval.best_metric"):
        EvalConfig(patience=1)


def test_an_evaluator_that_cannot_run_says_so_before_the_run():
    with pytest.raises(UserError, match="eval.metrics: 'samples'.*data.order=image_first"):
        check_evaluators(make_config(eval__metrics=("samples",), data__order="image_first"))


def test_each_split_has_its_data_and_its_names(fake_data, registered):
    """A plain dict and an EvalResult are both taken; pictures are named by their split."""
    picture = np.full((2, 3, 3), 7, np.uint8)

    def where(context):
        return EvalResult({"split": float(len(context.pipeline.split))}, {"view": picture})

    registered("where", where)
    registered("plain", lambda context: {"one": 1.0})
    config = make_config(eval__metrics=("where", "plain", "where@train", "where@test/3"))
    setup = prepare(config)
    context = setup.eval_context({}, setup.eval_pipeline, setup.pipeline, setup.eval_others)
    result = run_evaluators(context, eval_plans(config.eval))
    assert result.values == {"split": 3, "one": 1, "train/split": 5, "test/split": 4}
    assert result.images.keys() == {"val/view", "train/view", "test/view"}
    assert evaluate(context) == result.values
    alone = on_split(config, "test")
    assert alone.eval.metrics == ("where", "plain")
    assert eval_plans(alone.eval)[0] == EvalPlan("where", "test", 6)


def test_eval_command_draws_and_takes_one_split(fake_data, registered, tmp_path, capsys):
    def view(context):
        return EvalResult(
            {"split": float(len(context.pipeline.split))}, {"view": np.zeros((1, 1, 3), np.uint8)}
        )

    registered("view", view)
    workdir = tmp_path / "run"
    train(make_config(eval__metrics=("view", "view@train/0"), train__steps=1), workdir)
    names = {path.relative_to(workdir).as_posix() for path in workdir.glob("samples/*/*")}
    assert names == {"samples/step_1/val_view.png", "samples/step_1/train_view.png"}
    capsys.readouterr()
    assert main(["eval", "--workdir", str(workdir), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["metrics"] == {"split": 3.0, "train/split": 5.0}
    assert main(["eval", "--workdir", str(workdir), "--split", "test", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["split"], document["metrics"]) == ("test", {"split": 4.0})
    assert document["images"] == [str(workdir / "samples/step_1/test_view.png")]


def test_clashes_and_pictures_of_another_kind_are_refused(fake_data, registered):
    registered("one", lambda context: {"value": 1.0})
    registered("two", lambda context: {"value": 2.0})
    registered("grey", lambda context: EvalResult({}, {"view": np.zeros((2, 2), np.uint8)}))
    setup = prepare(make_config(eval__metrics=("one", "two", "grey")))
    context = setup.eval_context({}, setup.eval_pipeline, setup.pipeline)
    plans = eval_plans(setup.config.eval)
    with pytest.raises(UserError, match="'one' and 'two' both return 'value'"):
        run_evaluators(context, plans[:2])
    with pytest.raises(ValueError, match=r"image 'view'.* uint8\[2, 2\], not uint8\[h,w,3\]"):
        run_evaluators(context, plans[2:])


def scores(metric, patience, values):
    rows = [{"step": i, f"eval/{metric.removeprefix('-')}": v} for i, v in enumerate(values, 1)]
    # Training rows, and evaluations that measure something else, do not count.
    rows.insert(2, {"step": 2, "train/loss": 0.0})
    rows.append({"step": 99, "eval/other": 0.0})
    config = EvalConfig(best_metric=metric, patience=patience)
    return Patience(config, rows)


def test_patience_counts_evaluations_without_a_better_value():
    tracked = scores("score", 3, [3.0, 1.0, 2.0, 1.0])
    assert (tracked.best, tracked.best_step, tracked.since) == (1.0, 2, 2), "a tie is no better"
    assert not tracked.exhausted
    tracked.note(5, {"score": 1.5})
    assert tracked.exhausted
    assert tracked.describe() == (
        "score is no better than 1.0000 at step 2 in 3 evaluations, of 3 allowed (eval.patience)"
    )
    tracked.note(6, {"score": 0.5})
    assert not tracked.exhausted
    tracked.note(7, {"score": math.nan})
    assert tracked.since == 0
    upwards = scores("-psnr", 1, [20.0, 24.0, 23.0])
    assert upwards.exhausted and "psnr is no better than 24.0000 at step 2" in upwards.describe()
    assert not scores("score", 0, [1.0, 2.0, 3.0]).exhausted
