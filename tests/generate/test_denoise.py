"""Pictures of latents in a sequence: cached denoising is the full forward, and interleaving."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from moejax.config.diffusion import Diffusion
from moejax.config.schema import DecoderConfig, LatentConfig, UntieConfig
from moejax.data.vocabulary import BOI, BOS, EOI, PATCH, Vocabulary
from moejax.errors import UserError
from moejax.generate.api import (
    Sampler,
    caption_images,
    continue_parts,
    draw_captions,
    sample_images,
)
from moejax.generate.denoise import denoise_pictures, predict
from moejax.generate.drawing import Drawing
from moejax.generate.generate import decode, pad_prompts, place_latents, prefill
from moejax.generate.sampling import Sampling
from moejax.models.decoder import build_decoder
from moejax.ops.samplers import SAMPLERS
from tests.papers.latent_rows import full_batch

PATCHES, SIZE = 4, 3
VOCABULARY = Vocabulary(text_size=20, image_codes=0, codes_per_image=PATCHES)
FLOW = {"diffusion": Diffusion("flow"), "drawing": Drawing(steps=3)}


def random_latents(seed: int, pictures: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(pictures * PATCHES, SIZE)).astype(np.float32)


PICTURE = [BOI, *[PATCH] * PATCHES, EOI]
# Prompts up to a BOI, with none, one and two pictures before it.
PROMPTS = [[BOS, 17, 18, BOI], [BOS, *PICTURE, 19, BOI], [BOS, 20, *PICTURE, *PICTURE, 21, BOI]]
LATENTS = [random_latents(i, i) for i in range(3)]


@functools.cache
def tiny(adapter: str):
    untied = UntieConfig(qkv=True, out=True, ffn=True, norms=True, final_norm=True)
    config = DecoderConfig(
        vocab_size=VOCABULARY.size,
        num_layers=2,
        d_model=16,
        num_heads=2,
        ffn_hidden=(24,),
        untie=untied,
        latents=LatentConfig(channels=SIZE, grid=2, adapter=adapter, unet_width=8),
    )
    model = build_decoder(config)
    tokens = np.zeros((1, 16), np.int32)
    names = ("modality", "segments", "positions", "image_id")
    batch = {name: tokens for name in names}
    batch |= {"tokens": tokens, "latents": np.zeros((1, 16, SIZE), np.float32)}
    params = meta.unbox(jax.jit(model.init)(jax.random.key(0), batch))["params"]
    # Maps that start at zero would hide what goes into them.
    keys = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), params)
    return model, params


@pytest.mark.parametrize("adapter", ["linear", pytest.param("unet", marks=pytest.mark.slow)])
def test_denoising_with_a_cache_is_the_full_forward(adapter):
    model, params = tiny(adapter)
    noisy = np.random.default_rng(9).normal(size=(3, PATCHES, SIZE)).astype(np.float32)
    tokens, lengths = pad_prompts(PROMPTS)
    placed = place_latents(tokens, LATENTS, SIZE)
    _, cache = prefill(model, params, VOCABULARY, tokens, lengths, tokens.shape[1], placed)
    found = predict(model, params, cache, jnp.asarray(noisy), jnp.asarray(0.7))

    rows = [[*prompt, *[PATCH] * PATCHES] for prompt in PROMPTS]
    latents = [np.concatenate(pair) for pair in zip(LATENTS, noisy, strict=True)]
    expected = model.apply({"params": params}, full_batch(rows, latents, 0.7)).denoised
    for i, prompt in enumerate(PROMPTS):
        here = slice(len(prompt), len(prompt) + PATCHES)
        np.testing.assert_allclose(found[i], expected[i, here], atol=1e-4)
    assert np.abs(np.asarray(found)).max() > 0.1


def test_text_after_a_picture_is_decoded_as_in_the_full_forward():
    model, params = tiny("linear")
    rows = [[*prompt[:-1], 22, 23] for prompt in PROMPTS]
    batch = full_batch(rows, LATENTS)
    expected = model.apply({"params": params}, batch).logits
    prompts = [row[:-1] for row in rows]
    tokens, lengths = pad_prompts(prompts)
    placed = place_latents(tokens, LATENTS, SIZE)
    logits, cache = prefill(model, params, VOCABULARY, tokens, lengths, 32, placed)
    last = np.asarray([len(row) - 1 for row in rows])
    np.testing.assert_allclose(logits, expected[np.arange(3), last - 1], atol=1e-4)
    token = jnp.asarray([row[-1] for row in rows])
    logits, _ = decode(model, params, VOCABULARY, cache, token, jnp.ones(3, bool))
    np.testing.assert_allclose(logits, expected[np.arange(3), last], atol=1e-4)


def test_a_row_depends_on_its_own_prompt_noise_and_guidance_alone():
    model, params = tiny("linear")
    draw = functools.partial(denoise_pictures, model, params, VOCABULARY, seed=4, **FLOW)
    together = draw(PROMPTS, latents=LATENTS)
    alone = draw(PROMPTS[2:], latents=LATENTS[2:], row_ids=[2])
    np.testing.assert_allclose(alone[0], together[2], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.1
    without = {"latents": LATENTS, "unconditional": [[BOS, BOI]] * 3}
    guided = [draw(PROMPTS, guidance=[weight] * 3, **without) for weight in (1.0, 3.0)]
    np.testing.assert_allclose(guided[0], together, atol=1e-5)
    assert np.abs(guided[1] - together).max() > 1e-2
    mixed = draw(PROMPTS, guidance=[3.0, 1.0, 3.0], **without)
    expected = np.where(np.reshape([1, 0, 1], (3, 1, 1, 1)), guided[1], guided[0])
    np.testing.assert_allclose(mixed, expected, atol=1e-5)


def test_guidance_between_two_times_alone():
    """With few steps: none has a time in the first interval, all have one in the other."""
    model, params = tiny("linear")
    given = {"unconditional": [[BOS, BOI]], "seed": 4, "diffusion": FLOW["diffusion"]}

    def draw(interval, weight=3.0):
        drawing = Drawing(steps=3, interval=interval, guidance=weight)
        return denoise_pictures(model, params, VOCABULARY, PROMPTS[:1], drawing=drawing, **given)

    np.testing.assert_allclose(draw((0.4, 0.6)), draw(None, 1.0), atol=1e-6)
    np.testing.assert_allclose(draw((0.2, 1.0)), draw(None), atol=1e-6)
    assert np.abs(draw((0.6, 0.7)) - draw(None)).max() > 1e-3
    assert np.abs(draw((0.6, 0.7)) - draw(None, 1.0)).max() > 1e-3


@pytest.mark.parametrize("process", ["ddpm", "flow"])
def test_each_sampler_ends_elsewhere(process):
    """But of "flow" Euler's step is that of DDIM."""
    model, params = tiny("linear")
    diffusion = Diffusion(process)
    ends = {}
    for sampler in SAMPLERS:
        drawing = Drawing(sampler=sampler, steps=4)
        given = {"diffusion": diffusion, "drawing": drawing, "keep": (0, 3)}
        drawn = denoise_pictures(model, params, VOCABULARY, PROMPTS[:1], **given)
        assert drawn.shape == (1, 3, PATCHES, SIZE) and np.isfinite(drawn).all()
        np.testing.assert_array_equal(drawn[:, 1], drawn[:, 2], "the last step's is the picture")
        assert np.abs(drawn[:, 0] - drawn[:, 2]).max() > 1e-2
        ends[sampler] = drawn[0, 2]
    alike = [
        (a, b) for a, b in itertools.combinations(ends, 2) if np.abs(ends[a] - ends[b]).max() < 1e-4
    ]
    assert alike == ([("ddim", "euler")] if process == "flow" else [])


class LetterTokenizer:
    size = 20

    def encode(self, text):
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids):
        return "".join(chr(ord("a") + i) for i in ids)


class PixelCodec:
    """The patches of a picture are its pixels, as numbers around 0."""

    size = SIZE

    def encode(self, images):
        return images.reshape(len(images), PATCHES, SIZE).astype(np.float32) / 64 - 2

    def decode(self, patches):
        return np.clip((patches + 2) * 64, 0, 255).astype(np.uint8).reshape(-1, 2, 2, 3)


@pytest.fixture
def sampler():
    model, params = tiny("linear")
    return Sampler(
        model=model,
        params=params,
        vocabulary=VOCABULARY,
        text_tokenizer=LetterTokenizer(),
        image_codec=PixelCodec(),
        sequence_length=32,
        **FLOW,
        batch_size=3,
    )


def test_pictures_of_captions_and_captions_of_pictures(sampler):
    pictures = sample_images(sampler, ["ab", "c", "", "ab"], seed=1)
    assert pictures.shape == (4, 2, 2, 3) and pictures.dtype == np.uint8
    assert not np.array_equal(pictures[0], pictures[3])
    np.testing.assert_array_equal(sample_images(sampler, ["ab"], seed=1)[0], pictures[0])
    captions = caption_images(sampler, pictures, max_text_tokens=5, seed=1)
    assert len(captions) == 4 and all(1 <= len(caption) <= 5 for caption in captions)
    other = caption_images(sampler, 255 - pictures, max_text_tokens=5, seed=1)
    assert other != captions


def test_strips_and_sweeps_of_captions(sampler):
    """As diffusion models of pictures draw them: equal numbers are equal noise."""
    captions = ["ab", "c", "ab", "ab"]
    drawn = draw_captions(
        sampler, captions, seed=1, row_ids=[0, 1, 0, 2], guidance=[1.0, 2.0, 3.0, 1.0], keep=(0, 2)
    )
    plain = sample_images(sampler, captions, seed=1)
    np.testing.assert_array_equal(drawn.pictures[0], plain[0])
    np.testing.assert_array_equal(
        drawn.pictures[3], sample_images(sampler, ["", "", "ab"], seed=1)[2]
    )
    guided = sample_images(sampler, captions, sampling=Sampling(guidance=2.0), seed=1)
    np.testing.assert_array_equal(drawn.pictures[1], guided[1])
    assert (drawn.pictures[2] != drawn.pictures[0]).any()
    of_its_own = dataclasses.replace(
        sampler, drawing=dataclasses.replace(sampler.drawing, guidance=2.0)
    )
    np.testing.assert_array_equal(sample_images(of_its_own, captions, seed=1), guided)
    assert drawn.kept.shape == (2, *plain.shape)
    np.testing.assert_array_equal(drawn.kept[1], drawn.pictures)
    assert (drawn.kept[0] != drawn.pictures).any()
    np.testing.assert_allclose(drawn.times, [1, 1 / 3], atol=1e-6)
    assert draw_captions(sampler, captions).kept.shape == (0, *plain.shape)


@pytest.mark.parametrize(
    "drawing, guidance, message",
    [
        (Drawing(steps=0), 1.0, "--denoise-steps: must be positive, got 0"),
        (Drawing(sampler="hein"), 1.0, "--sampler: no sampler 'hein'; did you mean 'heun'"),
        (Drawing(), [1.0], "guidance: 2 pictures, and 1 of these"),
        (Drawing(), -1.0, "--guidance: must be 0 or more, got -1.0"),
    ],
)
def test_drawings_that_cannot_be_are_refused(sampler, drawing, guidance, message):
    sampler = dataclasses.replace(sampler, drawing=drawing)
    with pytest.raises(UserError, match=message):
        draw_captions(sampler, ["a", "b"], guidance=guidance)
    with pytest.raises(UserError, match="captions: there are none"):
        draw_captions(dataclasses.replace(sampler, drawing=Drawing()), [])
    with pytest.raises(UserError, match="drawing: is for pictures that are latents"):
        draw_captions(dataclasses.replace(sampler, diffusion=None), ["a"])


def test_text_until_boi_then_a_picture_in_its_place_then_text(sampler):
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    orders = set()
    sampler = dataclasses.replace(sampler, batch_size=16)
    rows = continue_parts(sampler, [["ab"], [picture]] * 8, images=2, sampling=Sampling(2.0))
    for i, row in enumerate(rows):
        kinds = "".join("t" if isinstance(part, str) else "p" for part in row)
        assert "tt" not in kinds and kinds.count("p") <= 2
        orders.add((i % 2, kinds))
    # Text goes on after a picture, also after the second one of a row.
    assert {i for i, kinds in orders if "pt" in kinds} == {0, 1}
    with pytest.raises(UserError, match="sequence_length=32"):
        continue_parts(sampler, [["a" * 24], ["b"]], max_new_tokens=10)


def test_rows_end_at_boi_only_where_pictures_are_latents():
    from moejax.generate.grammar import Grammar, advance, progress_of_prompt

    tokens = jnp.asarray([[BOS, 17]])
    for codes, done in ((0, True), (7, False)):
        vocabulary = dataclasses.replace(VOCABULARY, image_codes=codes)
        progress = progress_of_prompt(vocabulary, Grammar(images=1), tokens, jnp.asarray([2]))
        assert bool(advance(vocabulary, progress, jnp.asarray([BOI])).done_b[0]) == done
