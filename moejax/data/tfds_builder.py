"""``moejax prepare folder``: a folder of pictures becomes a set of TensorFlow Datasets.

The folder is that of ``folder:DIR`` (moejax/data/folder.py). The set is ArrayRecord, written and
read without TensorFlow, and is opened by ``tfds:NAME``: the same records in the same splits and
order, one large file instead of many small ones.
"""

import contextlib
import hashlib
import io
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from moejax.data.folder import CAPTIONS_FILE, Row, read_pictures, read_rows
from moejax.data.images import PROGRESS_AFTER
from moejax.data.records import SPLITS
from moejax.errors import UserError

NAME = re.compile(r"[a-z][a-z0-9_]*")
# Pictures are checked by decoding them to this size, the least that a decoder lets us ask for.
CHECK_SIZE = 32


class FolderBuilder(tfds.core.GeneratorBasedBuilder):
    """Writes the rows of a folder; ``name`` is the set's, not the class's."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, folder: Path, rows: list[Row], digest: str, *, name: str, data_dir: Path):
        self.name = name  # pyright: ignore[reportAttributeAccessIssue] -- a set has no class
        self._folder, self._rows, self._digest = folder, rows, digest
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(),
            "text": tfds.features.Text(),
            "id": tfds.features.Text(),
            "family": tfds.features.Text(),
        }
        if self._rows[0].label is not None:
            features["label"] = tfds.features.Scalar(np.int64)
        return tfds.core.DatasetInfo(
            builder=self,
            description=describe(self._digest),
            features=tfds.features.FeaturesDict(features),
            # Keeps the order of the folder; training shuffles anyway.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager) -> dict:
        del dl_manager  # Nothing is downloaded.
        present = {row.split for row in self._rows}
        return {split: self._generate_examples(split) for split in SPLITS if split in present}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        rows = [(key, row) for key, row in enumerate(self._rows) if row.split == split]
        for key, row in _bar(rows, split):
            # The file as it is: TFDS would need TensorFlow to encode pixels.
            example = {"image": io.BytesIO((self._folder / row.image).read_bytes())}
            example |= {"text": row.text, "id": row.id, "family": row.family}
            if row.label is not None:
                example["label"] = row.label
            yield key, example


def describe(digest: str) -> str:
    """The description of a set, by which the version of a source follows the set's content."""
    return f"Pictures and texts of a folder, by `moejax prepare folder`. SHA-256: {digest}"


def prepare_folder(folder: str | Path, name: str, data_dir: str | Path) -> Path:
    """Writes the set ``data_dir/name/1.0.0`` from a folder of pictures with captions.jsonl.

    Does nothing if the set is already there with the same content.

    Args:
      folder: as for ``folder:DIR``; all of its rows and pictures are checked first.
      name: of the set, as in ``tfds:NAME``.
      data_dir: as ``data.data_dir``; made if it does not exist.

    Returns:
      The folder of the set.

    Raises:
      UserError: a mistake in the folder or the name, or another set of this name.
    """
    folder, data_dir = Path(folder).expanduser(), Path(data_dir).expanduser()
    if not NAME.fullmatch(name):
        raise UserError(
            f"--name {name}: write small letters, digits and _, a letter first, such as my_pictures"
        )
    rows, content = read_rows(folder)
    _check_labels(rows, folder)
    _, pictures = read_pictures(folder, rows, CHECK_SIZE, keep=())
    digest = hashlib.sha256(f"{hashlib.sha256(content).hexdigest()} {pictures}".encode())
    target = data_dir / name / str(FolderBuilder.VERSION)
    if target.exists():
        _check_same(target, digest.hexdigest())
        return target
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        builder = FolderBuilder(folder, rows, digest.hexdigest(), name=name, data_dir=data_dir)
        # It writes to a temporary name and renames in the end. What it says about a download goes
        # nowhere, and its bars know no total.
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as empty:
            builder.download_and_prepare(
                download_dir=empty,
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
    except OSError as error:
        raise UserError(f"--data-dir {data_dir}: {error}; give a folder to write to") from error
    return target


def _check_labels(rows: list[Row], folder: Path) -> None:
    without = [row for row in rows if row.label is None]
    if 0 < len(without) < len(rows):
        raise UserError(
            f'{folder / CAPTIONS_FILE} line {without[0].line}: no "label", but other rows have '
            "one; give it to all rows or to none"
        )


def _check_same(target: Path, digest: str) -> None:
    try:
        known = tfds.builder_from_directory(target).info.description
    except Exception:  # Of many kinds, for a folder that is not a set.
        known = ""
    if known != describe(digest):
        raise UserError(
            f"{target} exists and holds other data; choose another --name, or delete "
            f"{target.parent}"
        )


def _bar(rows: list, split: str):
    if not sys.stderr.isatty():
        return rows
    from tqdm import tqdm

    return tqdm(rows, f"writing {split}", delay=PROGRESS_AFTER, leave=False)
