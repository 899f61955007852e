"""The "routing" evaluator and routing.jsonl, on a small decoder with experts."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from moejax.analysis.routing import NONE, PairCounts, agreement, one_hot
from moejax.analysis.routing_record import RoutingRecord
from moejax.cli.main import main
from moejax.config.moe import MoEConfig, RouterLossConfig
from moejax.config.schema import DecoderConfig
from moejax.errors import UserError
from moejax.train.evaluate import check_evaluators, eval_plans, run_evaluators
from moejax.train.load import load
from moejax.train.loop import train
from moejax.train.routing import metric_names, routing_agreement
from moejax.train.setup import prepare

from .conftest import VOCABULARY, FakePipeline, make_config

EXPERTS, TOP_K = 4, 2
MODEL = DecoderConfig(
    vocab_size=VOCABULARY.size,
    num_layers=2,
    d_model=16,
    num_heads=2,
    ffn_hidden=(16,),
    block_pattern=("dense", "moe"),
    moe=MoEConfig(
        num_experts=EXPERTS,
        top_k=TOP_K,
        zero_experts=1,
        capacity="order",
        capacity_factor=0.75,
        eval_capacity_factor=0.75,
        losses=(RouterLossConfig("switch", 0.01),),
    ),
)


def config_of_experts(**fields):
    config = make_config(**{"eval__metrics": ("routing",), **fields})
    return dataclasses.replace(config, model=MODEL)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_run_logs_loads_and_cuts_them_when_it_goes_on(pictures, tmp_path, capsys):
    workdir = tmp_path / "run"
    values = train(config_of_experts(), workdir)
    rows = lines_of(workdir / "routing.jsonl")
    assert [row["step"] for row in rows] == [4, 8, 12]
    batches = [FakePipeline(config_of_experts(), "train").batch(step) for step in range(4)]
    counted = np.zeros(2)
    for batch in batches:
        np.add.at(counted, batch["modality"][batch["segments"] > 0], 1)
    (layer,) = rows[0]["layers"]
    assert layer["layer"] == 1 and "iteration" not in layer
    loads = np.asarray(layer["load"])
    assert loads.shape == (2, EXPERTS + 1) and loads.dtype == int
    assert loads.sum(axis=1).tolist() == (TOP_K * counted).tolist()
    metrics = lines_of(workdir / "metrics.jsonl")
    first = next(row for row in metrics if "train/router/drop_fraction" in row)
    assert layer["dropped"] / loads.sum() == pytest.approx(first["train/router/drop_fraction"])
    assert layer["dropped"] > 0

    # Of the evaluations: numbers, pictures, arrays.
    assert {f"eval/{name}" for name in metric_names(config_of_experts())} <= values.keys()
    assert values["eval/routing/token_entropy"] <= values["eval/routing/expert_entropy"] + 1e-9
    found = {path.relative_to(workdir).as_posix() for path in workdir.glob("[as]*/*/*")}
    assert found == {
        name.format(step)
        for step in (6, 12)
        for name in (
            "arrays/step_{}/val_routing.npz",
            "samples/step_{}/val_routing_experts.png",
            "samples/step_{}/val_routing_together.png",
        )
    }

    # Gone on with after step 10: what was written later is cut, and written again, the same.
    whole = (workdir / "routing.jsonl").read_text()
    shutil.rmtree(workdir / "checkpoints" / "12")
    with (workdir / "routing.jsonl").open("a") as file:
        file.write('{"step": 16, "layers": []}\n{"step": 20, "lay')
    train(config_of_experts(), workdir)
    assert "resumed from step 10" in capsys.readouterr().out
    assert (workdir / "routing.jsonl").read_text() == whole

    # The same from the command line, for what the config does not name.
    shutil.rmtree(workdir / "arrays")
    argv = ["eval", "--workdir", str(workdir), "--metrics", "routing@test", "--json"]
    assert main(argv) == 0
    document = json.loads(capsys.readouterr().out)
    assert "test/routing/entropy" in document["metrics"]
    assert document["arrays"] == [str(workdir / "arrays/step_12/test_routing.npz")]
    assert main(["eval", "--workdir", str(workdir), "--metrics", "rooting"]) == 2
    assert "eval.metrics: no evaluator 'rooting'; did you mean 'routing'" in capsys.readouterr().err

    # Between checkpoints: a share of tokens; with itself, all.
    last, before = load(workdir), load(workdir, 10)
    context = last.eval_context()
    assert routing_agreement(context, last.params, last.params)["first"].tolist() == [1]
    found = routing_agreement(context, before.params, last.params)
    assert 0 < found["first"][0] <= 1 and 0 < found["overlap"][0] <= 1


def test_evaluation_counts_what_the_model_chose(pictures):
    """Against the recorded choices, counted anew; filler rows count for nothing."""
    batch_of = pictures.whole_batch

    def with_filler(self, step):
        batch = batch_of(self, step)
        batch["weights"][[3, 6]] = 0
        return batch

    pictures.whole_batch = with_filler
    config = config_of_experts(eval__batches=2)
    setup = prepare(config)
    context = setup.eval_context(
        setup.recipe.create().params, setup.eval_pipeline, setup.pipeline, setup.eval_others
    )
    result = run_evaluators(context, eval_plans(config.eval))
    assert set(result.values) == set(metric_names(config))
    assert result.images.keys() == {"val/routing_experts", "val/routing_together"}
    record = RoutingRecord(**result.arrays["val/routing"])

    apply = jax.jit(
        lambda batch: context.model.apply({"params": context.params}, batch, record=True)
    )
    by_token, pairs, dropped, tokens = PairCounts(EXPERTS + 1), np.zeros((5, 5)), 0, np.zeros(2)
    by_modality = np.zeros((2, EXPERTS + 1))
    for batch in context.pipeline.eval_batches(2):
        with jax.set_mesh(context.mesh):
            real = {
                **batch,
                "segments": batch["segments"] * ~np.isin(np.arange(8), (3, 6))[:, None],
            }
            router = apply(real).aux["segment_0"]["block_1"]["moe"]["router"]
        valid = real["segments"] > 0
        chosen, kept = (np.asarray(router[k][0])[valid] for k in ("chosen_ids", "expert_ids"))
        by_token.add(batch["tokens"][valid], one_hot(chosen, EXPERTS + 1))
        for a, b in chosen:
            pairs[a, b] += 1
            pairs[b, a] += 1
        dropped += (kept == EXPERTS + 1).sum()
        np.add.at(tokens, batch["modality"][valid], 1)
        np.add.at(by_modality, (batch["modality"][valid][:, None], chosen), 1)
    assert record.tokens.tolist() == tokens.tolist()
    off_diagonal = record.together[0] * (1 - np.eye(5, dtype=int))
    assert off_diagonal.tolist() == pairs.tolist()
    marginal, given = by_token.entropies()
    assert result.values["routing/expert_entropy"] == pytest.approx(marginal)
    assert result.values["routing/token_entropy"] == pytest.approx(given)
    for name, counts in zip(config.model.modalities, by_modality, strict=True):
        share = counts[counts > 0] / counts.sum()
        used = np.exp(-(share * np.log(share)).sum())
        assert result.values[f"routing/{name}/experts_used"] == pytest.approx(used)
    assert record.dropped.sum() == dropped > 0
    assert result.values["routing/drop_fraction"] == pytest.approx(dropped / record.choices.sum())
    shares = record.load()[0]
    assert result.values["routing/null_fraction"] == pytest.approx(shares[EXPERTS])
    ffn = shares[:EXPERTS]
    assert result.values["routing/max_violation"] == pytest.approx(ffn.max() / ffn.mean() - 1)
    assert record.weightless.tolist() == ["zero 0"] and record.num_ffn.tolist() == [EXPERTS]
    assert record.expert_name(0, EXPERTS) == "zero 0"

    # Rows that are kept: pieces of text, pictures, experts by weight; nothing of padding.
    assert record.row_experts.shape == (1, 4, 16, TOP_K)
    assert (record.row_experts[0][~record.row_valid] == NONE).all()
    assert record.row_valid.any(axis=1).tolist() == [True, True, True, False]
    assert set(record.row_pieces[record.row_modality == 0]) <= set("abcd")
    assert set(record.row_pieces[record.row_modality == 1]) == {""}
    row, start = record.places[0]
    codes = record.row_tokens[row, start : start + 4] - VOCABULARY.image_offset
    assert record.pictures[0, :, :, 0].ravel().tolist() == codes.tolist()
    assert (row, start) == (0, 8)


def test_agreement_is_weighted_by_tokens(pictures):
    config = config_of_experts(eval__batches=2)
    setup = prepare(config)
    first, second = (setup.recipe.create().params for _ in range(2))
    # Routers of another sign choose the other experts.
    flipped = jax.tree_util.tree_map_with_path(
        lambda path, leaf: -leaf if "router" in jax.tree_util.keystr(path) else leaf, second
    )
    context = setup.eval_context({}, setup.eval_pipeline, setup.pipeline, setup.eval_others)
    assert routing_agreement(context, first, second)["first"].tolist() == [1]
    found = routing_agreement(context, first, flipped)
    assert found["first"][0] < 0.2 and found["overlap"][0] < 0.5
    records = []
    for params in (first, flipped):
        result = run_evaluators(context.with_params(params), eval_plans(config.eval))
        records.append(RoutingRecord(**result.arrays["val/routing"]))
    of_rows = records[0].agreement(records[1])
    valid = records[0].row_valid
    assert of_rows is not None
    assert of_rows[0] == agreement(*(r.row_experts[0][valid] for r in records)) < 0.3


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "'routing' needs a model with experts, and model.name=decoder has none"),
        ({"moe": MODEL.moe}, "'routing' needs a block with experts; model.block_pattern"),
    ],
)
def test_a_model_without_experts_is_refused(pictures, model, message):
    model = dataclasses.replace(MODEL, **{"moe": MoEConfig(), "block_pattern": ("dense",), **model})
    config = dataclasses.replace(config_of_experts(), model=model)
    with pytest.raises(UserError, match=f"^eval.metrics: {message}"):
        check_evaluators(config)
        run_on(config)


def run_on(config):
    setup = prepare(config)
    context = setup.eval_context(
        setup.recipe.create().params, setup.eval_pipeline, setup.pipeline, setup.eval_others
    )
    run_evaluators(context, eval_plans(config.eval))


def test_a_dense_run_has_no_routing_log(fake_data, tmp_path):
    train(make_config(train__steps=1), tmp_path / "run")
    assert not (tmp_path / "run" / "routing.jsonl").exists()
    assert not (tmp_path / "run" / "arrays").exists()
