"""Where records come from: a source is opened by a spec ``KIND:REST``, such as builtin:emoji32.

A package of the user's own adds a kind with one decorated function::

    @SOURCES.register("mine")
    def open_mine(rest, split, *, image_size, languages, caption) -> RecordSource: ...
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from moejax.config.registry import Registry
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


SOURCES: Registry[Callable[..., RecordSource]] = Registry("data source")


def open_source(
    spec: str,
    split: str,
    *,
    image_size: int = 32,
    languages: tuple[str, ...] = ("en",),
    caption: str = "name",
) -> RecordSource:
    """Opens ``spec`` and checks all of it, so that no later step meets a bad record.

    Args:
      spec: ``KIND:REST``, e.g. ``builtin:emoji32`` or ``folder:photos``.
      split: ``train``, ``val`` or ``test``.
      image_size: height and width of the images.
      languages: of the built-in set's texts; other kinds may have only one text per image.
      caption: ``name``, or ``keywords`` for the name and up to five keywords (built-in set only).

    Raises:
      UserError: no such kind, split or option, or data that cannot be used.
    """
    kind, colon, rest = spec.partition(":")
    if not (kind and colon and rest):
        raise UserError(f"data.source: {spec!r} is not KIND:NAME, such as 'builtin:emoji32'")
    if split not in SPLITS:
        raise UserError(f"no split {split!r}{did_you_mean(split, SPLITS)}")
    if image_size < 1:
        raise UserError(f"data.image_size: {image_size} is not a size; it must be 1 or more")
    opener = SOURCES.get(kind, field="data.source")
    return opener(rest, split, image_size=image_size, languages=tuple(languages), caption=caption)


@SOURCES.register("builtin")
def open_builtin(
    rest: str, split: str, *, image_size: int, languages: tuple[str, ...], caption: str
) -> RecordSource:
    """The data sets that come with moejax; so far ``emoji32``."""
    from moejax.data.emoji import EmojiSource

    if rest != "emoji32":
        raise UserError(f"data.source: no built-in set {rest!r}{did_you_mean(rest, ['emoji32'])}")
    return EmojiSource(split, image_size=image_size, languages=languages, caption=caption)


@SOURCES.register("folder")
def open_folder(
    rest: str, split: str, *, image_size: int, languages: tuple[str, ...], caption: str
) -> RecordSource:
    """A folder of pictures with ``captions.jsonl``; its one text per row is used as it is."""
    from moejax.data.folder import FolderSource

    del languages, caption
    return FolderSource(rest, split, image_size=image_size)
