"""What makes the ``bagel`` config BAGEL: two towers by role, the new one a copy of the first."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.analysis.params import boxed_params
from moejax.api import build
from moejax.config import load_config
from moejax.config.schema import LatentConfig
from moejax.data.vocabulary import BOI, BOS, EOI, EOS, PATCH, Vocabulary
from moejax.generate.denoise import predict
from moejax.generate.generate import decode, pad_prompts, place_latents, prefill
from moejax.models.decoder import build_decoder
from moejax.objectives.transfusion import patch_weights
from moejax.ops.pictures import one_position_each, patch_numbers
from moejax.surgery import init_from
from moejax.train.leaves import modality_axis, named_leaves, path_name, shape_of, towers_of

from .latent_rows import (
    AFTER_DRAWN,
    AFTER_OPENING,
    DRAWN,
    OPENING,
    PATCHES,
    SIZE,
    TinyPictures,
    full_batch,
    make_batch,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def bagel():
    return TinyPictures("bagel")


def noisy_batch(time: float = 0.4) -> dict:
    """The first picture of each row is noisy, the second clean."""
    batch = make_batch()
    return {**batch, "times": np.where(batch["image_id"] == 1, time, 0).astype(np.float32)}


def tower(gradients: dict, index: int) -> float:
    """The largest number in a tower's gradient."""
    return max(np.abs(leaf[:, index]).max() for name, leaf in gradients.items() if "stack" in name)


@pytest.mark.parametrize("arg", ["", ":moe"])
def test_the_new_tower_on_text_is_the_base(arg, drawn, tiny, tiny_batch):
    """As it begins, whichever tokens go through it: its weights are those of the text model."""
    base = load_config("bagel:text", tiny)
    text_model = build(base)[0]
    params = drawn(text_model, base)
    expected = text_model.apply({"params": params}, tiny_batch(0)).logits
    # Without pictures as latents all tokens have logits.
    config = load_config(f"bagel{arg}", tiny)
    model = build_decoder(dataclasses.replace(config.model, latents=LatentConfig()))
    towers = begun_from(params, base, model, config, drawn(model, base, seed=2))
    apply = jax.jit(lambda params, batch: model.apply({"params": params}, batch).logits)
    mixed = np.random.default_rng(0).integers(0, 2, (2, 12))
    for modality in (np.ones((2, 12)), mixed):
        got = apply(towers, tiny_batch(modality))
        np.testing.assert_allclose(got, expected, atol=1e-5)
    # Once it has learned something it is not.
    ffn = towers["stack"]["segment_0"]["block_0"]["ffn"]
    ffn["wo_mfd"] = ffn["wo_mfd"].at[:, 1].multiply(1.1)
    assert np.abs(apply(towers, tiny_batch(mixed)) - expected).max() > 1e-3


def begun_from(params: dict, base, model, config, fresh: dict) -> dict:
    """``fresh`` parameters as ``train.init_from`` of a run of ``base`` leaves them."""
    modalities, train = config.model.modalities, config.train
    here = {
        name: init_from.Leaf(shape_of(leaf), modality_axis(leaf), towers_of(name, leaf, modalities))
        for name, leaf in named_leaves(boxed_params(model, base)).items()
    }
    there = named_leaves(params)
    shapes = {name: leaf.shape for name, leaf in there.items()}
    source = init_from.Source("text", shapes, base.model.modalities)
    rules = init_from.Rules(train.init_rename, train.init_broadcast)
    plan = init_from.plan(here, source, rules, modalities)
    assert not plan.skipped and not plan.unused
    filled = init_from.fill(plan, here, named_leaves(fresh), there)
    return jax.tree_util.tree_map_with_path(lambda path, _: filled[path_name(path)], fresh)


def test_pictures_go_by_role(bagel):
    """Clean pictures meet the tower of text and a map of their own, noisy ones the other tower."""
    gradients = bagel.gradient(noisy_batch(), text=AFTER_OPENING)
    assert tower(gradients, 1) == 0 and tower(gradients, 0) > 1e-3
    assert np.abs(gradients["reader/in_zd"]).max() > 1e-3
    assert np.all(gradients["patch_adapter/in_zd"] == 0)

    # The end of the first segment sees the noisy picture.
    gradients = bagel.gradient(noisy_batch(), text=AFTER_DRAWN)
    assert tower(gradients, 1) > 1e-3 and np.all(gradients["reader/in_zd"] == 0)
    clean = noisy_batch(0.0)
    assert tower(bagel.gradient(clean, text=AFTER_DRAWN), 1) == 0

    others = TinyPictures("bagel", {"model.latents.read_by": ""})
    assert "reader" not in others.params
    params = {name: leaf for name, leaf in bagel.params.items() if name != "reader"}
    read, not_read = bagel.outputs(bagel.params, clean), others.outputs(params, clean)
    difference = np.abs(read.logits - not_read.logits)
    assert difference[:, AFTER_DRAWN].max() > 1e-2
    np.testing.assert_allclose(difference[:, : DRAWN[0]], 0, atol=1e-5)


def test_what_opens_is_clean_and_not_to_be_denoised(bagel):
    batch = make_batch()
    prepared = bagel.objective.prepare(batch, jax.random.key(0))
    times = np.asarray(prepared["times"])
    assert np.all(times[:, OPENING] == 0) and np.all(times[:, DRAWN] > 0)
    latents = np.asarray(prepared["latents"])
    np.testing.assert_array_equal(latents[:, OPENING], batch["latents"][:, OPENING])
    assert np.all(latents[:, DRAWN] != batch["latents"][:, DRAWN])
    counted = np.zeros(times.shape, bool)
    counted[:, DRAWN] = True
    np.testing.assert_array_equal(patch_weights(prepared), counted)
    sums = bagel.objective(bagel.outputs(bagel.params, prepared), prepared)
    assert float(sums.weights["image"]) == 2 * PATCHES
    expected = 0.25 * sums.mean("token") + sums.mean("image")
    np.testing.assert_allclose(sums.total(), expected, rtol=1e-6)


def test_positions_in_which_a_picture_counts_as_one():
    image_id = jnp.asarray([[0, 1, 1, 1, 2, 2, 0, 0, 1, 1, 0, 0]])
    segments = jnp.asarray([[1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0]])
    positions = jnp.asarray([[5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(
        patch_numbers(image_id, segments), [[0, 0, 1, 2, 0, 1, 0, 0, 0, 1, 0, 0]]
    )
    np.testing.assert_array_equal(
        one_position_each(positions, image_id, segments), [[5, 6, 6, 6, 7, 7, 8, 0, 1, 1, 2, 4]]
    )


def test_where_a_patch_lies_is_told_by_its_place_alone(bagel):
    """With one position and no places patches are a set: their order changes nothing outside."""
    batch = make_batch()
    turned = {**batch, "latents": batch["latents"].copy()}
    turned["latents"][:, DRAWN] = np.roll(batch["latents"][:, DRAWN], 1, axis=1)
    without_places = TinyPictures("bagel", {"model.latents.places": "none"})
    for tiny, same in ((without_places, True), (bagel, False)):
        before, after = (tiny.outputs(tiny.params, b).logits for b in (batch, turned))
        difference = np.abs(before - after)[:, AFTER_DRAWN].max()
        assert difference < 1e-5 if same else difference > 1e-3


def test_reading_and_drawing_with_a_cache_are_the_full_forward(bagel):
    """A picture that is read, then one that is drawn; then text after it."""
    vocabulary = Vocabulary(text_size=20, image_codes=0, codes_per_image=PATCHES)
    picture = [BOI, *[PATCH] * PATCHES, EOI]
    rows = [[BOS, *picture, 20, BOI], [BOS, 21, BOI]]
    rng = np.random.default_rng(4)
    read, drawn = (rng.normal(size=(2, PATCHES, SIZE)).astype(np.float32) for _ in range(2))
    held = [read[0], read[0][:0]]
    tokens, lengths = pad_prompts(rows)
    placed = place_latents(tokens, held, SIZE)
    read_prompts = jax.jit(prefill, static_argnums=(0, 2, 5))
    _, cache = read_prompts(bagel.model, bagel.params, vocabulary, tokens, lengths, 32, placed)
    np.testing.assert_array_equal(cache.position_b, [9 - 3, 3])
    draw = jax.jit(predict, static_argnums=0)
    found = draw(bagel.model, bagel.params, cache, jnp.asarray(drawn), jnp.asarray(0.6))

    whole = [[*row, *[PATCH] * PATCHES, EOI, 22, EOS] for row in rows]
    latents = [np.concatenate(pair) for pair in zip(held, drawn, strict=True)]
    expected = bagel.outputs(bagel.params, full_batch(whole, latents, 0.6)).denoised
    for i, row in enumerate(rows):
        here = slice(len(row), len(row) + PATCHES)
        np.testing.assert_allclose(found[i], expected[i, here], atol=1e-4)

    # What was drawn is read when the text goes on.
    expected = bagel.outputs(bagel.params, full_batch(whole, latents, 0.0)).logits
    tokens, lengths = pad_prompts([row[:-2] for row in whole])
    placed = place_latents(tokens, latents, SIZE)
    logits, cache = read_prompts(bagel.model, bagel.params, vocabulary, tokens, lengths, 32, placed)
    for token in (22, EOS):
        at = np.asarray(cache.filled_b) - 1
        np.testing.assert_allclose(logits, expected[np.arange(2), at], atol=1e-4)
        token_b = jnp.full((2,), token)
        logits, cache = decode(
            bagel.model, bagel.params, vocabulary, cache, token_b, jnp.ones(2, bool)
        )
