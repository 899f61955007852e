"""Batches from real records: layout of a sequence, exactness by step, the held-out pass."""

import functools

import numpy as np
import pytest

from moejax.config import load_config
from moejax.data.build import build_pipeline
from moejax.data.vocabulary import BOI, BOS, EOI, EOS, NUM_SPECIAL, PAD
from moejax.errors import UserError


class PixelCodec:
    """Codes that are the mean red value of each 8x8 patch: fast, and decodable by eye."""

    num_codes, codes_per_image, version = 256, 16, "red"

    def encode(self, images):
        patches = images[..., 0].reshape(-1, 4, 8, 4, 8).mean(axis=(2, 4))
        return patches.reshape(-1, 16).astype(np.int32)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@functools.cache
def pipeline(split="train", **changes):
    base = {"data.batch_size": 4, "data.sequence_length": 100}
    config = load_config("quickstart", {**base, **{f"data.{k}": v for k, v in changes.items()}})
    return build_pipeline(config, split, codec=PixelCodec())


def items_of(pipe, row):
    for segment in range(1, row["segments"].max() + 1):
        here = row["segments"] == segment
        yield {name: row[name][here] for name in row}


def test_a_sequence_spells_its_record():
    pipe = pipeline(order="text_first", drop_text=0.0)
    vocabulary = pipe.vocabulary
    for index in range(5):
        row = pipe.row(index)
        records = pipe.row_records(index)
        for record, item in zip(records, items_of(pipe, row), strict=True):
            tokens = item["tokens"]
            begin = int(np.argmax(tokens == BOI))
            assert tokens[0] == BOS and tokens[-1] == EOS and tokens[-2] == EOI
            text = pipe.tokenizer.decode(vocabulary.to_text_ids(tokens[1:begin]))
            assert text == pipe.source[record]["text"]
            codes = PixelCodec().encode(pipe.source[record]["image"][None])[0]
            np.testing.assert_array_equal(vocabulary.to_image_codes(tokens), codes)
            np.testing.assert_array_equal(item["positions"], np.arange(len(tokens)))
            is_image = np.zeros(len(tokens), bool)
            is_image[begin + 1 : begin + 17] = True
            np.testing.assert_array_equal(item["modality"] == 1, is_image)
            np.testing.assert_array_equal(item["targets"][:-1], tokens[1:])
            assert item["weights"][:-1].all() and item["weights"][-1] == 0
        padding = row["segments"] == 0
        assert np.all(row["weights"][padding] == 0) and np.all(row["tokens"][padding] == PAD)


def test_order_and_dropped_captions_follow_the_config():
    def shares(**changes):
        pipe = pipeline(**changes)
        items = [item["tokens"] for i in range(60) for item in items_of(pipe, pipe.row(i))]
        image_first = np.mean([tokens[1] == BOI for tokens in items])
        no_text = np.mean([not pipe.vocabulary.to_text_ids(tokens).size for tokens in items])
        return image_first, no_text

    assert shares(order="image_first", drop_text=0.0) == (1, 0)
    image_first, no_text = shares(order="random", drop_text=0.0)
    assert 0.35 < image_first < 0.65 and no_text == 0
    assert 0.3 < shares(order="text_first", drop_text=0.4)[1] < 0.5


def test_prefetched_batches_are_the_batches_of_their_steps():
    pipe = pipeline()
    stream = pipe.batches(7)
    for step in range(7, 11):
        got, expected = next(stream), pipe.batch(step)
        assert got.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name])


def test_a_host_makes_its_own_rows_of_each_batch():
    pipe, held = pipeline(), (1, 3)
    stream = pipe.batches(7, held)
    for step in (7, 8):
        batch, whole, part = next(stream), pipe.batch(step), pipe.batch(step, held)
        for name in whole:
            np.testing.assert_array_equal(batch[name], whole[name][list(held)])
            np.testing.assert_array_equal(part[name], whole[name][list(held)])


def test_epochs_see_every_record_and_differ():
    pipe = pipeline()
    epochs = []
    for epoch in range(2):
        rows = range(epoch * pipe.rows_per_epoch, (epoch + 1) * pipe.rows_per_epoch)
        epochs.append([record for row in rows for record in pipe.row_records(row)])
        assert sorted(epochs[-1]) == list(range(len(pipe.source)))
    assert epochs[0] != epochs[1]


def test_held_out_pass_counts_each_record_once_and_is_the_same_twice():
    pipe = pipeline("val")
    batches = list(pipe.eval_batches())
    ends = sum(int(((b["tokens"] == EOS) & (b["segments"] > 0)).sum()) for b in batches[:-1])
    last = batches[-1]
    counted = last["weights"].sum(axis=1) > 0
    ends += int((last["tokens"] == EOS)[counted].sum())
    assert ends == len(pipe.source)
    for one, other in zip(batches, pipe.eval_batches(), strict=True):
        np.testing.assert_array_equal(one["tokens"], other["tokens"])
    assert len(list(pipe.eval_batches(2))) == 2


def test_token_counts_are_those_of_an_epoch_without_dropped_captions():
    pipe = pipeline(drop_text=0.0)
    counts = np.zeros(pipe.vocabulary.size, np.int64)
    for index in range(pipe.rows_per_epoch):
        row = pipe.row(index)
        np.add.at(counts, row["targets"][row["weights"] > 0], 1)
    np.testing.assert_array_equal(pipe.token_counts(), counts)
    assert counts[:NUM_SPECIAL][[BOI, EOI, EOS]].tolist() == [len(pipe.source)] * 3


def test_version_follows_what_decides_the_batches():
    versions = {pipeline().version, pipeline(seed=1).version, pipeline(order="text_first").version}
    versions.add(pipeline(languages=("de",)).version)
    assert len(versions) == 4
    assert pipeline(prefetch=1).version == pipeline().version


def test_batch_of_more_rows_than_an_epoch():
    pipe = pipeline("train", batch_size=2000)
    assert pipe.steps_per_epoch == 1
    assert pipe.batch(0)["tokens"].shape == (2000, 100)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.sequence_length": 20}, "data.sequence_length=20: .* at least 21"),
        ({"model.vocab_size": 300}, "model.vocab_size=300: .* need 4368"),
        (
            {"model.modalities": ("text", "speech")},
            "model.modalities: builtin:emoji32 has no speech",
        ),
    ],
)
def test_what_does_not_fit_names_the_field(changes, message):
    config = load_config("quickstart", changes)
    with pytest.raises(UserError, match=message):
        build_pipeline(config, "val", codec=PixelCodec())


def test_images_are_reshuffled_each_epoch_and_a_function_of_the_step():
    config = load_config("tokenizer_fsq", {"data.batch_size": 64})
    pipe = build_pipeline(config, "train")
    batch = pipe.batch(30)
    assert batch["images"].shape == (64, 32, 32, 3) and batch["images"].dtype == np.uint8
    for index, image in zip(batch["index"][:5], batch["images"][:5], strict=True):
        np.testing.assert_array_equal(pipe.source[int(index)]["image"], image)
    again = build_pipeline(config, "train").batch(30)
    np.testing.assert_array_equal(again["index"], batch["index"])
    size = len(pipe.source)
    epochs = [[pipe.row_records(e * size + i)[0] for i in range(size)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(size)) and epochs[0] != epochs[1]


class CellCodec:
    """Latents that are the mean colours of 8 x 8 cells."""

    num_codes, codes_per_image, version = 0, 64, "cells"

    def encode(self, images):
        return images.reshape(-1, 8, 4, 8, 4, 3).mean(axis=(2, 4)).reshape(-1, 64, 3) / 255


@pytest.mark.parametrize("name, length", [("dit:latents", 0), ("dit:text", 24)])
def test_latents_lie_beside_their_pictures(name, length):
    """In rows and columns, of texts too; what made them is a part of the version."""
    fields = {"data.batch_size": 3, "data.latents": True, "model.image_size": 8}
    config = load_config(name, fields)
    pipe = build_pipeline(config, "val", codec=CellCodec())
    batch = pipe.batch(1)
    assert batch["latents"].shape == (3, 8, 8, 3) and batch["latents"].dtype == np.float32
    expected = CellCodec().encode(batch["images"]).reshape(3, 8, 8, 3)
    np.testing.assert_allclose(batch["latents"], expected, atol=1e-3)
    assert batch["latents"].std() > 0.1
    assert batch["tokens"].shape == (3, length) if length else "tokens" not in batch
    plain = build_pipeline(config, "val")
    assert "latents" not in plain.batch(1) and plain.version != pipe.version
