"""The "attention_rank" evaluator on small decoders, some of whose layers look at nothing else."""

import dataclasses
import json
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.cli.common import command_parser
from moejax.cli.main import main
from moejax.config.depth import DepthConfig, RecursionConfig
from moejax.config.load import load_config
from moejax.config.moe import MoEConfig
from moejax.config.schema import DecoderConfig
from moejax.errors import UserError
from moejax.train import attention_rank
from moejax.train.attention_rank import BATCHES, ROWS, metric_names, overrides, propose
from moejax.train.evaluate import check_evaluators, eval_plans, run_evaluators
from moejax.train.loop import train
from moejax.train.rank_picture import draw_ranks
from moejax.train.setup import prepare

from .conftest import VOCABULARY, make_config

LENGTH = 16
# Three segments; the second is scanned twice over a period of two.
MODEL = DecoderConfig(
    vocab_size=VOCABULARY.size,
    num_layers=6,
    d_model=16,
    num_heads=2,
    ffn_hidden=(16,),
    first_blocks=("dense",),
    block_pattern=("dense", "untied"),
    last_blocks=("dense",),
)

SMALL = dataclasses.replace(
    MODEL, num_layers=2, first_blocks=(), block_pattern=("dense",), last_blocks=()
)


def config_of(model=MODEL, **fields):
    config = make_config(**{"eval__metrics": ("attention_rank",), "eval__batches": 3, **fields})
    return dataclasses.replace(config, model=model)


def context_of(config):
    setup = prepare(config)
    params = setup.recipe.create().params
    return setup.eval_context(params, setup.eval_pipeline, setup.pipeline, setup.eval_others)


def run_on(context):
    return run_evaluators(context, eval_plans(context.config.eval))


def test_maps_of_layers_that_share_no_attention_are_those_of_each_modality():
    rng = np.random.default_rng(0)
    draw = lambda: rng.normal(size=(1, 2, LENGTH, 2, 8)).astype(np.float32)
    own = {"q": draw(), "k": draw(), "kept": np.ones((1, 2, LENGTH), bool)}
    modality = rng.integers(0, 2, (2, LENGTH)).astype(np.int32)
    causal = np.broadcast_to(np.tril(np.ones((LENGTH, LENGTH), bool)), (2, LENGTH, LENGTH))
    apart = causal & (modality[:, :, None] == modality[:, None])
    ranks = attention_rank._of_attention({**own, "modality": modality[None]}, jnp.asarray(causal))
    expected = attention_rank._of_attention(own, jnp.asarray(apart))
    np.testing.assert_array_equal(ranks, expected)
    assert np.any(ranks != attention_rank._of_attention(own, jnp.asarray(causal)))


def looking_at_itself(params, segment, block, index):
    """The parameters, where in one layer each token gives all of its weight to itself."""
    params = jax.tree.map(np.array, params)
    attention = params["stack"][f"segment_{segment}"][f"block_{block}"]["attention"]
    heads = MODEL.num_heads
    qkv = attention["qkv_mdnh"][index]
    qkv[:, :, heads : 2 * heads] = qkv[:, :, :heads]
    for norm in ("q_norm", "k_norm"):
        attention[norm]["scale_md"][index] = 100
    return params


def test_layers_that_look_at_themselves_are_proposed(fake_data):
    context = context_of(config_of())
    params = context.params
    # Layers 2 and 3 are the first period's second block and the second period's first.
    for place in ((1, 1, 0), (1, 0, 1), (2, 0, 0)):
        params = looking_at_itself(params, *place)
    result = run_on(context.with_params(params))
    assert list(result.values) == metric_names(context.config)
    ranks = [result.values[f"attention_rank/layer_{layer}"] for layer in range(6)]
    assert ranks[2] == ranks[3] == ranks[5] == 0
    assert all(3 < ranks[layer] <= LENGTH - 1 for layer in (0, 1, 4))
    (note,) = result.notes
    assert note.startswith("attention_rank: layers of the lowest rank: 2, 3, 5; as mixtures")
    assert result.images.keys() == {"val/attention_rank"}


def test_ranks_by_numpy(fake_data):
    """Of the maps as they are defined; rows that only fill up the batch are not counted."""
    batch_of = fake_data.whole_batch

    def with_filler(self, step):
        batch = batch_of(self, step)
        batch["weights"][[1, 6]] = 0
        batch["segments"][2, 5:] *= 2
        return batch

    fake_data.whole_batch = with_filler
    context = context_of(config_of())
    found = run_on(context).values
    apply = jax.jit(
        lambda params, batch: context.model.apply({"params": params}, batch, record=True).rows
    )
    for layer, (segment, block, index) in {1: (1, 0, 0), 4: (1, 1, 1)}.items():
        ranks = []
        for batch in context.pipeline.eval_batches(BATCHES):
            with jax.set_mesh(context.mesh):
                rows = apply(context.params, batch)[f"segment_{segment}"][f"block_{block}"]
            q, k = (np.asarray(rows["cache"][name][index]) for name in ("q", "k"))
            segments = batch["segments"]
            for row in (0, 2, 3):
                own = segments[row] > 0
                same = segments[row][:, None] == segments[row][None]
                seen = np.tril(same)[own][:, own]
                for head in range(MODEL.num_heads):
                    logits = q[row, own, head] @ k[row, own, head].T / np.sqrt(q.shape[-1])
                    weights = np.where(seen, np.exp(logits - logits.max(1, keepdims=True)), 0)
                    maps = weights / weights.sum(1, keepdims=True)
                    ranks.append(np.linalg.matrix_rank(np.tril(maps, -1).astype(np.float32)))
        assert len(ranks) == BATCHES * (ROWS - 1) * MODEL.num_heads
        # Values at the edge of the tolerance may fall on either side of it.
        assert found[f"attention_rank/layer_{layer}"] == pytest.approx(np.mean(ranks), abs=0.1)


def test_queries_come_out_where_they_are_asked_for(fake_data):
    context = context_of(config_of(SMALL))
    batch = next(iter(context.pipeline.eval_batches(1)))
    apply = lambda **options: context.model.apply({"params": context.params}, batch, **options)
    with jax.set_mesh(context.mesh):
        plain, recorded = jax.jit(lambda: (apply(), apply(record=True)))()
        trained = jax.eval_shape(lambda: apply(train=True, record=True))
    rows = lambda out: set(out.rows["segment_0"]["block_0"]["cache"])
    assert rows(plain) == {"k", "v", "kept"} and rows(recorded) == {"k", "v", "kept", "q"}
    assert jax.tree.leaves(trained.rows) == []
    np.testing.assert_array_equal(plain.logits, recorded.logits)


def test_blocks_that_some_tokens_skip_are_left_out(fake_data):
    model = dataclasses.replace(
        SMALL, num_layers=4, block_pattern=("dense", "mod:dense"), depth=DepthConfig(capacity=0.5)
    )
    context = context_of(config_of(model))
    result = run_on(context)
    assert list(result.values) == metric_names(context.config)
    assert list(result.values) == ["attention_rank/layer_0", "attention_rank/layer_2"]
    # Half of the layers are what would be proposed.
    assert "nothing to propose" in result.notes[0]


def test_recursive_blocks_are_left_out(fake_data):
    model = dataclasses.replace(
        SMALL,
        num_layers=3,
        first_blocks=("dense",),
        block_pattern=("recursive:dense",),
        last_blocks=("dense",),
        recursion=RecursionConfig(steps=2, layers=1, router="expert"),
    )
    result = run_on(context_of(config_of(model)))
    assert list(result.values) == ["attention_rank/layer_0", "attention_rank/layer_2"]
    assert all(0 < rank <= LENGTH - 1 for rank in result.values.values())


def test_two_attentions_of_a_block_are_one_layer(fake_data):
    model = dataclasses.replace(
        SMALL,
        num_layers=1,
        block_pattern=("shortcut_moe",),
        norm_placement="pre",
        moe=MoEConfig(num_experts=2, top_k=1),
    )
    result = run_on(context_of(config_of(model)))
    assert 0 < result.values["attention_rank/layer_0"] <= LENGTH - 1


def test_how_many_are_proposed():
    def proposed(num_layers, mod=0):
        pattern = ("mod",) * mod + ("untied",) * (num_layers - mod)
        model = DecoderConfig(num_layers=num_layers, block_pattern=pattern)
        return propose(model, {layer: -float(layer) for layer in range(mod, num_layers)})

    # The release converts all of 32 layers but four.
    assert proposed(32) == tuple(range(4, 32))
    assert proposed(12) == tuple(range(4, 12))
    assert proposed(6) == (3, 4, 5) and proposed(4) == (2, 3) and proposed(1) == ()
    assert proposed(12, mod=5) == (9, 10, 11) and proposed(12, mod=8) == ()


def test_the_fields_can_be_pasted():
    config = load_config("chameleon")
    model = dataclasses.replace(config.model, num_layers=6)
    fields = shlex.split(" ".join(overrides(model, (3, 4))))
    parser = command_parser("train", "")
    given = ["--config", "chameleon", "--config.model.num_layers=6", *fields]
    parsed = parser.parse(given)
    kinds = load_config(parsed.config, parsed.overrides).model.block_kinds()
    assert kinds == ("untied", "untied", "untied", "mod", "mod", "untied")
    experts = dataclasses.replace(
        MODEL, block_pattern=("moe:4", "dense"), moe=MoEConfig(num_experts=2)
    )
    assert "'mod:moe:4'" in " ".join(overrides(experts, (1,)))


def test_the_command_says_what_it_proposes(fake_data, tmp_path, capsys):
    workdir = tmp_path / "run"
    train(config_of(SMALL, train__steps=1), workdir)
    assert "attention_rank: layers of the lowest rank" in capsys.readouterr().out
    command = ["eval", "--workdir", str(workdir), "--metrics", "attention_rank"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "as mixtures of depths: --config.model." in said
    assert str(workdir / "samples/step_1/val_attention_rank.png") in said
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["notes"][0] in said


def test_bars_are_as_long_as_ranks():
    picture = draw_ranks({0: 10.0, 2: 5.0}, ("untied", "mod", "untied"), (2,), 8, 21, "--config")
    blue, orange = (143, 184, 216), (213, 94, 0)
    wide = [(picture == color).all(axis=2).sum(axis=1).max() for color in (blue, orange)]
    assert wide[0] == pytest.approx(2 * wide[1], abs=2)
    assert wide[0] == pytest.approx(210, abs=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_pattern": ("mod:dense",)}, "'attention_rank' needs blocks with attention"),
        (
            {"block_pattern": ("moe", "moe"), "moe": MoEConfig(num_experts=2, pool_layers=2)},
            "'attention_rank' proposes other blocks",
        ),
    ],
)
def test_models_that_are_refused(changes, message):
    model = dataclasses.replace(SMALL, **changes)
    with pytest.raises(UserError, match=f"^eval.metrics: {message}"):
        check_evaluators(config_of(model))


def test_a_tokenizer_is_refused():
    with pytest.raises(UserError, match="'attention_rank' needs blocks with attention"):
        check_evaluators(load_config("tokenizer_fsq", {"eval.metrics": "('attention_rank',)"}))
