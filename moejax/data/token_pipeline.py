"""Packed sequences of text, pictures and speech."""

import functools

import numpy as np

from moejax.config.schema import Config
from moejax.data.image_codes import ImageCodec, image_codes
from moejax.data.packing import PackingPlan
from moejax.data.pipeline import Batch, RowPipeline, recipe_hash
from moejax.data.sources import RecordSource
from moejax.data.text_tokenizer import load_text_tokenizer
from moejax.data.vocabulary import (
    BOA,
    BOI,
    BOS,
    EOA,
    EOI,
    EOS,
    KINDS,
    NUM_SPECIAL,
    NUM_SPEECH_UNITS,
    PAD,
    PATCH,
    Vocabulary,
)
from moejax.errors import UserError


def make_vocabulary(config: Config, text_size: int, codec: ImageCodec | None) -> Vocabulary:
    """The vocabulary of a model; UserError if ``model.vocab_size`` does not hold it."""
    modalities = config.model.modalities
    codes, per_image = (codec.num_codes, codec.codes_per_image) if codec is not None else (0, 0)
    speech = NUM_SPEECH_UNITS if "speech" in modalities else 0
    vocabulary = Vocabulary(text_size, codes, per_image, speech)
    if config.model.vocab_size < vocabulary.size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size}: the tokenizers of "
            f"{', '.join(modalities)} need {vocabulary.size}"
        )
    return vocabulary


class TokenPipeline(RowPipeline):
    """Records as ``BOS part part ... EOS``; several share a row as segments 1, 2, ...

    The parts are those that the record has and the model knows: the text, ``BOI codes EOI`` (of a
    clip one after another for each frame) and ``BOA units EOA``. Training draws their order,
    whether the text is left out (its place then stays padding), and the variant of the picture, by
    (seed, epoch, record).

    With a tokenizer of latent vectors a picture's tokens are PATCH, its vectors lie in ``latents``
    [b, t, z] f32, and ``image_id`` [b, t] i32 numbers the pictures of a row, each frame one of its
    own, from 1 (0: no picture).
    """

    def __init__(self, config: Config, source: RecordSource, codec: ImageCodec | None):
        data, modalities = config.data, config.model.modalities
        unknown = [name for name in modalities if name not in KINDS]
        if unknown or "text" not in modalities:
            raise UserError(
                f"model.modalities: {modalities} must be 'text' and others of {', '.join(KINDS)}"
            )
        # Index of each kind of token among the model's modalities.
        self.modality_of_kind = np.asarray(
            [modalities.index(kind) if kind in modalities else -1 for kind in KINDS], np.int32
        )
        self.tokenizer = load_text_tokenizer(data.text_tokenizer)
        self.latent_size = config.model.latents.size
        self.training = source.split == "train"
        self.variants = data.variants if self.training else 1
        if "image" in modalities:
            assert codec is not None, "pictures need the image tokenizer"
            self.codes = image_codes(source, codec, self.variants, data.seed)
        else:
            codec, self.codes = None, lambda record, variant: None
        self.vocabulary = make_vocabulary(config, self.tokenizer.size, codec)
        self.speech = _speech_units(source) if "speech" in modalities else [None] * len(source)
        self._check_modalities(source, modalities)
        absent = lambda record: [False, self.codes(record, 0) is None, self.speech[record] is None]
        self.absent = np.asarray([absent(record) for record in range(len(source))])
        others = [self._other_tokens(record) for record in range(len(source))]
        room = data.sequence_length - max(others)
        if room < 1:
            raise UserError(
                f"data.sequence_length={data.sequence_length}: what is not text in a record takes "
                f"up to {max(others)}; give at least {max(others) + 1}"
            )
        texts = self.tokenizer.encode_batch([source.text_at(i) for i in range(len(source))])
        self.truncated = sum(len(ids) > room for ids in texts)
        self.captions = [ids[:room] for ids in texts]
        lengths = [len(ids) + other for ids, other in zip(self.captions, others, strict=True)]
        self.plan = PackingPlan(lengths, data.sequence_length, data.seed, shuffle=self.training)
        self._draws = functools.lru_cache(maxsize=2)(self._make_draws)
        super().__init__(config, source, len(self.plan))
        self.version = recipe_hash(
            source=source.version,
            modalities=modalities,
            text=self.tokenizer.version,
            image=codec.version if codec is not None else "",
            length=data.sequence_length,
            order=data.order,
            text_first_share=data.text_first_share,
            drop_text=data.drop_text,
            variants=self.variants,
            seed=data.seed,
        )

    def _check_modalities(self, source: RecordSource, modalities: tuple[str, ...]) -> None:
        # A record may lack its utterance (emoji3m: a name that cannot be read out).
        spoken = any(units is not None for units in self.speech)
        has = {"image": self.codes(0, 0) is not None, "speech": spoken}
        for name in modalities[1:]:
            if not has.get(name, True):
                raise UserError(
                    f"model.modalities: {source.name} has no {name} (record "
                    f"{source[0]['id']}); leave {name!r} out, or use another data.source"
                )

    def _other_tokens(self, record: int) -> int:
        """Tokens of a record that are not its text, all marks included."""
        codes, units = self.codes(record, 0), self.speech[record]
        count = len((BOS, EOS))
        if units is not None:
            count += len(units) + len((BOA, EOA))
        if codes is not None:
            frames, tokens = codes.shape[:2]
            count += frames * (tokens + len((BOI, EOI)))
            if self.latent_size:
                # As if each were in a segment of its own: so many moejax.ops.max_pictures allows.
                count += (frames - 1) * len((BOS, EOS))
        return count

    def _make_draws(self, epoch: int) -> tuple[np.ndarray, ...]:
        """For each record: the order of its parts, is its text left out, which variant."""
        data, count = self.config.data, len(self.captions)
        rng = np.random.default_rng([data.seed, epoch, 1])
        # Parts in the order of their keys; text is part 0.
        keys = rng.random((count, len(KINDS)))
        text_first = rng.random(count) < data.text_first_share
        if data.order != "random":
            keys[:] = np.arange(len(KINDS))
            text_first[:] = data.order == "text_first"
        keys[self.absent] = 9
        second = keys[:, 1:].min(axis=1) + 1e-9
        keys[:, 0] = np.where(text_first, -1, np.maximum(keys[:, 0], second))
        drop = rng.random(count) < (data.drop_text if self.training else 0)
        variants = rng.integers(self.variants, size=count)
        return np.argsort(keys, axis=1, kind="stable"), drop, variants

    def parts(self, record: int, drop_text: bool, variant: int) -> list[np.ndarray]:
        """The tokens of each of KINDS, empty for what the record has not."""
        vocabulary, codes = self.vocabulary, self.codes(record, variant)
        text = vocabulary.text_ids([] if drop_text else self.captions[record])
        picture = speech = np.zeros(0, np.int32)
        if codes is not None:
            patches = np.full(codes.shape[:2], PATCH)
            ids = patches if self.latent_size else vocabulary.image_ids(codes)
            picture = np.concatenate([part for frame in ids for part in ([BOI], frame, [EOI])])
        if self.speech[record] is not None:
            speech = np.concatenate([[BOA], vocabulary.speech_ids(self.speech[record]), [EOA]])
        return [text, picture, speech]

    def row_records(self, index: int) -> list[int]:
        return [int(record) for record in self.plan.items(index)[1]]

    def row(self, index: int) -> Batch:
        epoch, records = self.plan.items(index)
        orders, drop, variants = self._draws(epoch)
        row = self._empty_row()
        start = images = 0
        for segment, record in enumerate(map(int, records), 1):
            variant = int(variants[record])
            parts = self.parts(record, bool(drop[record]), variant)
            inner = [parts[kind] for kind in orders[record]]
            tokens = np.concatenate([[BOS], *inner, [EOS]]).astype(np.int32)
            end = start + len(tokens)
            row["tokens"][start:end] = tokens
            row["modality"][start:end] = self.modality_of_kind[self.vocabulary.kind_ids(tokens)]
            row["segments"][start:end] = segment
            row["positions"][start:end] = np.arange(len(tokens))
            row["targets"][start : end - 1] = tokens[1:]
            row["weights"][start : end - 1] = 1
            frames = self.codes(record, variant) if self.latent_size else None
            if frames is not None:
                here = start + np.flatnonzero(tokens == PATCH)
                numbers = images + 1 + np.arange(len(frames))
                row["image_id"][here] = np.repeat(numbers, frames.shape[1])
                row["latents"][here] = frames.reshape(len(here), -1)
                images += len(frames)
            start = end
        return row

    def _empty_row(self) -> Batch:
        length = self.config.data.sequence_length
        row: Batch = {
            name: np.zeros(length, np.int32)
            for name in ("tokens", "modality", "segments", "positions", "targets")
        }
        row["tokens"][:] = PAD
        row["modality"][:] = self.modality_of_kind[0]
        row["weights"] = np.zeros(length, np.float32)
        if self.latent_size:
            row["image_id"] = np.zeros(length, np.int32)
            row["latents"] = np.zeros((length, self.latent_size), np.float32)
        return row

    def token_counts(self) -> np.ndarray:
        """How often each id is a target in one epoch, [v] i64: the unigram baseline's counts."""
        counts = np.zeros(self.vocabulary.size, np.int64)
        for record in range(len(self.captions)):
            for part in self.parts(record, False, 0):
                np.add.at(counts, part, 1)
        counts[EOS] = len(self.captions)
        assert counts[NUM_SPECIAL:].sum() > 0
        return counts


def _speech_units(source: RecordSource) -> list[np.ndarray | None]:
    units = [source[index].get("audio_codes") for index in range(len(source))]
    highest = max((int(codes.max()) for codes in units if codes is not None), default=0)
    if highest >= NUM_SPEECH_UNITS:
        raise UserError(
            f"data.source={source.name}: speech unit {highest} is not below {NUM_SPEECH_UNITS}"
        )
    return units
