"""``fashion_mnist:``: idx files come back as records; the published set where it is installed."""

import gzip

import numpy as np
import pytest

from moejax.data import fashion_mnist
from moejax.data.fashion_mnist import CLASSES, PACKAGE_FOLDER
from moejax.data.sources import RecordSource, open_source
from moejax.errors import UserError

SPLITS = ("train", "val", "test")


def write_idx(file, array, *, kind=8):
    header = bytes([0, 0, kind, array.ndim]) + np.asarray(array.shape, ">i4").tobytes()
    file.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def folder(tmp_path):
    """36 pictures of train and 10 of t10k, with the pixels counting up from the number's own."""
    for part, count in (("train", 36), ("t10k", 10)):
        pictures = np.arange(28 * 28).reshape(28, 28) + np.arange(count)[:, None, None]
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", pictures % 251)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return tmp_path


def open_all(folder, **options):
    return {split: open_source(f"fashion_mnist:{folder}", split, **options) for split in SPLITS}


def mistake(folder, split="train"):
    with pytest.raises(UserError) as caught:
        open_source(f"fashion_mnist:{folder}", split)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_round_trip(folder):
    sources = open_all(folder)
    assert [len(source) for source in sources.values()] == [33, 3, 10]
    for split, source in sources.items():
        assert isinstance(source, RecordSource)
        for index, record in enumerate(source):
            part, number = record["id"].split("/")
            assert part == ("t10k" if split == "test" else "train")
            assert record["family"] == record["id"]
            assert record["label"] == int(number) % 10
            assert record["text"] == CLASSES[record["label"]] == source.text_at(index)
            image = record["image"]
            assert image.shape == (32, 32, 3) and image.dtype == np.uint8
            pixels = (np.arange(28 * 28).reshape(28, 28) + int(number)) % 251
            assert (image[2:30, 2:30] == pixels[..., None]).all()
            edge = image.copy()
            edge[2:30, 2:30] = 0
            assert not edge.any()


def test_val_is_fixed_and_apart_from_train(folder):
    ids = {split: {record["id"] for record in source} for split, source in open_all(folder).items()}
    assert ids["train"] | ids["val"] == {f"train/{i}" for i in range(36)}
    assert not ids["train"] & ids["val"]
    # Another choice would put what was held out into training.
    assert ids["val"] == {"train/3", "train/32", "train/33"}


def test_sizes(folder):
    plain, padded, large = (
        open_source(f"fashion_mnist:{folder}", "test", image_size=size)[3]["image"]
        for size in (28, 32, 64)
    )
    assert plain.shape == (28, 28, 3) and np.array_equal(plain, padded[2:30, 2:30])
    assert large.shape == (64, 64, 3) and not large[:3].any()
    assert abs(large.mean() - padded.mean()) < 2


def test_version(folder):
    versions = {source.version for source in open_all(folder).values()}
    versions |= {source.version for source in open_all(folder, image_size=28).values()}
    before = open_all(folder)["val"].version
    assert before in versions
    write_idx(folder / "train-labels-idx1-ubyte.gz", np.arange(36) % 9)
    versions.add(open_all(folder)["val"].version)
    assert len(versions) == 7


def test_missing_package_and_missing_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "PACKAGE_FOLDER", tmp_path / "none")
    with pytest.raises(UserError) as caught:
        open_source("fashion_mnist:default", "train")
    assert str(caught.value).endswith("install it: apt-get install dataset-fashion-mnist")
    assert "train-images-idx3-ubyte.gz does not exist; give the folder of the four" in mistake(
        tmp_path
    )


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("train-images-idx3-ubyte.gz", b"not gzip", "not a whole gzip file"),
        (
            "train-labels-idx1-ubyte.gz",
            gzip.compress(b"x" * 99, mtime=0)[:-9],
            "not a whole gzip file",
        ),
        (
            "train-labels-idx1-ubyte.gz",
            gzip.compress(b"", mtime=0),
            "not a whole idx file of 1 axes",
        ),
        (
            "train-images-idx3-ubyte.gz",
            gzip.compress(b"\0\0\x08\3" * 9, mtime=0),
            "not a whole idx file of 3",
        ),
    ],
)
def test_damaged_file(folder, name, content, message):
    (folder / name).write_bytes(content)
    found = mistake(folder)
    assert f"{folder / name}: {message}" in found and found.endswith("; replace it")


def test_files_of_another_set(folder):
    labels = folder / "train-labels-idx1-ubyte.gz"
    write_idx(labels, np.arange(36), kind=9)
    assert "not a whole idx file of 1 axes of bytes; replace it" in mistake(folder)
    write_idx(labels, np.arange(36))
    assert "the label 35 is not below 10; give the files of Fashion-MNIST" in mistake(folder)
    write_idx(labels, np.zeros(35))
    assert "35 labels for 36 pictures; give two files of one set" in mistake(folder)
    write_idx(folder / "train-images-idx3-ubyte.gz", np.zeros((36, 32, 32)))
    assert "the pictures are 32x32, not 28x28; give the files" in mistake(folder)
    assert len(open_source(f"fashion_mnist:{folder}", "test")) == 10


@pytest.mark.skipif(
    not PACKAGE_FOLDER.is_dir(), reason="apt-get install dataset-fashion-mnist is not done"
)
def test_the_published_set():
    sources = open_all("default")
    assert [len(source) for source in sources.values()] == [55_000, 5_000, 10_000]
    counts = {
        split: np.bincount([CLASSES.index(source.text_at(i)) for i in range(len(source))])
        for split, source in sources.items()
    }
    assert (counts["train"] + counts["val"] == 6_000).all() and (counts["test"] == 1_000).all()
    first = sources["test"][0]
    assert (first["id"], first["text"]) == ("t10k/0", "Ankle boot")
