"""One vocabulary for all modalities: special tokens, then text, then image codes."""

import dataclasses

import numpy as np

PAD, BOS, EOS, BOI, EOI = range(5)
# Ids below this are special; the rest of them is kept for the marks of later modalities.
NUM_SPECIAL = 16


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Where each modality's ids lie. All special tokens, also BOI and EOI, are text tokens."""

    text_size: int
    image_codes: int
    codes_per_image: int

    @property
    def text_offset(self) -> int:
        return NUM_SPECIAL

    @property
    def image_offset(self) -> int:
        return NUM_SPECIAL + self.text_size

    @property
    def size(self) -> int:
        return self.image_offset + self.image_codes

    def text_ids(self, ids) -> np.ndarray:
        """Tokenizer ids -> vocabulary ids."""
        return np.asarray(ids, np.int32) + self.text_offset

    def image_ids(self, codes) -> np.ndarray:
        """Image codes -> vocabulary ids."""
        return np.asarray(codes, np.int32) + self.image_offset

    def to_text_ids(self, tokens) -> np.ndarray:
        """The text tokens among ``tokens``, as tokenizer ids; others are left out."""
        tokens = np.asarray(tokens)
        is_text = (tokens >= self.text_offset) & (tokens < self.image_offset)
        return tokens[is_text] - self.text_offset

    def to_image_codes(self, tokens) -> np.ndarray:
        """The image tokens among ``tokens``, as codes; others are left out."""
        tokens = np.asarray(tokens)
        is_image = (tokens >= self.image_offset) & (tokens < self.size)
        return tokens[is_image] - self.image_offset

    def kind(self, token: int) -> str:
        """Whether it is a special, text or image token: one of these words."""
        if token < self.text_offset:
            return "special"
        return "text" if token < self.image_offset else "image"
