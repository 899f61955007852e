"""Pictures as latents inside of the sequence: mask, isolation, and what the loss may see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from moejax.config.schema import DecoderConfig, LatentConfig, TransfusionConfig, UntieConfig
from moejax.data.vocabulary import BOI, BOS, EOI, EOS, NUM_SPECIAL, PATCH
from moejax.models.decoder import build_decoder
from moejax.objectives.transfusion import transfusion
from moejax.ops import diffusion
from moejax.ops.attention import multimodal_mask
from moejax.ops.pictures import (
    max_pictures,
    per_token,
    picture_starts,
    place_pictures,
    take_pictures,
    text_follows,
)

GRID, CHANNELS = 2, 3
PATCHES = GRID * GRID
# BOS text text BOI 4 patches EOI text EOS | BOS BOI 4 patches EOI text EOS
ROW = [BOS, 20, 21, BOI, *[PATCH] * 4, EOI, 22, EOS, BOS, BOI, *[PATCH] * 4, EOI, 23, EOS]
FIRST, SECOND = slice(4, 8), slice(13, 17)


def make_config(**changes) -> DecoderConfig:
    latents = LatentConfig(channels=CHANNELS, grid=GRID, **changes.pop("latents", {}))
    config = DecoderConfig(
        vocab_size=40, num_layers=2, d_model=16, num_heads=2, ffn_hidden=(24,), latents=latents
    )
    return dataclasses.replace(config, **changes)


def make_batch(seed: int = 0, rows: int = 2) -> dict:
    rng = np.random.default_rng(seed)
    tokens = np.tile(np.asarray(ROW, np.int32), (rows, 1))
    is_patch = tokens == PATCH
    image_id = np.zeros_like(tokens)
    image_id[:, FIRST], image_id[:, SECOND] = 1, 2
    segments = np.where(np.arange(len(ROW)) < 11, 1, 2) * np.ones_like(tokens)
    positions = np.where(segments == 1, np.arange(len(ROW)), np.arange(len(ROW)) - 11)
    targets = np.roll(tokens, -1, axis=1)
    weights = np.ones(tokens.shape, np.float32)
    weights[:, [10, 19]] = 0
    latents = rng.normal(size=(*tokens.shape, CHANNELS)) * is_patch[..., None]
    return {
        "tokens": tokens,
        "modality": is_patch.astype(np.int32),
        "segments": segments.astype(np.int32),
        "positions": positions.astype(np.int32),
        "targets": targets,
        "weights": weights,
        "image_id": image_id,
        "latents": latents.astype(np.float32),
    }


class Tiny:
    def __init__(self, config: DecoderConfig, objective: TransfusionConfig):
        self.model, self.objective = build_decoder(config), transfusion(objective, config)
        self.params = meta.unbox(jax.jit(self.model.init)(jax.random.key(0), make_batch()))[
            "params"
        ]
        # The map out of the adapter starts at zero, which would hide gradients.
        out = self.params["patch_adapter"]["out_dz"]
        self.params["patch_adapter"]["out_dz"] = jax.random.normal(jax.random.key(1), out.shape)

        self.outputs = jax.jit(lambda params, batch: self.model.apply({"params": params}, batch))
        self.sums = jax.jit(self._sums)
        self.gradient = jax.jit(jax.grad(lambda params, batch: self._sums(params, batch).total()))

    def _sums(self, params, batch):
        batch = self.objective.prepare(batch, jax.random.key(3))
        return self.objective(self.model.apply({"params": params}, batch), batch)


@pytest.fixture(scope="module")
def tiny():
    return Tiny(make_config(), TransfusionConfig())


@pytest.fixture
def batch():
    return make_batch()


def test_mask_truth_table():
    """Text text BOI p p EOI text BOI p p: rows see their past, and patches their whole picture."""
    image_id = jnp.asarray([[0, 0, 0, 1, 1, 0, 0, 0, 2, 2]])
    mask = np.asarray(multimodal_mask(jnp.ones((1, 10), jnp.int32), image_id))[0].astype(int)
    expected = np.tril(np.ones((10, 10), int))
    expected[3, 4] = expected[8, 9] = 1
    np.testing.assert_array_equal(mask, expected)


def test_without_pictures_the_mask_is_causal():
    segments = jnp.ones((1, 7), jnp.int32)
    mask = multimodal_mask(segments, jnp.zeros((1, 7), jnp.int32))[0]
    np.testing.assert_array_equal(mask, np.tril(np.ones((7, 7), bool)))


def test_adjacent_pictures_and_packed_ones_do_not_see_each_others_future():
    adjacent = multimodal_mask(jnp.ones((1, 4), jnp.int32), jnp.asarray([[1, 1, 2, 2]]))[0]
    np.testing.assert_array_equal(
        np.asarray(adjacent).astype(int), [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    )
    # The same number in two segments (as filler rows have it) is no one picture either.
    packed = multimodal_mask(jnp.asarray([[1, 1, 2, 2]]), jnp.asarray([[1, 1, 1, 1]]))[0]
    np.testing.assert_array_equal(
        np.asarray(packed).astype(int), [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    )


def test_taking_pictures_apart_and_placing_them_is_the_identity(batch):
    starts = picture_starts(jnp.asarray(batch["image_id"]), 3)
    np.testing.assert_array_equal(starts[0], [4, 13, len(ROW)])
    pictures = take_pictures(jnp.asarray(batch["latents"]), starts, PATCHES)
    np.testing.assert_array_equal(pictures[0, 1], batch["latents"][0, SECOND])
    placed = place_pictures(pictures, jnp.asarray(batch["image_id"]), starts)
    np.testing.assert_array_equal(placed, batch["latents"])
    times = per_token(jnp.asarray([[0.25, 0.75, 9.0]] * 2), jnp.asarray(batch["image_id"]))
    assert np.all(times[:, FIRST] == 0.25) and np.all(times[:, SECOND] == 0.75)
    assert np.asarray(times).sum() == 8 * (0.25 + 0.75)
    assert max_pictures(len(ROW), PATCHES) == 2 and max_pictures(3, PATCHES) == 1


def test_each_picture_has_one_time_and_noise_of_its_own(tiny, batch):
    noisy = tiny.objective.prepare(batch, jax.random.key(0))
    times = np.asarray(noisy["times"])
    for row in times:
        assert len(set(row[FIRST])) == len(set(row[SECOND])) == 1
    assert len({*times[:, 4], *times[:, 13]}) == 4
    assert np.all(times[batch["image_id"] == 0] == 0)
    assert not np.allclose(noisy["denoise_target"][0, FIRST], noisy["denoise_target"][0, SECOND])


def test_the_cap_holds_for_pictures_that_open_their_segment(batch):
    objective = transfusion(TransfusionConfig(max_time_image_first=0.3), make_config())
    keys = jax.random.split(jax.random.key(0), 40)
    times = jax.vmap(lambda key: objective.prepare(batch, key)["times"])(keys)
    assert times[:, :, SECOND].max() <= 0.3
    assert times[:, :, FIRST].max() > 0.8


def test_the_cap_is_of_pictures_that_a_text_follows(batch):
    """One whose caption was left out is drawn, not read, and so it is as noisy as any."""
    objective = transfusion(TransfusionConfig(max_time_image_first=0.0), make_config())
    left_out = dict(batch, tokens=batch["tokens"].copy())
    after = (np.arange(len(ROW)) > SECOND.stop) & (batch["tokens"] >= NUM_SPECIAL)
    assert after.any()
    left_out["tokens"][after] = EOS
    keys = jax.random.split(jax.random.key(0), 40)
    times = lambda given: jax.vmap(lambda key: objective.prepare(given, key)["times"])(keys)
    read, drawn = (times(given)[:, :, SECOND] for given in (batch, left_out))
    assert read.max() == 0
    assert drawn.max() > 0.8
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0, 0]])
    words = jnp.asarray([[0, 1, 0, 1, 0, 0, 1, 0, 0]], bool)
    follows = [True, False, False, True, True, True, False, False, False]
    np.testing.assert_array_equal(text_follows(words, segments)[0], follows)


def test_lambda_0_gives_the_adapter_out_no_gradient(batch):
    model = make_config()
    for weight, grows in ((0.0, False), (5.0, True)):
        tiny = Tiny(model, TransfusionConfig(image_weight=weight))
        gradient = tiny.gradient(tiny.params, batch)
        adapter = gradient["patch_adapter"]
        assert bool(np.any(np.asarray(adapter["out_dz"]) != 0)) == grows
    # What goes in still serves the text after the picture, unless no text is trained either.
    without_text = {**batch, "weights": batch["weights"] * 0}
    tiny = Tiny(model, TransfusionConfig(image_weight=0.0))
    gradient = tiny.gradient(tiny.params, without_text)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(gradient))


def test_text_is_trained_neither_from_boi_nor_from_patches(tiny, batch):
    sums = tiny.sums(tiny.params, batch)
    # BOS text text | EOI text, then BOS | EOI text: what each of them predicts.
    assert float(sums.weights["token"]) == 2 * (3 + 2 + 1 + 2)
    assert float(sums.weights["image"]) == 2 * 2 * PATCHES
    logits = tiny.outputs(tiny.params, batch).logits
    assert np.all(np.asarray(logits)[batch["image_id"] > 0] == 0)
    assert np.all(np.any(np.asarray(logits)[batch["image_id"] == 0] != 0, axis=-1))


def test_text_before_a_picture_does_not_see_it_and_text_after_it_does(tiny, batch):
    changed = {**batch, "latents": batch["latents"].copy()}
    changed["latents"][:, FIRST] += 1
    before, after = (tiny.outputs(tiny.params, b).logits for b in (batch, changed))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.all(np.any(np.asarray(before != after)[:, 8:11], axis=-1))
    np.testing.assert_array_equal(before[:, 11:], after[:, 11:])


def test_patches_of_one_picture_see_each_other_unless_the_mask_is_causal(batch):
    changed = {**batch, "latents": batch["latents"].copy()}
    changed["latents"][:, 7] += 1
    for bidirectional in (True, False):
        tiny = Tiny(make_config(latents={"bidirectional": bidirectional}), TransfusionConfig())
        before, after = (tiny.outputs(tiny.params, b).denoised for b in (batch, changed))
        sees = np.any(np.asarray(before != after)[:, 4:7], axis=-1)
        assert np.all(sees == bidirectional)


@pytest.mark.parametrize("process", ["flow", "ddpm"])
def test_later_text_never_sees_the_clean_patches(process, batch):
    """At time 1 nothing of the picture is left: other latents give the same text logits."""
    config = TransfusionConfig(process=process)
    tiny = Tiny(make_config(), config)

    def text_loss(latents, time):
        noisy = tiny.objective.prepare({**batch, "latents": latents}, jax.random.key(3))
        x0 = jnp.asarray(latents)
        noise = jax.random.normal(jax.random.key(5), x0.shape)
        times = jnp.where(batch["image_id"] > 0, time, 0.0)
        noisy["latents"] = diffusion.add_noise(config.diffusion, x0, noise, times)
        noisy["times"] = times
        return tiny.objective(tiny.outputs(tiny.params, noisy), noisy).mean("token")

    gradient = jax.jit(jax.grad(text_loss))
    at_half, at_end = (
        float(jnp.abs(gradient(jnp.asarray(batch["latents"]), time)).max()) for time in (0.5, 1.0)
    )
    assert at_half > 1e-6
    # The cosine schedule leaves 5e-5 of the data at its last step, the flow nothing.
    assert at_end == 0 if process == "flow" else at_end < at_half * 1e-3


def test_towers_of_other_modalities_get_no_gradient(batch):
    untie = UntieConfig(qkv=True, out=True, ffn=True, norms=True, final_norm=True)
    tiny = Tiny(make_config(untie=untie), TransfusionConfig())
    text_only = {**batch, "image_id": batch["image_id"] * 0, "modality": batch["modality"] * 0}
    gradient = tiny.gradient(tiny.params, text_only)
    for leaf in jax.tree.leaves(gradient["stack"]):
        towers = np.asarray(leaf)
        assert towers.shape[1] == 2
        assert np.all(towers[:, 1] == 0)
    assert np.all(np.asarray(gradient["patch_adapter"]["in_zd"]) == 0)
