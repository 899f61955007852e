"""The configs of models whose tokens skip blocks, made tiny: what is theirs does what they say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.analysis.params import abstract_params
from moejax.api import build
from moejax.config import load_config
from moejax.data.build import build_pipeline
from moejax.data.vocabulary import BOI
from moejax.depth import recursion_indices

LENGTH = 24
TINY = {
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.ffn_hidden": (24,),
    "model.vocab_size": 40,
    "model.kernel_backend": "reference",
    "data.sequence_length": LENGTH,
    "data.batch_size": 2,
}


def batch() -> dict:
    """Two rows of text, a picture of ten tokens, text, and one of five."""
    rng = np.random.default_rng(0)
    ids = rng.integers(16, 40, (2, LENGTH)).astype(np.int32)
    modality = np.array([0] * 3 + [1] * 10 + [0] * 4 + [1] * 5 + [0] * 2, np.int32)
    made = {
        "tokens": ids,
        "modality": np.stack([modality, modality]),
        "segments": np.ones_like(ids),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1)),
        "targets": ids,
        "weights": np.ones((2, LENGTH), np.float32),
    }
    return jax.tree.map(jnp.asarray, made)


@functools.cache
def trained(name: str, *overrides):
    """(model, params, output of a training forward) of a tiny config with random parameters."""
    config = load_config(name, {**TINY, **dict(overrides)})
    model, objective = build(config)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype),
        abstract_params(model, config),
    )
    out = jax.jit(lambda p: model.apply({"params": p}, batch(), train=True))(params)
    return model, params, out, objective(out, batch())


def choices(name: str, *overrides) -> dict[str, np.ndarray]:
    """Counts of each block that tokens skip, in order."""
    _, _, out, losses = trained(name, *overrides)
    found = losses.statistics["depth"]
    assert found
    merged = [jax.tree.map(np.ravel, one["sums"]) for one in found.values()]
    return {key: np.concatenate([one[key] for one in merged]) for key in merged[0]}


@pytest.mark.parametrize("name, share, blocks", [("mod", 0.125, 2), ("moma_mod", 0.25, 2)])
def test_so_many_tokens_run_so_many_blocks(name, share, blocks):
    counts = choices(name)
    np.testing.assert_array_equal(counts["count"], [2 * LENGTH] * blocks)
    np.testing.assert_array_equal(counts["chosen"], [2 * LENGTH * share] * blocks)


def test_experts_may_be_skipped():
    counts = choices("mode_moe_depths", ("model.moe.hidden", 16))
    np.testing.assert_array_equal(counts["chosen"], [6, 6])
    _, _, _, losses = trained("mode_moe_depths", ("model.moe.hidden", 16))
    (routing,) = losses.statistics["routing"].values()
    # Each of those tokens has two experts; the others have none.
    np.testing.assert_array_equal(routing["statistics"]["chosen_me"].sum(axis=(1, 2)), [12, 12])
    _, _, _, losses = trained("mode_moe_depths:integrated", ("model.moe.hidden", 16))
    (routing,) = losses.statistics["routing"].values()
    chosen = np.asarray(routing["statistics"]["chosen_me"]).sum(axis=1)
    assert chosen.shape == (2, 8) and (chosen.sum(axis=1) == 2 * 2 * LENGTH).all()
    # The last four do nothing.
    assert (chosen[:, 4:].sum(axis=1) > 0).all()


@pytest.mark.parametrize("arg", ["", "sharing"])
def test_later_steps_have_fewer_tokens(arg):
    counts = choices(f"mor:{arg}" if arg else "mor")
    np.testing.assert_array_equal(counts["count"], [2 * LENGTH, 2 * 16])
    np.testing.assert_array_equal(counts["chosen"], [2 * 16, 2 * 8])


@pytest.mark.parametrize("arg, balance_loss", [("token", 0.1), ("token_free", 0.0)])
def test_mor_gives_each_token_its_number_of_steps(arg, balance_loss):
    _, params, out, losses = trained(f"mor:{arg}")
    block = params["stack"]["segment_1"]["block_0"]
    assert ("select_bias_r" in block) == (arg == "token_free")
    sums = out.aux["segment_1"]["block_0"]["depth"]["recursion"]
    assert float(sums["chosen_r"].sum()) == float(sums["count"].sum()) == 2 * LENGTH
    values, count = losses.derived_values(), 2 * LENGTH
    f, p = np.asarray(sums["chosen_r"][0]) / count, np.asarray(sums["probs_r"][0]) / count
    assert float(values["depth/balance"]) == pytest.approx(3 * (f * p).sum(), rel=1e-5)
    coefficients = {term.name: term.coefficient for term in losses.derived}
    assert (coefficients["depth/balance"], coefficients["depth/z"]) == (balance_loss, 1e-5)


SHARING = [
    ("", "middle_cycle"),
    ("cycle", "cycle"),
    ("sequence", "sequence"),
    ("middle_sequence", "middle_sequence"),
]


@pytest.mark.parametrize("arg, sharing", SHARING)
def test_recursion_is_the_unrolled_transformer(arg, sharing):
    """The same weights in a plain decoder, layer by layer in the order of the sharing's table."""
    _, params, out, _ = trained(f"recursive:{arg}" if arg else "recursive")
    stack = params["stack"]
    middle = sharing.startswith("middle")
    shared = stack["segment_1" if middle else "segment_0"]["block_0"]
    shared = shared["layers"]["stack"]["segment_0"]["block_0"]
    # [blocks, layers in a block, ...]
    shared = [
        jax.tree.map(lambda leaf, at=at: leaf[at], shared)
        for at in np.ndindex(jax.tree.leaves(shared)[0].shape[:2])
    ]
    depth = len(shared) * 3 + 2 * middle
    order = recursion_indices(depth, 3, sharing)
    if middle:
        first, last = (
            jax.tree.map(lambda leaf: leaf[0], stack[name]["block_0"])
            for name in ("segment_0", "segment_2")
        )
        by_number = {0: first, depth - 1: last} | {i + 1: one for i, one in enumerate(shared)}
    else:
        by_number = dict(enumerate(shared))
    layers = [by_number[i] for i in order]
    plain = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    overrides = {"model.num_layers": depth, "model.norm_placement": "pre", "model.qk_norm": "none"}
    model, _ = build(load_config("chameleon", {**TINY, **overrides}))
    own = {**params, "stack": {"segment_0": {"block_0": plain}}}
    expected = jax.jit(lambda p: model.apply({"params": p}, batch(), train=True).logits)(own)
    np.testing.assert_allclose(out.logits, expected, atol=2e-3, rtol=2e-3)


def test_p_mod_keeps_fewer_pictures_in_depth():
    counts = choices("p_mod", ("model.num_layers", 4))
    # Pictures of ten and five tokens, of which 0.75, 0.25, 0.15 are kept, rounded down.
    np.testing.assert_array_equal(counts["count"], [30] * 3)
    np.testing.assert_array_equal(counts["chosen"], [2 * (7 + 3), 2 * (2 + 1), 2 * (1 + 0)])


def test_gamma_mod_has_one_router():
    model, params, _, losses = trained("gamma_mod")
    names = [
        "/".join(str(part.key) for part in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    assert [name for name in names if "router" in name] == ["stack/depth_router/router_dk"]
    counts = choices("gamma_mod")
    np.testing.assert_array_equal(counts["chosen"], [2 * (5 + 3)] * 2)

    # It learns from each layer's choice.
    @jax.jit
    def causal(params):
        out = model.apply({"params": params}, batch(), train=True)
        config = load_config("gamma_mod", TINY)
        return build(config)[1](out, batch()).derived_values()["depth/causal"]

    slope = jax.grad(causal)(params)["stack"]["depth_router"]["router_dk"]
    assert float(jnp.abs(slope).max()) > 0


def test_videollm_mod_takes_a_fifth_of_a_frame():
    # Rows of this file are not those of clips, which it has places for.
    counts = choices("videollm_mod", ("model.depth.room", 0.0))
    np.testing.assert_array_equal(counts["count"], [30, 30])
    np.testing.assert_array_equal(counts["chosen"], [2 * (2 + 1)] * 2)


class Brightness:
    """So many codes a side of a picture: the mean red value of each square."""

    num_codes = 256

    def __init__(self, side: int):
        self.side, self.codes_per_image, self.version = side, side * side, f"red {side}"

    def encode(self, images):
        n = self.side
        squares = images[..., 0].reshape(-1, n, 32 // n, n, 32 // n).mean(axis=(2, 4))
        return squares.reshape(-1, n * n).astype(np.int32)


def on_clips(side: int, **sizes):
    """(batch of clips, output of a training forward on it) of a tiny videollm_mod."""
    # Ids of the marks, the text and the codes.
    own = {"model.vocab_size": 16 + 4096 + 256, **sizes}
    config = load_config("videollm_mod", {**TINY, **own})
    clips = build_pipeline(config, "val", codec=Brightness(side)).batch(0)
    model, _ = build(config)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype),
        abstract_params(model, config),
    )
    run = jax.jit(lambda p, b: model.apply({"params": p}, b, train=True, record=True))
    return clips, run(params, clips)


def test_each_frame_of_a_clip_has_a_fifth_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path))
    clips, out = on_clips(4, **{"data.sequence_length": 190, "model.depth.room": 0.0})
    kept = np.asarray(out.aux["segment_0"]["block_1"]["depth"]["kept"])
    is_frame, real = clips["modality"] == 1, clips["segments"] > 0
    starts = np.argwhere((clips["tokens"] == BOI) & real)
    # Two clips of four frames in each of two rows.
    assert kept.shape == (2, 2, 190) and len(starts) == 16
    for row, start in starts:
        frame = slice(start + 1, start + 17)
        assert is_frame[row, frame].all() and not is_frame[row, start + 17]
        # Of 16 a fifth, rounded up.
        np.testing.assert_array_equal(kept[:, row, frame].sum(axis=1), [4, 4])
    assert kept[:, real & ~is_frame].all()


def test_there_are_places_for_a_whole_clip(tmp_path, monkeypatch):
    """As shipped, a block that runs on 0.3 of a row does what it does where all have a place."""
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path))
    shipped = load_config("videollm_mod")
    assert 0 < shipped.model.depth.room < 0.5
    length = {"data.sequence_length": shipped.data.sequence_length}
    clips, few = on_clips(8, **length)
    _, all_of_it = on_clips(8, **length, **{"model.depth.room": 0.0})
    real = clips["segments"] > 0
    assert real.sum(axis=1).min() > 250
    np.testing.assert_allclose(few.logits[real], all_of_it.logits[real], atol=2e-3, rtol=2e-3)
