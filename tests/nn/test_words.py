"""What patches take from words: the formulas by hand, padding, the order of words, no words."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from moejax.config import load_config
from moejax.config.contrastive import TextSizes
from moejax.config.depth import DepthConfig
from moejax.config.dit import DiTConfig, WordsConfig
from moejax.errors import UserError
from moejax.models.dit import build_dit
from moejax.nn.words import Words

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, S, Z, D, HEADS, E, F = 2, 5, 8, 16, 2, 3, 12
HEAD, PATCHES = D // HEADS, 16
THRESHOLD = 0.9
rng = np.random.default_rng(0)
X = rng.normal(size=(B, PATCHES, D)).astype(np.float32)
WORDS = rng.normal(size=(B, S, Z)).astype(np.float32)
SAID = np.arange(S)[None] < np.asarray([[5], [3]])


def make_config(**words) -> DiTConfig:
    fields = {"attend": True, "num_experts": E, "hidden": F, "threshold": THRESHOLD, **words}
    return DiTConfig(
        image_size=8,
        patch_size=2,
        num_layers=1,
        d_model=D,
        num_heads=HEADS,
        ffn_hidden=(24,),
        kernel_backend="reference",
        text_length=S,
        vocab_size=40,
        text=TextSizes(num_layers=1, d_model=Z),
        words=WordsConfig(**fields),
    )


def context_of(config, words=WORDS, said=SAID, **given):
    ctx = build_dit(config)._context(jnp.ones(B), jnp.zeros(B, bool), train=False)
    told = {"condition_bd": jnp.ones((B, D)), "words_bsz": jnp.asarray(words)}
    return ctx.replace(**told, said_bs=jnp.asarray(said), **given)


def parameters(config):
    """At random, with shifts and scales of 0 and gates of 1."""
    layer, ctx = Words(config), context_of(config)
    shapes = meta.unbox(jax.eval_shape(layer.init, jax.random.key(0), jnp.asarray(X), ctx))
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) * 0.5
    params = jax.tree.map(draw, shapes["params"])
    zeros, ones = np.zeros(D, np.float32), np.ones(D, np.float32)
    branches = 2 if config.words.num_experts else 1
    bias = np.concatenate([zeros, zeros, ones] * branches)
    params["modulation"] = {
        "weight_df": jnp.zeros((D, 3 * branches * D)),
        "bias_f": jnp.asarray(bias),
    }
    return params


CONFIG = make_config()
PARAMS = parameters(CONFIG)


def run(params=PARAMS, config=CONFIG, x=X, **told):
    apply = lambda params, x, ctx: Words(config).apply({"params": params}, x, ctx)
    return np.asarray(jax.jit(apply)(params, jnp.asarray(x), context_of(config, **told)))


def normed(x):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)


def by_hand(outside: bool) -> np.ndarray:
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), PARAMS)
    gelu = lambda h: np.asarray(jax.nn.gelu(jnp.asarray(h, jnp.float32)))
    expert = lambda e, x: gelu(x @ p["wi_edf"][e] + p["wi_bias_ef"][e]) @ p["wo_efd"][e]
    out = X.astype(np.float64)
    for b in range(B):
        words = WORDS[b][SAID[b]]
        maps = np.zeros((len(words), PATCHES))
        attended = np.zeros((PATCHES, D))
        for n in range(HEADS):
            q = normed(X[b]) @ p["query_dnh"][:, n]
            k, v = words @ p["key_value_zgh"][:, n], words @ p["key_value_zgh"][:, HEADS + n]
            weights = np.exp(q @ k.T / HEAD**0.5)
            weights /= weights.sum(axis=-1, keepdims=True)
            maps += weights.T / HEADS
            attended += weights @ v @ p["out_nhd"][n]
        out[b] += attended
        seen, made = normed(out[b]), np.zeros((PATCHES, D))
        for i, word in enumerate(words):
            mask = maps[i] > THRESHOLD * maps[i].max()
            assert 0 < mask.sum() < PATCHES
            e = (word @ p["gate_ze"]).argmax()
            of_word = expert(e, seen * mask[:, None]) + p["wo_bias_ed"][e]
            made += of_word if outside else of_word * mask[:, None]
        out[b] += made / len(words)
    return out


@pytest.mark.parametrize("outside", [True, False])
def test_word_by_word(outside):
    expected = by_hand(outside)
    np.testing.assert_allclose(run(config=make_config(outside=outside)), expected, atol=2e-4)
    assert np.abs(expected - by_hand(not outside)).max() > 0.1


def test_words_without_experts_are_attention_alone():
    config = dataclasses.replace(CONFIG, words=WordsConfig(attend=True))
    params = {name: PARAMS[name] for name in ("query_dnh", "key_value_zgh", "out_nhd")}
    params["modulation"] = parameters(config)["modulation"]
    nothing = {**PARAMS, "wo_efd": 0 * PARAMS["wo_efd"], "wo_bias_ed": 0 * PARAMS["wo_bias_ed"]}
    got = run(params, config)
    np.testing.assert_allclose(got, run(nothing), atol=1e-6)
    assert np.abs(got - X).max() > 0.1


def test_neither_the_order_of_words_nor_padding_is_of_account():
    order = np.asarray([3, 0, 4, 1, 2])
    plain = run()
    np.testing.assert_allclose(run(words=WORDS[:, order], said=SAID[:, order]), plain, atol=1e-5)
    padding = np.where(SAID[..., None], WORDS, WORDS[:, ::-1] + 1)
    np.testing.assert_array_equal(run(words=padding), plain)
    assert np.abs(run(words=WORDS + SAID[..., None]) - plain).max() > 0.1


def test_no_words_add_nothing():
    got = run(said=SAID & (np.arange(B) == 0)[:, None])
    np.testing.assert_array_equal(got[1], X[1])
    np.testing.assert_allclose(got[0], run()[0], atol=1e-6)


def test_both_branches_begin_shut():
    layer, ctx = Words(CONFIG), context_of(CONFIG)
    params = meta.unbox(jax.jit(layer.init)(jax.random.key(0), jnp.asarray(X), ctx))["params"]
    np.testing.assert_array_equal(run(params), X)
    for branch in range(2):
        gate = np.arange(6 * D) // D == 3 * branch + 2
        opened = {"weight_df": jnp.zeros((D, 6 * D)), "bias_f": jnp.asarray(gate, jnp.float32)}
        assert np.abs(run({**params, "modulation": opened}) - X).max() > 1e-2


def test_the_gate_and_the_words_learn():
    @jax.jit
    @jax.grad
    def gradient(told):
        ctx = context_of(CONFIG, words=told["words"])
        out = Words(CONFIG).apply({"params": told["params"]}, jnp.asarray(X), ctx)
        return jnp.square(out).sum()

    found = gradient({"params": PARAMS, "words": jnp.asarray(WORDS)})
    assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(found["params"]))
    assert (np.abs(found["words"]).max(axis=-1) > 1e-5)[SAID].all()
    np.testing.assert_array_equal(found["words"][~SAID], 0)


def test_noise_moves_the_gate_in_training_alone():
    noisy = make_config(noise=30.0)
    key = jax.random.key(1)
    in_training = {"train": True, "rng": key}
    np.testing.assert_array_equal(run(config=noisy, rng=key), run())
    assert np.abs(run(config=noisy, **in_training) - run()).max() > 0.05
    np.testing.assert_array_equal(run(config=make_config(noise=0.0), **in_training), run())


def test_patches_that_sit_a_block_out_are_no_places():
    """Whatever they are, the others' masks are the same."""
    valid = jnp.asarray(np.arange(PATCHES)[None] < np.asarray([[PATCHES], [6]]))
    other = np.where(valid[..., None], X, 5 * X[:, ::-1])
    plain, changed = (run(x=x, valid_bt=valid) for x in (X, other))
    np.testing.assert_array_equal(plain[valid], changed[valid])
    np.testing.assert_array_equal(plain[0], run()[0])


def test_skipped_patches_are_no_places_of_words():
    """Evaluation has them in the block with no part in it, training has not."""
    depth = DepthConfig(causal_rule="none")
    config = dataclasses.replace(
        make_config(noise=0.0), block_pattern=("mod:0.5:dense",), depth=depth
    )
    model = build_dit(config)
    batch = {
        "x_t": rng.normal(size=(4, 8, 8, 3)).astype(np.float32),
        "times": np.linspace(0.1, 0.9, 4, dtype=np.float32),
        "tokens": np.int32([[1, 9, 8, 2, 0]] * 4),
    }
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))["params"]
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, leaf.dtype), shapes
    )
    apply = jax.jit(
        lambda train: model.apply({"params": params}, batch, train=train).prediction,
        static_argnums=0,
    )
    np.testing.assert_allclose(apply(True), apply(False), rtol=1e-3, atol=1e-3)


def test_dropout_and_norms_of_queries_reach_the_words():
    dropped = dataclasses.replace(CONFIG, dropout=0.5)
    key = jax.random.key(1)
    np.testing.assert_array_equal(run(config=dropped), run())
    assert np.abs(run(config=dropped, train=True, rng=key) - run()).max() > 0.1
    normed_too = dataclasses.replace(CONFIG, qk_norm="rms")
    params = {**PARAMS, **{f"{which}_norm": {"scale_md": jnp.ones((1, HEAD))} for which in "qk"}}
    scaled = {**params, "query_dnh": 7 * params["query_dnh"]}
    got = run(params, normed_too)
    np.testing.assert_allclose(run(scaled, normed_too), got, atol=1e-4)
    assert np.abs(got - run()).max() > 0.05


def test_raphael_reads_words():
    """Six experts of places beside those of time; of labels there are no words."""
    model, plain = (load_config(name).model for name in ("raphael:text", "raphael"))
    assert model.words.attend and model.words.num_experts == 6
    assert model.moe.score.input == plain.moe.score.input == "noise"
    assert not plain.words.attend


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"attend": False}, "model.words.num_experts: needs model.words.attend=True"),
        ({"threshold": 1.0}, "model.words.threshold: must be in"),
        ({"hidden": 0}, "model.words.hidden: must be positive for the 3 experts"),
        ({"num_experts": 0, "hidden": 0}, "model.words.threshold: is of the experts of places"),
        ({"noise": -1.0}, "model.words.noise: must not be negative"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(UserError, match=message):
        make_config(**fields)


def test_there_must_be_a_text():
    with pytest.raises(UserError, match=r"model.words.attend: needs texts \(model.text_length"):
        DiTConfig(words=WordsConfig(attend=True))
