"""Where records come from: a source is opened by a spec ``KIND:REST``, such as builtin:emoji32.

A package of the user's own adds a kind with one decorated function::

    @SOURCES.register("mine")
    def open_mine(rest: str, split: str, data: DataConfig) -> RecordSource: ...
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from moejax.config.registry import Registry
from moejax.config.schema import DataConfig
from moejax.data.records import SPLITS, Record
from moejax.errors import UserError, did_you_mean


@runtime_checkable
class RecordSource(Protocol):
    """Records of one split by index: the same index is always the same record.

    ``source[len(source)]`` raises IndexError, so that a source can be iterated over.
    """

    name: str  # the spec it was opened by
    split: str
    # 16 hexadecimal digits: hash of everything that decides the records, data bytes and options.
    version: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def text_at(self, index: int) -> str:
        """The record's text, without decoding its image."""
        ...


# kind -> function(rest of the spec, split, config.data) -> RecordSource
SOURCES: Registry[Callable[[str, str, DataConfig], RecordSource]] = Registry("data source")


def open_source(
    spec: str, split: str, data: DataConfig | None = None, **fields: Any
) -> RecordSource:
    """Opens ``spec`` and checks all of it, so that no later step meets a bad record.

    Args:
      spec: ``KIND:REST``, e.g. ``builtin:emoji32`` or ``folder:photos``.
      split: ``train``, ``val`` or ``test``.
      data: the options of the config; each kind reads those that concern it.
      **fields: of ``data``, to replace, e.g. ``languages=("de",)``.

    Raises:
      UserError: no such kind, split or option, or data that cannot be used.
    """
    kind, colon, rest = spec.partition(":")
    if not (kind and colon and rest):
        raise UserError(f"data.source: {spec!r} is not KIND:NAME, such as 'builtin:emoji32'")
    if split not in SPLITS:
        raise UserError(f"no split {split!r}{did_you_mean(split, SPLITS)}")
    options = dataclasses.replace(data or DataConfig(), source=spec, **fields)
    return SOURCES.get(kind, field="data.source")(rest, split, options)


@SOURCES.register("builtin")
def open_builtin(rest: str, split: str, data: DataConfig) -> RecordSource:
    """The data sets that come with moejax: ``emoji32``, and clips made of it, ``emoji_clips``."""
    from moejax.data.clips import ClipSource
    from moejax.data.emoji import EmojiSource

    options: dict[str, Any] = {
        "image_size": data.image_size,
        "languages": data.languages,
        "caption": data.caption,
    }
    if rest == "emoji32":
        return EmojiSource(split, **options)
    if rest == "emoji_clips":
        return ClipSource(split, **options, frames=data.frames, seed=data.seed)
    known = ("emoji32", "emoji_clips")
    raise UserError(f"data.source: no built-in set {rest!r}{did_you_mean(rest, known)}")


@SOURCES.register("folder")
def open_folder(rest: str, split: str, data: DataConfig) -> RecordSource:
    """A folder of pictures with ``captions.jsonl``; its one text per row is used as it is."""
    from moejax.data.folder import FolderSource

    return FolderSource(rest, split, image_size=data.image_size)


@SOURCES.register("tfds")
def open_tfds(rest: str, split: str, data: DataConfig) -> RecordSource:
    """A set of TensorFlow Datasets under ``data.data_dir``, prepared as ArrayRecord."""
    from moejax.data.tfds_source import TfdsSource

    return TfdsSource(rest, split, data)


@SOURCES.register("fashion_mnist")
def open_fashion_mnist(rest: str, split: str, data: DataConfig) -> RecordSource:
    """Fashion-MNIST: ``default`` is Debian's package, else a folder of its four idx.gz files."""
    from moejax.data.fashion_mnist import FashionMnistSource

    return FashionMnistSource(rest, split, image_size=data.image_size)


@SOURCES.register("tuxpaint")
def open_tuxpaint(rest: str, split: str, data: DataConfig) -> RecordSource:
    """Stamps of Tux Paint: ``default`` is Debian's package, else a folder of stamps."""
    from moejax.data.tuxpaint import TuxpaintSource

    return TuxpaintSource(rest, split, image_size=data.image_size)


@SOURCES.register("local")
def open_local(rest: str, split: str, data: DataConfig) -> RecordSource:
    """A set under ``data.data_dir`` that `moejax prepare` made, such as emoji3m."""
    from moejax.data.local import open_local_set

    return open_local_set(rest, split, data)


@SOURCES.register("arrayrecord")
def open_arrayrecord(rest: str, split: str, data: DataConfig) -> RecordSource:
    """The folder of a prepared set, wherever it lies."""
    from pathlib import Path

    from moejax.data.local import PreparedSource

    return PreparedSource(f"arrayrecord:{rest}", Path(rest).expanduser(), split, data)
