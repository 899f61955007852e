"""Single tokens of a batch as people see them: pieces of text, pictures and where they lie."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax.config.contrastive import LIMoEConfig
from moejax.config.schema import Config, DiTConfig, PatchesConfig
from moejax.data.vocabulary import BOA, BOI, BOS, EOA, EOI, EOS, PAD
from moejax.train.evaluate import EvalContext

# Pictures of a batch that are shown: two clips of four frames, say.
PICTURES = 8
_MARKS = {BOS: "BOS", EOS: "EOS", BOI: "BOI", EOI: "EOI", BOA: "BOA", EOA: "EOA"}


def token_rows(model: Any, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch with its tokens: those that models of patches make of pictures have no others.

    A token's id is its place in the row (class token, registers, patches row by row), as in
    moejax/models/vit.py; each has the label of its picture. All are of the first modality, but
    those of pictures of which nothing is said where these are a second one (models/dit.py), and the
    words behind a picture (models/limoe.py), whose ids are above all places and have no label.
    """
    if not isinstance(model, PatchesConfig):
        return dict(batch)
    ids = np.arange(model.first_patch + model.num_patches, dtype=np.int32)
    tokens = np.broadcast_to(ids, (len(batch["images"]), len(ids)))
    ones = np.ones_like(tokens)
    rows = {
        "tokens": tokens,
        "modality": _said_nothing(model, batch)[:, None] * ones,
        "segments": ones,
        "token_labels": np.asarray(batch["labels"])[:, None] * ones,
    }
    if isinstance(model, LIMoEConfig):
        words = np.asarray(batch["tokens"], np.int32)
        of_words = {
            "tokens": len(ids) + words,
            "modality": np.full_like(words, model.modalities.index("text")),
            "segments": (words != PAD).astype(np.int32),
            "token_labels": np.full_like(words, -1),
        }
        rows = {name: np.concatenate([rows[name], of_words[name]], axis=1) for name in rows}
    weights = np.asarray(batch["weights"])[:, None] * np.ones_like(rows["tokens"])
    return {**batch, **rows, "weights": weights}


def _said_nothing(model: Any, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """[b] int: 1 for pictures of the second modality, if there is one."""
    rows = len(batch["images"])
    if not isinstance(model, DiTConfig) or len(model.modalities) == 1:
        return np.zeros(rows, np.int32)
    nothing = np.ones(rows, bool)
    if model.num_classes:
        nothing &= np.asarray(batch["labels"]) < 0
    if model.text_length:
        nothing &= (np.asarray(batch["tokens"]) == PAD).all(axis=1)
    return nothing.astype(np.int32)


def valid_tokens(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """[b, t] bool: no padding, and of a row that counts."""
    return (batch["segments"] > 0) & (batch["weights"] > 0).any(axis=1, keepdims=True)


def pieces_of(context: EvalContext, tokens: np.ndarray) -> np.ndarray:
    """The text of each token; the names of marks; "" for the tokens of pictures and speech."""
    if isinstance(context.config.model, PatchesConfig):
        return np.full(tokens.shape, "")
    vocabulary = context.pipeline.vocabulary
    tokenizer = context.kept("text tokenizer", functools.partial(_text_tokenizer, context.config))

    def piece(token: int) -> str:
        ids = vocabulary.to_text_ids([token])
        return tokenizer.decode(ids.tolist()) if len(ids) else _MARKS.get(token, "")

    known = {int(token): piece(int(token)) for token in np.unique(tokens)}
    return np.asarray([[known[int(token)] for token in row] for row in tokens])


def _text_tokenizer(config: Config) -> Any:
    from moejax.data.text_tokenizer import load_text_tokenizer

    return load_text_tokenizer(config.data.text_tokenizer)


def pictures_of(context: EvalContext, batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """The first pictures of some rows as their tokens hold them, where they are, and their grid."""
    from moejax.models.picture_codec import load_picture_codec

    model = context.config.model
    if isinstance(model, PatchesConfig):
        pictures = batch["images"][:PICTURES]
        places = [(row, model.first_patch) for row in range(len(pictures))]
        return pictures, np.asarray(places, np.int32), np.asarray(model.grid, np.int32)
    vocabulary, tokens = context.pipeline.vocabulary, batch["tokens"]
    length = vocabulary.codes_per_image
    places = []
    if "image" in model.modalities:
        for row, is_image in enumerate(vocabulary.is_image(tokens)):
            starts = np.flatnonzero(np.diff(is_image, prepend=False) & is_image)
            places += [(row, int(start)) for start in starts]
    places = places[:PICTURES]
    codec: Any = None
    if places:
        codec = context.kept("codec", functools.partial(load_picture_codec, context.config))
    if codec is None:
        return np.zeros((0, 1, 1, 3), np.uint8), np.zeros((0, 2), np.int32), np.ones(2, np.int32)
    held = batch["latents"] if "latents" in batch else tokens - vocabulary.image_offset
    pictures = codec.decode(np.stack([held[row, start : start + length] for row, start in places]))
    return pictures, np.asarray(places, np.int32), np.asarray(codec.grid, np.int32)
