"""Blocks that tokens skip: reductions, who is changed, causality, and decoding with caches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.analysis.jaxpr_flops import inner_jaxprs
from moejax.config.moe import MoEConfig
from moejax.config.schema import Config, DecoderConfig, MeshConfig, NextTokenConfig
from moejax.errors import UserError
from moejax.generate.cache import init_cache, write_rows
from moejax.models.decoder import build_decoder
from moejax.objectives import build_objective
from moejax.ops.attention import multimodal_mask
from moejax.parallel.mesh import make_mesh
from moejax.parallel.rules import state_shardings

from .depth_models import LENGTH, ROWS, Block, best, changed, decoder, draw, taken, tokens

EXPERT = {"gate": "sigmoid", "gate_scale": 0.1, "branch": "whole"}


def test_all_tokens_with_weight_one_are_the_block_itself():
    block = Block(decoder(depth={"capacity": 1.0, "gate": "none"}))
    np.testing.assert_allclose(block(), block.inner(block.x, block.ctx), atol=1e-5)


@pytest.mark.parametrize("branch", ["delta", "whole"])
def test_chosen_tokens_run_the_block_among_themselves_and_the_others_are_untouched(branch):
    block = Block(decoder(depth={"branch": branch}))
    out, scores = np.asarray(block()), block.scores()
    index = best(scores, LENGTH // 2)
    expected = np.zeros((ROWS, LENGTH), bool)
    np.put_along_axis(expected, index, True, axis=1)
    np.testing.assert_array_equal(changed(out, block.x), expected)
    few = np.take_along_axis(np.asarray(block.x), index[..., None], axis=1)
    ran = np.asarray(block.inner(jnp.asarray(few), taken(block.ctx, index)))
    r = np.take_along_axis(scores, index, axis=1)[..., None]
    wanted = few + r * (ran - few if branch == "delta" else ran)
    got = np.take_along_axis(out, index[..., None], axis=1)
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_a_router_of_zeros_is_the_identity():
    block = Block(decoder())
    params = {**block.params, "router": jax.tree.map(jnp.zeros_like, block.params["router"])}
    np.testing.assert_array_equal(block(params), block.x)


def test_padding_never_runs_and_counts_for_nothing():
    block = Block(decoder())
    segments = block.batch["segments"].at[:, -4:].set(0)
    ctx = block.ctx.replace(
        segments_bt=segments, valid_bt=segments > 0, mask_bts=multimodal_mask(segments)
    )
    ran = changed(block(ctx=ctx), block.x)
    assert not ran[:, -4:].any()
    np.testing.assert_array_equal(ran.sum(axis=1), [4, 4])


def test_tokens_of_another_modality_always_run():
    config = decoder(depth={"modality": "image", "rounding": "down"})
    block = Block(config)
    ran, image = changed(block(), block.x), np.asarray(block.batch["modality"]) == 1
    assert ran[~image].all()
    np.testing.assert_array_equal((ran & image).sum(axis=1), image.sum(axis=1) // 2)


def test_each_run_of_pictures_has_its_own_share():
    config = decoder(depth={"modality": "image", "within": "run", "rounding": "up"})
    block = Block(config)
    modality = np.array([[0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0], [1] * 5 + [0] * 2 + [1] * 5])
    one = jnp.ones((ROWS, LENGTH), jnp.int32)
    ctx = block.ctx.replace(modality_bt=jnp.asarray(modality), segments_bt=one)
    ran = changed(block(ctx=ctx), block.x) & (modality == 1)
    frames = [ran[0, 1:4], ran[0, 6:10], ran[1, :5], ran[1, 7:]]
    assert [int(frame.sum()) for frame in frames] == [2, 2, 3, 3]


def test_segments_have_their_own_share():
    block = Block(decoder(depth={"within": "segment"}))
    ran = changed(block(), block.x)
    # Row 0 holds segments of 7 and 5 tokens.
    assert [int(ran[0, :7].sum()), int(ran[0, 7:].sum()), int(ran[1].sum())] == [3, 2, 6]


def test_rows_that_compete_depend_on_each_other_and_others_do_not():
    """Mixture of depths compares within a row; MoMa over the batch (arXiv 2407.21770)."""
    for group in (1, 2):
        block = Block(decoder(depth={"group": group}))
        raised = block.x.at[1].multiply(3.0)
        first, second = (changed(block(x=x), x)[0] for x in (block.x, raised))
        both = changed(block(), block.x)
        assert both.sum() == LENGTH
        assert np.array_equal(first, second) == (group == 1)


def test_tokens_of_rows_that_compete_do_not_see_each_other():
    block = Block(decoder(depth={"group": 2, "capacity": 1.0, "gate": "none"}))
    other = block(x=block.x.at[1].multiply(3.0))
    np.testing.assert_allclose(other[0], block()[0], atol=1e-6)
    np.testing.assert_allclose(block(), block.inner(block.x, block.ctx), atol=1e-5)


def test_skipped_tokens_are_weighed_where_asked():
    """p-MoD: text as it is, kept pictures weighed in the feed-forward branch, skipped ones w x."""
    config = decoder(
        depth={
            "modality": "image",
            "gate": "tanh_norm",
            "gate_scale": 0.2,
            "gate_on": "ffn",
            "weigh_skipped": True,
        }
    )
    block = Block(config)
    out, image = np.asarray(block()), np.asarray(block.batch["modality"]) == 1
    weight = 1 + 0.2 * np.tanh(block.scores())
    chosen = np.zeros_like(image)
    for b in range(ROWS):
        here = np.flatnonzero(image[b])
        order = here[np.argsort(-weight[b, here], kind="stable")]
        chosen[b, order[: len(here) // 2]] = True
    skipped = image & ~chosen
    x = np.asarray(block.x)
    np.testing.assert_allclose(out[skipped], (x * weight[..., None])[skipped], atol=1e-6)
    # A router that begins with zeros weighs nothing: with all kept it is the block.
    zeros = {**block.params, "router": jax.tree.map(jnp.zeros_like, block.params["router"])}
    everyone = Block(decoder(depth={**dataclasses.asdict(config.depth), "capacity": 1.0}))
    np.testing.assert_allclose(everyone(zeros), block.inner(block.x, block.ctx), atol=1e-5)


def test_gate_of_the_feed_forward_branch_is_not_of_the_attention():
    config = decoder(depth={"capacity": 1.0, "gate": "softmax", "gate_on": "ffn"})
    block = Block(config)
    off = jax.tree.map(jnp.zeros_like, block.params["block"]["ffn"])
    without = {**block.params, "block": {**block.params["block"], "ffn": off}}
    alone = np.asarray(block(without))
    whole = np.asarray(block.inner(block.x, block.ctx))
    gate = 1 / (1 + np.exp(-block.scores()))[..., None]
    np.testing.assert_allclose(block(), alone + gate * (whole - alone), atol=1e-4)


def test_who_finds_no_room_skips_lowest_scores_first_and_protected_ones_last():
    """Six places: of eight pictures four are chosen, of four two; text runs without a choice."""
    config = decoder(depth={"modality": "image", "room": 0.5})
    block = Block(config)
    modality = np.array([[1] * 8 + [0] * 4, [0, 0, 1, 0, 0, 1, 0, 1, 0, 1, 0, 0]])
    ctx = block.ctx.replace(modality_bt=jnp.asarray(modality))
    # Text is not weighed, so what it does is never nothing.
    ran, scores = changed(block(ctx=ctx), block.x), block.scores()
    expected = modality == 0
    # Row 0: all text, and the best two of the four pictures.
    expected[0, best(np.where(modality == 1, scores, -np.inf)[:1], 2)[0]] = True
    # Row 1: eight words want to run, and no picture finds room.
    expected[1] = False
    expected[1, best(np.where(modality == 0, scores, -np.inf)[1:], 6)[0]] = True
    np.testing.assert_array_equal(ran, expected)


def test_pictures_are_seen_in_both_directions_inside_of_the_block():
    block = Block(decoder(depth={"gate": "none"}))
    image_id = np.array([[0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0], [1] * 5 + [0] + [2] * 6])
    one = jnp.ones((ROWS, LENGTH), jnp.int32)
    images = jnp.asarray(image_id)
    ctx = block.ctx.replace(
        segments_bt=one, image_id_bt=images, mask_bts=multimodal_mask(one, images)
    )
    index = best(block.scores(), LENGTH // 2)
    few = jnp.take_along_axis(block.x, jnp.asarray(index)[..., None], axis=1)
    got = jnp.take_along_axis(block(ctx=ctx), jnp.asarray(index)[..., None], axis=1)
    wanted = block.inner(few, taken(ctx, index))
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    causal = block.inner(few, taken(ctx.replace(image_id_bt=None), index))
    seen = np.take_along_axis(image_id, index, axis=1) > 0
    assert np.abs(causal - wanted).max(axis=-1)[seen].max() > 1e-2


@pytest.mark.parametrize("name", ["mod", "expert"])
def test_capacity_falls_from_all_over_the_first_steps(name):
    """In a model: half a cosine from 1 over ten steps; without a step, and after it, as it is."""
    recursion = {"steps": 2, "router": "expert", "capacities": (1.0, 0.5)}
    config = {
        "mod": decoder(("mod",), {"warmup_steps": 10, "gate": "sigmoid"}),
        "expert": decoder(("recursive",), {**EXPERT, "warmup_steps": 10}, recursion),
    }[name]
    model = build_decoder(config)
    params = draw(jax.eval_shape(model.init, jax.random.key(0), whole_rows())["params"])

    @jax.jit
    def aux(step):
        out = model.apply({"params": params}, whole_rows(), train=True, step=step, record=True)
        return out.aux["segment_0"]["block_0"]["depth"]

    for step, share in ((0, 1.0), (5, 0.75), (10, 0.5), (1000, 0.5)):
        found = aux(jnp.int32(step))
        np.testing.assert_array_equal(found["sums"]["chosen"].ravel(), [share * ROWS * LENGTH])
        kept = np.asarray(found["kept"]).reshape(-1, ROWS, LENGTH)[-1]
        np.testing.assert_array_equal(kept.sum(axis=1), [share * LENGTH] * ROWS)


@functools.cache
def model_of(name: str):
    """(model, params) of a decoder around some kind of block."""
    ends = {"first_blocks": ("untied",), "last_blocks": ("untied",), "num_layers": 3}
    configs = {
        # Two layers that can be skipped in one scan.
        "router": decoder(("untied", "mod"), num_layers=4),
        "predictor": decoder(("untied", "mod"), {"causal_rule": "predictor"}),
        "threshold": decoder(("untied", "mod"), {"causal_rule": "threshold"}),
        "room": decoder(
            ("untied", "mod"), {"capacity": 0.25, "eval_room": 1.0, "router_bias": True}
        ),
        "experts": decoder(("mod:moe", "untied"), moe=MoEConfig(num_experts=2, top_k=1, hidden=16)),
        "expert": decoder(
            ("recursive",), EXPERT, {"steps": 3, "layers": 2, "router": "expert"}, **ends
        ),
        "shared": decoder(
            ("recursive",),
            EXPERT,
            {"steps": 3, "layers": 1, "router": "expert", "share_kv": True},
            **ends,
        ),
        "token": decoder(("recursive",), {}, {"steps": 3, "layers": 1, "router": "token"}, **ends),
        "updated": decoder(
            ("recursive",),
            {},
            {"steps": 3, "layers": 2, "router": "token", "share_kv": True, "update_kv": True},
            **ends,
        ),
    }
    model = build_decoder(configs[name])
    shapes = jax.eval_shape(model.init, jax.random.key(0), whole_rows())
    params = draw(shapes["params"])
    if name == "room":
        # More want to run the block than there is room for.
        own = params["stack"]["segment_0"]["block_1"]["router"]["own"]
        own["bias_k"] = jnp.full_like(own["bias_k"], 2.0)
    return model, params


def whole_rows() -> dict:
    """One segment a row, as in decoding."""
    return {**tokens(), "segments": jnp.ones((ROWS, LENGTH), jnp.int32)}


RULES = ("router", "predictor", "threshold", "experts", "expert", "shared", "token", "updated")


@pytest.mark.parametrize("name", RULES)
def test_training_sees_the_future_and_decoding_does_not(name):
    model, params = model_of(name)
    batch, at = whole_rows(), 8
    other = {
        **batch,
        "tokens": batch["tokens"].at[:, at].set(16 + (batch["tokens"][:, at] - 9) % 24),
    }
    forward = jax.jit(
        lambda batch, train: model.apply({"params": params}, batch, train=train).logits,
        static_argnames="train",
    )
    moved = {
        train: np.abs(forward(batch, train=train) - forward(other, train=train)).max(axis=(0, 2))
        for train in (False, True)
    }
    assert moved[False][:at].max() == 0 and moved[False][at] > 1e-3
    # The highest scores are those of all tokens; how often a token runs by itself, by arg max, not.
    assert (moved[True][:at].max() > 1e-3) == (name not in ("token", "updated"))


@pytest.mark.parametrize("name", [*RULES, "room"])
def test_prefill_and_decoding_equal_the_full_forward(name):
    """Sequences that take different ways, in caches of unequal length."""
    model, params = model_of(name)
    batch, known = whole_rows(), 5
    full = jax.jit(lambda b: model.apply({"params": params}, b).logits)(batch)
    part = lambda a, z: {key: value[:, a:z] for key, value in batch.items() if key != "weights"}
    prefill = jax.jit(lambda b: model.apply({"params": params}, b, row_length=LENGTH).rows)
    rows = prefill(part(0, known))
    cache = init_cache(model, params, ROWS, LENGTH)
    cache = write_rows(cache, rows, jnp.full((ROWS,), known))
    step = jax.jit(lambda b, c: model.apply({"params": params}, b, cache=c))
    for t in range(known, LENGTH):
        out = step(part(t, t + 1), cache.rows)
        np.testing.assert_allclose(out.logits[:, 0], full[:, t], atol=1e-4)
        cache = write_rows(cache, out.rows, jnp.ones((ROWS,), jnp.int32))
    filled = [
        np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(cache.rows)
        if path[-1].key == "filled"
    ]
    assert any((leaf == LENGTH).all() for leaf in filled)
    # All but shared keys: some layer has seen fewer tokens, of some models of each row others.
    all_of_them = name in ("shared", "updated")
    assert any((leaf < LENGTH).any() for leaf in filled) != all_of_them
    if name in ("predictor", "experts", "expert", "token"):
        assert any(np.ptp(leaf) > 0 for leaf in filled)
    if name == "room":
        slots = {leaf.shape[-3] for leaf in jax.tree.leaves(cache.rows) if leaf.ndim == 5}
        assert slots == {LENGTH, 3}


def choices(jaxpr):
    """All ``cond`` of a program, those inside of loops and branches too."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "cond":
            yield eqn
        for inner in inner_jaxprs(eqn):
            yield from choices(inner)


@pytest.mark.parametrize("name", ["router", "expert"])
def test_decoding_reads_weights_after_the_choice(name):
    """Stacks of all layers go into it; one layer that is taken out before is copied in any case."""
    model, params = model_of(name)
    cache = init_cache(model, params, ROWS, LENGTH)
    one = {key: value[:, :1] for key, value in whole_rows().items() if key != "weights"}
    step = jax.make_jaxpr(lambda p: model.apply({"params": p}, one, cache=cache.rows).logits)
    given = {var.aval.shape for eqn in choices(step(params)) for var in eqn.invars}
    stack = params["stack"]
    skipped = {
        "router": lambda: stack["segment_0"]["block_1"]["block"],
        "expert": lambda: stack["segment_1"]["block_0"]["layers"]["stack"]["segment_0"]["block_0"],
    }[name]()
    shape = max(jax.tree.leaves(skipped), key=jnp.size).shape
    assert shape in given and not {shape[1:], shape[2:]} & given


@pytest.mark.parametrize("name", ["router", "expert"])
def test_decoding_on_a_mesh_is_that_of_one_device(name):
    model, params = model_of(name)
    batch = {key: value for key, value in whole_rows().items() if key != "weights"}
    before, last = ({k: v[:, a:z] for k, v in batch.items()} for a, z in ((0, -1), (-1, None)))
    rows = jax.jit(lambda b: model.apply({"params": params}, b).rows)(before)
    cache = init_cache(model, params, ROWS, LENGTH)
    cache = write_rows(cache, rows, jnp.full((ROWS,), LENGTH - 1))
    step = lambda p, c: model.apply({"params": p}, last, cache=c).logits
    expected = jax.jit(step)(params, cache.rows)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    boxed = jax.eval_shape(model.init, jax.random.key(0), whole_rows())["params"]
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, state_shardings(mesh, boxed))
        got = jax.jit(step)(sharded, cache.rows)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_cache_that_is_full_skips_the_block():
    config = decoder(("untied", "mod"), {"capacity": 0.25, "eval_room": 1.0, "router_bias": True})
    model = build_decoder(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), whole_rows())
    params = draw(shapes["params"])
    # Everyone wants to run the block; 3 of 12 find room.
    bias = params["stack"]["segment_0"]["block_1"]["router"]["own"]
    bias["bias_k"] = jnp.full_like(bias["bias_k"], 100.0)
    out = model.apply({"params": params}, whole_rows(), record=False)
    kept = out.rows["segment_0"]["block_1"]["cache"]["kept"]
    np.testing.assert_array_equal(kept, np.ones((1, ROWS, 3), bool))
    cache = init_cache(model, params, ROWS, LENGTH)
    cache = write_rows(cache, out.rows, jnp.full((ROWS,), LENGTH))
    one = {key: value[:, -1:] for key, value in whole_rows().items() if key != "weights"}
    again = model.apply({"params": params}, one, cache=cache.rows)
    assert not again.rows["segment_0"]["block_1"]["cache"]["kept"].any()
    assert np.isfinite(again.logits).all()


def objective_of(config: DecoderConfig):
    return build_objective(Config(model=config, objective=NextTokenConfig()))


def test_a_predictor_learns_from_the_model_and_teaches_it_nothing():
    model, params = model_of("predictor")
    objective = objective_of(model.config)
    batch = tokens()

    @jax.jit
    def causal(params):
        out = model.apply({"params": params}, batch, train=True)
        return objective(out, batch).derived_values()["depth/causal"]

    slopes = jax.tree_util.tree_leaves_with_path(jax.grad(causal)(params))
    for path, slope in slopes:
        learns = str(path[-1].key).startswith("predictor_")
        assert bool((slope != 0).any()) == learns, path


def test_losses_and_counts_of_the_routers():
    model, params = model_of("expert")
    objective, batch = objective_of(model.config), tokens()
    out = jax.jit(lambda p: model.apply({"params": p}, batch, train=True))(params)
    losses = objective(out, batch)
    values = {name: float(value) for name, value in losses.derived_values().items()}
    sums = out.aux["segment_1"]["block_0"]["depth"]["sums"]
    # 12 tokens compete for 8 places, those for 4, in each of two rows.
    np.testing.assert_array_equal(sums["count"], [[24, 16]])
    np.testing.assert_array_equal(sums["chosen"], [[16, 8]])
    nats = np.asarray(sums["cross_entropy"] / sums["count"])
    assert values["depth/causal"] == pytest.approx(nats.mean(), rel=1e-5)
    assert values["depth/chosen"] == pytest.approx((16 / 24 + 8 / 16) / 2)
    coefficients = {term.name: term.coefficient for term in losses.derived}
    assert coefficients["depth/causal"] == pytest.approx(2 * model.config.depth.causal_loss)
    assert coefficients["depth/agreement"] == 0


def test_configs_that_cannot_be():
    for recursion, message in (
        ({"steps": 2, "router": "token", "capacities": (1.0, 0.5)}, "capacities: are of"),
        ({"steps": 2, "router": "expert", "room": 0.5}, "room: and gate_steps are of"),
    ):
        with pytest.raises(UserError, match=f"model.recursion.{message}"):
            decoder(recursion=recursion)
    for changes, message in (
        ({"depth": {"group": 2}}, "model.depth.group: is of 'mod', not of 'recursive'"),
        ({"depth": {"block": "moe"}}, "model.depth.block: 'moe' cannot be run several times"),
    ):
        with pytest.raises(UserError, match=message):
            build_decoder(decoder(("recursive",), moe=MoEConfig(num_experts=2), **changes))
    with pytest.raises(UserError, match="only 'mod' has a capacity"):
        build_decoder(decoder(("recursive:0.5",)))
    for depth, message in (
        ({"within": "run"}, "model.depth.within: 'run' is about tokens of one modality"),
        ({"gate_on": "ffn", "branch": "whole"}, "model.depth.branch: is 'delta' where"),
        ({"random_choice": True}, "model.depth.causal_rule: is 'none' where tokens are chosen at"),
        ({"capacity": 1.5}, r"model.depth.capacity: must be in \(0, 1\], got 1.5"),
        ({"block": "mod"}, "model.depth.block: 'mod' is itself about other blocks"),
        ({"gate": "relu"}, "model.depth.gate: "),
        ({"modality": "image", "eval_room": 2.0}, "model.depth.eval_room: is 0 or at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            decoder(depth=depth)
    with pytest.raises(UserError, match="model.depth.modality: "):
        build_decoder(decoder(depth={"modality": "smell"}))
    with pytest.raises(UserError, match="'0.x' is no number"):
        decoder(("mod:0.x:untied",)).for_block("mod:0.x:untied")
    with pytest.raises(UserError, match="model.recursion.capacities: needs one share for each"):
        decoder(recursion={"steps": 3, "router": "expert", "capacities": (1.0, 0.5)})
    with pytest.raises(UserError, match="model.recursion.capacities: must not rise"):
        decoder(recursion={"steps": 2, "router": "expert", "capacities": (0.5, 1.0)})
