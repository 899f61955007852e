"""The functions of notebooks: captions to pictures, pictures to captions, interleaved parts."""

import dataclasses
import functools

import numpy as np
import pytest

from moejax.config.schema import DataConfig
from moejax.data.text_tokenizer import TextTokenizer
from moejax.data.vocabulary import BOI, EOI, EOS
from moejax.errors import UserError
from moejax.generate.api import (
    Sampler,
    caption_images,
    continue_parts,
    sample_images,
    split_parts,
)
from moejax.generate.samples import Request, sample_mode
from moejax.generate.sampling import Sampling


class Letters(TextTokenizer):
    """The letters a to t."""

    size = 20
    version = "letters"

    def encode_batch(self, texts):
        return [[ord(char) - ord("a") for char in text] for text in texts]

    def _decode(self, ids):
        return "".join(chr(ord("a") + i) for i in ids)


class Squares:
    """Pictures of 2 x 2 grey pixels; code c is the grey level 10 c."""

    codes_per_image, num_codes = 4, 12

    def encode(self, images):
        return (images[..., 0] // 10).reshape(len(images), 4).astype(np.int32)

    def decode(self, codes):
        grey = (np.asarray(codes) * 10).astype(np.uint8).reshape(-1, 2, 2, 1)
        return np.repeat(grey, 3, axis=-1)


@pytest.fixture
def sampler(dense) -> Sampler:
    return Sampler(
        dense.model, dense.params, dense.vocabulary, Letters(), Squares(), 32, batch_size=4
    )


PICTURES = Squares().decode([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 0]])


def test_a_picture_for_each_caption_whatever_the_batch(sampler):
    captions = ["abc", "tt", "", "abc", "d"]
    pictures = sample_images(sampler, captions, seed=4)
    assert pictures.shape == (5, 2, 2, 3)
    assert (pictures % 10 == 0).all()
    whole = dataclasses.replace(sampler, batch_size=5)
    np.testing.assert_array_equal(sample_images(whole, captions, seed=4), pictures)
    # The same caption in another row is another draw.
    assert (pictures[0] != pictures[3]).any()


def test_guidance_changes_captioned_pictures_only(sampler):
    captions = ["abc", "tt", "", "ss"]
    plain = sample_images(sampler, captions)
    guided = sample_images(sampler, captions, sampling=Sampling(guidance=8.0))
    np.testing.assert_array_equal(guided[2], plain[2])
    assert (guided != plain).any()


def test_progress_counts_every_picture(sampler):
    counts = []
    sample_images(sampler, ["a"] * 5, progress=counts.append)
    assert counts == [4, 1]


def test_captions_are_not_empty_and_not_too_long(sampler):
    captions = caption_images(sampler, PICTURES, seed=2, max_text_tokens=5)
    assert len(captions) == 3
    assert all(1 <= len(caption) <= 6 for caption in captions)
    again = caption_images(sampler, PICTURES[:1], seed=2, max_text_tokens=5)
    assert again == captions[:1]


def test_a_clip_has_one_caption_of_all_its_frames(sampler):
    clip = PICTURES[:2]
    greedy = functools.partial(
        caption_images, sampler, sampling=Sampling(temperature=0.0), max_text_tokens=5
    )
    found = greedy([clip, clip[::-1], clip[:1], PICTURES[2]])
    # The order of the frames counts, and those after the first.
    assert len(set(found[:3])) == 3
    assert found[2:] == greedy(PICTURES[[0, 1, 0, 2]])[2:]
    assert greedy([]) == []
    with pytest.raises(UserError, match="no room for a caption in data.sequence_length=32"):
        caption_images(sampler, [np.concatenate([clip] * 3)])


class Clips:
    """Eight clips of two frames."""

    name, split, version = "fake:clips", "val", "0"

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        frames = Squares().decode(np.arange(8).reshape(2, 4) + index % 4)
        return {"id": f"{index}", "frames": frames, "text": "abcdefgh"[index]}


@pytest.mark.parametrize("mode", ["text2image", "image2text"])
def test_samples_of_a_model_of_clips(sampler, mode):
    request = Request(
        sampler=sampler,
        data=DataConfig(),
        split="val",
        prompts=(),
        count=4,
        sampling=Sampling(),
        seed=0,
        sources={"train": Clips(), "val": Clips()},
    )
    outcome = sample_mode(mode, request)
    labels = [tile.label for row in outcome.grid for tile in row.tiles]
    if mode == "image2text":
        assert labels == ["real", "real", "its codes", "its codes"] * 4
    else:
        # A picture is drawn, not a clip.
        assert sum(label.startswith("nearest") for label in labels) == 4
        assert labels.count("real, frame 1") == 2


def test_parts_go_on_with_texts_and_whole_pictures(sampler):
    prompts = [["ab", PICTURES[0], "c"], [], [PICTURES[1]], ["dd"]]
    found = []
    for seed in range(4):
        rows = continue_parts(
            sampler, prompts, images=2, max_new_tokens=18, seed=seed, sampling=Sampling(3.0)
        )
        assert len(rows) == 4
        found += [part for row in rows for part in row]
    assert {type(part) for part in found} == {str, np.ndarray}
    assert all(part.shape == (2, 2, 3) for part in found if isinstance(part, np.ndarray))


def test_split_parts_is_the_inverse_of_a_sequence(sampler):
    tokens = [
        *sampler.encode_text("ab"),
        *sampler.encode_images(PICTURES[:1])[0][0],
        *sampler.encode_images(PICTURES[2:3])[0][0],
        *sampler.encode_text("c"),
        EOS,
    ]
    first, picture, other, last = split_parts(sampler, tokens)
    assert (first, last) == ("ab", "c")
    np.testing.assert_array_equal(picture, PICTURES[0])
    np.testing.assert_array_equal(other, PICTURES[2])
    # An image that was cut off is left out.
    cut = [*sampler.encode_text("ab"), BOI, *sampler.vocabulary.image_ids([1, 2]).tolist()]
    assert split_parts(sampler, cut) == ["ab"]
    assert split_parts(sampler, [EOI, EOS]) == []


def test_what_is_too_long_is_refused_by_name(sampler):
    # 32 tokens less four codes and four marks.
    assert len(sampler.encode_text("a" * 24)) == 24
    with pytest.raises(UserError, match=r"'a+'.* 25 tokens .*at most 24 .*sequence_length=32"):
        sample_images(sampler, ["b", "a" * 25])
    with pytest.raises(UserError, match="sequence_length=32"):
        continue_parts(sampler, [["a" * 20, PICTURES[0]]], max_new_tokens=10)
    with pytest.raises(UserError, match="sequence_length=32"):
        continue_parts(sampler, [["a" * 24, PICTURES[0], "bb"]])
    with pytest.raises(UserError, match="--top-p"):
        sample_images(sampler, ["a"], sampling=Sampling(top_p=2.0))
