"""``moejax prepare folder``: a folder of pictures comes back as a set of TensorFlow Datasets."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from moejax.cli.main import main
from moejax.data import tfds_builder
from moejax.data.folder import FolderSource
from moejax.data.sources import RecordSource, open_source
from moejax.data.tfds_builder import prepare_folder
from moejax.errors import UserError

EMOJI = open_source("builtin:emoji32", "train")
SPLITS = ("train", "val", "test")


def emoji(index):
    return EMOJI[index * 100]["image"]


def open_set(data_dir, split="train"):
    return open_source("tfds:ten", split, data_dir=str(data_dir))


def mistake(data_dir, split="train"):
    with pytest.raises(UserError) as caught:
        open_set(data_dir, split)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    """Ten emoji with captions, labels and a family of two; splits are left to the reader."""
    path = tmp_path / "folder"
    path.mkdir()
    rows = []
    for i in range(10):
        Image.fromarray(emoji(i)).save(path / f"{i}.png")
        text = EMOJI[i * 100]["text"]
        rows.append({"image": f"{i}.png", "text": text, "label": i, "family": f"f{i // 2}"})
    write_captions(path, rows)
    return path


def write_captions(folder, rows):
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")


def rows_of(folder):
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]


def test_folder_round_trip(folder, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # Turned by 90 degrees.
    Image.fromarray(emoji(3)[:20]).save(folder / "3.png", "JPEG", exif=turned)
    Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) << 6).save(folder / "4.png")
    made = prepare_folder(folder, "ten", tmp_path / "sets")
    assert made == tmp_path / "sets" / "ten" / "1.0.0"
    assert [p.name for p in (tmp_path / "sets").iterdir()] == ["ten"]
    sizes = []
    for split in SPLITS:
        source = open_set(tmp_path / "sets", split)
        expected = FolderSource(str(folder), split, image_size=32)
        assert isinstance(source, RecordSource)
        for got, want in zip(source, expected, strict=True):
            assert np.array_equal(got.pop("image"), want.pop("image"))
            assert got == want
        assert [source.text_at(i) for i in range(len(source))] == [r["text"] for r in expected]
        sizes.append(len(source))
    assert sizes == [6, 2, 2]


def test_folder_whose_rows_are_all_train_is_divided_by_family(folder, tmp_path):
    write_captions(folder, [{**row, "split": "train"} for row in rows_of(folder)])
    prepare_folder(folder, "ten", tmp_path / "sets")
    train, val = (open_set(tmp_path / "sets", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (8, 2)
    assert not {r["family"] for r in train} & {r["family"] for r in val}
    assert mistake(tmp_path / "sets", "test").endswith("no split 'test'; it has: train")


def test_folder_without_labels_and_with_two_captions_of_a_picture(folder, tmp_path):
    rows = [{"image": row["image"], "text": row["text"]} for row in rows_of(folder)]
    write_captions(folder, [*rows, {"image": "0.png", "text": "Größe"}])
    prepare_folder(folder, "ten", tmp_path)
    records = [r for split in SPLITS for r in open_set(tmp_path, split)]
    assert {r["id"]: r["text"] for r in records if r["family"] == "0.png"} == {
        "0.png": rows[0]["text"],
        "0.png#2": "Größe",
    }
    assert not any("label" in r for r in records)


def test_prepare_again_does_nothing_and_never_overwrites(folder, tmp_path):
    made = prepare_folder(folder, "ten", tmp_path)
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    version = open_set(tmp_path).version
    assert prepare_folder(folder, "ten", tmp_path) == made
    Image.fromarray(emoji(11)).save(folder / "0.png")
    with pytest.raises(UserError, match="1.0.0 exists and holds other data; choose another --name"):
        prepare_folder(folder, "ten", tmp_path)
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before
    prepare_folder(folder, "ten", tmp_path / "other")
    assert open_set(tmp_path / "other").version != version


def test_a_build_that_breaks_off_leaves_nothing_that_opens(folder, tmp_path, monkeypatch):
    def stop(rows, split):
        yield rows[0]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tfds_builder, "_bar", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_folder(folder, "ten", tmp_path)
    assert "no finished version" in mistake(tmp_path)
    prepare_folder(folder, "ten", tmp_path)
    assert len(open_set(tmp_path)) == 6


def test_mistakes_of_prepare(folder, tmp_path):
    def message(*args):
        with pytest.raises(UserError) as caught:
            prepare_folder(*args)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "--name My-Set: write small letters" in message(folder, "My-Set", tmp_path)
    assert "nowhere does not exist" in message(tmp_path / "nowhere", "ten", tmp_path)
    (tmp_path / "file").touch()
    assert f"--data-dir {tmp_path}/file" in message(folder, "ten", tmp_path / "file")
    rows = rows_of(folder)
    del rows[3]["label"]
    write_captions(folder, rows)
    assert 'captions.jsonl line 4: no "label", but other' in message(folder, "ten", tmp_path)
    (folder / "0.png").write_bytes(b"x")
    write_captions(folder, rows[4:] + rows[:3])
    assert "0.png is not a whole PNG or JPEG" in message(folder, "ten", tmp_path)
    assert not (tmp_path / "ten").exists()


def test_the_command(folder, tmp_path, capsys):
    argv = [
        "prepare",
        "folder",
        str(folder),
        "--name",
        "ten",
        "--data-dir",
        str(tmp_path),
        "--json",
    ]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out) == {
        "source": "tfds:ten",
        "path": str(tmp_path / "ten" / "1.0.0"),
        "records": {"train": 6, "val": 2, "test": 2},
    }
    assert main(argv[:-1]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("ten/1.0.0: 6 train, 2 val, 2 test")
    assert f"--config.data.source=tfds:ten --config.data.data_dir={tmp_path}" in lines[1]
    assert main(["prepare", "folder", str(folder)]) == 2
    assert "prepare folder: the following arguments are required: --name" in capsys.readouterr().err


def test_tensorflow_is_never_loaded(folder, tmp_path):
    code = (
        "import sys\n"
        "from moejax.data.sources import open_source\n"
        "from moejax.data.tfds_builder import prepare_folder\n"
        "prepare_folder(sys.argv[1], 'ten', sys.argv[2])\n"
        "assert len(list(open_source('tfds:ten', 'train', data_dir=sys.argv[2]))) == 6\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    argv = [sys.executable, "-c", code, str(folder), str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
