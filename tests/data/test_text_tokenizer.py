"""Text to ids and back: nothing is lost, and nothing that a model samples can raise."""

import json
import random

import pytest
from tokenizers import Tokenizer

from moejax.data.emoji import load_emoji32
from moejax.data.text_tokenizer import BUILTIN, load_text_tokenizer
from moejax.errors import UserError

SPECS = ("builtin:bpe4096", "bytes")
TEXTS = (
    "a cat",
    "  two  spaces\n\ttab\r\n",
    "Größe, naïve, ÅNGSTRÖM",
    "चेहरा",
    "笑顔 👩‍🚀🏽",
    "e\u0301 is not \u00e9",
    "\x00\x7f\u200d\ufe0f\U0010ffff",
    "",
)


@pytest.mark.parametrize("spec", SPECS)
def test_round_trip_is_exact(spec):
    tokenizer = load_text_tokenizer(spec)
    rows = load_emoji32()[0]["rows"]
    texts = [*TEXTS, *(name for row in rows[::9] for name in row["names"].values())]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.size for i in ids)
    assert tokenizer.encode(TEXTS[3]) == tokenizer.encode_batch(TEXTS)[3]
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


@pytest.mark.parametrize("spec", SPECS)
def test_decode_never_raises(spec):
    tokenizer = load_text_tokenizer(spec)
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(-5, tokenizer.size + 5) for _ in range(rng.randrange(20))]
        text = tokenizer.decode(ids)
        text.encode("utf-8")


@pytest.mark.parametrize("spec", SPECS)
def test_half_a_character(spec):
    """The first byte of a character alone, in either vocabulary, is U+FFFD."""
    tokenizer = load_text_tokenizer(spec)
    first, *rest = tokenizer.encode("\U0001fadf")  # Rare, so not one token.
    assert rest and "\ufffd" in tokenizer.decode([first])


@pytest.mark.parametrize("spec", SPECS)
def test_a_lone_surrogate_is_read_as_a_question_mark(spec):
    tokenizer = load_text_tokenizer(spec)
    assert tokenizer.decode(tokenizer.encode("a\udcff")) == "a?"


def test_builtin_vocabulary():
    tokenizer = load_text_tokenizer("builtin:bpe4096")
    assert tokenizer.size == 4096
    content = json.loads((BUILTIN / "bpe4096.json").read_text(encoding="utf-8"))
    assert content["added_tokens"] == []
    single = {tokenizer.encode_batch([chr(code)])[0][0] for code in range(128)}
    assert len(single) == 128
    names = [row["names"]["en"] for row in load_emoji32()[0]["rows"] if row["split"] == "val"]
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(names))
    assert sum(len(name.encode()) for name in names) / tokens > 2


def test_version_tells_tokenizers_apart(tmp_path):
    content = (BUILTIN / "bpe4096.json").read_text(encoding="utf-8")
    (tmp_path / "same.json").write_text(content, encoding="utf-8")
    smaller = Tokenizer.from_str(content.replace('"dropout":null', '"dropout":0.0'))
    smaller.save(str(tmp_path / "other.json"))
    builtin = load_text_tokenizer("builtin:bpe4096").version
    assert load_text_tokenizer(str(tmp_path / "same.json")).version == builtin
    assert load_text_tokenizer(str(tmp_path / "other.json")).version != builtin
    assert load_text_tokenizer("bytes").version != builtin
    assert len(builtin) == len(load_text_tokenizer("bytes").version) == 16


def test_a_file_of_the_users_own_is_not_cut_or_padded(tmp_path):
    tokenizer = Tokenizer.from_file(str(BUILTIN / "bpe4096.json"))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=30)
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(tmp_path / "mine.json"))
    mine = load_text_tokenizer(str(tmp_path / "mine.json"))
    assert mine.size == 4097
    assert mine.decode(mine.encode("a rather long text")) == "a rather long text"


@pytest.mark.parametrize(
    "spec, message",
    [
        ("builtin:bpe4095", "did you mean 'bpe4096'"),
        ("nowhere/tokenizer.json", "no file nowhere/tokenizer.json; give a tokenizer.json"),
    ],
)
def test_mistakes_are_named_with_the_mend(spec, message):
    with pytest.raises(UserError, match=message):
        load_text_tokenizer(spec)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "t.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"t\.json is not a JSON file of the tokenizers.*save one"):
        load_text_tokenizer(str(tmp_path / "t.json"))
