"""``tuxpaint:``: stamps become records, families stay together; the package where it is."""

import io

import numpy as np
import pytest
from PIL import Image

from moejax.data import tuxpaint
from moejax.data.sources import RecordSource, open_source
from moejax.data.tuxpaint import PACKAGE_FOLDER, families_of, split_families
from moejax.errors import UserError

SPLITS = ("train", "val", "test")
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9pt" height="9pt"><rect {}/></svg>'


def write_stamp(folder, stamp, text, *, rgba=(200, 0, 0, 255), size=(6, 4), svg=False, dat=""):
    path = folder / f"{stamp}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\nde.utf8=Etwas.\n", encoding="utf-8")
    if svg:
        fill = 'width="12" height="12" fill="#0000ff"'
        path.with_suffix(".svg").write_text(SVG.format(fill))
    else:
        file = io.BytesIO()
        Image.new("RGBA", size, rgba).save(file, "PNG")
        path.with_suffix(".png").write_bytes(file.getvalue())
    if dat:
        path.with_suffix(".dat").write_text(dat)


@pytest.fixture
def folder(tmp_path):
    """Eight animals, of which two and two are one thing, three foods, a series of letters."""
    for i, name in enumerate(("ant", "bee", "cow", "dog", "eel", "fox")):
        write_stamp(tmp_path, f"animals/{name}", f"A {name}.", rgba=(20 * i, 0, 0, 255))
    write_stamp(tmp_path, "animals/cartoon/ant2", "Hello, ant!")
    write_stamp(tmp_path, "animals/mammals/calf", "A COW.")
    for name in ("nut", "pie", "pea"):
        write_stamp(tmp_path, f"food/{name}", f"A {name}.", dat="nomirror\n")
    for name in "abc":
        write_stamp(tmp_path, f"symbols/alphabets/{name}", f"The letter {name}.", svg=True)
    # No stamps: a mirrored picture, and words without any.
    write_stamp(tmp_path, "animals/dog_mirror", "")
    (tmp_path / "animals/dog_mirror.txt").unlink()
    (tmp_path / "food/gift.txt").write_text("A gift.")
    return tmp_path


def open_all(folder, **options):
    return {split: open_source(f"tuxpaint:{folder}", split, **options) for split in SPLITS}


def mistake(spec):
    with pytest.raises(UserError) as caught:
        open_source(spec, "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_records(folder):
    sources = open_all(folder, image_size=12)
    records = {r["id"]: r for source in sources.values() for r in source}
    assert len(records) == 14 == sum(map(len, sources.values()))
    for split, source in sources.items():
        assert isinstance(source, RecordSource) and source.split == split
        assert source.categories == ("animals", "food", "symbols")
        for i, record in enumerate(source):
            assert source.text_at(i) == record["text"]
            assert source.categories[record["label"]] == record["id"].split("/")[0]
            image = record["image"]
            assert image.dtype == np.uint8 and image.shape == (12, 12, 3)
    bee = records["animals/bee"]
    assert bee["text"] == "A bee."
    # 6x4 pixels in the middle of a white square.
    np.testing.assert_array_equal(bee["image"][6, 6], [20, 0, 0])
    np.testing.assert_array_equal(bee["image"][0, 6], [255, 255, 255])
    np.testing.assert_array_equal(records["symbols/alphabets/a"]["image"][5, 5], [0, 0, 255])
    one_way = {name for name, record in records.items() if not record["mirror"]}
    assert one_way == {"animals/dog", "food/nut", "food/pea", "food/pie"}


def test_transparency_is_white(tmp_path):
    for name in "abc":
        write_stamp(tmp_path, f"food/{name}", name, rgba=(0, 0, 0, 128), size=(8, 8))
    image = open_source(f"tuxpaint:{tmp_path}", "train", image_size=8)[0]["image"]
    assert set(np.unique(image)) <= {126, 127, 128}


def test_families(folder):
    families = {r["id"]: r["family"] for s in open_all(folder).values() for r in s}
    together = {}
    for stamp, family in families.items():
        together.setdefault(family, set()).add(stamp)
    assert {"animals/ant", "animals/cartoon/ant2"} in together.values()
    assert {"animals/cow", "animals/mammals/calf"} in together.values()
    assert {f"symbols/alphabets/{name}" for name in "abc"} in together.values()
    assert len(together) == 6 + 3 + 1
    # What joins two families joins all of both.
    captions = {"a/x": "One.", "a/y": "Two.", "a/x2": "Two.", "a/z": "One."}
    assert len(set(families_of(captions).values())) == 1


def test_splits(folder):
    found = {split: {r["family"] for r in source} for split, source in open_all(folder).items()}
    assert not found["train"] & found["val"] and not found["test"] & (found["train"] | found["val"])
    for category in ("animals", "food"):
        for split in ("val", "test"):
            assert sum(name.startswith(category) for name in found[split]) == 1
    assert "symbols/alphabets" in found["train"]
    # A fixed choice: another would put what was held out into training.
    many = {f"a/{i}": f"a/{i}" for i in range(30)}
    splits = split_families(many)
    assert {name for name, split in splits.items() if split == "val"} == VAL_OF_30
    assert sum(split == "test" for split in splits.values()) == 3


VAL_OF_30 = {"a/0", "a/11", "a/14"}


def test_version(folder):
    before = {s.version for s in open_all(folder).values()} | {
        s.version for s in open_all(folder, image_size=16).values()
    }
    assert len(before) == 6
    write_stamp(folder, "animals/bee", "Another bee.")
    assert not before & {s.version for s in open_all(folder).values()}


def test_mistakes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tuxpaint, "PACKAGE_FOLDER", tmp_path / "none")
    message = mistake("tuxpaint:default")
    assert message.endswith("install it: apt-get install tuxpaint-stamps-default")
    (tmp_path / "empty").mkdir()
    assert "has no stamps (NAME.txt with NAME.png); give the" in mistake(
        f"tuxpaint:{tmp_path}/empty"
    )
    (folder / "symbols/alphabets/a.svg").write_text("<svg")
    assert "a.svg cannot be drawn (" in mistake(f"tuxpaint:{folder}")
    (folder / "symbols/alphabets/a.txt").write_text("\n")
    assert "a.txt: its first line, the description, is empty" in mistake(f"tuxpaint:{folder}")
    (folder / "symbols/alphabets/a.txt").write_bytes(b"\xff")
    assert "a.txt: byte 1 is not UTF-8" in mistake(f"tuxpaint:{folder}")


@pytest.mark.skipif(
    not PACKAGE_FOLDER.is_dir(), reason="apt-get install tuxpaint-stamps-default is not done"
)
def test_the_package():
    sources = open_all("default")
    assert sum(map(len, sources.values())) == 950
    assert len(sources["train"].categories) == 16
