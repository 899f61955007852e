"""Prepared sets: rows on disk, records of them, and what is refused."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from moejax.cli.main import main
from moejax.data import local, record_io
from moejax.data.record_io import Row, RowFile, decode_row, encode_row, write_rows, write_set
from moejax.data.sources import RecordSource, open_source
from moejax.errors import UserError

STYLES = ["noto", "fluent"]
LANGUAGES = ["en", "de", "ja"]
IDS = ("1F600", "1F98A", "1F3E0")


def picture(number, style):
    seed = STYLES.index(style) + 10 * number
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def make_row(number):
    """Concept 1 lacks the style fluent, concept 2 the language ja; no speech in Japanese."""
    styles = STYLES[:1] if number == 1 else STYLES
    languages = LANGUAGES[:2] if number == 2 else LANGUAGES
    header = {
        "id": IDS[number],
        "family": f"family {number}",
        "label": number,
        "mirror": number != 2,
        "names": {lang: f"{lang} {number}" for lang in languages},
        "keywords": {lang: ["eins", "zwei"] for lang in languages},
    }
    parts = {f"image/{style}": png(picture(number, style)) for style in styles}
    parts |= {f"speech/{lang}": bytes([number, 255, 7][: number + 1]) for lang in LANGUAGES[:2]}
    return Row(header, parts)


def make_set(folder, *, name="mine", recipe=None, rows=None, speech=True, version="a" * 16):
    rows = rows or {"train": [make_row(0), make_row(1), make_row(2)], "val": [make_row(1)]}
    description = {
        "name": name,
        "version": version,
        "languages": LANGUAGES,
        "styles": STYLES,
        "categories": ["faces", "animals", "houses"],
        "num_audio_codes": 256 if speech else 0,
    }
    if recipe is not None:
        description["recipe"] = recipe
    write_set(folder, rows, description)
    return folder


def open_mine(folder, split="train", **fields):
    fields = {"languages": tuple(LANGUAGES)} | fields
    return open_source("local:mine", split, data_dir=str(folder.parent), **fields)


@pytest.fixture
def mine(tmp_path):
    return make_set(tmp_path / "mine")


def test_a_row_is_read_as_it_was_written():
    row = Row(
        {"id": "x", "names": {"ja": "狐 🦊"}, "n": [1, None, 0.5]}, {"a": b"", "b/c": b"\0\xff"}
    )
    content = encode_row(row)
    assert decode_row(content) == row
    with pytest.raises(ValueError, match="of which its header names"):
        decode_row(content + b"x")


def test_rows_in_any_order_and_none(tmp_path):
    rows = [make_row(0), make_row(1), make_row(2)]
    write_rows(tmp_path / "three", rows)
    write_rows(tmp_path / "none", [])
    with RowFile(tmp_path / "three") as file:
        assert [file[index] for index in (2, 0, 1)] == [rows[2], rows[0], rows[1]]
        assert file.read_all() == rows and len(file) == 3
        with pytest.raises(IndexError):
            file[3]
    with RowFile(tmp_path / "none") as file:
        assert len(file) == 0 and file.read_all() == []


def test_records(mine):
    source = open_mine(mine)
    assert isinstance(source, RecordSource)
    assert [record["id"] for record in source] == [
        *("1F600/noto/en", "1F600/noto/de", "1F600/noto/ja"),
        *("1F600/fluent/en", "1F600/fluent/de", "1F600/fluent/ja"),
        *("1F98A/noto/en", "1F98A/noto/de", "1F98A/noto/ja"),
        *("1F3E0/noto/en", "1F3E0/noto/de", "1F3E0/fluent/en", "1F3E0/fluent/de"),
    ]
    assert (source.name, source.split, len(source)) == ("local:mine", "train", 13)
    assert source.num_audio_codes == 256 and source.categories[source[0]["label"]] == "faces"
    record = source[12]
    assert np.array_equal(record["image"], picture(2, "fluent"))
    assert record["text"] == "de 2" and record["family"] == "family 2"
    assert record["label"] == 2 and record["mirror"] is False and source[0]["mirror"] is True
    assert record["audio_codes"].dtype == np.int32
    assert record["audio_codes"].tolist() == [2, 255, 7] and source[7]["audio_codes"].tolist() == [
        1,
        255,
    ]
    assert "audio_codes" not in source[2]
    with pytest.raises(ValueError, match="read-only"):
        record["image"][:] = 0


def test_a_set_without_speech_says_so(tmp_path):
    make_set(tmp_path / "mine", speech=False)
    assert not hasattr(open_mine(tmp_path / "mine"), "num_audio_codes")


def test_a_picture_is_decoded_once_and_not_for_its_text(mine, monkeypatch):
    sizes = []

    def count(content, size):
        sizes.append(size)
        return np.zeros((size, size, 3), np.uint8)

    monkeypatch.setattr(local, "decode_image", count)
    source = open_mine(mine)
    assert [source.text_at(index) for index in range(3)] == ["en 0", "de 0", "ja 0"]
    assert sizes == []
    for _ in range(2):
        assert len(list(source)) == 13
    assert sizes == [32] * 5


def test_a_set_too_large_for_memory_gives_the_same_records(mine, monkeypatch):
    kept = list(open_mine(mine))
    monkeypatch.setattr(local, "MAX_BYTES_IN_MEMORY", 0)
    source = open_mine(mine)
    assert source._parts is None
    for index in reversed(range(len(source))):
        again = source[index]
        assert again.keys() == kept[index].keys()
        assert all(np.array_equal(again[key], kept[index][key]) for key in again)
    assert not source._pictures


def test_options(mine):
    assert len(open_mine(mine, styles=("fluent",))) == 5
    assert len(open_mine(mine, languages=("ja",))) == 3
    # In the order that is asked for, as languages are.
    assert open_mine(mine, styles=("fluent", "noto"))[0]["id"] == "1F600/fluent/en"
    assert open_mine(mine, caption="keywords").text_at(0) == "en 0: eins, zwei"
    assert open_mine(mine, image_size=16)[0]["image"].shape == (16, 16, 3)
    assert len(open_mine(mine, split="val")) == 3


def test_version_changes_with_every_option_and_with_the_set(mine):
    changes = (
        {},
        {"split": "val"},
        {"image_size": 16},
        {"languages": ("de",)},
        {"styles": ("noto",)},
        {"caption": "keywords"},
    )
    versions = [open_mine(mine, **change).version for change in changes]
    assert versions[0] == open_mine(mine).version
    make_set(mine, version="b" * 16)
    versions.append(open_mine(mine).version)
    assert len(set(versions)) == len(versions)
    assert all(len(version) == 16 and int(version, 16) >= 0 for version in versions)


def test_a_folder_anywhere(mine):
    source = open_source(f"arrayrecord:{mine}", "val", languages=("de",))
    assert source.name == f"arrayrecord:{mine}"
    assert [record["id"] for record in source] == ["1F98A/noto/de"]


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"languages": ("en", "eo")},
            "data.languages: local:mine has no 'eo'; choose from: en, de",
        ),
        ({"languages": ("en", "en")}, "data.languages: .* must name each once"),
        (
            {"styles": ("apple",)},
            "data.styles: local:mine has no 'apple'; choose from: noto, fluent",
        ),
        ({"split": "test"}, "local:mine has no split 'test'; it has: train, val"),
    ],
)
def test_options_that_a_set_has_not(mine, fields, message):
    with pytest.raises(UserError, match=message):
        open_mine(mine, **fields)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("local:emoji3m", "make it with: moejax prepare emoji3m --data-dir '{} x'"),
        ("local:emoji3n", "there is no prepared set; did you mean 'emoji3m'?"),
        ("local:a/b", "a folder is opened by arrayrecord:a/b"),
        ("arrayrecord:nowhere", "no dataset.json in nowhere"),
    ],
)
def test_a_set_that_is_not_there(spec, message, tmp_path):
    with pytest.raises(UserError) as error:
        open_source(spec, "train", data_dir=f"{tmp_path} x")
    assert message.format(tmp_path) in str(error.value)


def test_the_command_of_the_default_folder_needs_no_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"make it with: moejax prepare emoji3m$"):
        open_source("local:emoji3m", "train")


def test_training_on_a_set_that_is_not_there_is_one_line(tmp_path, capsys):
    workdir = tmp_path / "run"
    command = ["train", "--config", "quickstart", "--workdir", str(workdir)]
    command += ["--config.data.source=local:emoji3m", f"--config.data.data_dir={tmp_path}"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("moejax: error: data.source: local:emoji3m") and error.count("\n") == 1
    assert f"moejax prepare emoji3m --data-dir {tmp_path}" in error and not workdir.exists()


@pytest.mark.parametrize("recipe", [None, 0, 2])
def test_a_set_of_another_recipe_is_refused(recipe, tmp_path):
    folder = make_set(tmp_path / "emoji3m", name="emoji3m", recipe=recipe)
    for spec in ("local:emoji3m", f"arrayrecord:{folder}"):
        with pytest.raises(UserError, match=f"by recipe {recipe!r}.* moejax prepare emoji3m"):
            open_source(spec, "train", data_dir=str(tmp_path))
    make_set(folder, name="emoji3m", recipe=local.RECIPES["emoji3m"])
    assert len(open_source("local:emoji3m", "train", data_dir=str(tmp_path))) == 5


def change_description(folder, **values):
    path = folder / "dataset.json"
    document = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in document.items() if v is not None}))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: change_description(d, format=2), "format 2, but this moejax reads 1"),
        (lambda d: change_description(d, styles=None), "the key 'styles' is missing"),
        (lambda d: (d / "dataset.json").write_text("{"), "not JSON"),
        (lambda d: (d / "dataset.json").write_text("[]"), "does not describe a prepared set"),
        (lambda d: (d / "val.array_record").unlink(), "val.array_record is missing"),
        (lambda d: shorten(d / "train.array_record"), "train.array_record has .* bytes"),
        (lambda d: flip(d / "train.array_record"), "train.array_record is damaged"),
    ],
)
def test_a_damaged_set_is_refused(mine, damage, message):
    damage(mine)
    with pytest.raises(UserError, match=message):
        open_mine(mine)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    at = content.index(b"image/noto") if b"image/noto" in content else len(content) // 2
    content[at + 2000] ^= 255
    path.write_bytes(bytes(content))


def test_a_set_half_written_is_none(mine, monkeypatch):
    def fail(path, rows):
        if path.name.startswith("val"):
            raise KeyboardInterrupt
        write_rows(path, rows)

    monkeypatch.setattr(record_io, "write_rows", fail)
    with pytest.raises(KeyboardInterrupt):
        make_set(mine)
    with pytest.raises(UserError, match="no dataset.json"):
        open_mine(mine)
