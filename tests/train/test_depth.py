"""The "depth" evaluator on small decoders whose tokens skip blocks."""

import dataclasses

import numpy as np
import pytest

from moejax.config.depth import DepthConfig, RecursionConfig
from moejax.config.schema import DecoderConfig
from moejax.errors import UserError
from moejax.train.depth import kept_of, metric_names
from moejax.train.depth_pictures import draw_tokens
from moejax.train.evaluate import check_evaluators, eval_plans, run_evaluators
from moejax.train.load import load
from moejax.train.loop import train

from .conftest import VOCABULARY, make_config

MOD = DecoderConfig(
    vocab_size=VOCABULARY.size,
    num_layers=4,
    d_model=16,
    num_heads=2,
    ffn_hidden=(16,),
    block_pattern=("dense", "mod:dense"),
    depth=DepthConfig(capacity=0.5),
)
MOR = dataclasses.replace(
    MOD,
    num_layers=3,
    first_blocks=("dense",),
    block_pattern=("recursive:dense",),
    last_blocks=("dense",),
    recursion=RecursionConfig(steps=2, layers=1, router="expert"),
)


def config_of(model, **depth):
    config = make_config(eval__metrics=("likelihood", "depth"), train__steps=4)
    own = dataclasses.replace(model, depth=dataclasses.replace(model.depth, **depth))
    return dataclasses.replace(config, model=own)


@pytest.mark.slow
@pytest.mark.parametrize("model", [MOD, MOR], ids=["mod", "mor"])
def test_losses_with_and_without_sight(model, pictures, tmp_path):
    values = train(config_of(model), tmp_path / "run")
    found = {name: values[f"eval/depth/{name}"] for name in ("loss", "loss_as_trained")}
    # Evaluations follow the causal rule.
    assert found["loss"] == pytest.approx(values["eval/loss"], rel=1e-6)
    assert found["loss_as_trained"] != found["loss"]
    own = {name.removeprefix("eval/") for name in values if name.startswith("eval/depth/")}
    assert own <= set(metric_names(config_of(model)))
    assert 0 <= values["eval/depth/agreement"] <= 1
    # Of the tokens that compete half are chosen, less what is rounded off.
    assert 0.3 < values["eval/depth/chosen"] <= 0.5
    context = load(tmp_path / "run").eval_context()
    result = run_evaluators(context, eval_plans(context.config.eval))
    assert {"val/depth_blocks", "val/depth_tokens"} <= set(result.images)
    assert result.values["depth/ran"] == pytest.approx(values["eval/depth/ran"])


def test_choices_of_training_have_no_price(pictures, tmp_path):
    values = train(config_of(MOD, causal_rule="none"), tmp_path / "run")
    assert values["eval/depth/loss"] == values["eval/depth/loss_as_trained"]
    assert values["eval/depth/ran"] == pytest.approx(values["eval/depth/chosen"], abs=0.02)


def test_blocks_in_the_order_of_the_layers():
    one = np.zeros((2, 1, 3), bool)
    kept = kept_of(MOD, {"segment_0/block_1": one})
    assert list(kept) == ["layer 1", "layer 3"]
    steps = np.arange(6).reshape(1, 2, 1, 3)
    kept = kept_of(MOR, {"segment_1/block_0": steps})
    assert list(kept) == ["layer 1, step 1", "layer 1, step 2"]
    np.testing.assert_array_equal(kept["layer 1, step 2"], steps[0, 1])


def test_what_skipped_is_faded():
    kept = np.zeros((1, 1, 5), bool)
    kept[0, 0, 1:3] = True
    image = draw_tokens(
        names=["layer 1"],
        kept=kept,
        pieces=np.array([["", "", "", "", "word"]]),
        valid=np.ones((1, 5), bool),
        pictures=np.zeros((1, 2, 2, 3), np.uint8),
        places=np.array([[0, 0]]),
        grid=np.array([2, 2]),
    )
    # The second line of pictures: tokens 1 and 2 of four ran, one at its top right, one below left.
    column = np.flatnonzero((image == 0).all(axis=(2,)).sum(axis=0) > 100)
    left, right = column[0], column[-1]
    second = np.flatnonzero((image[:, right] == 0).all(axis=1))
    rows = second[second > second[0] + 100]
    top = rows[0]
    assert (image[top + 5, right] == 0).all() and (image[top + 5, left] > 200).all()
    assert (image[top + 60, left] == 0).all() and (image[top + 60, right] > 200).all()


def test_a_model_without_such_blocks_is_refused():
    config = make_config(eval__metrics=("depth",))
    plain = dataclasses.replace(MOD, block_pattern=("dense",))
    with pytest.raises(UserError, match="eval.metrics: 'depth' needs a block that tokens can skip"):
        check_evaluators(dataclasses.replace(config, model=plain))
