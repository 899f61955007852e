"""Variants of training pictures."""

import numpy as np
import pytest

from moejax.config import load_config
from moejax.data.emoji import may_mirror
from moejax.data.image_codes import image_codes
from moejax.data.sources import open_source
from moejax.data.variants import variant
from moejax.errors import UserError


@pytest.fixture(scope="module")
def source():
    return open_source("builtin:emoji32", "train")


def test_variant_0_is_the_picture_and_others_are_decided_by_the_arguments(source):
    image = source[0]["image"]
    assert variant(image, 0, 3, True) is image
    seen = {variant(image, number, 3, True).tobytes() for number in range(6)}
    assert len(seen) == 6
    again = variant(image.copy(), 4, 3, True)
    np.testing.assert_array_equal(again, variant(image, 4, 3, True))
    assert not np.array_equal(again, variant(image, 4, 5, True))


def test_only_what_may_be_mirrored_is(source):
    """A picture that is dark on its left half alone keeps that side unless it may be mirrored."""
    image = np.full((32, 32, 3), 255, np.uint8)
    image[8:24, 4:14] = 0

    def darker_half(picture):
        dark = (255 - picture.astype(int)).sum(axis=(0, 2))
        return dark[:16].sum() < dark[16:].sum()

    kept = [darker_half(variant(image, number, 0, False)) for number in range(1, 40)]
    mirrored = [darker_half(variant(image, number, 0, True)) for number in range(1, 40)]
    assert not any(kept)
    assert 8 < sum(mirrored) < 31


def test_emoji_that_mean_another_thing_mirrored_are_marked(source):
    assert may_mirror("gorilla", "Animals & Nature")
    for name, category in (
        ("flag: Belize", "Flags"),
        ("ATM sign", "Symbols"),
        ("two-thirty", "Travel & Places"),
        ("two o’clock", "Travel & Places"),
        ("left-facing fist", "People & Body"),
        ("waning gibbous moon", "Travel & Places"),
    ):
        assert not may_mirror(name, category)
    share = np.mean([source[index]["mirror"] for index in range(len(source))])
    assert 0.5 < share < 0.8


class MeanCodec:
    """One code for each picture: its mean, so that variants can be told apart."""

    num_codes, codes_per_image, version = 256 * 64, 1, "mean"

    def encode(self, images):
        return images.reshape(len(images), -1).astype(np.float64).mean(1, keepdims=True) * 64


def test_codes_of_variants_lie_with_their_record(source, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path))
    codec = MeanCodec()
    codes = image_codes(source, codec, variants=3, seed=1)
    for index in (0, 700, len(source) - 1):
        record = source[index]
        for number in range(3):
            picture = variant(record["image"], number, 1, record["mirror"])
            np.testing.assert_array_equal(
                codes(index, number), codec.encode(picture[None]).astype(np.int32)
            )


def test_variants_without_token_sequences_are_refused():
    with pytest.raises(UserError, match="data.variants: needs data.format=tokens"):
        load_config("tokenizer_fsq", {"data.variants": 2})
