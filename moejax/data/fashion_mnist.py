"""``fashion_mnist:default`` or ``fashion_mnist:DIR``: 70,000 grey pictures of clothes, 10 classes.

Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747), MIT licence. ``default`` is the folder
of Debian's package dataset-fashion-mnist; DIR holds the same four idx.gz files. The split test is
the published one of 10,000; val is the twelfth of the published train (5,000 of 60,000) that comes
first in the order of a hash of the id. One picture is one family.
"""

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from moejax.data.records import Record
from moejax.errors import UserError

PACKAGE_FOLDER = Path("/usr/share/datasets/fashion-mnist")
INSTALL = "apt-get install dataset-fashion-mnist"
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SIZE = 28
# The size with a black edge of 2 pixels, which patches of 4 and 8 divide.
PADDED = 32
SALT = "moejax fashion_mnist split 1:"
VAL_PART = 12
UNSIGNED_BYTES = 0x08


class FashionMnistSource:
    """One split; ids like ``train/17`` and ``t10k/17``, the place in the published file.

    The label is an index into ``categories``, and the text is its name. Pictures of 28 pixels are
    as published; those of 32 have a black edge; other sizes are resized from 32.
    """

    categories = CLASSES

    def __init__(self, rest: str, split: str, *, image_size: int):
        self.name = f"fashion_mnist:{rest}"
        self.split = split
        self.image_size = image_size
        folder = PACKAGE_FOLDER if rest == "default" else Path(rest).expanduser()
        self._part = "t10k" if split == "test" else "train"
        self._pictures, self._labels = _read_part(folder, self._part)
        self._rows = np.arange(len(self._labels))
        if split != "test":
            self._rows = self._rows[_is_val(len(self._rows)) == (split == "val")]
        digest = hashlib.sha256(self._pictures.tobytes() + self._labels.tobytes()).hexdigest()
        options = [SALT, split, image_size, digest]
        self.version = hashlib.sha256(str(options).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = int(self._rows[index])
        label = int(self._labels[row])
        record_id = f"{self._part}/{row}"
        return Record(
            id=record_id,
            image=_to_rgb(self._pictures[row], self.image_size),
            text=CLASSES[label],
            label=label,
            family=record_id,
        )

    def text_at(self, index: int) -> str:
        return CLASSES[self._labels[self._rows[index]]]


def _is_val(count: int) -> np.ndarray:
    """Which of ``count`` pictures of the published train are val, [count] bool."""
    hashes = [hashlib.sha256(f"{SALT}train/{row}".encode()).digest() for row in range(count)]
    ranked = sorted(range(count), key=hashes.__getitem__)
    val = np.zeros(count, bool)
    val[ranked[: count // VAL_PART]] = True
    return val


def _to_rgb(
    picture: UInt8[np.ndarray, "height width"], size: int
) -> UInt8[np.ndarray, "size size 3"]:
    if size != SIZE:
        picture = np.pad(picture, (PADDED - SIZE) // 2)
    if size not in (SIZE, PADDED):
        from PIL import Image

        image = Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC)
        picture = np.asarray(image)
    return np.repeat(picture[..., None], 3, axis=-1)


def _read_part(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """The pictures [n, 28, 28] and labels [n] of ``train`` or ``t10k``."""
    pictures_file = folder / f"{part}-images-idx3-ubyte.gz"
    labels_file = folder / f"{part}-labels-idx1-ubyte.gz"
    for file in (pictures_file, labels_file):
        if not file.is_file():
            mend = (
                f"install it: {INSTALL}"
                if folder == PACKAGE_FOLDER
                else f"give the folder of the four idx.gz files, or install them ({INSTALL}) and "
                "write fashion_mnist:default"
            )
            raise UserError(f"data.source: {file} does not exist; {mend}")
    pictures, labels = _read_idx(pictures_file, 3), _read_idx(labels_file, 1)
    if pictures.shape[1:] != (SIZE, SIZE):
        height, width = pictures.shape[1:]
        raise UserError(
            f"{pictures_file}: the pictures are {height}x{width}, not {SIZE}x{SIZE}; "
            "give the files of Fashion-MNIST"
        )
    if len(pictures) != len(labels):
        raise UserError(
            f"{labels_file}: {len(labels)} labels for {len(pictures)} pictures; "
            "give two files of one set"
        )
    if labels.size and labels.max() >= len(CLASSES):
        raise UserError(
            f"{labels_file}: the label {labels.max()} is not below {len(CLASSES)}; "
            "give the files of Fashion-MNIST"
        )
    return pictures, labels


def _read_idx(file: Path, rank: int) -> np.ndarray:
    """Unsigned bytes of an idx file: 0, 0, type, rank, sizes as big-endian int32, the values."""
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: not a whole gzip file ({error}); replace it") from error
    start = 4 + 4 * rank
    shape = tuple(np.frombuffer(content[4:start], ">i4").tolist()) if len(content) >= start else ()
    if content[:4] != bytes([0, 0, UNSIGNED_BYTES, rank]) or len(content) != start + np.prod(shape):
        raise UserError(f"{file}: not a whole idx file of {rank} axes of bytes; replace it")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
