"""Single tokens of a batch as people see them: pieces of text, pictures and where they lie."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax.analysis.routing import NONE
from moejax.config.checks import require
from moejax.config.schema import (
    Config,
    DiTConfig,
    PairConfig,
    PatchesConfig,
    TaskViTConfig,
    TwoTowersConfig,
)
from moejax.data.vocabulary import BOA, BOI, BOS, EOA, EOI, EOS, PAD
from moejax.train.evaluate import EvalContext

# Pictures of a batch that are shown: two clips of four frames, say.
PICTURES = 8
_MARKS = {BOS: "BOS", EOS: "EOS", BOI: "BOI", EOI: "EOI", BOA: "BOA", EOA: "EOA"}


def check_one_size(config: Config, evaluator: str) -> None:
    """UserError unless a row of a batch of pictures is one picture."""
    require(
        not config.data.image_sizes,
        "eval.metrics",
        f"{evaluator!r} needs pictures of one size, and data.image_sizes has several; leave it out",
    )


def modalities_of(model: Any) -> tuple[str, ...]:
    """Names of the modalities of :func:`token_rows`; each of two towers has one."""
    return (*model.modalities, *(("text",) if isinstance(model, TwoTowersConfig) else ()))


def token_rows(model: Any, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch with its tokens: those that models of patches make of pictures have no others.

    A token's id is its place in the row (class token, registers, patches row by row), as in
    moejax/models/vit.py; each has the label of its picture. All are of the first modality, but
    those of pictures of which nothing is said where these are a second one (models/dit.py), those
    of pictures that are asked for another task (models/task_vit.py), and the words behind a
    picture (models/limoe.py, models/two_towers.py), whose ids are above all places and have no
    label.
    """
    if not isinstance(model, PatchesConfig):
        return dict(batch)
    ids = np.arange(model.first_patch + model.num_patches, dtype=np.int32)
    tokens = np.broadcast_to(ids, (len(batch["images"]), len(ids)))
    ones = np.ones_like(tokens)
    rows = {
        "tokens": tokens,
        "modality": _of_pictures(model, batch)[:, None] * ones,
        "segments": ones,
        "token_labels": np.asarray(batch["labels"])[:, None] * ones,
    }
    if isinstance(model, PairConfig):
        words = np.asarray(batch["tokens"], np.int32)
        of_words = {
            "tokens": len(ids) + words,
            "modality": np.full_like(words, modalities_of(model).index("text")),
            "segments": (words != PAD).astype(np.int32),
            "token_labels": np.full_like(words, -1),
        }
        rows = {name: np.concatenate([rows[name], of_words[name]], axis=1) for name in rows}
    weights = np.asarray(batch["weights"])[:, None] * np.ones_like(rows["tokens"])
    return {**batch, **rows, "weights": weights}


def in_whole_rows(model: Any, recorded: dict[str, dict]) -> dict[str, dict]:
    """What routers record of choices, for the rows of :func:`token_rows`.

    A tower is given a part of the tokens of a row; the others get NONE for their choices
    [l, b, t, k], of weight 0.
    """
    if not isinstance(model, TwoTowersConfig):
        return recorded
    around = {"image": (0, model.text_length), "text": (model.num_tokens, 0)}
    return {
        name: {**own, **_padded(own, around[name.partition("/")[0]])}
        for name, own in recorded.items()
    }


def _padded(own: Mapping[str, Any], tokens: tuple[int, int]) -> dict[str, np.ndarray]:
    fill = {"expert_ids": NONE, "chosen_ids": NONE, "weights": 0}
    widths = ((0, 0), (0, 0), tokens, (0, 0))
    return {name: np.pad(own[name], widths, constant_values=value) for name, value in fill.items()}


def _of_pictures(model: Any, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """[b] int: the number of the modality that the pictures' tokens are of."""
    rows = len(batch["images"])
    if isinstance(model, TaskViTConfig):
        return np.asarray(batch["task"], np.int32)
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
