"""Pictures with their texts: tokens, who belongs together, and what is refused."""

import dataclasses

import numpy as np
import pytest

from moejax.config.contrastive import ContrastiveConfig, TwoTowersConfig
from moejax.config.schema import Config, DataConfig
from moejax.data.build import build_pipeline
from moejax.data.pair_pipeline import PairPipeline, write_clusters
from moejax.data.vocabulary import BOS, EOS, NUM_SPECIAL, PAD
from moejax.errors import UserError


def make_config(model=None, **data) -> Config:
    data = {"batch_size": 4, "sequence_length": 16, "text_tokenizer": "bytes", **data}
    return Config(
        model=model or TwoTowersConfig(vocab_size=272),
        data=DataConfig(format="pairs", **data),
        objective=ContrastiveConfig(),
    )


class Drawn(list):
    """Two concepts of one family and one of another; two styles and two languages, in part."""

    name, version = "made:drawn", "1"
    categories = ("animals", "food")
    texts = ("cat", "Katze", "cat", "kitten", "a very long loaf of bread")

    def __init__(self, split="train", keys=("family", "concept", "style", "text", "label")):
        self.split = split
        rows = zip(
            self.texts, ("cats",) * 4 + ("bread",), "aaabc", "nntnt", (0, 0, 0, 0, 1), strict=True
        )
        for i, (text, family, concept, style, label) in enumerate(rows):
            image = np.full((32, 32, 3), i, np.uint8)
            fields = {
                "text": text,
                "family": family,
                "concept": concept,
                "style": style,
                "label": label,
            }
            kept = {key: fields[key] for key in keys}
            self.append({"id": str(i), "image": image, **kept})

    def text_at(self, index):
        return self.texts[index]


def test_rows():
    pipeline = PairPipeline(make_config(), Drawn("val"))
    (first, last) = pipeline.eval_batches()
    expected = [BOS, *(NUM_SPECIAL + byte for byte in b"Katze"), EOS, *[PAD] * 9]
    assert first["tokens"][1].tolist() == expected
    cut = [BOS, *(NUM_SPECIAL + byte for byte in b"a very long lo"), EOS]
    assert last["tokens"][0].tolist() == cut and pipeline.truncated == 1
    assert first["family"].tolist() == [0, 0, 0, 0] and last["family"][0] == 1
    assert first["concept"].tolist() == [0, 0, 0, 1] and last["concept"][0] == 2
    assert first["style"].tolist() == [0, 0, 1, 0] and pipeline.styles == ("n", "t")
    assert first["images"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert first["labels"].tolist() == [0, 0, 0, 0] and pipeline.categories == ("animals", "food")
    # Three rows of the second batch only fill it up.
    assert last["weights"].tolist() == [1, 0, 0, 0]


def test_texts_stay_with_their_pictures_in_any_order():
    pipeline = PairPipeline(make_config(), Drawn())
    seen = set()
    for step in range(5):
        batch = pipeline.batch(step)
        np.testing.assert_array_equal(batch["tokens"], pipeline.tokens[batch["index"]])
        np.testing.assert_array_equal(batch["images"][:, 0, 0, 0], batch["index"])
        seen |= set(batch["index"].tolist())
    assert seen == set(range(5))


def test_records_that_say_nothing_belong_to_nobody():
    pipeline = PairPipeline(make_config(), Drawn(keys=("text",)))
    assert pipeline.families.tolist() == pipeline.concepts.tolist() == [0, 1, 2, 3, 4]
    assert pipeline.style_of.tolist() == [-1] * 5 and pipeline.styles == ()
    assert pipeline.batch(0)["labels"].tolist() == [-1] * 4


def test_families_of_emoji_are_in_one_split():
    config = make_config(TwoTowersConfig(), text_tokenizer="builtin:bpe4096", sequence_length=24)
    records = {split: build_pipeline(config, split).source for split in ("train", "val", "test")}
    families = {split: {r["family"] for r in source} for split, source in records.items()}
    assert all(len(found) > 100 for found in families.values())
    assert not families["train"] & families["val"]
    assert not families["train"] & families["test"] and not families["val"] & families["test"]
    # Skin tones of one person are of one family, and are concepts of their own.
    people = [r for r in records["train"] if r["family"] == "1F9D1"]
    assert len(people) > 5 and len({r["concept"] for r in people}) == len(people)


def test_the_version_says_what_decides_the_rows():
    version = lambda **data: PairPipeline(make_config(**data), Drawn()).version
    versions = {version(), version(sequence_length=20), version(seed=1)}
    assert len(versions) == 3 and version() in versions


def test_clusters_are_those_of_the_file(tmp_path):
    """By the ids of the records, in training alone."""
    file = tmp_path / "clusters.npz"
    write_clusters(file, ["4", "3", "2", "1", "0", "another"], [8, 7, 6, 5, 4, 3])
    config = make_config(clusters=str(file))
    batch = PairPipeline(config, Drawn()).batch(0)
    np.testing.assert_array_equal(batch["cluster"], batch["index"] + 4)
    (first, _) = PairPipeline(config, Drawn("val")).eval_batches()
    assert first["cluster"].tolist() == [0] * 4
    version = PairPipeline(config, Drawn()).version
    assert version != PairPipeline(make_config(), Drawn()).version
    write_clusters(file, ["0", "1", "2", "3"], [0] * 4)
    with pytest.raises(UserError, match="data.clusters=.*: knows no record 4"):
        PairPipeline(config, Drawn())
    file.write_text("no archive")
    with pytest.raises(UserError, match="data.clusters=.*: no file of clusters"):
        PairPipeline(config, Drawn())


def test_mistakes():
    with pytest.raises(UserError, match="data.source=made:drawn: its records have no text"):
        PairPipeline(make_config(), Drawn(keys=("label",)))
    with pytest.raises(UserError, match="model.vocab_size=200: .*=bytes needs 272"):
        PairPipeline(make_config(TwoTowersConfig(vocab_size=200)), Drawn())
    with pytest.raises(UserError, match="data.sequence_length: must be at least 3"):
        PairPipeline(make_config(sequence_length=2), Drawn())
    with pytest.raises(UserError, match="data.format"):
        dataclasses.replace(make_config(), data=DataConfig(format="images"))
