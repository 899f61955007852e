"""Sequences of three modalities, pictures as latents, and mixtures of sources."""

import itertools

import numpy as np
import pytest

from moejax.config import freeze, load_config_dict
from moejax.data.build import build_pipeline
from moejax.data.latents import PatchCodec
from moejax.data.mixture import BLOCK, block_counts
from moejax.data.sources import SOURCES
from moejax.data.vocabulary import BOA, BOI, BOS, EOA, EOI, EOS, PAD, PATCH
from moejax.errors import UserError


class Codec:
    """The mean of each quarter of a picture."""

    num_codes, codes_per_image, version = 256, 4, "quarters"

    def encode(self, images):
        quarters = images[..., 0].reshape(-1, 2, 16, 2, 16).mean(axis=(2, 4))
        return quarters.reshape(-1, 4).astype(np.int32)


class Latents:
    """A grid of 4 x 4 latents of two channels: the mean of a cell, and the number of the cell."""

    channels, grid, version = 2, (4, 4), "cells"

    def encode(self, images):
        cells = images[..., 0].reshape(-1, 4, 8, 4, 8).mean(axis=(2, 4)).reshape(-1, 16)
        number = np.broadcast_to(np.arange(16), cells.shape)
        return np.stack([cells, number], axis=-1).astype(np.float32)

    def decode(self, latents):
        return latents


class Source:
    """Records with a picture, a text and speech, each there or not by the kind of source."""

    def __init__(self, rest, split, data):
        self.name, self.split, self.version = f"fake:{rest}", split, f"{rest}-{split}"
        self.kind, self.data = rest, data

    def __len__(self):
        return 40 if self.split == "train" else 7

    def text_at(self, index):
        return "" if "silent" in self.kind else f"{self.kind[0]}{index}"

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        record = {"id": str(index), "text": self.text_at(index)}
        if "i" in self.kind:
            record["image"] = np.full((32, 32, 3), index, np.uint8)
        if "s" in self.kind:
            record["audio_codes"] = np.arange(3 + index % 4, dtype=np.int32)
        return record


@pytest.fixture(autouse=True)
def fake_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(SOURCES, "_entries", dict(SOURCES._entries))
    SOURCES.register("fake")(Source)


def make(split="train", modalities=("text", "image", "speech"), codec=None, **data):
    config = load_config_dict("quickstart")
    config.model.modalities, config.model.vocab_size = modalities, 6000
    config.data.update(text_tokenizer="bytes", batch_size=4, sequence_length=48, drop_text=0.0)
    config.data.update({"source": "fake:is", **data})
    if codec is not None:
        config.model.latents.update(channels=2, grid=4, patch=2)
        with config.unlocked():
            config.objective = load_config_dict("transfusion").objective
    return build_pipeline(freeze(config), split, codec=codec or Codec())


def segments_of(row):
    for segment in range(1, row["segments"].max() + 1):
        here = row["segments"] == segment
        yield {name: value[here] for name, value in row.items() if value.shape[:1] == here.shape}


def test_a_sequence_of_three_modalities_spells_its_record():
    pipe = make()
    vocabulary = pipe.vocabulary
    for index in range(pipe.rows_per_epoch):
        row = pipe.row(index)
        for record, item in zip(pipe.row_records(index), segments_of(row), strict=True):
            tokens, modality = item["tokens"], item["modality"]
            assert tokens[0] == BOS and tokens[-1] == EOS
            boa, eoa = (int(np.flatnonzero(tokens == mark)[0]) for mark in (BOA, EOA))
            units = tokens[boa + 1 : eoa] - vocabulary.speech_offset
            np.testing.assert_array_equal(units, pipe.source[record]["audio_codes"])
            assert set(modality[boa + 1 : eoa]) == {2} and modality[boa] == modality[eoa] == 0
            boi, eoi = (int(np.flatnonzero(tokens == mark)[0]) for mark in (BOI, EOI))
            assert vocabulary.to_image_codes(tokens[boi + 1 : eoi]).tolist() == [record] * 4
            assert set(modality[boi + 1 : eoi]) == {1}
            text = pipe.tokenizer.decode(vocabulary.to_text_ids(tokens).tolist())
            assert text == pipe.source.text_at(record)
            assert len(tokens) == 6 + 4 + len(units) + len(text)
        assert np.all(row["tokens"][row["segments"] == 0] == PAD)


def order_of(tokens, vocabulary):
    """Such as "tis" for text, image, speech."""
    names = np.asarray(["s" if t == BOA else "i" if t == BOI else "" for t in tokens])
    names[(tokens >= vocabulary.text_offset) & (tokens < vocabulary.image_offset)] = "t"
    return "".join(name for name, _ in itertools.groupby("".join(names)))


def test_orders_of_three_parts():
    def orders(**data):
        pipe = make(**data)
        rows = [pipe.row(index) for index in range(5 * pipe.rows_per_epoch)]
        return [order_of(item["tokens"], pipe.vocabulary) for r in rows for item in segments_of(r)]

    assert set(orders(order="text_first")) == {"tis"}
    assert set(orders(order="image_first")) == {"its"}
    drawn = orders(order="random", text_first_share=0.25)
    assert set(drawn) == {"tis", "tsi", "its", "sti", "ist", "sit"}
    assert 0.15 < np.mean([order[0] == "t" for order in drawn]) < 0.35


def test_a_model_without_speech_leaves_it_out_and_one_with_it_needs_it():
    pipe = make(modalities=("text", "image"))
    assert not np.any(pipe.row(0)["tokens"] == BOA)
    assert pipe.vocabulary.speech_units == 0
    text_only = make(modalities=("text",))
    assert text_only.vocabulary.image_codes == 0
    assert not np.any(np.isin(text_only.row(0)["tokens"], [BOA, BOI]))
    with pytest.raises(UserError, match="model.modalities: fake:i has no speech"):
        make(sources=(("fake:i", 1.0),))
    with pytest.raises(UserError, match="model.modalities: .* must be 'text' and others of"):
        make(modalities=("text", "touch"))


def test_latents_lie_in_their_places():
    codec = PatchCodec(Latents(), 2)
    pipe = make(modalities=("text", "image"), codec=codec)
    row = pipe.row(0)
    records = pipe.row_records(0)
    assert row["latents"].shape == (48, 8) and row["image_id"].max() == len(records) > 1
    for number, record in enumerate(records, 1):
        here = row["image_id"] == number
        assert set(row["tokens"][here]) == {PATCH} and set(row["modality"][here]) == {1}
        patches = row["latents"][here]
        np.testing.assert_array_equal(patches[:, 0::2], record)
        # A patch holds the cells of a square of the grid.
        np.testing.assert_array_equal(
            patches[:, 1::2], [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
        )
    assert np.all(row["latents"][row["image_id"] == 0] == 0)


def test_patches_put_together_are_the_grid():
    codec = PatchCodec(Latents(), 2)
    images = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3)).astype(np.uint8)
    np.testing.assert_array_equal(codec.decode(codec.encode(images)), Latents().encode(images))
    with pytest.raises(ValueError, match="patches of 3 do not cut a grid of 4 x 4"):
        PatchCodec(Latents(), 3)


MIX = (("fake:is", 3.0), ("fake:s", 1.0))


def test_shares_are_exact_in_every_block_whatever_the_sizes_are():
    assert block_counts([3.0, 1.0]).tolist() == [750, 250]
    assert block_counts([1.0, 1.0, 1.0]).sum() == BLOCK
    assert block_counts([1.0, 1e-9]).tolist() == [BLOCK - 1, 1]
    pipe = make(modalities=("text", "speech"), sources=MIX)
    for block in range(2):
        marks = sum(pipe.row(block * BLOCK + i)["sources"] for i in range(BLOCK))
        assert marks.tolist() == [750, 250]


def test_each_source_goes_on_through_its_own_plan():
    """Rows of a source, whichever places of the mixture they come at, are those of it alone."""
    pipe = make(modalities=("text", "speech"), sources=MIX)
    alone = [make(modalities=("text", "speech"), source=spec) for spec, _ in MIX]
    seen = [0, 0]
    for index in range(BLOCK - 20, BLOCK + 60):
        row = pipe.row(index)
        number = int(row["sources"].argmax())
        if index == BLOCK - 20:
            seen = [sum(int(pipe.row(i)["sources"][s]) for i in range(index)) for s in range(2)]
        expected = alone[number].row(seen[number])
        np.testing.assert_array_equal(row["tokens"], expected["tokens"])
        seen[number] += 1
    batch = next(pipe.batches(9))
    np.testing.assert_array_equal(batch["tokens"], pipe.batch(9)["tokens"])
    assert batch["sources"].shape == (4, 2)


def test_held_out_pass_of_a_mixture_takes_every_record_once():
    pipe = make("val", modalities=("text", "speech"), sources=MIX)
    ends = np.zeros(2)
    for batch in pipe.eval_batches():
        real = (batch["weights"] > 0).any(axis=1)
        counts = ((batch["tokens"] == EOS) & (batch["segments"] > 0)).sum(axis=1) * real
        ends += counts @ batch["sources"]
    assert ends.tolist() == [7, 7]
    ids = [pipe.source[index]["id"] for index in range(len(pipe.source))]
    assert ids[0] == "fake:is/0" and ids[7] == "fake:s/0" and len(set(ids)) == 14


def test_version_follows_the_shares_and_the_parts():
    def version(sources, **data):
        return make(modalities=("text", "speech"), sources=sources, **data).version

    versions = {version(MIX), version(MIX[::-1]), version((MIX[0], ("fake:s", 2.0)))}
    versions |= {version(MIX, seed=3), make(modalities=("text", "speech")).version}
    assert len(versions) == 5


@pytest.mark.parametrize("sources", [(("fake:is", 0.0),), (("fake", 1.0),), (("fake:is",),)])
def test_a_mixture_that_means_nothing_is_refused(sources):
    with pytest.raises(UserError, match="data.sources"):
        make(modalities=("text", "speech"), sources=sources)
