"""Text to ids and back. The ids start at 0; special tokens belong to the model's vocabulary.

``builtin:bpe4096`` is a byte-level BPE of 12 languages, made by tools/train_text_tokenizer.py from
the train split of ``builtin:emoji32``; ``bytes`` needs no training and knows every script.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

from moejax.errors import UserError, did_you_mean

BUILTIN = Path(__file__).parent / "builtin"


class TextTokenizer(ABC):
    """Ids of a text in ``[0, size)``. ``version`` is a hash of what decides them (16 digits)."""

    size: int
    version: str

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without special tokens; a lone surrogate is read as ``?``."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of each text."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``, whatever they are: a model may sample half a character.

        Bytes that are not UTF-8 become U+FFFD; ids outside ``[0, size)`` are left out.
        """
        return self._decode([int(i) for i in ids if 0 <= i < self.size])

    @abstractmethod
    def _decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer(TextTokenizer):
    """One id per byte of UTF-8."""

    size = 256
    version = hashlib.sha256(b"bytes").hexdigest()[:16]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        return [list(text.encode("utf-8", "replace")) for text in texts]

    def _decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


class FileTokenizer(TextTokenizer):
    """A JSON file of the ``tokenizers`` library."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        content = path.read_bytes()
        self._tokenizer = Tokenizer.from_buffer(content)
        # A file may ask for these; packing decides about lengths here.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Ids need not be without gaps.
        self.size = max(self._tokenizer.get_vocab().values()) + 1
        self.version = hashlib.sha256(content).hexdigest()[:16]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        clean = [text.encode("utf-8", "replace").decode() for text in texts]
        encodings = self._tokenizer.encode_batch_fast(clean, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def load_text_tokenizer(spec: str) -> TextTokenizer:
    """Opens ``builtin:bpe4096``, ``bytes``, or the path of a ``tokenizers`` JSON file.

    Raises:
      UserError: there is no such file, or it is not one of the library's.
    """
    if spec == "bytes":
        return ByteTokenizer()
    kind, _, rest = spec.partition(":")
    if kind == "builtin":
        names = [path.stem for path in BUILTIN.glob("bpe*.json")]
        if rest not in names:
            raise UserError(
                f"data.text_tokenizer: no built-in tokenizer {rest!r}{did_you_mean(rest, names)}"
            )
        return FileTokenizer(BUILTIN / f"{rest}.json")
    path = Path(spec).expanduser()
    if not path.is_file():
        raise UserError(
            f"data.text_tokenizer: there is no file {spec}; "
            "give a tokenizer.json, 'builtin:bpe4096' or 'bytes'"
        )
    try:
        return FileTokenizer(path)
    except Exception as error:  # The library raises plain Exception for a bad file.
        raise UserError(
            f"data.text_tokenizer: {spec} is not a JSON file of the tokenizers library ({error}); "
            "save one with Tokenizer.save"
        ) from error
