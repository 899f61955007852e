"""The built-in set: pictures as drawn, names in 12 languages, and a split that does not leak."""

import collections
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from moejax.config.schema import DataConfig
from moejax.data.emoji import FOLDER, compose_caption, load_emoji32
from moejax.data.records import SPLITS
from moejax.data.sources import SOURCES, RecordSource, open_source
from moejax.errors import UserError

LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "ru", "hi", "sw", "tr", "pl", "ja")


def table_rows():
    return load_emoji32()[0]["rows"]


def by_split(key):
    """Split -> set of ``key(index, row)`` over the whole table."""
    found = collections.defaultdict(set)
    for index, row in enumerate(table_rows()):
        value = key(index, row)
        found[row["split"]] |= value if isinstance(value, set) else {value}
    return found


def assert_apart(found):
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert found[one] and not found[one] & found[other]


def test_no_family_lies_in_two_splits():
    assert_apart(by_split(lambda index, row: row["family"]))


def test_no_name_lies_in_two_splits():
    assert_apart(by_split(lambda index, row: {(k, v.casefold()) for k, v in row["names"].items()}))


def test_no_picture_lies_in_two_splits_even_mirrored():
    pictures = load_emoji32()[1]
    found = by_split(
        lambda i, row: {pictures[i].tobytes(), np.fliplr(pictures[i]).tobytes()},
    )
    assert_apart(found)


def test_no_held_out_picture_is_nearly_one_of_train():
    pictures = load_emoji32()[1].reshape(len(table_rows()), -1).astype(np.int16)
    splits = np.array([row["split"] for row in table_rows()])
    train = pictures[splits == "train"]
    for picture in pictures[splits != "train"][::7]:
        assert np.abs(train - picture).mean(1).min() >= 3


def test_families_fold_what_is_one_concept():
    family = {row["names"]["en"]: row["family"] for row in table_rows()}
    for group in (
        ("farmer", "man farmer", "woman farmer"),
        ("one o’clock", "twelve-thirty"),
        ("red heart", "blue heart", "white heart"),
        ("keycap: 1", "keycap: #"),
        ("red square", "blue circle"),
        ("right arrow", "down-left arrow"),
        ("new moon", "last quarter moon face"),
        ("flag: Norway", "flag: Bouvet Island", "flag: Svalbard & Jan Mayen"),
        ("woman walking", "man walking: facing right"),
        ("family: man, boy", "kiss: woman, man", "people holding hands"),
    ):
        assert len({family[name] for name in group}) == 1, group
    assert family["female sign"] != family["male sign"]
    assert family["flag: Norway"] != family["flag: Iceland"]


def test_shares_of_each_category():
    counts = collections.Counter((row["category"], row["split"]) for row in table_rows())
    categories = load_emoji32()[0]["categories"]
    assert len(categories) == 10
    for category in categories:
        total = sum(counts[category, split] for split in SPLITS)
        if category == "Component":  # Five skin tones, one family.
            assert counts[category, "train"] == total == 5
            continue
        for split in ("val", "test"):
            assert abs(counts[category, split] / total - 0.1) < 0.01, (category, split)


def test_every_row_has_every_language():
    table, pictures, _ = load_emoji32()
    assert tuple(table["languages"]) == LANGUAGES
    assert len(table["rows"]) == len(pictures) == 1910
    assert len({row["id"] for row in table["rows"]}) == 1910
    for row in table["rows"]:
        assert tuple(row["names"]) == tuple(row["keywords"]) == LANGUAGES
        assert all(name and name == name.strip() for name in row["names"].values())
        assert all(row["keywords"].values())


def test_pictures_are_the_ones_that_were_drawn():
    """The version holds the hash of pixels and rows from before the sheet was encoded."""
    table, pictures, _ = load_emoji32()
    digest = hashlib.sha256(pictures.tobytes())
    digest.update(json.dumps(table["rows"], ensure_ascii=False, sort_keys=True).encode())
    assert table["version"] == f"1-{digest.hexdigest()[:16]}"


def test_pictures_match_their_names():
    source = open_source("builtin:emoji32", "train", languages=("en",))
    pictures = {source.text_at(i): source[i]["image"] for i in range(len(source))}

    def colour(name):
        return pictures[name][8:24, 8:24].reshape(-1, 3).mean(0)

    for name, channel in (("red square", 0), ("green square", 1), ("blue square", 2)):
        assert colour(name).argmax() == channel
    assert (pictures["red apple"][0, 0] == 255).all()


def test_records():
    source = open_source("builtin:emoji32", "val", languages=("en", "ja"))
    assert isinstance(source, RecordSource)
    assert (source.name, source.split, len(source)) == ("builtin:emoji32", "val", 2 * 191)
    record, sibling = source[0], source[1]
    assert record["id"].split("/")[1] == "en" and sibling["id"].split("/")[1] == "ja"
    assert record["id"].split("/")[0] == sibling["id"].split("/")[0]
    assert np.array_equal(record["image"], sibling["image"])
    assert record["image"].shape == (32, 32, 3) and record["image"].dtype == np.uint8
    assert source.categories[record["label"]] == "Smileys & Emotion"
    assert len({record["id"] for record in source}) == len(source)
    assert [record["text"] for record in source] == [source.text_at(i) for i in range(len(source))]


def test_records_are_the_same_each_time_and_cannot_be_spoiled():
    source = open_source("builtin:emoji32", "test")
    with pytest.raises(ValueError, match="read-only"):
        source[3]["image"][:] = 0
    again = open_source("builtin:emoji32", "test")
    assert again.version == source.version
    assert np.array_equal(again[3]["image"], source[3]["image"])


def test_image_size():
    source = open_source("builtin:emoji32", "val", image_size=16)
    assert source[5]["image"].shape == (16, 16, 3)


def test_captions():
    keywords = ["Cat", "face", "pet", "a", "b", "c", "d"]
    assert compose_caption("cat", keywords, "name") == "cat"
    assert compose_caption("cat", keywords, "keywords") == "cat: face, pet, a, b, c"
    assert compose_caption("cat", ["CAT"], "keywords") == "cat"
    source = open_source("builtin:emoji32", "train", caption="keywords")
    assert source.text_at(0).startswith("grinning face: ")


def test_version_changes_with_every_option():
    base = dict(split="val", image_size=32, languages=("en",), caption="name")
    changes = (
        {},
        {"split": "test"},
        {"image_size": 16},
        {"languages": ("de",)},
        {"languages": ("en", "de")},
        {"caption": "keywords"},
    )
    versions = [open_source("builtin:emoji32", **(base | change)).version for change in changes]
    assert len(set(versions)) == len(changes)
    assert all(len(version) == 16 and int(version, 16) >= 0 for version in versions)


@pytest.mark.parametrize(
    "spec, options, message",
    [
        ("emoji32", {}, "is not KIND:NAME"),
        ("builtn:emoji32", {}, "did you mean 'builtin'"),
        ("builtin:emoji33", {}, "did you mean 'emoji32'"),
        ("builtin:emoji32", {"split": "valid"}, "did you mean 'val'"),
        ("builtin:emoji32", {"languages": ("en", "eo")}, "has no 'eo'; choose from: en, de, fr"),
        ("builtin:emoji32", {"languages": ("en", "en")}, "each language once"),
        ("builtin:emoji32", {"caption": "keyword"}, "data.caption: 'keyword' is none of"),
        ("builtin:emoji32", {"image_size": 0}, "data.image_size"),
    ],
)
def test_mistakes_are_named_with_the_mend(spec, options, message):
    with pytest.raises(UserError, match=message):
        open_source(spec, **({"split": "train"} | options))


def test_a_source_of_the_users_own(monkeypatch):
    monkeypatch.setattr(SOURCES, "_entries", dict(SOURCES._entries))

    @SOURCES.register("mine")
    def open_mine(rest, split, data):
        return rest, split, data

    data = DataConfig(source="mine:a:b", languages=("de",))
    assert open_source("mine:a:b", "val", languages=("de",)) == ("a:b", "val", data)


def test_size_on_disk_and_notice():
    assert sum(path.stat().st_size for path in FOLDER.glob("emoji32.*")) < 4.5e6
    notice = (FOLDER / "NOTICE").read_text(encoding="utf-8")
    for part in (
        "Noto Emoji",
        "Apache License",
        "Unicode-3.0",
        "emoji-datasource-google 16.0.0",
        "cldr-annotations-full 48.2.0",
        "cldr-annotations-derived-full 48.2.0",
    ):
        assert part in notice
    with Image.open(FOLDER / load_emoji32()[0]["sheet"]) as sheet:
        assert sheet.width == 44 * 32


def test_importing_sources_is_light():
    code = (
        "import sys, moejax.data.sources, moejax.data.text_tokenizer, moejax.data.records\n"
        "heavy = {'tensorflow', 'torch', 'PIL', 'tokenizers', 'tensorflow_datasets'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_categories_are_classes():
    """The ten of `vit:emoji`; a model of other classes is told."""
    from moejax.config import load_config
    from moejax.data.build import build_pipeline

    config = load_config("vit:emoji")
    pipeline = build_pipeline(config, "val")
    counts = pipeline.label_counts(config.model.num_classes)
    assert counts.sum() == 191 and len(counts) == len(pipeline.source.categories) == 10
    named = dict(zip(pipeline.source.categories, counts, strict=True))
    # A skin or hair component is in train alone.
    assert [name for name, count in named.items() if not count] == ["Component"]
    apple = next(r for r in open_source("builtin:emoji32", "train") if r["text"] == "green apple")
    assert pipeline.source.categories[apple["label"]] == "Food & Drink"
    with pytest.raises(UserError, match="model.num_classes=9: builtin:emoji32 has 10 classes"):
        build_pipeline(load_config("vit:emoji", {"model.num_classes": 9}), "val")
