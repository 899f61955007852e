"""One vocabulary for all modalities: special tokens, then text, then image codes, then speech."""

import dataclasses

import numpy as np

# BOI and EOI enclose a picture, BOA and EOA an utterance; PATCH stands where a picture's latent
# vector is read instead of a code.
PAD, BOS, EOS, BOI, EOI, PATCH, BOA, EOA = range(8)
# Ids below this are special; the rest of them is kept for the marks of later modalities.
NUM_SPECIAL = 16
# Units that prepared sets spell speech in (moejax.data.prepare).
NUM_SPEECH_UNITS = 256

# What a token can be: the names that model.modalities gives its towers.
KINDS = ("text", "image", "speech")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Where each modality's ids lie. All special tokens but PATCH are text tokens, BOI too.

    ``codes_per_image`` counts the tokens of a picture; ``image_codes`` is 0 where they are PATCH.
    """

    text_size: int
    image_codes: int
    codes_per_image: int
    speech_units: int = 0

    @property
    def text_offset(self) -> int:
        return NUM_SPECIAL

    @property
    def image_offset(self) -> int:
        return NUM_SPECIAL + self.text_size

    @property
    def speech_offset(self) -> int:
        return self.image_offset + self.image_codes

    @property
    def size(self) -> int:
        return self.speech_offset + self.speech_units

    def text_ids(self, ids) -> np.ndarray:
        """Tokenizer ids -> vocabulary ids."""
        return np.asarray(ids, np.int32) + self.text_offset

    def image_ids(self, codes) -> np.ndarray:
        """Image codes -> vocabulary ids."""
        return np.asarray(codes, np.int32) + self.image_offset

    def speech_ids(self, units) -> np.ndarray:
        """Speech units -> vocabulary ids."""
        return np.asarray(units, np.int32) + self.speech_offset

    def to_text_ids(self, tokens) -> np.ndarray:
        """The text tokens among ``tokens``, as tokenizer ids; others are left out."""
        tokens = np.asarray(tokens)
        is_text = (tokens >= self.text_offset) & (tokens < self.image_offset)
        return tokens[is_text] - self.text_offset

    def to_image_codes(self, tokens) -> np.ndarray:
        """The image tokens among ``tokens``, as codes; others are left out."""
        tokens = np.asarray(tokens)
        return tokens[self.is_code(tokens)] - self.image_offset

    def is_code(self, tokens):
        """Which tokens are image codes; works on numpy and jax arrays."""
        return (tokens >= self.image_offset) & (tokens < self.speech_offset)

    def is_image(self, tokens):
        """Which tokens are of a picture, codes or patches; works on numpy and jax arrays."""
        return self.is_code(tokens) | (tokens == PATCH)

    def kind_ids(self, tokens):
        """The index in KINDS of each token; works on numpy and jax arrays."""
        return self.is_image(tokens) + 2 * (tokens >= self.speech_offset)

    def kind(self, token: int) -> str:
        """The token's name in KINDS, or "special"."""
        if token < self.text_offset and token != PATCH:
            return "special"
        return KINDS[int(self.kind_ids(token))]
