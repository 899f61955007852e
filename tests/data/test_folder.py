"""``folder:DIR``: pictures come back as written, and every mistake is found at opening."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from moejax.data import images
from moejax.data.sources import RecordSource, open_source
from moejax.errors import UserError

EMOJI = open_source("builtin:emoji32", "train")


def write_captions(folder, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """Twelve emoji, every other one a JPEG, and their captions."""
    rows = []
    for i in range(12):
        record = EMOJI[i * 100]
        name = f"{i:02d}.jpg" if i % 2 else f"{i:02d}.png"
        Image.fromarray(record["image"]).save(tmp_path / name, quality=95, subsampling=0)
        rows.append({"image": name, "text": record["text"]})
    write_captions(tmp_path, rows)
    return tmp_path


def open_all(folder, **options):
    return {s: open_source(f"folder:{folder}", s, **options) for s in ("train", "val", "test")}


def rows_of(folder):
    text = (folder / "captions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def mistake(folder, split="train"):
    """The message of the error of opening ``folder``: one line."""
    with pytest.raises(UserError) as caught:
        open_source(f"folder:{folder}", split)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_round_trip(folder):
    sources = open_all(folder)
    assert [len(source) for source in sources.values()] == [10, 1, 1]
    records = [record for source in sources.values() for record in source]
    assert {record["id"] for record in records} == {row["image"] for row in rows_of(folder)}
    for record in records:
        expected = EMOJI[int(record["id"][:2]) * 100]
        assert record["text"] == expected["text"] and "label" not in record
        if record["id"].endswith("png"):
            assert np.array_equal(record["image"], expected["image"])
        else:
            assert np.abs(record["image"].astype(int) - expected["image"]).mean() < 4
    assert isinstance(sources["val"], RecordSource)
    assert sources["val"].text_at(0) == sources["val"][0]["text"]


def test_the_split_stays_when_rows_change_places(folder):
    before = {
        split: {record["id"] for record in source} for split, source in open_all(folder).items()
    }
    write_captions(folder, rows_of(folder)[::-1])
    after = {
        split: {record["id"] for record in source} for split, source in open_all(folder).items()
    }
    assert before == after


def test_families_stay_together_and_follow_a_given_split(folder):
    rows = rows_of(folder)
    for i, row in enumerate(rows):
        row["family"] = f"family {i // 3}"
    rows[0]["split"] = "test"
    write_captions(folder, rows)
    found = {s: {r["family"] for r in source} for s, source in open_all(folder).items()}
    assert "family 0" in found["test"]
    assert sum(len(group) for group in found.values()) == 4
    assert sum(len(source) for source in open_all(folder).values()) == 12


def test_given_splits_labels_ids_and_other_columns(folder):
    rows = rows_of(folder)
    for i, row in enumerate(rows):
        row |= {"split": ("train", "val", "test")[i % 3], "label": i, "id": f"r{i}", "url": "u"}
    write_captions(folder, rows)
    source = open_source(f"folder:{folder}", "val")
    assert [(r["id"], r["label"], r["family"]) for r in source] == [
        (f"r{i}", i, rows[i]["image"]) for i in (1, 4, 7, 10)
    ]


def test_two_captions_of_one_picture(folder):
    rows = rows_of(folder)
    write_captions(folder, [*rows, {"image": "./00.png", "text": "second"}])
    records = [record for source in open_all(folder).values() for record in source]
    ids = [record["id"] for record in records if record["family"] == "00.png"]
    assert ids == ["00.png", "00.png#2"]
    assert len({len(source) for source in open_all(folder).values()}) == 2


def test_byte_order_mark_blank_lines_and_windows_line_ends(folder):
    lines = [json.dumps(row) for row in rows_of(folder)]
    content = "\ufeff" + "\r\n\r\n".join(lines)
    (folder / "captions.jsonl").write_bytes(content.encode())
    assert len(open_source(f"folder:{folder}", "train")) == 10


def test_pictures_are_laid_on_white_upright_and_letterboxed(tmp_path):
    wide = Image.new("RGBA", (64, 32), (255, 0, 0, 255))
    wide.paste((0, 0, 0, 0), (32, 0, 64, 32))  # The right half is transparent.
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    image = images.decode_image(buffer.getvalue(), 64)
    assert (image[:15] == 255).all() and (image[49:] == 255).all()
    assert (image[16:48, :32] == (255, 0, 0)).all() and (image[16:48, 32:] == 255).all()

    turned = Image.new("RGB", (64, 64), "white")
    turned.paste("black", (0, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # Turned by 90 degrees: the stored top is the right side.
    buffer = io.BytesIO()
    turned.save(buffer, "JPEG", exif=exif)
    image = images.decode_image(buffer.getvalue(), 64)
    assert image[:, 40:].max() < 30 and image[:, :24].min() > 225


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_every_kind_of_pixel(mode):
    grey = Image.fromarray(np.full((16, 16), 128, np.uint16) << 8) if mode == "I;16" else None
    picture = grey or Image.new("RGB", (16, 16), (128, 128, 128)).convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG" if mode == "CMYK" else "PNG")
    image = images.decode_image(buffer.getvalue(), 16)
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8
    assert abs(image.mean() - 128) < 8


def test_image_size_and_pictures_that_are_not_kept(folder, monkeypatch):
    small = open_source(f"folder:{folder}", "train", image_size=16)
    monkeypatch.setattr("moejax.data.folder.MAX_BYTES_IN_MEMORY", 0)
    fresh = open_source(f"folder:{folder}", "train", image_size=16)
    assert small[0]["image"].shape == (16, 16, 3)
    for kept, decoded in zip(small, fresh, strict=True):
        assert np.array_equal(kept["image"], decoded["image"])
    assert small.version == fresh.version


def test_version(folder):
    sources = open_all(folder)
    assert open_source(f"folder:{folder}", "val").version == sources["val"].version
    versions = {source.version for source in sources.values()}
    versions.add(open_source(f"folder:{folder}", "train", image_size=16).version)
    Image.new("RGB", (8, 8)).save(folder / "00.png")
    versions.add(open_source(f"folder:{folder}", "train").version)
    rows = rows_of(folder)
    rows[3]["text"] += "!"
    write_captions(folder, rows)
    versions.add(open_source(f"folder:{folder}", "train").version)
    assert len(versions) == 6


def test_missing_folder(tmp_path):
    assert "nowhere does not exist; give the folder" in mistake(tmp_path / "nowhere")


def test_a_file_for_a_folder(tmp_path):
    (tmp_path / "x.png").touch()
    assert "x.png is a file, not a folder" in mistake(tmp_path / "x.png")


def test_empty_folder(tmp_path):
    message = mistake(tmp_path)
    assert "captions.jsonl does not exist (the folder is empty); write rows such as {" in message


def test_missing_captions(folder):
    (folder / "captions.jsonl").unlink()
    assert "captions.jsonl does not exist; write rows such as {" in mistake(folder)


def test_empty_captions(folder):
    (folder / "captions.jsonl").write_text("\n \n")
    assert "captions.jsonl has no rows; write rows such as {" in mistake(folder)


def test_not_utf8(folder):
    content = (folder / "captions.jsonl").read_bytes().splitlines()
    content[4] = '{"image": "04.png", "text": "Größe"}'.encode("latin-1")
    (folder / "captions.jsonl").write_bytes(b"\n".join(content))
    assert "captions.jsonl line 5: byte 32 is not UTF-8; save the file as UTF-8" in mistake(folder)


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"image": "00.png", ', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["00.png", "a"]', "not a JSON object; write one such as {"),
        ({"text": "a"}, 'the key "image" is missing; write {"image"'),
        ({"image": "00.png"}, 'the key "text" is missing; write {"image"'),
        ({"image": "00.png", "text": None}, 'the key "text" is missing'),
        ({"image": "00.png", "text": 3}, '"text" is 3; it must be a string'),
        ({"image": "00.png", "text": ""}, '"text" is empty; fill it in'),
        ('{"image": "00.png", "text": "\\ud83d"}', '"text" has half a surrogate pair'),
        ({"image": "00.png", "text": "a", "label": "cat"}, '"label" is "cat"; it must be an int'),
        ({"image": "00.png", "text": "a", "label": True}, '"label" is true; it must be an int'),
        ({"image": "00.png", "text": "a", "famly": "b"}, "\"famly\"; did you mean 'family'"),
        ({"image": "00.png", "text": "a", "split": "valid"}, "\"valid\"; did you mean 'val'"),
        ({"image": "../x.png", "text": "a"}, 'image "../x.png" is outside the folder; give a path'),
        ({"image": "a/../../x.png", "text": "a"}, "outside the folder; give a path relative"),
        ({"image": "/etc/x.png", "text": "a"}, "outside the folder; give a path relative"),
        ({"image": "none.png", "text": "a"}, "none.png; mend the path or take the row out"),
        ({"image": "sub", "text": "a"}, "Is a directory"),
        ({"image": "a\0b.png", "text": "a"}, "mend the path or take the row out"),
        ({"image": "01.jpg", "text": "a", "id": "00.png"}, 'id "00.png" is that of line 1 too'),
    ],
)
def test_bad_row(folder, row, message):
    (folder / "sub").mkdir()
    write_captions(folder, [*rows_of(folder), row])
    found = mistake(folder)
    assert f"{folder}/captions.jsonl line 13: " in found and message in found


@pytest.mark.parametrize("name", ["02.png", "03.jpg"])
@pytest.mark.parametrize("kind", ["cut off", "overwritten", "empty", "another format"])
def test_bad_picture(folder, name, kind):
    content = (folder / name).read_bytes()
    gif = io.BytesIO()
    Image.new("RGB", (8, 8)).save(gif, "GIF")
    (folder / name).write_bytes(
        {
            "cut off": content[: len(content) * 2 // 3],
            "overwritten": b"not a picture at all",
            "empty": b"",
            "another format": gif.getvalue(),
        }[kind]
    )
    line = int(name[:2]) + 1
    for split in ("train", "val", "test"):  # Whichever split the picture is in.
        message = mistake(folder, split)
        assert f"captions.jsonl line {line}: {folder}/{name} is not a whole PNG or JPEG" in message
        assert message.endswith("replace it or take the row out")


def test_a_picture_spoiled_after_it_was_checked(folder):
    open_all(folder)
    content = (folder / "06.png").read_bytes()
    (folder / "06.png").write_bytes(content[:100])
    for split in ("train", "val", "test"):
        assert "06.png is not a whole PNG or JPEG file" in mistake(folder, split)


def test_too_few_families(folder):
    write_captions(folder, rows_of(folder)[:2])
    message = mistake(folder)
    assert "captions.jsonl: only 2 of the pictures or families" in message
    assert "3 or more are needed" in message and 'give each row a "split"' in message


def test_three_families_are_enough(folder):
    write_captions(folder, rows_of(folder)[:3])
    assert [len(source) for source in open_all(folder).values()] == [1, 1, 1]


def test_one_family_in_two_splits(folder):
    rows = [row | {"split": "train", "family": "a"} for row in rows_of(folder)]
    rows[7]["split"] = "val"
    write_captions(folder, rows)
    message = mistake(folder)
    assert (
        'captions.jsonl line 8: the family "a" is in "val" here but in "train" on line 1' in message
    )
    assert message.endswith("give all its rows one split")


def test_a_split_without_rows(folder):
    write_captions(folder, [row | {"split": "train"} for row in rows_of(folder)])
    assert 'captions.jsonl: no row has the split "val"; give it to some rows' in mistake(
        folder, "val"
    )


def test_progress_appears_only_on_a_terminal_and_only_when_slow(folder, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    open_source(f"folder:{folder}", "train")
    assert terminal.getvalue() == ""
    monkeypatch.setattr(images, "PROGRESS_AFTER", 0.0)
    open_source(f"folder:{folder}", "train")
    assert "checking pictures" in terminal.getvalue()
